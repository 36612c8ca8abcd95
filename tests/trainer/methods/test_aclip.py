"""A-CLIP: terms against a slow reference, masks, cost, bad settings, and that it learns to keep what matters."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from losses import normalize
from models.registry import build_model
from tests.losses import reference
from tests.trainer.methods.aclip_batches import SETTINGS, micro_batch
from trainer.config.sections import TrainConfig
from trainer.errors import ConfigError
from trainer.loading import load_config, parse_config
from trainer.methods import METHODS, Method, parse_method

NAME = "vit_femto_p8_32"


def make_method(
    name: str = "aclip", model_name: str = NAME, *, model: dict[str, Any] | None = None, **settings
) -> Method:
    torch.manual_seed(0)
    built = build_model(model_name, vocab_size=49_409, **(model or {}))
    _, parsed = parse_method({"name": name, **settings})
    return METHODS[name](built, parsed, None).train()


def aclip(**settings) -> Method:
    return make_method(**{**SETTINGS, **settings})


def begin_run(method: Method, steps: int) -> Method:
    method.begin_run(TrainConfig(steps=steps, global_batch_size=8), None)
    return method


def run(method: Method, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    return method("train", {"micro_batches": list(batches)})


def batch_norm(rows: Tensor) -> Tensor:
    return (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()


def mlp(rows: Tensor, layers: torch.nn.Sequential) -> Tensor:
    """A head written out for one view; gain 1 and shift 0 as at the start."""
    linears = [layer for layer in layers if hasattr(layer, "in_features")]
    for number, layer in enumerate(linears):
        rows = rows @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        if number < len(linears) - 1:
            rows = batch_norm(rows).relu()
    return rows


def slow_terms(method: Method, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The paper's equations view by view, from the towers on."""
    tower, model = method.model.image_tower, method.model
    kept = method.prepare(batch)["kept_patches"]
    texts = model.encode_text(batch["token_ids"][0], batch["text_lengths"][0]).features
    images, pooled = zip(
        *(
            tower(method.pixels(view), kept=rows, with_pooled=True)
            for view, rows in zip(batch["images"], kept, strict=True)
        ),
        strict=True,
    )
    clip = sum(reference.info_nce(normalize(view), normalize(texts), model.logit_scale()) for view in images) / 2
    projections = [F.normalize(mlp(view, method.simclr.projector), dim=-1) for view in pooled]
    with torch.no_grad():
        teacher, _ = method.teacher.attend(method.pixels(batch["context_images"][0]))
        targets = mlp(teacher, method.teacher_projector)
    predictions = [mlp(mlp(view, method.byol.projector), method.byol.predictor) for view in pooled]
    byol = sum((2 - 2 * F.cosine_similarity(prediction, targets)).mean() for prediction in predictions) / 2
    return {"clip": clip, "simclr": reference.simclr(*projections, 0.1), "byol": byol}


def test_terms_and_gradients_against_the_equations():
    method, batch = aclip().double(), micro_batch(0, 8)
    scale = method.model.logit_scale
    scale.forward = lambda: scale.log_value.exp()
    begin_run(method, 10).begin_step(1, 0)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # The heads' gains and shifts stay at their start, which the reference takes for granted.
    for layer in method.modules():
        if type(layer).__name__ == "BatchNorm" and isinstance(layer.weight, torch.nn.Parameter):
            torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
    found = run(method, batch)
    expected = slow_terms(method, batch)
    for name, term in expected.items():
        torch.testing.assert_close(found[f"loss/{name}"], term.detach(), atol=1e-10, rtol=1e-10)
    total = expected["clip"] + expected["simclr"] + 2 * expected["byol"]
    parameters = {name: value for name, value in method.named_parameters() if value.requires_grad}
    gradients = [
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) for loss in (found["loss"], total)
    ]
    for name, ours, slow in zip(parameters, *gradients, strict=True):
        # The reference leaves gain and shift of the batch norms out.
        if slow is not None:
            torch.testing.assert_close(ours, slow, atol=1e-9, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert sum(slow is None for slow in gradients[1]) == 2 * 4


def test_micro_batches_change_nothing_and_the_teacher_runs_once_in_each():
    method = aclip()
    calls = []
    attend = method.teacher.attend
    method.teacher.attend = lambda images: calls.append(len(images)) or attend(images)
    results = []
    for size in (8, 2):
        method.zero_grad()
        terms = run(method, *(micro_batch(start, start + size) for start in range(0, 8, size)))
        terms["loss"].backward()
        results.append((terms, {name: value.grad.clone() for name, value in method.named_parameters()}))
    assert calls == [8, 2, 2, 2, 2]
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, atol=1e-5, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def swapped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.tensor([0, 2, 1])
    return {**batch, "images": batch["images"].flip(0), "crop_boxes": batch["crop_boxes"][order]}


def test_views_may_be_swapped_and_both_count():
    method, batch = aclip(), micro_batch(0, 8)
    terms = run(method, batch)
    for name, value in run(method, swapped(batch)).items():
        torch.testing.assert_close(value, terms[name], atol=2e-5, rtol=1e-5)
    changed = {**batch, "images": torch.stack([batch["images"][0], batch["images"][1].roll(1, 0)])}
    for name in ("loss/clip", "loss/simclr", "loss/byol"):
        assert not torch.isclose(run(method, changed)[name], terms[name], rtol=1e-4), name


def test_two_equal_views_without_a_mask_are_plain_clip():
    method, batch = aclip(), micro_batch(0, 8)
    batch["images"] = batch["images"][:1].expand(2, -1, -1, -1, -1)
    everything = torch.arange(16).expand(2, 8, -1)
    plain = {**batch, "images": batch["images"][:1]}
    expected = make_method("clip")
    expected.model.load_state_dict(method.model.state_dict())
    prepared = {**method.prepare(batch), "kept_patches": everything}
    found = method.objective(method.encode(prepared))
    torch.testing.assert_close(found["loss/clip"], run(expected, plain)["loss/clip"])


def test_masks_keep_what_the_teacher_attends_to_and_evaluation_keeps_all():
    method, batch = aclip(mask_block=2, model_name="vit_nano_p4_32"), micro_batch(0, 8)
    batch["crop_boxes"][:] = torch.tensor([0, 0, 32, 32])
    batch["context_images"] = batch["images"][:1]
    prepared = method.prepare(batch)
    _, scores = method.teacher.attend(method.pixels(batch["context_images"][0]))
    blocks = F.avg_pool2d(scores, 2).flatten(1)
    assert prepared["kept_patches"].shape == (2, 8, 36)
    for view in prepared["kept_patches"]:
        for row, values in zip(view.tolist(), blocks.tolist(), strict=True):
            best = sorted(range(16), key=lambda block: -values[block])[:9]
            expected = {(b // 4 * 2 + r) * 8 + b % 4 * 2 + c for b in best for r in (0, 1) for c in (0, 1)}
            assert set(row) == expected
    share = blocks.sort(dim=1, descending=True).values[:, :9].sum(1) / blocks.sum(1)
    torch.testing.assert_close(prepared["kept_attention"], share)
    images = batch["images"][0]
    whole = normalize(method.model.image_tower(method.pixels(images)))
    found = method.eval()("image", {"images": images})["embeddings"]
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)


def test_no_gradient_reaches_the_teacher_and_terms_can_be_left_out():
    method = aclip()
    run(method, micro_batch(0, 8))["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert not any(buffer.requires_grad for buffer in method.buffers())
    metrics = method.metrics()
    assert 9 / 16 < metrics["aclip/kept_attention"] < 1
    assert metrics["simclr/std"] > 0 and metrics["byol/std"] > 0
    bare = aclip(w_simclr=0, w_byol=0)
    assert not any(name.startswith(("simclr", "byol", "teacher_projector")) for name in bare.state_dict())
    terms = run(bare, micro_batch(0, 8))
    assert torch.equal(terms["loss"].detach(), terms["loss/clip"])
    begin_run(bare, 2).begin_step(1, 0)
    assert bare.metrics().keys() == {"aclip/momentum", "aclip/kept_attention"}


def test_the_teacher_follows_the_weights_once_a_step():
    method = aclip(teacher_momentum=0.5)
    tower, teacher = method.model.image_tower, method.teacher
    with torch.no_grad():
        tower.class_embedding.fill_(4.0)
        method.byol.projector[0].weight.fill_(2.0)
    # Weights that training starts from may be loaded after the method is made.
    begin_run(method, 8).begin_step(1, 0)
    assert (teacher.class_embedding == 4.0).all()
    assert (method.teacher_projector[0].weight == 2.0).all()
    with torch.no_grad():
        tower.class_embedding.fill_(8.0)
    run(method, micro_batch(0, 2), micro_batch(2, 4))
    assert (teacher.class_embedding == 4.0).all()
    method.begin_step(5, 4)
    # Half of the way from 0.5 to 1.
    assert method.metrics()["aclip/momentum"] == 0.75
    assert (teacher.class_embedding == 5.0).all()


def flops(function: Callable[[], Any]) -> int:
    # Autocast knows no device "meta".
    without = mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with without, FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.slow
def test_cost_at_paper_scale():
    """Two views forward and backward (three passes) over the kept tokens, one forward of the teacher, one caption."""
    samples, paper = 2, {"model_name": "vit_b16", "model": {"freeze_patch_embed": True}}
    with torch.device("meta"):
        method, clip = make_method(**paper), make_method("clip", **paper)
        efficient = make_method(**paper, teacher_image_size=112)
        captions = {"token_ids": torch.ones(1, samples, 77, dtype=torch.int64)}
        pixels = torch.zeros(samples, 3, 224, 224)
        kept = torch.zeros(samples, 100, dtype=torch.int64)
        boxes = torch.zeros(3, samples, 4, dtype=torch.int64)
        views = torch.zeros(2, samples, 3, 224, 224, dtype=torch.uint8)
    captions["text_lengths"] = torch.full((1, samples), 77)
    batch = {**captions, "images": views, "context_images": views[:1], "crop_boxes": boxes}
    small = {"context_images": views[:1, ..., ::2, ::2], "crop_boxes": boxes}
    plain = flops(lambda: run(clip, {**captions, "images": views[:1]})["loss"].backward())
    full = flops(lambda: run(method, batch)["loss"].backward())
    with torch.no_grad():
        whole = flops(lambda: method.model.image_tower(pixels))
        masked = flops(lambda: method.model.image_tower(pixels, kept=kept))
        written = flops(lambda: method.model.encode_text(captions["token_ids"][0], captions["text_lengths"][0]))
        teacher, small_teacher = flops(lambda: method.prepare(batch)), flops(lambda: efficient.prepare(small))
    print(*(f"{value / samples / 1e9:.1f}" for value in (plain, full, whole, masked, written, teacher, small_teacher)))
    assert masked / whole == pytest.approx(8.77 / 17.4, rel=0.1)
    assert teacher / whole == pytest.approx(1.0, rel=0.1)
    assert small_teacher / whole == pytest.approx(0.25, rel=0.1)
    assert full == pytest.approx(6 * masked + teacher + 3 * written, rel=0.1)
    assert full / plain == pytest.approx(1.29, rel=0.1)
    assert (full - teacher + small_teacher) / plain == pytest.approx(1.07, rel=0.1)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"name": "rn_pico_32"}, {}, "needs one of the vit_* models"),
        ({"patch_dropout": 0.5}, {}, "set model.patch_dropout 0"),
        ({}, {"mask_block": 3}, "method.mask_block 3 does not divide the 4 patches along a side of a view"),
        ({}, {"teacher_image_size": 20}, "not a multiple of the patch size 8; use 16 or 24"),
        ({}, {"mask_block": 2, "keep_ratio": 0.8}, "keeps all 4 blocks of a view, so nothing is masked"),
    ],
)
def test_settings_that_do_not_fit_are_named(model, settings, message):
    from trainer.assemble import build_method
    from trainer.pipeline import build_tokenizer

    tree = {
        "model": {"name": NAME, **model},
        "method": {"name": "aclip", **SETTINGS, **settings},
        "data": {"train": "none"},
        "train": {"steps": 1, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
    }
    config = parse_config(tree)
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        build_method(config, build_tokenizer(config))


def test_recipe_holds_the_published_settings():
    config = load_config("aclip_yfcc15m_vitb16")
    assert config.train.steps * config.train.global_batch_size == pytest.approx(25 * 15_388_848, rel=1e-4)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (5e-4, 0.5)
    assert (config.schedule.start_lr, config.schedule.end_lr) == (1e-6, 1e-5)
    assert config.schedule.warmup_steps * 25 == pytest.approx(config.train.steps, rel=1e-3)
    assert config.model.freeze_patch_embed
    method = config.method
    assert (method["w_clip"], method["w_simclr"], method["w_byol"]) == (1.0, 1.0, 2.0)
    assert (method["teacher_momentum"], method["simclr_temperature"], method["teacher_image_size"]) == (
        0.996,
        0.1,
        None,
    )
    assert load_config("aclip_eff_yfcc15m_vitb16").method == {**method, "teacher_image_size": 112}
    with torch.device("meta"):
        full = make_method(model_name="vit_b16")
    assert "masks: 100 of 196 patches kept per view" in full.describe(4096)[-1]


def salient_batch(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Grey noise with one of 16 patterns on one of 16 patches, named by the caption, and on which patch it is."""
    patterns = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    labels, places = torch.randint(0, 16, (2, count), generator=generator)
    images = torch.randint(96, 160, (3, count, 3, 32, 32), generator=generator)
    for row, (label, place) in enumerate(zip(labels.tolist(), places.tolist(), strict=True)):
        top, left = place // 4 * 8, place % 4 * 8
        images[:, row, :, top : top + 8, left : left + 8] = patterns[label]
    images = images.to(torch.uint8)
    batch = {
        "images": images[:2],
        "context_images": images[2:],
        "crop_boxes": torch.tensor([0, 0, 32, 32]).expand(3, count, 4),
        "token_ids": torch.stack([torch.full((count,), 49_406), 100 + labels, torch.full((count,), 49_407)], dim=1)[
            None
        ],
        "text_lengths": torch.full((1, count), 3),
    }
    return batch, places


def kept_share(method: Method, batch: dict[str, Tensor], places: Tensor) -> float:
    kept = method.prepare(batch)["kept_patches"]
    return float((kept == places[None, :, None]).any(-1).float().mean())


@pytest.mark.slow
def test_the_teacher_learns_to_keep_what_the_captions_name():
    method, generator, steps = aclip(teacher_image_size=32, teacher_momentum=0.9), torch.Generator().manual_seed(3), 30
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    held_out = salient_batch(256, generator)
    begin_run(method, steps)
    start = kept_share(method, *held_out)
    for step in range(1, steps + 1):
        method.begin_step(step, step - 1)
        optimizer.zero_grad()
        run(method, salient_batch(32, generator)[0])["loss"].backward()
        optimizer.step()
    end = kept_share(method, *held_out)
    print(f"the patch that matters is kept in {start:.3f} of the views at the start, in {end:.3f} after {steps} steps")
    # A random mask keeps 9 of 16.
    assert start < 0.7
    assert end > 0.95
