"""Ranks that should be equal: a difference is found and named, and local batch norm ends up the same everywhere."""

import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.harness import Launched, ds_config, metrics, write_recipe
from tests.trainer.test_step import build
from trainer.engine.replicas import average_local_statistics, differing_ranks, verify_replicas
from trainer.errors import ConfigError


def test_the_minority_differs():
    assert differing_ranks([1, 1, 1]) == []
    assert differing_ranks([2, 1, 1]) == [0]
    assert differing_ranks(["a", "b", "a", "c"]) == [1, 3]
    # Between two, nobody knows: the lower rank is taken as right.
    assert differing_ranks([1, 2]) == [1]


def tamper(rank, world_size, stages):
    from trainer.loop import train_step

    for stage in stages:
        run, batch = build(stage)
        engine = run.engine
        engine.broadcast_buffers()
        train_step(run, 1, iter([[dict(batch)]]))
        verify_replicas(engine, 1)
        scale = engine.method.model.logit_scale.log_value
        queue = engine.method.queue.rows
        # ZeRO 3 has cut the scale up by now.
        tampered = [(queue, "queue.rows"), (scale.data, "logit_scale.log_value")][: 1 if stage == 3 else 2]
        for tensor, name in tampered:
            if rank == 1:
                # The last bit of one number: the smallest difference there is.
                tensor.view(torch.int32).view(-1)[-1] ^= 1
            with pytest.raises(ConfigError, match=rf"step 2: .*{name} on rank 1 .host .*1 of 2 ranks"):
                verify_replicas(engine, 2)
            if rank == 1:
                tensor.view(torch.int32).view(-1)[-1] ^= 1
        verify_replicas(engine, 3)


def test_one_flipped_bit_is_found_and_named():
    run_distributed(tamper, 2, [0, 2, 3], timeout_s=300)


def local_statistics(rank, world_size):
    from trainer.loop import train_step

    run, batch = build(1, method={"iss_bn": "local"})
    for step in (1, 2):
        train_step(run, step, iter([[dict(batch)]]))
    verify_replicas(run.engine, 2)
    layers = [module for module in run.engine.method.simsiam.modules() if hasattr(module, "running_mean")]
    before = torch.stack([layer.running_mean.sum() for layer in layers] + [layer.running_var.sum() for layer in layers])
    average_local_statistics(run.engine)
    after = torch.stack([layer.running_mean.sum() for layer in layers] + [layer.running_var.sum() for layer in layers])
    return before, after


def test_local_batch_norm_is_averaged():
    (before_0, after_0), (before_1, after_1) = run_distributed(local_statistics, 2)
    assert not torch.isclose(before_0, before_1).all()
    assert torch.equal(after_0, after_1)
    torch.testing.assert_close(after_0, (before_0 + before_1) / 2)


@pytest.mark.slow
def test_a_run_stops_before_it_saves_what_differs(shards, cache, tmp_path):
    train = {"steps": 8, "verify_replicas_every": 4}
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, "clip", train=train, checkpoint={"every": 2})
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(2)]
    finished = Launched(arguments, 2, cache, {"corrupt": {"step": 4, "rank": 1}}).leave()
    assert finished.codes == [2, 2], finished.output
    assert "step 4: weight model.text_tower.ln_final.weight on rank 1 (host " in finished.output
    assert [record["step"] for record in metrics(tmp_path / "run") if record.get("event") == "checkpoint"] == [2]
