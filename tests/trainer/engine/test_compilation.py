"""`train.compile` changes the speed, not the names and not the numbers."""

from unittest import mock

import pytest
import torch
import torch._inductor.config

from models.architectures import ARCHITECTURES, Architecture, TextConfig, VitConfig
from tests.distributed import run_distributed
from tests.trainer.methods.test_gradients import WIDTH
from tests.trainer.test_step import build
from trainer.engine.compilation import compile_towers
from trainer.errors import ConfigError

# One layer a tower: the C++ compiler takes seconds for each piece of code.
ONE_LAYER = Architecture(VitConfig(16, 64, 1), 32, 64, TextConfig(width=64, layers=1))
# Compiled sums associate differently.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def shorter(batch, width):
    """The batch with captions cut: another number of tokens, as every step has."""
    keep = batch["mlm_index"] % WIDTH < width
    rows = batch["mlm_index"] // WIDTH * width + batch["mlm_index"] % WIDTH
    return {
        **batch,
        "token_ids": batch["token_ids"][..., :width],
        "text_lengths": batch["text_lengths"].clamp(max=width),
        "mlm_index": rows[keep],
        "mlm_targets": batch["mlm_targets"][keep],
    }


def train(stage, compiled):
    """Losses of four steps, and the state they end in."""
    from trainer.loop import train_step

    run, batch = build(stage, model="vit_one_layer", compiled=compiled)
    losses = []
    for step, width in enumerate((14, 12, 10, 14), 1):
        terms, _, _ = train_step(run, step, iter([[shorter(batch, width)]]))
        losses.append(terms["loss"].detach())
    return torch.stack(losses), run.engine.deepspeed.module.state_dict()


def compare_compiled(rank, world_size, stage, backend):
    ARCHITECTURES["vit_one_layer"] = ONE_LAYER
    compiles = []
    original = torch.nn.Module.compile

    def counted(module, **options):
        compiles.append(type(module).__name__)
        original(module, **options, **({"backend": backend} if backend else {}))

    with mock.patch.object(torch.nn.Module, "compile", counted):
        losses, state = train(stage, True)
    counters = torch._dynamo.utils.counters
    assert len(compiles) == 2
    assert counters["stats"]["unique_graphs"] >= 2
    expected_losses, expected_state = train(stage, False)
    torch.testing.assert_close(losses, expected_losses, **TOLERANCE)
    # Nor may a checkpoint show that the towers were compiled.
    assert list(state) == list(expected_state)
    assert not any("_orig_mod" in name for name in state)
    # Adam's first steps go by the sign of the gradient: where that is nothing but rounding, weights differ by a step.
    far = [(state[name] - value).abs() > 1e-4 for name, value in expected_state.items() if value.is_floating_point()]
    assert torch.cat([entry.flatten() for entry in far]).float().mean() < 0.01


@pytest.mark.slow
def test_compiled_towers_on_one_rank():
    run_distributed(compare_compiled, 1, 0, None, timeout_s=550)


@pytest.mark.slow
def test_compiled_towers_under_zero_2():
    # The part of the compiler that meets the engine: tracing and autograd, without generating code.
    run_distributed(compare_compiled, 2, 2, "aot_eager", timeout_s=550)


def test_without_a_compiler_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"train\.compile needs a C\+\+ compiler on a CPU: install g\+\+"):
        compile_towers(mock.Mock(), torch.device("cpu"))
