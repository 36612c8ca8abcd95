import pytest
import torch

from data.captions.tokenizer import ClipTokenizer
from models.registry import build_model
from models.weights.fitting import fit_state


def build(**options):
    return build_model("vit_pico_p8_32", **{"vocab_size": 49408, "context_length": 16, **options})


def test_equal_sizes_are_left_alone():
    model = build()
    state, notes = fit_state(build(), model.state_dict())
    assert notes == []
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_shorter_context_keeps_the_features_of_captions_that_fit():
    long, short = build(), build(context_length=9)
    state, notes = fit_state(short, long.state_dict())
    short.load_state_dict(state)
    assert notes == ["text_tower.positional_embedding adapted from [16, 128] to [9, 128]"]
    ids, lengths = torch.randint(1, 49406, (2, 9)), torch.tensor([9, 4])
    torch.testing.assert_close(short.encode_text(ids, lengths).features, long.encode_text(ids, lengths).features)


@pytest.mark.parametrize("gains", [True, False])
def test_the_vocabulary_gains_or_loses_the_mask_token(gains):
    tokenizers = [ClipTokenizer(mask_token=mask, context_length=16) for mask in (not gains, gains)]
    models = [build(vocab_size=tokenizer.vocab_size) for tokenizer in tokenizers]
    state, notes = fit_state(models[1], models[0].state_dict())
    models[1].load_state_dict(state)
    assert len(notes) == 1
    features = []
    for tokenizer, model in zip(tokenizers, models, strict=True):
        ids = torch.tensor([tokenizer.encode("a photo of a cat")])
        features.append(model.encode_text(ids, torch.tensor([ids.shape[1]])).features)
    assert torch.equal(*features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 20}, r"of another shape 1: text_tower.positional_embedding \[16, 128\] instead of"),
        ({"text_projection_bias": True}, "missing 1: text_tower.text_projection.bias"),
        ({"embed_dim": 64}, "of another shape 2: image_tower.proj.weight"),
        ({"vocab_size": 1000}, "of another shape 1: text_tower.token_embedding.weight"),
    ],
)
def test_other_differences_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit_state(build(**options), build().state_dict())


def test_what_is_left_over_is_refused():
    with pytest.raises(ValueError, match="left over 1: extra"):
        fit_state(build(), {**build().state_dict(), "extra": torch.zeros(1)})
