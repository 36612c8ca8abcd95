"""The fused kernels against dense float64 references and the torch path: interpreted on the CPU, compiled on a GPU."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import losses.similarity
from losses import contrastive_terms, normalize
from losses.similarity import BlockLosses
from losses.tiles import Block, Plan
from tests.distributed import run_distributed

# Not importorskip: the interpreter must be asked for before triton is imported, and workers import this module first.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

Call = Callable[..., Any]

# (rows, columns, width, label offset): smaller and larger than a kernel's block, never a multiple of it.
SHAPES = {"tiny": (3, 3, 1, 0), "offset": (37, 111, 20, 69), "blocks": (70, 130, 33, 60), "column": (1, 65, 16, 64)}
OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {},
    "uneven tiles": {"tile_rows": 33},
    "pairs": {"clip_pairs": [(1, 0)]},
    "neighbours": {"neighbours": True},
    "symmetric neighbours": {"neighbours": True, "neighbour_symmetric": True},
    "masked": {"neighbours": True, "neighbour_mask_duplicates": True},
    "symmetric masked": {
        "neighbours": True,
        "neighbour_symmetric": True,
        "neighbour_mask_duplicates": True,
        "tile_rows": 40,
    },
}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    """Calls a function of this module in a process where triton is interpreted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(torch.set_num_threads, 1).result()
        yield lambda function, *args: pool.submit(function, *args).result()


def unit_rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def draw_slots(masked: bool, num_rows: int, num_columns: int, offset: int) -> tuple[Tensor | None, Tensor | None]:
    if not masked:
        return None, None
    slots = torch.randint(0, 4, (num_columns,), generator=torch.Generator().manual_seed(7))
    return slots[offset : offset + num_rows], slots


def dense(
    rows: Tensor, columns: Tensor, scale: float, offset: int, slots: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Float64 logits, -inf where masked, and the one-hot labels."""
    logits = scale * (rows.double() @ columns.double().t())
    labels = torch.zeros_like(logits)
    labels[torch.arange(len(rows)), offset + torch.arange(len(rows))] = 1
    if slots[0] is not None:
        logits[(slots[0][:, None] == slots[1]) & (labels == 0)] = float("-inf")
    return logits, labels


def check_sums(shape: tuple[int, int, int, int], scale: float, masked: bool, dtype: torch.dtype) -> None:
    from losses.triton_similarity import tile_sums

    num_rows, num_columns, width, offset = shape
    rows, columns = unit_rows(0, num_rows, width, dtype=dtype), unit_rows(1, num_columns, width, dtype=dtype)
    slots = draw_slots(masked, num_rows, num_columns, offset)
    options = {"row_slots": slots[0], "column_slots": slots[1]}
    actual = tile_sums(rows, columns, torch.tensor([scale]), offset, symmetric=True, **options)
    logits, labels = dense(rows, columns, scale, offset, slots)
    expected = (logits.logsumexp(1), logits[labels == 1], (logits - scale).exp().sum(0))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float64
        # Column sums span many orders of magnitude: only their relative error counts.
        torch.testing.assert_close(one, other, rtol=1e-6 * (1 + scale), atol=0 if one is actual[2] else 1e-6 * scale)
    without = tile_sums(rows, columns, torch.tensor([scale]), offset, symmetric=False, **options)
    assert without[2] is None
    assert torch.equal(without[0], actual[0])


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_sums_of_a_tile(interpreted: Call, shape: tuple[int, int, int, int], scale: float) -> None:
    interpreted(check_sums, shape, scale, False, torch.float32)
    interpreted(check_sums, shape, scale, True, torch.float32)
    interpreted(check_sums, shape, scale, False, torch.bfloat16)


def check_gradient(
    shape: tuple[int, int, int, int],
    scale: float,
    masked: bool,
    dtype: torch.dtype,
    min_programs: int = 256,
    max_width: int = 512,
) -> None:
    from losses import triton_similarity
    from losses.triton_similarity import Side, add_gradient

    num_rows, num_columns, width, offset = shape
    rows, columns = unit_rows(0, num_rows, width, dtype=dtype), unit_rows(1, num_columns, width, dtype=dtype)
    slots = draw_slots(masked, num_rows, num_columns, offset)
    logits, labels = dense(rows, columns, scale, offset, slots)
    # Statistics of a wider matrix than this tile, as they are in training.
    row_lse, column_lse = logits.logsumexp(1) + 0.3, torch.cat([logits, logits.new_zeros(1, num_columns)]).logsumexp(0)
    by_row, by_column = (row_lse.float(), slots[0]), (column_lse.float(), slots[1])
    row_part, column_part = (logits - row_lse[:, None]).exp() - labels, (logits - column_lse).exp() - labels
    tolerance = 2e-6 * (1 + scale)
    with mock.patch.multiple(triton_similarity, _MIN_PROGRAMS=min_programs, _MAX_WIDTH_BLOCK=max_width):
        for directions, weights in (("both", row_part + column_part), ("row", row_part), ("column", column_part)):
            one = Side(rows, by_row[0] if directions != "column" else None, by_row[1])
            two = Side(columns, by_column[0] if directions != "row" else None, by_column[1])
            for own, others, matrix, sign in ((one, two, weights, 1), (two, one, weights.t(), -1)):
                out = torch.full(own.features.shape, 2.0)
                add_gradient(out, own, others, torch.tensor([scale]), torch.tensor(0.7), sign * offset)
                expected = 2 + 0.7 * matrix @ others.features.double()
                torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_a_tile(interpreted: Call, shape: tuple[int, int, int, int], scale: float) -> None:
    interpreted(check_gradient, shape, scale, False, torch.float32)
    interpreted(check_gradient, shape, scale, True, torch.float32)
    interpreted(check_gradient, shape, scale, False, torch.bfloat16)


@pytest.mark.parametrize("layout", [(1, 512), (7, 512), (256, 16)], ids=["no splits", "uneven splits", "chunked width"])
def test_gradients_do_not_depend_on_the_layout(interpreted: Call, layout: tuple[int, int]) -> None:
    interpreted(check_gradient, SHAPES["blocks"], 20.0, True, torch.float32, *layout)


def make_inputs(scale: float, device: str = "cpu") -> list[Tensor]:
    images, texts = unit_rows(2, 2, 70, 40), unit_rows(3, 2, 70, 40)
    texts = normalize(texts + 0.5 * images[:1])
    return [value.to(device).requires_grad_() for value in (images, texts, torch.tensor([scale]))]


def evaluate(kernel: str, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Terms and their gradients under one random weighting, by the named implementation."""
    options = dict(options)
    device = inputs[0].device
    if options.pop("neighbours", False):
        slots = torch.randint(0, 30, inputs[1].shape[:2], generator=torch.Generator().manual_seed(5))
        options["queue_rows"] = unit_rows(4, 30, 40).to(device, inputs[0].dtype)
        options["neighbour_slots"] = slots.to(device)
    with mock.patch.dict(os.environ, DECLIP_SIMILARITY=kernel):
        terms = contrastive_terms(*inputs, **options)
        values = torch.stack([terms.clip] if terms.nns is None else [terms.clip, terms.nns])
        weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(6)).to(values)
        return [values.detach(), *torch.autograd.grad((values * weights).sum(), inputs)]


def compare_with_torch(scale: float, options: dict[str, Any], device: str = "cpu") -> None:
    inputs = make_inputs(scale, device)
    exact = evaluate("torch", [value.detach().double().requires_grad_() for value in inputs], options)
    for one, other in zip(evaluate("triton", inputs, options), exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=5e-8 * (1 + scale))


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_terms_equal_those_of_torch(interpreted: Call, scale: float) -> None:
    interpreted(compare_with_torch, scale, OPTIONS["clip"])


@pytest.mark.parametrize("options", list(OPTIONS.values())[1:], ids=list(OPTIONS)[1:])
def test_options_equal_those_of_torch(interpreted: Call, options: dict[str, Any]) -> None:
    interpreted(compare_with_torch, 20.0, options)


def block_losses(kernel: str, images: Tensor, texts: Tensor) -> list[Tensor]:
    inputs = [images.clone(), texts.clone(), torch.tensor([20.0], device=images.device)]
    inputs = [value.requires_grad_() for value in inputs]
    plan = Plan((Block(0, 0),), num_text_views=1, first_column=0, tile_rows=64, slab_budget_bytes=0)
    with mock.patch.dict(os.environ, DECLIP_SIMILARITY=kernel):
        values, _ = BlockLosses.apply(*inputs, plan, texts.new_empty(0, dtype=torch.float64), None, texts[0])
        return [values.detach(), *torch.autograd.grad(values.sum(), inputs)]


def compare_half_precision() -> None:
    images, texts = unit_rows(2, 1, 70, 40, dtype=torch.bfloat16), unit_rows(3, 1, 70, 40, dtype=torch.bfloat16)
    actual, expected = (block_losses(kernel, images, texts) for kernel in ("triton", "torch"))
    assert [value.dtype for value in actual] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert (one.double() - other.double()).norm() < 0.01 * other.double().norm()


def test_half_precision_features_are_summed_in_single(interpreted: Call) -> None:
    interpreted(compare_half_precision)


def rank_gradients(rank: int, world_size: int, kernel: str) -> list[Tensor]:
    """This rank's terms and its gradients as rows of the whole batch, whose mean over ranks is the true one."""
    images, texts, scale = make_inputs(20.0)
    inputs = [value.detach().requires_grad_() for value in (images[:1], texts[:1], scale)]
    rows = inputs[0].shape[1] // world_size
    own = slice(rank * rows, (rank + 1) * rows)
    slots = torch.randint(0, 9, inputs[1].shape[:2], generator=torch.Generator().manual_seed(5))[:, own]
    with mock.patch.dict(os.environ, DECLIP_SIMILARITY=kernel):
        terms = contrastive_terms(
            inputs[0][:, own],
            inputs[1][:, own],
            inputs[2],
            queue_rows=unit_rows(4, 30, 40),
            neighbour_slots=slots,
            neighbour_mask_duplicates=True,
        )
        total = terms.clip.sum() + terms.nns.sum()
        return [total.detach(), *torch.autograd.grad(total, inputs)]


def test_two_ranks_equal_one_rank_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ranks = run_distributed(rank_gradients, 2, "triton", fresh=True)
    for *shares, expected in zip(*ranks, rank_gradients(0, 1, "torch"), strict=True):
        torch.testing.assert_close(sum(shares) / 2, expected, rtol=1e-5, atol=1e-6)


def test_without_triton_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "losses.triton_similarity", raising=False)
    monkeypatch.delattr(losses, "triton_similarity", raising=False)
    monkeypatch.setenv("DECLIP_SIMILARITY", "auto")
    find = losses.similarity._triton_kernels.__wrapped__
    monkeypatch.setattr(losses.similarity, "_triton_kernels", find)
    assert find() is None
    rows = unit_rows(0, 1, 5, 4).requires_grad_()
    contrastive_terms(rows, rows, torch.ones(1)).clip.sum().backward()
    on_gpu = mock.Mock(is_cuda=True)
    assert losses.similarity._fused_kernels(on_gpu) is None
    monkeypatch.setenv("DECLIP_SIMILARITY", "triton")
    with pytest.raises(ValueError, match="pip install triton"):
        losses.similarity._fused_kernels(rows)


def test_choice_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, on_gpu = mock.Mock(is_cuda=False), mock.Mock(is_cuda=True)
    kernels = mock.Mock()
    monkeypatch.setattr(losses.similarity, "_triton_kernels", lambda: kernels)
    choose = losses.similarity._fused_kernels
    for choice, reason, cpu, gpu in (
        ("auto", None, None, kernels),
        ("auto", "too old", None, None),
        ("torch", None, None, None),
        ("triton", None, kernels, kernels),
    ):
        monkeypatch.setenv("DECLIP_SIMILARITY", choice)
        kernels.unsupported.return_value = reason
        assert choose(on_cpu) is cpu
        assert choose(on_gpu) is gpu
    kernels.unsupported.return_value = "too old"
    with pytest.raises(ValueError, match="cannot be followed: too old"):
        choose(on_gpu)
    monkeypatch.setenv("DECLIP_SIMILARITY", "Triton")
    with pytest.raises(ValueError, match="'Triton', expected auto, torch or triton"):
        choose(on_cpu)
    # Unmeasured kernels are nobody's default.
    kernels.unsupported.return_value = None
    monkeypatch.delenv("DECLIP_SIMILARITY")
    assert choose(on_gpu) is None


def reasons_against(interpreter: bool) -> list[str | None]:
    from losses.triton_similarity import triton, unsupported

    with mock.patch.object(triton.knobs.runtime, "interpret", interpreter):
        return [unsupported(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]


def test_reasons_against_the_kernels(interpreted: Call) -> None:
    single, half, double = interpreted(reasons_against, True)
    assert single is None
    assert half is None
    assert "float64" in double
    assert "expected an NVIDIA GPU or TRITON_INTERPRET=1" in interpreted(reasons_against, False)[0]


def signature_type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}[value.dtype]
    return "i32" if type(value) is int else "constexpr"


def shared_memory(kernel: Any, launch: Any, capability: int) -> int:
    """Compiles what a recorded launch would have run; bytes of shared memory a program of it needs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    arguments = dict(zip(names, launch.args, strict=False))
    constants = {name: value for name, value in launch.kwargs.items() if name in names}
    options = {name: value for name, value in launch.kwargs.items() if name not in names}
    signature = {name: signature_type(value) for name, value in arguments.items()} | dict.fromkeys(
        constants, "constexpr"
    )
    constants |= {name: value for name, value in arguments.items() if value is None}
    compiled = compile(
        ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options=options
    )
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled")
@pytest.mark.skipif(sys.platform != "linux", reason="needs the assembler that triton ships on Linux")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compile_and_fit_on_chip(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from losses import triton_similarity
    from losses.triton_similarity import Side, _gradient_kernel, _sums_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    features, scale, slots = torch.zeros(64, 512, dtype=dtype), torch.ones(1), torch.zeros(64, dtype=torch.int64)
    side = Side(features, torch.zeros(64), slots)
    with mock.patch.multiple(triton_similarity, _sums_kernel=mock.DEFAULT, _gradient_kernel=mock.DEFAULT) as launched:
        triton_similarity.tile_sums(features, features, scale, 0, symmetric=True, row_slots=slots, column_slots=slots)
        triton_similarity.add_gradient(torch.zeros(64, 512), side, side, scale, scale, 0)
    for name, kernel in (("_sums_kernel", _sums_kernel), ("_gradient_kernel", _gradient_kernel)):
        launch = launched[name].__getitem__.return_value.call_args
        # What the smallest GPUs of compute capability 8.0 and later offer.
        assert shared_memory(kernel, launch, capability=80) <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_on_a_gpu_terms_equal_those_of_torch_and_repeat_bitwise(options: dict[str, Any]) -> None:
    compare_with_torch(20.0, options, "cuda")
    compare_with_torch(100.0, options, "cuda")
    inputs = make_inputs(20.0, "cuda")
    assert losses.similarity._fused_kernels(inputs[0]) is not None
    first, second = evaluate("auto", inputs, options), evaluate("auto", inputs, options)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_large_tiles_equal_torch(dtype: torch.dtype) -> None:
    images, texts = (unit_rows(seed, 1, 1000, 700, dtype=dtype).cuda() for seed in (2, 3))
    actual, expected = (block_losses(kernel, images, texts) for kernel in ("triton", "torch"))
    for one, other in zip(actual, expected, strict=True):
        assert (one.double() - other.double()).norm() < (
            1e-5 if dtype == torch.float32 else 0.01
        ) * other.double().norm()
