"""A-CLIP on several ranks, at every ZeRO stage, in micro-batches, after skipped steps, and resumed."""

import math
import shutil

import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.harness import ds_config, metrics, run_trainer, steps, write_recipe, write_shards
from tests.trainer.methods.aclip_batches import SAMPLES, SETTINGS, micro_batch
from tests.trainer.methods.test_gradients import worst_error
from trainer.checkpoint import read_weights

# Four times that of a first step: two steps of rounding lie behind these weights, and a bias in front of a batch norm,
# whose gradient is zero, holds nothing else.
TOLERANCE = 2e-5
STEPS = 4
_LINEAR = torch.nn.functional.linear


def build_engine(stage: int, micro_batch_size: int, rank: int, world_size: int, **settings):
    from trainer.assemble import build_method
    from trainer.config.ds_config import plan_batch, resolve_deepspeed
    from trainer.engine.engine import Engine, init_distributed
    from trainer.loading import parse_config
    from trainer.pipeline import build_tokenizer
    from trainer.ranks.launch import Place

    tree = {
        "model": {"name": "vit_femto_p8_32", "freeze_patch_embed": True},
        "method": {"name": "aclip", **SETTINGS, "teacher_momentum": 0.5, **settings},
        "data": {"train": "none"},
        "train": {"steps": STEPS, "global_batch_size": SAMPLES, "micro_batch_size": micro_batch_size},
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.0},
    }
    config = parse_config(tree)
    init_distributed(torch.device("cpu"), Place(rank, rank, world_size, world_size, "test"))
    resolved = resolve_deepspeed(ds_config(stage), config, plan_batch(config, world_size), "fp32")
    torch.manual_seed(0)
    # ZeRO 3 replaces it for the rest of the process, and its sums round differently; a run has one stage only.
    torch.nn.functional.linear = _LINEAR
    method = build_method(config, build_tokenizer(config))
    method.begin_run(config.train, None)
    return Engine(method, config, resolved, torch.device("cpu"))


def forward_and_backward(engine, rank: int, world_size: int, size: int) -> dict[str, torch.Tensor]:
    share = SAMPLES // world_size
    starts = range(rank * share, (rank + 1) * share, size)
    terms = engine("train", {"micro_batches": [micro_batch(start, start + size) for start in starts]})
    engine.backward(terms["loss"])
    return terms


def third_step(rank: int, world_size: int, cases: list[tuple[int, int]], **settings) -> list[dict]:
    """After two steps: terms, gradients, teacher and masks of the third for each (stage, micro-batches)."""
    from deepspeed.utils import safe_get_full_grad

    results = []
    for stage, accumulation in cases:
        size = SAMPLES // world_size // accumulation
        engine = build_engine(stage, size, rank, world_size, **settings)
        for step in (1, 2):
            engine.method.begin_step(step, step - 1)
            forward_and_backward(engine, rank, world_size, size)
            engine.step()
        engine.method.begin_step(3, 2)
        terms = forward_and_backward(engine, rank, world_size, size)
        gradients = {}
        for name, parameter in engine.method.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
                gradients[name] = gradient.double().reshape(engine.parameter_shapes[name]).clone()
        values = torch.stack([terms[name].detach().double().reshape(()) for name in sorted(terms)])
        torch.distributed.all_reduce(values)
        method = engine.method
        results.append(
            {
                "terms": dict(zip(sorted(terms), (values / world_size).tolist(), strict=True)),
                "gradients": gradients if rank == 0 else {},
                "teacher": {name: value.clone() for name, value in method.teacher.named_buffers()},
                "masks": method.prepare(micro_batch(0, SAMPLES))["kept_patches"],
                "metrics": method.metrics(),
            }
        )
    return results


# By world size. The first is the reference: one rank, ZeRO 0, the whole batch at once.
CASES = {1: [(0, 1), (0, 8), (3, 4)], 2: [(1, 1), (2, 4), (3, 2)], 4: [(2, 1), (3, 2)]}


@pytest.fixture(scope="module")
def one_rank():
    return run_distributed(third_step, 1, CASES[1], timeout_s=500)


@pytest.fixture(scope="module")
def reference(one_rank):
    return one_rank[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", CASES)
def test_every_number_of_the_third_step_equals_one_rank(world_size, one_rank, reference):
    cases = CASES[world_size]
    by_rank = one_rank if world_size == 1 else run_distributed(third_step, world_size, cases, timeout_s=500)
    # The teacher has moved away from its start and from the weights.
    assert reference["metrics"]["aclip/momentum"] == 0.75
    for number, case in enumerate(cases):
        for rank, results in enumerate(by_rank):
            found = results[number]
            assert torch.equal(found["masks"], reference["masks"]), (case, rank)
            for name, value in reference["teacher"].items():
                torch.testing.assert_close(found["teacher"][name], value, atol=1e-6, rtol=1e-5)
                assert torch.equal(found["teacher"][name], by_rank[0][number]["teacher"][name])
            for name, value in reference["terms"].items():
                assert math.isclose(found["terms"][name], value, rel_tol=2e-6), (case, name)
        error, name = worst_error(by_rank[0][number]["gradients"], reference["gradients"])
        print(world_size, case, error, name)
        assert error < TOLERANCE, (case, name)


def off_schedule(rank: int, world_size: int, stages: list[int]) -> tuple[list[bool], dict]:
    """Whether a teacher moves on towards weights that a skipped step left alone; gradients with local batch norms."""
    import deepspeed

    found = []
    for stage in stages:
        engine = build_engine(stage, SAMPLES // world_size, rank, world_size)
        method = engine.method
        for step in (1, 2):
            method.begin_step(step, step - 1)
            terms = forward_and_backward(engine, rank, world_size, SAMPLES // world_size)
            engine.step()
        before = {name: value.clone() for name, value in method.teacher.named_buffers()}
        method.begin_step(3, 2)
        share = SAMPLES // world_size
        batch = micro_batch(rank * share, (rank + 1) * share)
        terms = engine("train", {"micro_batches": [batch]})
        engine.backward(terms["loss"] * (math.nan if rank == 0 else 1.0))
        skipped, _ = engine.step()
        method.begin_step(4, 3)
        momenta = [0.75, 1 - 0.5 * (1 + math.cos(math.pi * 3 / 4)) / 2]
        right = bool(skipped)
        for name, parameter in method.model.image_tower.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter] if stage == 3 else [], enabled=stage == 3):
                expected = before[name]
                for momentum in momenta:
                    expected = torch.lerp(expected, parameter.detach(), 1 - momentum)
            right &= torch.equal(method.teacher.get_buffer(name), expected)
        found.append(right)
    return found, third_step(rank, world_size, [(1, 1)], head_bn="local")[0]["gradients"]


@pytest.mark.slow
def test_a_skipped_step_moves_the_teacher_as_any_other_and_local_statistics_are_noticed(reference):
    (skipped, gradients), (skipped_on_1, _) = run_distributed(off_schedule, 2, [1, 3], timeout_s=500)
    assert skipped == skipped_on_1 == [True, True]
    error, name = worst_error(gradients, reference["gradients"])
    print("local batch norms", error, name)
    assert error > 100 * TOLERANCE


@pytest.mark.slow(seconds=60)
def test_a_resumed_run_is_the_run_that_went_on(tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yaml",
        write_shards(tmp_path / "shards"),
        "aclip",
        data={"augmentation": {"augmented": "aclip"}, "mask_token": False},
        train={"steps": 8, "micro_batch_size": 4, "verify_replicas_every": 4},
        checkpoint={"every": 3},
    )
    whole, parts, moved = (tmp_path / name for name in ("whole", "parts", "moved"))
    common = ["--recipe", str(recipe), "--ds_config", ds_config(3)]
    run_trainer([*common, "--run_dir", str(whole)], tmp_path, world_size=2)
    run_trainer([*common, "--run_dir", str(parts), "--train.stop_after", "3"], tmp_path, world_size=2)
    shutil.copytree(parts, moved)
    run_trainer([*common, "--run_dir", str(parts), "--resume", "auto"], tmp_path, world_size=2)
    assert steps(parts) == steps(whole)
    final, resumed = (read_weights(run / "checkpoints" / "step_8") for run in (whole, parts))
    assert final.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in final.items())
    # Neither a copy of the weights nor what it was at the start.
    weights, teacher = (final[f"{name}.class_embedding"] for name in ("model.image_tower", "teacher"))
    assert not torch.equal(weights, teacher)
    assert not torch.equal(teacher, read_weights(parts / "checkpoints" / "step_3")["teacher.class_embedding"])
    # Another number of ranks and another stage: the same data, and numbers to float tolerance.
    other = ["--recipe", str(recipe), "--ds_config", ds_config(0), "--run_dir", str(moved), "--resume", "auto"]
    run_trainer(other, tmp_path)
    for step, record in steps(whole).items():
        for key, value in record.items():
            expected = pytest.approx(value, rel=2e-4, abs=2e-4) if isinstance(value, float) else value
            assert steps(moved)[step][key] == expected, (step, key)
    assert not [record for record in metrics(moved) if record.get("event") == "skipped_step"]
