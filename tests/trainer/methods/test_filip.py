"""FILIP and DeFILIP: any ranks, stages and micro-batches; resume; evaluation by tokens; what a step costs."""

import math
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import count_flops
from benchmarks.workload import VOCAB_SIZE, make_batch
from models.registry import build_model
from tests.distributed import run_distributed
from tests.trainer.harness import ds_config, run_trainer, steps, write_eval_set, write_recipe
from tests.trainer.methods.test_gradients import SETTINGS, TOLERANCE, gradients_on_rank, worst_error
from tests.trainer.test_step import HostReads, build
from tests.trainer.test_world_size import compare
from trainer.errors import ConfigError
from trainer.evaluation.retrieval import retrieval_figures
from trainer.evaluation.similarity import class_scores, joined, pairwise_scores, pooled
from trainer.export.__main__ import main as export
from trainer.loading import load_config
from trainer.methods import METHODS, parse_method

FILIP = {"name": "filip", "filip_dim": 16, "filip_topk": 3}
DEFILIP = {**SETTINGS, **FILIP, "name": "defilip"}
CASES = {
    "filip": FILIP,
    "all keys and a global term": {**FILIP, "filip_keys": "all", "w_clip": 0.5},
    "local_max": {**FILIP, "filip_select": "local_max", "filip_select_group": 4},
    "defilip": DEFILIP,
}


def gradients_of_all(rank: int, world_size: int, cases: list[tuple[int, int, None]]) -> dict[str, list[dict]]:
    """As `gradients_on_rank`, for every case here."""
    return {name: gradients_on_rank(rank, world_size, cases, {"method": settings}) for name, settings in CASES.items()}


@pytest.fixture(scope="module")
def whole():
    """One rank, ZeRO 0, whole batch at once."""
    return run_distributed(gradients_of_all, 1, [(0, 1, None)], timeout_s=500)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "cases"), [(1, [(2, 8)]), (2, [(0, 1), (3, 4)]), (4, [(1, 2)])])
def test_every_gradient_equals_one_rank(world_size, cases, whole):
    found = run_distributed(gradients_of_all, world_size, [(*case, None) for case in cases], timeout_s=500)[0]
    for name, (reference,) in whole.items():
        for case, result in zip(cases, found[name], strict=True):
            assert math.isclose(result["loss"], reference["loss"], rel_tol=1e-6), (name, case)
            assert result["gradients"].keys() == reference["gradients"].keys()
            error, where = worst_error(result["gradients"], reference["gradients"])
            assert error < TOLERANCE, (name, case, where)
        names = reference["gradients"].keys()
        assert "alignment.logit_scale.log_value" in names
        # Without a global term nothing that only it would need is trained.
        assert ("model.image_tower.proj.weight" in names) == (name not in ("filip", "local_max"))


@pytest.fixture(scope="module", params=["filip", "defilip"])
def uninterrupted(request, shards, cache, tmp_path_factory):
    """Name, recipe and folder of a whole run on one rank."""
    folder = tmp_path_factory.mktemp(request.param)
    # Where tokens are wider, fewer of them are so alike that a rounding decides which is chosen.
    sections = {"checkpoint": {"every": 5}, "eval": {"at_end": False}, "model": {"name": "vit_nano_p8_32"}}
    sections["eval"]["sets"] = {"shapes": {"data": str(write_eval_set(folder / "set"))}}
    recipe = write_recipe(folder / "tiny.yaml", shards, request.param, **sections)
    run_trainer(["--recipe", str(recipe), "--run_dir", str(folder / "run"), "--ds_config", ds_config(2)], cache)
    return request.param, recipe, folder / "run"


@pytest.mark.slow
def test_resume_is_bitwise(uninterrupted, cache, tmp_path):
    _, recipe, reference = uninterrupted
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(2)]
    run_trainer([*arguments, "--train.stop_after", "7"], cache)
    run_trainer([*arguments, "--resume", "auto"], cache)
    assert steps(tmp_path / "run") == steps(reference)


@pytest.mark.slow
def test_two_ranks_and_micro_batches_log_what_one_rank_logs(uninterrupted, cache, tmp_path):
    name, recipe, reference = uninterrupted
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(3)]
    run_trainer([*arguments, "--train.micro_batch_size", "2"], cache, world_size=2)
    compare(steps(tmp_path / "run"), steps(reference))
    record = steps(reference)[20]
    expected = {"loss/filip", "loss/clip", "logit_scale", "logit_scale_dense"}
    assert record.keys() >= expected
    if name == "filip":
        assert record["loss"] == pytest.approx(record["loss/filip"] + 0.5 * record["loss/clip"], rel=1e-5)


def figures_on_rank(rank, world_size, run, filip_eval):
    """Evaluation of a run's last checkpoint, by tokens or not."""
    from trainer.evaluation import Evaluation
    from trainer.ranks.launch import Place
    from trainer.trained import TrainedModel, load_trained

    trained = load_trained(run)
    method = trained.method
    method.settings = method.settings.model_copy(update={"filip_eval": filip_eval})
    evaluation = Evaluation(trained.config, trained.tokenizer, Place(rank, rank, world_size, world_size, "test"))
    (result,) = evaluation.run(TrainedModel(method, torch.device("cpu")))
    return result.figures


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_ranks(uninterrupted):
    _, _, run = uninterrupted
    one = run_distributed(figures_on_rank, 1, run, "tokens")[0]
    assert one["samples"] == 37
    for figures in run_distributed(figures_on_rank, 3, run, "tokens"):
        assert figures == one
    by_vectors = run_distributed(figures_on_rank, 1, run, "global")[0]
    assert by_vectors.keys() == one.keys()
    assert by_vectors != one


def tokens(*shape: int, seed: int, lengths: list[int] | None = None) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = F.normalize(values, dim=-1)
    if lengths is None:
        return values
    return values * (torch.arange(shape[1]) < torch.tensor(lengths)[:, None])[..., None]


def slow_scores(queries: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One token after the other; zero vectors are no tokens."""
    rows = []
    for query in queries:
        row = []
        for target in targets:
            best = [max(float(t @ s) for s in target if s.any()) for t in query if t.any()]
            row.append(sum(best) / len(best))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


IMAGES = tokens(9, 4, 5, seed=0)
PROMPTS = tokens(6, 5, 5, seed=1, lengths=[5, 2, 3, 1, 4, 5])


def test_prompts_are_scored_one_by_one():
    by_prompt = slow_scores(IMAGES, PROMPTS)
    torch.testing.assert_close(class_scores(IMAGES, PROMPTS.unflatten(0, (3, 2))), by_prompt.view(9, 3, 2).mean(-1))
    # More padding, as of a list of longer class names, changes nothing.
    wider = joined([PROMPTS[:2].unflatten(0, (1, 2)), F.pad(PROMPTS[2:], (0, 0, 0, 3)).unflatten(0, (2, 2))])
    assert wider.shape == (3, 2, 8, 5)
    torch.testing.assert_close(class_scores(IMAGES, wider), by_prompt.view(9, 3, 2).mean(-1))
    torch.testing.assert_close(pairwise_scores(PROMPTS, IMAGES), slow_scores(PROMPTS, IMAGES))
    torch.testing.assert_close(pooled(PROMPTS), F.normalize(PROMPTS.sum(1), dim=-1))


def token_scores_on_rank(rank, world_size):
    images, texts = tokens(150, 3, 4, seed=2), tokens(150, 4, 4, seed=3, lengths=[1 + i % 4 for i in range(150)])
    return class_scores(images, texts.unflatten(0, (75, 2))), retrieval_figures(images, texts, torch.arange(150))


def test_scores_of_tokens_are_spread_over_the_ranks():
    ((scores, figures),) = run_distributed(token_scores_on_rank, 1)
    images, texts = tokens(150, 3, 4, seed=2), tokens(150, 4, 4, seed=3, lengths=[1 + i % 4 for i in range(150)])
    to_texts, to_images = slow_scores(images, texts), slow_scores(texts, images)
    own = torch.arange(150)
    for k in (1, 5, 10):
        for name, found in (("text", to_texts), ("image", to_images)):
            rank = (found >= found[own, own, None]).sum(1) - 1
            assert figures[f"{name}_retrieval_recall@{k}"] == float((rank < k).double().mean())
    for other_scores, other_figures in run_distributed(token_scores_on_rank, 3):
        assert torch.equal(other_scores, scores)
        assert other_figures == figures


def reads_of_a_step(rank, world_size, stage):
    from trainer.loop import train_step

    run, batch = build(stage, {k: v for k, v in DEFILIP.items() if k not in SETTINGS or k == "name"})
    train_step(run, 1, iter([[dict(batch)]]))
    with HostReads() as reads:
        train_step(run, 2, iter([[dict(batch)]]))
    return reads.places


def test_a_step_reads_nothing_on_the_host():
    assert run_distributed(reads_of_a_step, 2, 1, timeout_s=300) == [[], []]


def step_flops(name: str, **settings: int) -> int:
    """Forward and backward of a method around ViT-B/32, on tensors without values."""
    _, settings = parse_method({"name": name, **settings})
    batch = make_batch(8, 224, views=1 if name in ("clip", "filip") else 2)
    with torch.device("meta"):
        model = build_model("vit_b32", vocab_size=VOCAB_SIZE)
        method = METHODS[name](model, settings, None).train()
    on_host = ("text_lengths", "mlm_index")
    batch = {key: value if key in on_host else value.to("meta") for key, value in batch.items()}
    # Autocast knows no device "meta".
    with mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()):
        return count_flops(lambda: method("train", {"micro_batches": [batch]})["loss"].backward())


def test_passes():
    # One of each tower; the last block, which CLIP runs for one token of 50, and the heads are what is added.
    assert 1 < step_flops("filip") / step_flops("clip") < 1.10
    queue = {"nns_queue_size": 256}
    assert 1 < step_flops("defilip", **queue) / step_flops("declip", **queue) < 1.10


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("filip_demo", {"method.filip_eval": "global"}, "needs w_clip above 0"),
        ("filip_demo", {"method.filip_select_group": "4"}, "has no effect without"),
        ("filip_demo", {"method.w_filip": "0"}, "method.w_filip"),
    ],
)
def test_settings_without_effect_are_refused(recipe, overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(recipe, overrides)


def test_towers_without_tokens_are_refused():
    model = build_model("timm:test_vit", vocab_size=300)
    with pytest.raises(ConfigError, match="TimmTower does not give the tokens"):
        METHODS["filip"](model, parse_method(FILIP)[1], None)


@pytest.mark.slow
def test_export_of_a_model_without_global_features_is_refused(shards, cache, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, "filip", train={"steps": 2}, schedule={"warmup_steps": 1})
    run = str(tmp_path / "run")
    run_trainer(["--recipe", str(recipe), "--run_dir", run, "--method.w_clip", "0"], cache)
    with pytest.raises(ConfigError, match="token by token, which openclip cannot hold"):
        export([run, "--to", "openclip"])
    assert export([run, "--to", "safetensors"]) == 0
