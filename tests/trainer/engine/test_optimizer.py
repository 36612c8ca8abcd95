"""Parameter groups: which decay, which have a rate of their own, at every ZeRO stage and through checkpoints."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.registry import build_model
from tests.distributed import run_distributed
from tests.trainer.test_step import build
from trainer.config.sections import OptimizerConfig
from trainer.engine.optimizer import parameter_groups
from trainer.errors import ConfigError
from trainer.loading import load_config
from trainer.methods import METHODS, parse_method
from trainer.methods.base import TrainingRule
from trainer.methods.rules import check_groups, training_rules

SCALE = "model.logit_scale"


def method_of(name: str = "clip", model: str = "vit_femto_p8_32"):
    _, settings = parse_method({"name": name})
    return METHODS[name](build_model(model, vocab_size=50, text_projection_bias=True), settings, None)


def optimizer_config(**values) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"lr": 1e-3, **values})


def treated(method, config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Weight decay and rate factor of each trained parameter, each in one group."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups = parameter_groups(method, config, training_rules(method, config))
    found = [
        (names[id(parameter)], (group["weight_decay"], group["lr_factor"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


def test_what_decays_is_a_choice_by_kind():
    method = method_of("siglip", "rn_pico_32")
    everything = {name for name, _ in method.named_parameters()}
    kinds = {
        "norms": {name for name in everything if ".ln_" in name or ".bn" in name or "downsample.1." in name},
        "attention_biases": {name for name in everything if name.endswith("in_proj_bias")},
        "temperatures": {"model.logit_scale.log_value", "model.logit_bias.value"},
    }
    kinds["biases"] = {name for name in everything if name.endswith(".bias")} - kinds["norms"]
    assert all(kinds.values()) and "model.text_tower.text_projection.bias" in kinds["biases"]
    for chosen in ([], ["norms", "biases", "temperatures"], *([kind] for kind in kinds), list(kinds)):
        found = treated(method, optimizer_config(weight_decay=0.3, no_decay=chosen))
        spared = {name for kind in chosen for name in kinds[kind]}
        assert found == {name: (0.0 if name in spared else 0.3, 1.0) for name in everything}, chosen
    default = treated(method, optimizer_config(weight_decay=0.3))
    assert {name for name, (decay, _) in default.items() if not decay} == set().union(*kinds.values())


def test_the_innermost_group_counts_for_each_thing_by_itself():
    groups = {
        "model.text_tower.transformer": {"weight_decay": 0.2},
        "model.text_tower": {"lr_factor": 0.5, "weight_decay": 0.1},
        SCALE: {"lr_factor": 0.0},
    }
    found = treated(method_of(), optimizer_config(weight_decay=0.3, groups=groups))
    assert found[f"{SCALE}.log_value"] == (0.0, 0.0)
    assert found["model.text_tower.transformer.resblocks.0.mlp.c_fc.weight"] == (0.2, 0.5)
    assert found["model.text_tower.token_embedding.weight"] == (0.1, 0.5)
    assert found["model.text_tower.ln_final.weight"] == (0.0, 0.5)
    assert found["model.image_tower.proj.weight"] == (0.3, 1.0)
    # The recipe's word counts against the method's.
    method = method_of()
    method.training_rules = lambda: [TrainingRule("model.text_tower", lr_factor=0.7, last_step=4)]
    config = optimizer_config(groups={"model.text_tower": {"lr_factor": 0.5}})
    found = parameter_groups(method, config, training_rules(method, config))
    assert {(group["lr_factor"], group["last_step"]) for group in found} == {(1.0, None), (0.5, 4)}


def test_a_group_that_changes_nothing_makes_no_group():
    method = method_of()
    plain = parameter_groups(method, optimizer_config())
    for groups in ({SCALE: {"lr_factor": 1.0}}, {"model.text_tower.ln_final": {"weight_decay": 0.0}}):
        config = optimizer_config(groups=groups)
        found = parameter_groups(method, config, training_rules(method, config))
        assert [list(map(id, group["params"])) for group in found] == [list(map(id, g["params"])) for g in plain]
    # Nor does a weight decay of 0 merge the two groups that checkpoints know.
    assert len(parameter_groups(method, optimizer_config(weight_decay=0.0))) == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optimizer.groups": "{model.logit_scal: {lr_factor: 0.1}}"}, "no module 'model.logit_scal': did you mean"),
        ({"optimizer.groups": "{'': {lr_factor: 0.1}}"}, "no module ''"),
        ({"optimizer.groups": "{x y z 1 2 3: {lr_factor: 0.1}}"}, "names are such as model.logit_scale"),
        ({"optimizer.groups": "{model.logit_scale: {}}"}, "sets nothing"),
        ({"optimizer.groups": "{model.logit_scale: {lr_factor: -1}}"}, "greater than or equal to 0"),
        ({"optimizer.groups": "{model.logit_scale: {lr: 0.1}}"}, "unknown key 'optimizer.groups.model.logit_scale.lr'"),
        ({"optimizer.groups": "3"}, "optimizer.groups: got 3"),
        ({"optimizer.no_decay": "[norm]"}, "optimizer.no_decay.0: got 'norm'"),
        ({"optimizer.no_decay": "norms"}, "optimizer.no_decay: got 'norms'"),
        ({"method.nns_queue": "local"}, "nns_queue local needs nns_warmup random"),
        ({"method.nns_queue": "own"}, "method.nns_queue: got 'own'"),
        ({"model.init": "moco"}, "model.init: got 'moco'"),
        ({"eval.interpolation": "nearest"}, "eval.interpolation: got 'nearest'"),
    ],
)
def test_mistakes_are_one_line(overrides, words):
    with pytest.raises(ConfigError) as caught:
        check_groups(method_of(), load_config("demo", overrides).optimizer)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_module_that_is_not_trained_has_no_group():
    method = method_of("filip")
    with pytest.raises(ConfigError, match=r"'model.logit_scale' has no parameters that are trained; leave it out"):
        check_groups(method, optimizer_config(groups={SCALE: {"lr_factor": 0.1}}))


def step_once(run, batch, step: int) -> float:
    """One step of the loop; the stored temperature after it."""
    from deepspeed.utils import safe_get_full_fp32_param

    from trainer.loop import train_step

    train_step(run, step, iter([[dict(batch)]]))
    scale = run.engine.method.model.logit_scale.log_value
    return float(scale if run.engine.stage == 0 else safe_get_full_fp32_param(scale))


def rates_on_rank(rank: int, world_size: int, folder: Path, stages: list[int]) -> dict:
    """The temperature's way at a stage each, straight on and from checkpoint to checkpoint, with a queue per rank."""
    from trainer.assemble import _continue_from
    from trainer.checkpoint import TrainerState, load_checkpoint, save_checkpoint
    from trainer.engine.replicas import verify_replicas

    def start(stage: int, **optimizer):
        groups = {"groups": {SCALE: {"lr_factor": 0.1}}}
        # Without the head of a vocabulary, which is half of the work.
        queue = {"nns_queue": "local", "nns_mask_duplicates": True, "w_tss": 0.0}
        run, batch = build(stage, queue, name="sgd", **({"lr": 0.2, "weight_decay": 0.0} | groups | optimizer))
        run.engine.broadcast_buffers()
        return run, batch

    found = {"whole": step_once(*start(0, groups={}), 1)}
    run, batch = start(0)
    found["straight"] = [step_once(run, batch, step) for step in range(1, len(stages) + 1)]
    found["rows"], found["filled"] = run.engine.method.queue.rows, run.engine.method.queue.filled
    found["chain"], warnings, before = [], [], None
    for step, stage in enumerate(stages, 1):
        run, batch = start(stage)
        if before is not None:
            path = folder / f"step_{step - 1}"
            saved = load_checkpoint(run.engine, path, rank, world_size)
            state = TrainerState(0, "", "", "", "", {})
            _continue_from(saved, state, run.engine, path, SimpleNamespace(warn=warnings.append))
            assert torch.equal(run.engine.method.queue.rows, before), "the queue of this rank is not what was saved"
            verify_replicas(run.engine, step)
        found["chain"].append(step_once(run, batch, step))
        before = run.engine.method.queue.rows.clone()
        method = run.engine.method
        state = TrainerState(step, "", "", "", "", {}, method_digest=method.state_digest())
        state.method_state = method.method_state() if rank == 0 else {}
        save_checkpoint(run.engine, folder, state, rank, world_size)
    found["warnings"], found["digest"] = warnings, method.state_digest()
    return found


def test_a_rate_and_a_queue_of_its_own_at_every_stage(tmp_path):
    start = math.log(1 / 0.07)
    ranks = run_distributed(rates_on_rank, 2, tmp_path, [1, 3, 2, 0], timeout_s=300)
    for found in ranks:
        whole = found["whole"] - start
        assert abs(whole) > 0.1
        assert found["straight"][0] - start == pytest.approx(0.1 * whole, rel=1e-4)
        # Momentum and all: each step at another stage, from the checkpoint of the step before.
        assert found["chain"] == pytest.approx(found["straight"], abs=2e-5)
        assert found["warnings"] == []
        # Two captions of each of a rank's sixteen samples a step, of 96 rows.
        assert found["filled"] == 96
    first, second = ranks
    assert first["digest"] == second["digest"]
    assert not torch.isclose(first["rows"], second["rows"]).all(dim=1).any()
    _moved_to_other_ranks(tmp_path / "step_4", [first, second])


def _moved_to_other_ranks(folder: Path, ranks: list[dict]) -> None:
    from tests.trainer.methods.test_gradients import SETTINGS
    from trainer.checkpoint.shards import read_rank_states

    states = read_rank_states(folder)
    assert len(states) == 2
    saved = torch.cat([state["queue"]["rows"] for state in states])
    model = build_model("vit_femto_p8_32", vocab_size=50)
    for queue in ("local", "global"):
        name, settings = parse_method({**SETTINGS, "nns_queue": queue})
        method = METHODS[name](model, settings, None)
        method.load_rank_states(states)
        # One rank: the newest half of all rows, from both in turn.
        assert method.queue.filled == 96
        assert torch.isin(method.queue.rows, saved).all()
        newest_first = enumerate(method.queue.rows_by_age().flip(0))
        assert all(torch.isin(row, states[i % 2]["queue"]["rows"]).all() for i, row in newest_first)
    assert method.method_state().keys() == {"queue"}
