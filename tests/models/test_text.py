import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from models.text import TextTransformer, caption_rows, pack_captions

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


def all_rows(lengths: torch.Tensor = LENGTHS, positions: int = 20) -> torch.Tensor:
    """Flat positions of every token of every caption."""
    return torch.tensor([row * positions + i for row, length in enumerate(lengths.tolist()) for i in range(length)])


def padded_reference(
    tower: TextTransformer, token_ids: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower on every position of the padded ids, written out; features and all states [n, T, width]."""
    num_positions = token_ids.shape[1]
    hidden = torch.ones(num_positions, num_positions, dtype=torch.bool).triu(1)
    x = tower.token_embedding.weight[token_ids] + tower.positional_embedding[:num_positions]
    for block in tower.transformer.resblocks:
        attention, mlp = block.attn, block.mlp
        query, key, value = (
            (block.ln_1(x) @ attention.in_proj_weight.T + attention.in_proj_bias)
            .unflatten(-1, (3, attention.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + attention.out_proj(attended)
        inner = mlp.c_fc(block.ln_2(x))
        x = x + mlp.c_proj(inner * torch.sigmoid(1.702 * inner))
    states = tower.ln_final(x)
    return tower.text_projection(states[torch.arange(len(lengths)), lengths - 1]), states


def gradients(tower: TextTransformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("lengths", [[4, 9, 2, 12], [7, 7, 7, 7], [1, 20, 20, 1]])
@pytest.mark.parametrize(
    "wanted", [None, [], [0, 61, 22, 60, 21], "all"], ids=["features", "no_states", "some_states", "all_states"]
)
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_packing_equals_the_padded_tower(lengths, wanted, activation_checkpointing):
    tower = make_tower(projection_bias=True, activation_checkpointing=activation_checkpointing).double()
    reference = make_tower(projection_bias=True).double()
    lengths = torch.tensor(lengths)
    token_ids = make_token_ids("random")
    rows = all_rows(lengths) if wanted == "all" else wanted
    if isinstance(rows, list):
        rows = torch.tensor(rows, dtype=torch.long)
        rows = rows[rows % 20 < lengths[rows // 20]]
    features, states = tower(token_ids, lengths, rows)
    expected, every_state = padded_reference(reference, token_ids, lengths)
    torch.testing.assert_close(features, expected, atol=1e-10, rtol=0)
    loss, expected_loss = features.square().sum(), expected.square().sum()
    if rows is None:
        assert states is None
    else:
        expected_states = every_state.flatten(0, 1)[rows]
        torch.testing.assert_close(states, expected_states, atol=1e-10, rtol=0)
        weights = torch.randn(states.shape, dtype=torch.float64)
        loss, expected_loss = loss + (states * weights).sum(), expected_loss + (expected_states * weights).sum()
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(gradients(tower), gradients(reference), atol=1e-10, rtol=1e-10)


def test_a_row_asked_for_twice_counts_twice():
    # The last token of the first caption is pooled and, twice, a state.
    tower, reference = make_tower().double(), make_tower().double()
    features, states = tower(make_token_ids(), LENGTHS, torch.tensor([3, 3]))
    (features.sum() + states.square().sum()).backward()
    expected, every_state = padded_reference(reference, make_token_ids(), LENGTHS)
    (expected.sum() + 2 * every_state[0, 3].square().sum()).backward()
    torch.testing.assert_close(gradients(tower), gradients(reference), atol=1e-10, rtol=1e-10)


def test_only_real_tokens_are_computed():
    tower = make_tower(layers=2)
    tokens = {}
    for name, module in tower.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args, name=name: tokens.__setitem__(name, args[0].shape[0]))
    tower(make_token_ids(), LENGTHS, torch.tensor([0, 3]))
    total, used = int(LENGTHS.sum()), 5  # Four pooled tokens, one of which is also asked for.
    expected = {"ln_final": used, "text_projection": 4}
    for block, ends in ((0, total), (1, used)):
        prefix = f"transformer.resblocks.{block}"
        expected |= {f"{prefix}.ln_1": total, f"{prefix}.attn.out_proj": ends, f"{prefix}.ln_2": ends}
        expected |= {f"{prefix}.mlp.c_fc": ends, f"{prefix}.mlp.c_proj": ends}
    assert tokens == expected


def test_padding_content_has_no_effect():
    tower = make_tower()
    one, states = tower(make_token_ids("zeros"), LENGTHS, all_rows())
    other, other_states = tower(make_token_ids("random"), LENGTHS, all_rows())
    assert torch.equal(one, other)
    assert torch.equal(states, other_states)
    narrow, _ = tower(make_token_ids("zeros")[:, :12], LENGTHS)
    assert torch.equal(narrow, tower(make_token_ids("random"), LENGTHS)[0])


def test_captions_do_not_see_each_other():
    tower = make_tower().double()
    together, _ = tower(make_token_ids(), LENGTHS)
    alone = [tower(make_token_ids()[row : row + 1], LENGTHS[row : row + 1])[0] for row in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=0)


def test_a_token_changes_later_states_only():
    tower = make_tower()
    token_ids = make_token_ids("random")
    changed = token_ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 500
    lengths = torch.full((4,), 20)
    before, after = (tower(ids, lengths, torch.arange(80))[1].unflatten(0, (4, 20)) for ids in (token_ids, changed))
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(-1) > 1e-5).all()


def test_compiled_tower_keeps_its_graphs_when_shapes_change():
    counter = CompileCounterWithBackend("eager")
    tower, compiled = make_tower(layers=2), make_tower(layers=2)
    compiled.compile(backend=counter, dynamic=True)
    frames = []
    for size in (3, 5, 8):
        lengths = torch.randint(1, 21, (size,), generator=torch.Generator().manual_seed(size))
        token_ids = torch.randint(1, 500, (size, int(lengths.max())))
        rows = all_rows(lengths, token_ids.shape[1])[::3]
        for output, expected in zip(compiled(token_ids, lengths, rows), tower(token_ids, lengths, rows), strict=True):
            torch.testing.assert_close(output, expected)
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames[1] == frames[-1]


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


def test_activation_checkpointing_recomputes_every_block():
    tower = make_tower(activation_checkpointing=True)
    calls = []
    for block in tower.transformer.resblocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    tower(make_token_ids(), LENGTHS)[0].sum().backward()
    assert all(calls.count(block) == 2 for block in tower.transformer.resblocks)


@pytest.mark.parametrize("pure", [False, True])
def test_bfloat16_stays_close_to_fp32(pure):
    tower = make_tower()
    expected = tower(make_token_ids(), LENGTHS)[0].detach()
    if pure:
        features, states = tower.to(torch.bfloat16)(make_token_ids(), LENGTHS, all_rows())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            features, states = tower(make_token_ids(), LENGTHS, all_rows())
    assert features.dtype == torch.bfloat16
    assert states.shape == (27, 128)
    assert F.cosine_similarity(features.float(), expected).min() > 0.999
    (features.float().sum() + states.float().sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tower.parameters())


@pytest.mark.parametrize(
    ("positions", "lengths", "rows", "message"),
    [
        (21, [3, 3], None, "21 positions, more than context_length 20"),
        (5, [3, 6], None, r"text_lengths span \[3, 6\]"),
        (5, [0, 3], None, r"text_lengths span \[0, 3\]"),
        (5, [3], None, "do not match"),
        (5, [3, 3], [2, 3], "state_rows name 3, which is no token of a caption"),
        (5, [3, 3], [10], "state_rows name 10,"),
        (5, [3, 3], [-1], "state_rows name -1,"),
    ],
)
def test_wrong_arguments_are_refused(positions, lengths, rows, message):
    token_ids = torch.ones(2, positions, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        make_tower()(token_ids, torch.tensor(lengths), None if rows is None else torch.tensor(rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("host_lengths", [True, False])
def test_cuda_equals_the_cpu_and_does_not_wait(host_lengths):
    tower, token_ids, rows = make_tower(), make_token_ids("random"), all_rows()
    features, states = tower(token_ids, LENGTHS, rows)
    tower.cuda()
    lengths, rows = (LENGTHS, rows) if host_lengths else (LENGTHS.cuda(), rows.cuda())
    arguments = (token_ids.cuda(), lengths, rows)
    if host_lengths:
        torch.cuda.set_sync_debug_mode("error")
    try:
        on_device, states_on_device = tower(*arguments)
        with torch.autocast("cuda", torch.bfloat16):
            half, _ = tower(*arguments)
        (on_device.sum() + states_on_device.sum() + half.float().sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(on_device.cpu(), features, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(states_on_device.cpu(), states, atol=1e-4, rtol=1e-3)
    assert F.cosine_similarity(half.float().cpu(), features).min() > 0.999


def test_states_of_all_tokens_in_order():
    tower = make_tower()
    token_ids, lengths = make_token_ids(), LENGTHS
    rows = caption_rows(lengths, token_ids.shape[1])
    assert rows.equal(all_rows())
    assert pack_captions(lengths, rows, token_ids.shape[1], token_ids.device).rows is None
    features, states = tower(token_ids, lengths, rows)
    torch.testing.assert_close(features, tower(token_ids, lengths)[0])
    assert len(states) == int(lengths.sum())
    begin = 0
    for caption, length in zip(token_ids, lengths.tolist(), strict=True):
        own = tower(caption[None], torch.tensor([length]), torch.arange(length))[1]
        torch.testing.assert_close(states[begin : begin + length], own, atol=1e-5, rtol=1e-5)
        begin += length
