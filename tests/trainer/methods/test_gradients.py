"""Every parameter's gradient under the engine: W ranks, any ZeRO stage, any number of micro-batches."""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch

from tests.distributed import run_distributed

SAMPLES = 32
WIDTH = 14
SETTINGS = {
    "name": "declip",
    "nns_queue_size": 96,
    "iss_hidden_dim": 32,
    "iss_predictor_dim": 16,
    "nns_warmup": "random",
}
TOLERANCE = 5e-6
MISTAKES = ("gather without gradient", "labels off by one rank", "temperature gradient times accumulation")


def run_config(stage: int, micro_batch_size: int, **sections: dict):
    from trainer.config.ds_config import plan_batch, resolve_deepspeed
    from trainer.loading import parse_config

    tree = {
        "model": {"name": "vit_femto_p8_32", "patch_dropout": 0.5},
        "method": SETTINGS,
        "data": {"train": "none", "mask_token": True},
        "train": {"steps": 1, "global_batch_size": SAMPLES, "micro_batch_size": micro_batch_size},
        "optimizer": {"lr": 1e-9},
        **sections,
    }
    config = parse_config(tree)
    plan = plan_batch(config, torch.distributed.get_world_size())
    from tests.trainer.harness import ds_config

    return config, resolve_deepspeed(ds_config(stage), config, plan, "fp32")


def micro_batch(first: int, last: int, views: int = 2, texts: int = 2) -> dict:
    """Samples [first, last) of one fixed global batch."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (views, SAMPLES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    token_ids = torch.randint(1, 49000, (texts, SAMPLES, WIDTH), generator=generator)
    lengths = torch.randint(4, WIDTH + 1, (texts, SAMPLES), generator=generator)
    keys = torch.randint(0, 2**62, (views, SAMPLES), generator=generator)
    # Unequal numbers of masked tokens, and samples without any: the mean is over the tokens of the global batch.
    masked = torch.arange(SAMPLES).remainder(3)
    rows = [(row - first) * WIDTH + 1 + position for row in range(first, last) for position in range(masked[row])]
    index = torch.tensor(rows, dtype=torch.int64)
    return {
        "images": images[:, first:last],
        "token_ids": token_ids[:, first:last],
        "text_lengths": lengths[:, first:last],
        "view_keys": keys[:, first:last],
        "mlm_index": index,
        "mlm_targets": token_ids[0, first:last].flatten()[index],
    }


def planted(mistake: str | None, rank: int, world_size: int, accumulation: int) -> AbstractContextManager:
    """The losses with one of the classic mistakes in them."""
    import losses.contrastive
    import losses.similarity

    if mistake is None:
        return nullcontext()
    if mistake == "gather without gradient":

        def own_part_only(partial: torch.Tensor) -> torch.Tensor:
            return partial.chunk(world_size, dim=1)[rank]

        return mock.patch.object(losses.similarity, "reduce_scatter_rows", own_part_only)
    if mistake == "labels off by one rank":
        return mock.patch.object(losses.contrastive, "rank", lambda: (rank + 1) % world_size)
    correct = losses.similarity._scale_gradient
    return mock.patch.object(losses.similarity, "_scale_gradient", lambda *args: correct(*args) * accumulation)


def gradients_on_rank(
    rank: int, world_size: int, cases: list[tuple[int, int, str | None]], sections: dict | None = None
) -> list[dict]:
    """Loss and full gradients by parameter name for each (stage, accumulation, mistake); gradients on rank 0 only.

    `sections` replace those of the DeCLIP recipe of this file.
    """
    from deepspeed.utils import safe_get_full_grad

    from trainer.assemble import build_method
    from trainer.engine.engine import Engine, init_distributed
    from trainer.pipeline import build_tokenizer
    from trainer.ranks.launch import Place

    device = torch.device("cpu")
    init_distributed(device, Place(rank, rank, world_size, world_size, "test"))
    share = SAMPLES // world_size
    results = []
    for stage, accumulation, mistake in cases:
        size = share // accumulation
        config, resolved = run_config(stage, size, **(sections or {}))
        torch.manual_seed(0)
        engine = Engine(build_method(config, build_tokenizer(config)), config, resolved, device)
        # Away from the symmetric start, where some gradients vanish.
        starts = range(rank * share, (rank + 1) * share, size)
        views, texts = len(engine.method.image_views), len(engine.method.text_views)
        batches = [micro_batch(start, start + size, views, texts) for start in starts]
        with planted(mistake, rank, world_size, accumulation):
            terms = engine("train", {"micro_batches": batches})
            engine.backward(terms["loss"])
        found = {}
        for name, parameter in engine.method.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
                if rank == 0:
                    found[name] = gradient.double().reshape(engine.parameter_shapes[name]).clone()
        loss = terms["loss"].detach().double().reshape(1)
        torch.distributed.all_reduce(loss)
        results.append({"loss": float(loss) / world_size, "gradients": found})
    # Code generation: nothing here compiles, and DeepSpeed's Muon would load it in a second of every rank.
    assert "torch._inductor.compile_fx" not in sys.modules
    return results


def worst_error(found: dict, expected: dict) -> tuple[float, str]:
    """Largest difference of any element, as a share of the largest element of its tensor (at least the median's)."""
    floor = sorted(float(value.abs().max()) for value in expected.values())[len(expected) // 2]
    errors = {
        name: float((found[name] - value).abs().max()) / max(float(value.abs().max()), floor)
        for name, value in expected.items()
    }
    name = max(errors, key=errors.get)
    return errors[name], name


@pytest.fixture(scope="module")
def reference():
    """One rank, ZeRO 0, whole batch at once."""
    return run_distributed(gradients_on_rank, 1, [(0, 1, None)])[0][0]


def check_mistakes_are_caught(results: list[dict], reference: dict) -> None:
    for mistake, result in zip(MISTAKES if results else (), results, strict=True):
        error, name = worst_error(result["gradients"], reference["gradients"])
        print(mistake, error, name)
        # A hundred times what the check allows: far from rounding.
        assert error > 100 * TOLERANCE, mistake
        assert (name == "model.logit_scale.log_value") == mistake.startswith("temperature")
        # The value of the loss shows wrong labels only; the others spoil nothing but gradients.
        unseen = math.isclose(result["loss"], reference["loss"], rel_tol=1e-6)
        assert unseen == (mistake != "labels off by one rank"), mistake


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_gradient_equals_one_rank(world_size, reference):
    cases = [(stage, accumulation, None) for stage in (0, 1, 2, 3) for accumulation in (1, 8)]
    if world_size == 4:
        # Eight micro-batches of one sample; two stages are enough where every rank costs a core.
        cases = [(1, 1, None), (2, 8, None), (3, 8, None)]
    planted_cases = [(1, 4, mistake) for mistake in MISTAKES] if world_size == 2 else []
    results = run_distributed(gradients_on_rank, world_size, cases + planted_cases, timeout_s=500)[0]
    check_mistakes_are_caught(results[len(cases) :], reference)
    results = results[: len(cases)]
    for case, result in zip(cases, results, strict=True):
        assert math.isclose(result["loss"], reference["loss"], rel_tol=1e-6), case
        assert result["gradients"].keys() == reference["gradients"].keys()
        error, name = worst_error(result["gradients"], reference["gradients"])
        print(world_size, case, error, name)
        assert error < TOLERANCE, (case, name)
        for name in ("model.logit_scale.log_value", "model.image_tower.patch_embed.weight"):
            assert name in result["gradients"]
