import pytest
import torch
import torch.nn.functional as F

from models.text import TextTransformer

SIZES = {"vocab_size": 500, "context_length": 20, "width": 128, "layers": 3, "heads": 2, "embed_dim": 48}
LENGTHS = torch.tensor([4, 9, 2, 12])


def make_tower(**options) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(**{**SIZES, **options})


def make_token_ids(padding: str = "zeros", positions: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(1, 500, (4, positions), generator=generator)
    is_padding = torch.arange(positions) >= LENGTHS[:, None]
    if padding == "zeros":
        return token_ids.masked_fill(is_padding, 0)
    other = torch.randint(1, 500, token_ids.shape, generator=torch.Generator().manual_seed(2))
    return token_ids.where(~is_padding, other)


@pytest.mark.parametrize("with_hidden_states", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_trimming_equals_the_whole_context(with_hidden_states, dtype, tolerance):
    tower, token_ids = make_tower().to(dtype), make_token_ids()
    widths = []
    tower.transformer.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    trimmed, states = tower(token_ids, LENGTHS, with_hidden_states)
    # An extra caption of full length keeps every position.
    whole, whole_states = tower(
        torch.cat([token_ids, token_ids[:1]]), torch.cat([LENGTHS, torch.tensor([20])]), with_hidden_states
    )
    assert widths == [12, 20]
    assert (F.normalize(trimmed, dim=-1) - F.normalize(whole[:4], dim=-1)).abs().max() <= tolerance
    if with_hidden_states:
        assert states.shape == (4, 20, 128)
        torch.testing.assert_close(states[:, :12], whole_states[:4, :12], atol=4 * tolerance, rtol=0)
        assert not states[:, 12:].any()
    else:
        assert states is None and whole_states is None


def test_without_hidden_states_features_and_gradients_are_the_same():
    towers = make_tower().double(), make_tower().double()
    features = [
        tower(make_token_ids(), LENGTHS, wanted)[0] for tower, wanted in zip(towers, (True, False), strict=True)
    ]
    torch.testing.assert_close(*features)
    for output in features:
        output.square().sum().backward()
    for (name, one), other in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_padding_content_has_no_effect():
    tower = make_tower()
    for wanted in (True, False):
        one, _ = tower(make_token_ids("zeros"), LENGTHS, wanted)
        other, _ = tower(make_token_ids("random"), LENGTHS, wanted)
        assert torch.equal(one, other)


def test_a_token_changes_later_states_only():
    tower = make_tower()
    token_ids = make_token_ids("random")
    changed = token_ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 500
    lengths = torch.full((4,), 20)
    _, before = tower(token_ids, lengths)
    _, after = tower(changed, lengths)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(-1) > 1e-5).all()


def test_features_are_the_projected_state_of_the_last_token():
    tower = make_tower(projection_bias=True)
    with torch.no_grad():
        tower.text_projection.bias.normal_()
    features, states = tower(make_token_ids(), LENGTHS)
    for row, length in enumerate(LENGTHS):
        expected = tower.text_projection.weight @ states[row, length - 1] + tower.text_projection.bias
        torch.testing.assert_close(features[row], expected)


def test_initial_weights_follow_clip():
    tower = make_tower(width=256, heads=4, layers=8, vocab_size=3000, projection_bias=True)
    residual_std = 256**-0.5 * 16**-0.5
    block = tower.transformer.resblocks[5]
    stds = {
        tower.token_embedding.weight: 0.02,
        tower.positional_embedding: 0.01,
        block.attn.in_proj_weight: 256**-0.5,
        block.attn.out_proj.weight: residual_std,
        block.mlp.c_fc.weight: 512**-0.5,
        block.mlp.c_proj.weight: residual_std,
        tower.text_projection.weight: 256**-0.5,
    }
    for parameter, std in stds.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.03)
    for bias in (block.attn.in_proj_bias, block.attn.out_proj.bias, tower.text_projection.bias):
        assert not bias.any()


def test_activation_checkpointing_changes_nothing():
    towers = make_tower(), make_tower(activation_checkpointing=True)
    for tower in towers:
        features, states = tower(make_token_ids(), LENGTHS)
        (features.square().sum() + states.square().sum()).backward()
    for one, other in zip(towers[0].parameters(), towers[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("pure", [False, True])
def test_bfloat16_stays_close_to_fp32(pure):
    tower = make_tower()
    expected = tower(make_token_ids(), LENGTHS)[0].detach()
    if pure:
        features, states = tower.to(torch.bfloat16)(make_token_ids(), LENGTHS)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            features, states = tower(make_token_ids(), LENGTHS)
    assert features.dtype == torch.bfloat16
    assert F.cosine_similarity(features.float(), expected).min() > 0.999
    (features.float().sum() + states.float().sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tower.parameters())


@pytest.mark.parametrize(
    ("token_ids", "lengths", "message"),
    [
        (torch.ones(2, 21, dtype=torch.long), torch.tensor([3, 3]), "21 positions, more than context_length 20"),
        (torch.ones(2, 5, dtype=torch.long), torch.tensor([3, 6]), r"text_lengths span \[3, 6\]"),
        (torch.ones(2, 5, dtype=torch.long), torch.tensor([0, 3]), r"text_lengths span \[0, 3\]"),
        (torch.ones(2, 5, dtype=torch.long), torch.tensor([3]), "do not match"),
    ],
)
def test_wrong_arguments_are_refused(token_ids, lengths, message):
    with pytest.raises(ValueError, match=message):
        make_tower()(token_ids, lengths)
