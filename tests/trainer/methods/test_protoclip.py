"""ProtoCLIP under the engine and in whole runs: gradients, schedule, resuming within an episode, its cost."""

import numpy as np
import pytest
import torch

from benchmarks.harness import count_flops
from losses import Clusters
from models.registry import build_model
from tests.distributed import run_distributed
from tests.trainer.harness import (
    Launched,
    ds_config,
    metrics,
    run_trainer,
    state_hashes,
    steps,
    write_recipe,
)
from tests.trainer.methods.test_gradients import SAMPLES, worst_error
from tests.trainer.methods.test_gradients import micro_batch as declip_batch
from tests.trainer.test_world_size import compare
from trainer.checkpoint.shards import read_weights
from trainer.config.sections import OptimizerConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.loading import load_config
from trainer.methods import METHODS, parse_method
from trainer.reporting import rate

TINY = {
    "name": "protoclip",
    "episode_steps": 2,
    "warmup_episodes": 0,
    "clusters": 10,
    "head_dim": 8,
    "head_hidden_dim": 16,
}
FIRST = 2 * SAMPLES
# Targets at a temperature of 0.01 amplify rounding; the reference is in single precision too.
TOLERANCE = 2e-5


def micro_batch(first: int, last: int) -> dict:
    """Samples [first, last) of global batch 3, the second of its episode."""
    batch = declip_batch(first, last)
    one_view = {name: batch[name][:1] for name in ("images", "token_ids", "text_lengths", "view_keys")}
    return {**one_view, "position": torch.arange(first, last) + FIRST + SAMPLES}


def clusters(modalities: int = 3) -> Clusters:
    """Clusters of an episode of two batches, some of them without members and some samples without clusters."""
    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(-1, 9, (modalities, 2 * SAMPLES), generator=generator, dtype=torch.int32)
    labels[:, labels[0] < 0] = -1
    labels[labels == -1] = torch.where(labels[0].expand(modalities, -1)[labels == -1] < 0, -1, 0).int()
    counts = torch.stack([(entry.long() + 1).bincount(minlength=11)[1:] for entry in labels])
    tables = torch.randn(2 * (modalities - 1), 10, 8, generator=generator) / 3
    centroids = torch.randn(2, 10, 8, generator=generator) / 3
    return Clusters(FIRST, labels, counts, centroids, tables, torch.zeros(modalities, dtype=torch.float64))


def gradients_on_rank(rank: int, world_size: int, cases: list[tuple[int, int, bool]]) -> list[dict]:
    """Loss and gradients by parameter name for each (stage, accumulation, whether prototypes count)."""
    from deepspeed.utils import safe_get_full_grad

    from trainer.assemble import build_method
    from trainer.config.ds_config import plan_batch, resolve_deepspeed
    from trainer.engine.engine import Engine, init_distributed
    from trainer.loading import parse_config
    from trainer.pipeline import build_tokenizer
    from trainer.ranks.launch import Place

    device, share, results = torch.device("cpu"), SAMPLES // world_size, []
    init_distributed(device, Place(rank, rank, world_size, world_size, "test"))
    for stage, accumulation, active in cases:
        size = share // accumulation
        tree = {
            "model": {"name": "vit_femto_p8_32"},
            "method": {**TINY, "lit_episodes": 1},
            "data": {"train": "none"},
            "train": {"steps": 8, "global_batch_size": SAMPLES, "micro_batch_size": size},
            "optimizer": {"lr": 1e-9},
        }
        config = parse_config(tree)
        resolved = resolve_deepspeed(ds_config(stage), config, plan_batch(config, world_size), "fp32")
        torch.manual_seed(0)
        method = build_method(config, build_tokenizer(config))
        method.begin_run(config.train, None)
        engine = Engine(method, config, resolved, device)
        method.clusters = clusters() if active else None
        # The last two of eight steps are without prototypes.
        assert method.begin_step(4 if active else 7, 3) is None
        starts = range(rank * share, (rank + 1) * share, size)
        terms = engine("train", {"micro_batches": [micro_batch(start, start + size) for start in starts]})
        engine.backward(terms["loss"])
        found = {}
        for name, parameter in engine.method.named_parameters():
            gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
            if rank == 0:
                found[name] = gradient.double().reshape(engine.parameter_shapes[name]).clone()
        values = torch.stack([terms[name].detach().double().reshape(()) for name in sorted(terms)])
        torch.distributed.all_reduce(values)
        results.append({"terms": dict(zip(sorted(terms), (values / world_size).tolist(), strict=True)), "found": found})
    return results


def by_autograd() -> dict:
    """The same loss written down from the paper, differentiated by autograd, on one process without an engine."""
    method, batch = tiny_method(), micro_batch(0, SAMPLES)
    found = clusters()
    method.clusters = found
    encoded = method.encode(batch)
    image, text = (torch.nn.functional.normalize(encoded[f"{kind}_features"][0], dim=1) for kind in ("image", "text"))
    logits = method.model.logit_scale() * image @ text.T
    diagonal = torch.arange(SAMPLES)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, diagonal) + cross_entropy(logits.T, diagonal)) / 2
    heads = {
        0: torch.nn.functional.normalize(method.image_head(encoded["image_features"][0]), dim=1),
        1: torch.nn.functional.normalize(method.text_head(encoded["text_features"][0]), dim=1),
    }
    own = found.labels[:, SAMPLES:].long()
    for student, partner, table, soft in ((0, 1, 0, True), (1, 0, 1, True), (0, 2, 2, False), (1, 2, 3, False)):
        kept = found.counts[partner] > 0
        for row in range(SAMPLES):
            if own[partner, row] >= 0:
                scores = method.proto_scale() * found.tables[table][kept] @ heads[student][row]
                target = torch.zeros(10)
                target[own[partner, row]] = 1.0
                if soft:
                    teacher = found.centroids[partner]
                    target = torch.zeros(10)
                    target[kept] = torch.softmax(teacher[kept] @ teacher[own[partner, row]] / 0.01, dim=0)
                loss = loss - (target[kept] * torch.log_softmax(scores, dim=0)).sum() / SAMPLES / 2
    loss.backward()
    return {"loss": float(loss), "found": {name: p.grad.double() for name, p in method.named_parameters()}}


def tiny_method(**settings):
    """The method alone on the small model, told of a run of eight steps."""
    name, parsed = parse_method({**TINY, **settings})
    torch.manual_seed(0)
    method = METHODS[name](build_model("vit_femto_p8_32", vocab_size=49_408), parsed, None)
    method.begin_run(TrainConfig(steps=8, global_batch_size=SAMPLES), None)
    return method


@pytest.fixture(scope="module")
def reference():
    """Loss and gradients by autograd."""
    return by_autograd()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_gradient_equals_autograd(world_size, reference):
    cases = [(0, 4, True), (3, 1, True)]
    if world_size == 2:
        cases = [(0, 1, True), (1, 4, True), (2, 1, True), (3, 4, True)]
    inactive = [(2, 1, False), (3, 1, False)] if world_size == 2 else []
    results = run_distributed(gradients_on_rank, world_size, cases + inactive, timeout_s=500)[0]
    for case, result in zip(cases, results, strict=False):
        assert result["terms"]["loss"] == pytest.approx(reference["loss"], rel=1e-6), case
        assert {"loss/clip", "loss/proto", "loss/external"} < result["terms"].keys()
        assert result["found"].keys() == reference["found"].keys()
        for head in ("image_head", "text_head"):
            # In front of a batch norm a bias has no gradient: what is there is rounding, of the size of its weight's.
            rounding = result["found"].pop(f"{head}.layers.0.bias")
            assert rounding.abs().max() < TOLERANCE * reference["found"][f"{head}.layers.0.weight"].abs().max()
        expected = {name: reference["found"][name] for name in result["found"]}
        error, name = worst_error(result["found"], expected)
        print(world_size, case, error, name)
        assert error < TOLERANCE, (case, name)
    for result in results[len(cases) :]:
        assert "loss/proto" not in result["terms"]
        heads = {name for name in result["found"] if name.startswith(("image_head", "text_head", "proto_scale"))}
        assert len(heads) == 13
        # Gradients of zero, not missing ones.
        assert not any(result["found"][name].any() for name in heads)


def test_heads_start_equal_and_do_not_decay():
    from trainer.engine.optimizer import parameter_groups

    method = tiny_method(lit_episodes=1)
    twins = zip(method.image_head.parameters(), method.text_head.parameters(), strict=True)
    assert all(torch.equal(one, other) and one is not other for one, other in twins)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups = parameter_groups(method, OptimizerConfig(lr=1e-3, weight_decay=0.5), method.training_rules())
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert (group["last_step"] == 6) == name.startswith("model.image_tower"), name
            if name.startswith(("image_head", "text_head", "proto_scale")):
                assert group["weight_decay"] == 0.0
    decayed = {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert {"model.text_tower.text_projection.weight", "model.image_tower.patch_embed.weight"} <= decayed


def test_the_published_schedule():
    config = load_config("protoclip_cc3m_rn50")
    name, settings = parse_method(config.method)
    method = METHODS[name](build_model("vit_femto_p8_32", vocab_size=600), settings, None)
    method.begin_run(config.train, None)
    visual = method.training_rules()[-1]
    assert (visual.module, visual.last_step, config.train.steps) == ("model.image_tower", 391 * 398, 391 * 400)
    assert rate(config, 15_625, visual.last_step) == rate(config, 15_625) == 5e-4
    assert rate(config, 391 * 398 - 1, visual.last_step) > 0
    assert [rate(config, step, visual.last_step) for step in (391 * 398, 391 * 398 + 1, 391 * 400)] == [0.0] * 3
    assert rate(config, 391 * 400 - 1) > rate(config, 391 * 400) == 0.0
    active = []
    for step in (391, 392, 391 * 398, 391 * 398 + 1):
        method.clusters = None
        active.append(method.begin_step(step, step - 1))
    assert active == [None, range(391, 782), range(391 * 397, 391 * 398), None]


def test_an_episode_follows_the_data_not_the_step():
    method = tiny_method(episode_steps=4)
    # Two batches were left out by a rollback: step 3 trains on batch 4, in another episode than step 2 on batch 1.
    assert method.begin_step(2, 1) == range(4)
    assert method.begin_step(3, 4) == range(4, 8)
    method.clusters = Clusters(4 * SAMPLES, *[torch.zeros(0)] * 5)
    assert method.begin_step(4, 5) is None
    assert method.begin_step(5, 8) == range(8, 12)


def test_mistakes_are_refused_in_one_line(tmp_path, monkeypatch):
    def refusal(**settings) -> str:
        with pytest.raises(ConfigError) as error:
            tiny_method(**settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "clusters 65 is more than the 64 samples" in refusal(clusters=65)
    assert "cluster_sample 9 is less than method.clusters 10" in refusal(cluster_sample=9)
    assert "train.steps 8 leaves no step for prototypes" in refusal(warmup_episodes=3, lit_episodes=1)
    assert "without prototype terms is CLIP" in refusal(w_proto=0.0)
    path = tmp_path / "teacher.npy"
    assert "no .npy file that can be read" in refusal(external_teacher=str(path))
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert "no .npy file that can be read" in refusal(external_teacher=str(path))
    np.save(path, np.zeros(5, dtype=np.float32))
    assert "one array of floats" in refusal(external_teacher=str(path))
    np.save(path, np.zeros((5, 2), dtype=np.float32))
    assert "back_translation" in refusal(external_teacher=str(path), back_translation=False)
    method = tiny_method(external_teacher=str(path))
    with pytest.raises(ConfigError, match=r"has 5 rows, data\.train has 6 samples"):
        method.begin_run(TrainConfig(steps=8, global_batch_size=SAMPLES), 6)
    state = method.method_state()
    np.save(path, np.ones((5, 2), dtype=np.float32))
    with pytest.raises(ConfigError, match=r"another method\.external_teacher"):
        tiny_method(external_teacher=str(path)).load_method_state(state)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install faiss-cpu" in refusal()


def test_clusters_of_other_settings_are_dropped():
    state = {"clusters": clusters(2).state(), "external_hash": ""}
    method = tiny_method()
    method.load_method_state(state)
    assert method.state_digest() == clusters(2).content_hash()
    for other in ({"clusters": 11}, {"head_dim": 9}, {"episode_steps": 4}, {"back_translation": False}):
        method = tiny_method(**other)
        method.load_method_state(state)
        assert method.clusters is None
    # Going back to a checkpoint from before the first clusters.
    method = tiny_method()
    method.clusters = clusters(2)
    method.load_method_state({"external_hash": ""})
    assert method.clusters is None


def test_cost_is_that_of_the_method():
    """Extra over CLIP: one forward per sample for the preview, the heads, and six products of batch and clusters."""
    method, batch = tiny_method(clusters=60), micro_batch(0, SAMPLES)
    clip = METHODS["clip"](method.model, parse_method({"name": "clip"})[1], None)
    found = clusters(2)
    wide = {name: torch.zeros(2, 60, 8) for name in ("centroids", "tables")}
    method.clusters = Clusters(FIRST, found.labels, torch.ones(2, 60), inertia=torch.zeros(2), **wide)

    def train(trained) -> float:
        def step() -> None:
            trained("train", {"micro_batches": [batch]})["loss"].backward()

        return count_flops(step)

    method.begin_step(8, 3)
    assert method._active
    whole, forward = train(clip), count_flops(lambda: clip.encode(batch))
    heads = 2 * (2 * SAMPLES * (method.model.embed_dim * 16 + 16 * 8))
    products = 6 * 2 * SAMPLES * 60 * 8
    assert train(method) == whole + 3 * heads + products
    with torch.no_grad():
        preview = count_flops(lambda: method("preview", batch))
    assert preview == forward + heads
    # The spec's third of a training step, to 10 %.
    assert forward == pytest.approx(whole / 3, rel=0.1)


EVERY = {"checkpoint": {"every": 6, "keep_last": 9}}


@pytest.fixture(scope="module")
def uninterrupted(shards, cache, tmp_path_factory):
    """Recipe and records of a whole run of five episodes on two ranks at ZeRO 2: one warm, three, one without."""
    folder = tmp_path_factory.mktemp("protoclip")
    recipe = write_recipe(folder / "tiny.yaml", shards, "protoclip", **EVERY)
    run_trainer(["--recipe", str(recipe), "--run_dir", str(folder / "run"), "--ds_config", ds_config(2)], cache, 2)
    return recipe, folder / "run"


@pytest.mark.slow
def test_episodes_of_a_run(uninterrupted):
    _, run_dir = uninterrupted
    records = steps(run_dir)
    assert [step for step, record in records.items() if "loss/proto" in record] == list(range(5, 17))
    assert all(record["proto/used_clusters"] > 0.5 for step, record in records.items() if 5 <= step <= 16)
    # The clusters change where an episode begins, and only there.
    inertia = [records[step]["proto/inertia_image"] for step in range(5, 17)]
    assert [len(set(inertia[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]
    assert len(set(inertia)) == 3
    hashes = state_hashes(run_dir)
    assert hashes.keys() == {6, 12}
    assert hashes[6] != hashes[12]
    # In the last episode the image tower stands still, to the bit, while the rest goes on.
    before, after = (read_weights(run_dir / "checkpoints" / f"step_{step}") for step in (18, 20))
    for name, value in after.items():
        if name.startswith("model.image_tower"):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(
        after["model.text_tower.text_projection.weight"], before["model.text_tower.text_projection.weight"]
    )


@pytest.mark.slow
def test_killed_in_an_episode_and_in_clustering_it_continues_bitwise(uninterrupted, cache, tmp_path):
    recipe, reference = uninterrupted
    run_dir = tmp_path / "run"
    arguments = ["--recipe", str(recipe), "--run_dir", str(run_dir), "--ds_config", ds_config(2)]
    worker = ["--data.workers", "1"]
    # In step 8, the last of its episode, after a checkpoint at 6.
    killed = Launched(
        [*arguments, *worker], 2, cache, {"die": {"place": "trainer.loop:train_step", "calls": 8, "rank": 1}}
    ).wait()
    assert killed.codes[1] == -9
    assert "episode 1:" in killed.output
    # K-Means searches twice 5 times for images, then for texts: in those of the second of two episodes.
    fault = {"die": {"place": "losses.clustering:nearest", "calls": 20 + 15, "rank": 1}}
    killed = Launched([*arguments, *worker, "--resume", "auto"], 2, cache, fault).wait()
    assert killed.codes[1] == -9, killed.output
    # Clusters come from the checkpoint where it is in an episode, and are made anew where it is between two.
    assert "episode 1:" not in killed.output
    assert "episode 2:" in killed.output
    assert "episode 3:" not in killed.output
    finished = run_trainer([*arguments, "--resume", "auto"], cache, 2)
    assert "episode 2:" not in finished.output
    assert "episode 3:" in finished.output
    assert steps(run_dir) == steps(reference)
    assert [record["step"] for record in metrics(run_dir) if record.get("event") == "resumed"] == [6, 12]
    assert state_hashes(run_dir).items() <= state_hashes(reference).items()


@pytest.mark.slow
def test_other_ranks_stages_and_micro_batches(uninterrupted, cache, tmp_path):
    recipe, reference = uninterrupted
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run")]
    # Changes in the middle of an episode.
    run_trainer([*arguments, "--ds_config", ds_config(3), "--train.stop_after", "10"], cache, 2)
    run_trainer(
        [*arguments, "--ds_config", ds_config(0), "--resume", "auto", "--train.micro_batch_size", "4"], cache, 1
    )
    compare(steps(tmp_path / "run"), steps(reference))


@pytest.mark.slow
def test_external_teacher_and_rollback(uninterrupted, cache, tmp_path):
    recipe, _ = uninterrupted
    teacher = tmp_path / "teacher.npy"
    np.save(teacher, np.random.default_rng(0).standard_normal((96, 5)).astype(np.float16) / 3)
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(1)]
    arguments += ["--method.external_teacher", str(teacher), "--guard.max_skipped", "2", "--method.feature_memory_gib"]
    # Steps 7 and 8 cannot be used: back to step 6, and on with batch 9, in the middle of the next episode.
    faults = {"spoil_loss": {"batches": [7, 8]}}
    finished = run_trainer([*arguments, "0"], cache, faults=faults)
    assert "episode 1: 6 clusters of 64 samples in 3 modalities" in finished.output
    assert "leaving out 2 global batches" in finished.output
    records = steps(tmp_path / "run")
    assert [step for step, record in records.items() if "loss/external" in record] == list(range(5, 17))
    assert all(record["loss"] is not None for record in records.values())
    # Step 6 trains on batch 6 and step 7 on batch 9: another episode, seen whole, and one more until the end.
    assert [finished.output.count(f"episode {number}:") for number in range(6)] == [0, 1, 1, 1, 1, 0]
    changes = [
        step for step in range(6, 17) if records[step]["proto/inertia_text"] != records[step - 1]["proto/inertia_text"]
    ]
    assert changes == [7, 11, 15]
