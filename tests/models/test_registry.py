import open_clip
import pytest
import torch

from models.architectures import ARCHITECTURES, ResNetConfig, VitConfig, list_architectures
from models.registry import build_model

PARAMETER_COUNTS = {
    "vit_b32": 151_277_313,
    "vit_b16": 149_620_737,
    "vit_l14": 427_616_513,
    "vit_s16": 85_290_753,
    "vit_s32": 86_119_041,
    "vit_ti16": 69_051_009,
    "rn50": 102_007_137,
    "rn101": 119_688_033,
    "rn50x4": 178_300_601,
    "rn50x16": 290_979_217,
    "rn50x64": 623_258_305,
    "regnety_640": 345_186_107,
    "vit_ti_p4_32": 18_634_241,
    "vit_ti_p8_32": 18_652_673,
    "vit_ti_p8_64": 18_661_889,
    "vit_nano_p4_32": 7_968_385,
    "vit_nano_p8_32": 7_980_673,
    "vit_nano_p8_64": 7_986_817,
    "vit_pico_p8_32": 7_385_857,
    "vit_femto_p8_32": 3_715_649,
    "rn_pico_32": 8_107_929,
    "rn_femto_32": 4_635_993,
    "rn_nano_32": 8_504_473,
    "rn_nano_64": 8_506_009,
}
CLIP_ARCHITECTURES = [name for name in PARAMETER_COUNTS if name != "regnety_640"]


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build_on_meta(name: str, **options):
    with torch.device("meta"):
        return build_model(name, **{"vocab_size": 49408, **options})


def test_every_architecture_has_an_asserted_size():
    assert list_architectures() == list(PARAMETER_COUNTS)


@pytest.mark.parametrize("name", PARAMETER_COUNTS)
def test_parameter_counts(name):
    assert count_parameters(build_on_meta(name)) == PARAMETER_COUNTS[name]


@pytest.mark.parametrize("name", CLIP_ARCHITECTURES)
def test_parameter_counts_equal_open_clip(name):
    architecture = ARCHITECTURES[name]
    image = architecture.image
    patch_size = image.patch_size if isinstance(image, VitConfig) else None
    vision = {"layers": image.layers, "width": image.width, "patch_size": patch_size}
    text = {"width": architecture.text.width, "layers": architecture.text.layers}
    with torch.device("meta"):
        reference = open_clip.CLIP(
            architecture.embed_dim,
            {"image_size": architecture.image_size, "head_width": 64, **vision},
            {"context_length": 77, "vocab_size": 49408, "heads": architecture.text.width // 64, **text},
            quick_gelu=True,
        )
    assert count_parameters(reference) == PARAMETER_COUNTS[name]


@pytest.mark.parametrize(("name", "embed_dim"), [("vit_b32", 512), ("vit_b32", 3072), ("rn50", 1024)])
def test_declip_options_add_a_bias_a_token_and_width(name, embed_dim):
    model = build_on_meta(name, vocab_size=49409, text_projection_bias=True, embed_dim=embed_dim)
    architecture = ARCHITECTURES[name]
    last_width = 2048 if isinstance(architecture.image, ResNetConfig) else 768
    # An attention pool has a bias on its projection, a ViT has none.
    per_output = last_width + 512 + (1 if last_width == 2048 else 0)
    grown = (embed_dim - architecture.embed_dim) * per_output + 512 + embed_dim
    assert count_parameters(model) == PARAMETER_COUNTS[name] + grown
    assert model.embed_dim == embed_dim


def test_image_size_and_context_length_can_be_overridden():
    model = build_on_meta("vit_b32", image_size=288, context_length=32)
    assert model.image_tower.positional_embedding.shape == (82, 768)
    assert model.text_tower.positional_embedding.shape == (32, 512)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_b23", {}, "unknown model 'vit_b23'; did you mean vit_b32"),
        ("ViT-B/32", {}, "unknown model 'ViT-B/32'"),
        ("zzz", {}, "use one of vit_b32, vit_b16"),
        ("timm:regnety_64", {}, "timm has no architecture 'regnety_64'; close matches: regnety_640"),
        ("rn50", {"freeze_patch_embed": True}, "freeze_patch_embed=True"),
        ("rn50", {"patch_dropout": 0.5}, "patch_dropout=0.5 need one of the vit_"),
        ("vit_b32", {"image_size": 100}, "image_size 100 is not a multiple of patch_size 32; use 96 or 128"),
        ("vit_b32", {"batch_norm": "none"}, "batch_norm 'none' is not known; use one of sync, local"),
    ],
)
def test_mistakes_are_named_with_their_fix(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_on_meta(name, **options)


def test_options_reach_the_towers():
    options = {"activation_checkpointing": True, "patch_dropout": 0.5, "freeze_patch_embed": True}
    model = build_on_meta("vit_nano_p8_32", **options)
    assert model.image_tower.transformer.activation_checkpointing
    assert model.text_tower.transformer.activation_checkpointing
    assert model.image_tower.num_kept_patches == 8
    assert not model.image_tower.patch_embed.weight.requires_grad
    resnet = build_on_meta("rn_nano_32", batch_norm="local", activation_checkpointing=True)
    assert not resnet.image_tower.bn1.sync and not resnet.image_tower.layer4[0].downsample[1].sync
    assert resnet.image_tower.activation_checkpointing
    assert build_on_meta("rn_nano_32").image_tower.layer1[0].bn2.sync
