"""SLIP, SigLIP and ALIGN as methods: the same gradients on any ranks, the same run after a stop, their cost."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_distributed
from tests.trainer.harness import ds_config, run_trainer, steps, write_recipe
from tests.trainer.methods.test_gradients import TOLERANCE, gradients_on_rank, micro_batch, worst_error
from trainer.building import build_method
from trainer.loading import parse_config
from trainer.pipeline import build_tokenizer

VIT = {"name": "vit_nano_p8_32", "patch_dropout": 0.5}
SLIP = {"name": "slip", "simclr_hidden_dim": 32, "simclr_out_dim": 16}
ALIGN = {"name": "align", "logit_scale_init": 5.0}
BERT = {"text_name": "hf:builtin/bert_tiny"}
EFFICIENTNET = {"name": "timm:test_efficientnet", "image_size": 32, "embed_dim": 32, **BERT}
# The second caption is read by neither term left, the second view by SimSiam; the first caption is edited and masked.
FEWER_VIEWS = {
    "name": "declip",
    "w_mvs": 0.0,
    "w_nns": 0.0,
    "iss_hidden_dim": 32,
    "iss_predictor_dim": 16,
    "image_views": ["base", "augmented"],
    "text_views": ["eda", "original"],
}
FAMILY = {
    "slip": {"model": VIT, "method": SLIP},
    "siglip": {"model": VIT, "method": {"name": "siglip"}},
    "align": {"model": VIT | BERT, "method": ALIGN},
    "align, EfficientNet": {"model": EFFICIENTNET, "method": ALIGN},
    "declip, fewer views": {"model": VIT, "method": FEWER_VIEWS, "data": {"train": "none", "mask_token": True}},
}
# (ZeRO stage, micro-batches) by ranks. Batch norm in a tower sees one micro-batch at a time.
CASES = {
    1: {name: [(0, 1)] for name in FAMILY},
    2: {
        "slip": [(0, 4), (3, 1)],
        "siglip": [(3, 4)],
        "align": [(3, 4)],
        "align, EfficientNet": [(2, 1)],
        "declip, fewer views": [(3, 2)],
    },
    4: {"slip": [(2, 2)], "siglip": [(1, 2)], "align": [(2, 1)]},
}
# Batch norm divides rounding by small deviations; the biases in front of it have no gradient but rounding.
TOLERANCES = dict.fromkeys(("slip", "align, EfficientNet", "declip, fewer views"), 4 * TOLERANCE)


def all_gradients(rank: int, world_size: int) -> dict[str, list[dict]]:
    """By name of `FAMILY`, for the cases of this number of ranks."""
    return {
        name: gradients_on_rank(
            rank,
            world_size,
            [(stage, pieces, None) for stage, pieces in cases],
            {"data": {"train": "none"}, **FAMILY[name]},
        )
        for name, cases in CASES[world_size].items()
    }


@pytest.fixture(scope="module")
def reference():
    return run_distributed(all_gradients, 1, timeout_s=300)[0]


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_gradient_equals_one_rank(world_size, reference):
    results = run_distributed(all_gradients, world_size, timeout_s=500)[0]
    for name, cases in CASES[world_size].items():
        (wanted,) = reference[name]
        for case, result in zip(cases, results[name], strict=True):
            assert math.isclose(result["loss"], wanted["loss"], rel_tol=1e-6), (name, case)
            assert result["gradients"].keys() == wanted["gradients"].keys()
            error, parameter = worst_error(result["gradients"], wanted["gradients"])
            print(world_size, name, case, error, parameter)
            assert error < TOLERANCES.get(name, TOLERANCE), (name, case, parameter)
    assert "model.logit_bias.value" in reference["siglip"][0]["gradients"]
    assert any(parameter.startswith("simclr.") for parameter in reference["slip"][0]["gradients"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "model", "terms"),
    [
        ("slip", {"name": "rn_pico_32"}, {"loss/clip", "loss/simclr", "simclr/std"}),
        ("siglip", {"name": "vit_pico_p8_32"}, {"loss/sigmoid", "logit_bias"}),
        ("align", EFFICIENTNET, {"loss/align", "loss/clip"}),
    ],
)
def test_a_resumed_run_is_bitwise_the_whole_one(method, model, terms, shards, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, method, model=model, train={"steps": 12})
    arguments = ["--recipe", str(recipe), "--ds_config", ds_config(2), "--checkpoint.every", "5", "--run_dir"]
    run_trainer([*arguments, str(tmp_path / "whole")], cache)
    whole = steps(tmp_path / "whole")
    assert len(whole) == 12
    assert whole[1].keys() >= terms | {"loss", "logit_scale"}
    assert whole[12]["loss"] < whole[1]["loss"]
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_5"
    run_trainer([*arguments, str(tmp_path / "resumed"), "--resume", str(checkpoint)], cache)
    assert steps(tmp_path / "resumed") == {step: whole[step] for step in range(6, 13)}


def build(method: dict, **model):
    tree = {
        "model": {"name": "vit_femto_p8_32", **model},
        "method": method,
        "data": {"train": "none"},
        "train": {"steps": 1, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
    }
    config = parse_config(tree)
    torch.manual_seed(0)
    return build_method(config, build_tokenizer(config))


def flops(method, samples: int) -> int:
    """Of a forward and backward."""
    batch = micro_batch(0, samples, len(method.image_views), len(method.text_views))
    with FlopCounterMode(display=False) as counter:
        method("train", {"micro_batches": [batch]})["loss"].backward()
    return counter.get_total_flops()


def tower_flops(method, samples: int) -> tuple[int, int]:
    """Of a forward and backward of one image and one text pass."""
    batch = micro_batch(0, samples, 1, 1)
    with FlopCounterMode(display=False) as image:
        method.model.encode_image_views(method.pixels(batch["images"])).sum().backward()
    with FlopCounterMode(display=False) as text:
        method.model.encode_text(batch["token_ids"][0], batch["text_lengths"][0]).features.sum().backward()
    return image.get_total_flops(), text.get_total_flops()


def test_cost_is_that_of_the_passes():
    samples = 16
    image, text = tower_flops(build({"name": "clip"}), samples)
    hidden, out = SLIP["simclr_hidden_dim"], SLIP["simclr_out_dim"]
    head = 3 * 2 * 2 * samples * (128 * hidden + hidden * hidden + hidden * out)
    for method, passes in (
        ({"name": "clip"}, image + text),
        ({"name": "siglip"}, image + text),
        ({"name": "align"}, image + text),
        (SLIP, 3 * image + text + head),
        ({**SLIP, "w_simclr": 0.0}, image + text),
    ):
        # The loss adds a little, and SimCLR's views save the backward of a projection that nothing reads.
        assert flops(build(method), samples) == pytest.approx(passes, rel=0.01), method


def test_a_weight_of_zero_leaves_out_views_and_head():
    whole, plain = build(SLIP), build({**SLIP, "w_simclr": 0.0})
    assert (whole.image_views, plain.image_views) == (("base", "augmented", "augmented"), ("base",))
    assert not any(name.startswith("simclr") for name, _ in plain.named_parameters())
    assert (whole.exchanged_per_sample(), plain.exchanged_per_sample()) == ((128 + 2 * 16, 128), (128, 128))
    batch = micro_batch(0, 8, 3, 1)
    terms = whole("train", {"micro_batches": [batch]})
    assert terms["loss"].item() == pytest.approx(float(terms["loss/clip"] + terms["loss/simclr"]))
    base = {name: value[:1] if name in ("images", "view_keys") else value for name, value in batch.items()}
    plain.load_state_dict({name: value for name, value in whole.state_dict().items() if not name.startswith("simclr")})
    assert plain("train", {"micro_batches": [base]})["loss"].item() == pytest.approx(terms["loss/clip"].item())


def test_where_training_starts():
    siglip = build({"name": "siglip"}).model
    assert (siglip.logit_scale().item(), siglip.logit_bias().item()) == (pytest.approx(10.0), -10.0)
    assert build({"name": "align"}).model.logit_scale().item() == 1.0
    assert build({"name": "clip"}).model.logit_bias is None


def test_configurations_that_ship_need_no_network():
    with pytest.raises(ValueError, match=r"known: builtin/bert_base, builtin/bert_large, builtin/bert_tiny"):
        build({"name": "align"}, text_name="hf:builtin/bert_huge")
    tower = build({"name": "align"}, **BERT).model.text_tower
    with pytest.raises(ValueError, match="'builtin/bert_tiny' is a configuration without weights"):
        tower.load_pretrained()
    # The padding id of BERT is a word of CLIP's vocabulary, which must learn like any other.
    assert tower.backbone.embeddings.word_embeddings.padding_idx is None
