import pytest
import torch
import torch.nn.functional as F

import models.sequences
from models.sequences import PackedSequences, UniformSequences, has_unequal_length_kernel

HEADS, HEAD_WIDTH = 2, 8
LENGTHS = [1, 3, 3, 6]
TOTAL = sum(LENGTHS)


def make_tokens(total: int = TOTAL) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (total, HEADS, HEAD_WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def masked_attention(query, key, value, offsets, causal: bool) -> torch.Tensor:
    """All tokens against all tokens, with a mask."""
    lengths = offsets.diff()
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    visible = sequence[:, None] == sequence
    if causal:
        visible = visible.tril()
    by_head = (tokens.transpose(0, 1) for tokens in (query, key, value))
    return F.scaled_dot_product_attention(*by_head, attn_mask=visible).transpose(0, 1)


def packed() -> PackedSequences:
    return PackedSequences.of(torch.tensor(LENGTHS), torch.device("cpu"))


def test_layout_of_packed_sequences():
    assert packed().groups.tolist() == [[1, 1], [2, 3], [1, 6]]
    assert packed().offsets.tolist() == [0, 1, 4, 7, 13]
    assert packed().offsets.dtype == torch.int32
    assert packed().max_length == 6
    assert not packed().has_kernel


@pytest.mark.parametrize("rows", [None, [0, 3, 4, 5, 12], [7]])
@pytest.mark.parametrize("kernel", [False, True])
def test_packed_attention_equals_a_masked_one(rows, kernel, monkeypatch):
    sequences = packed()
    if kernel:
        # Stands in for the CUDA kernel: the same arguments, the documented meaning.
        monkeypatch.setattr(models.sequences, "_HALF_PRECISIONS", (torch.float64,))
        monkeypatch.setattr(
            models.sequences,
            "_attend_unequal",
            lambda *tokens_and_offsets: masked_attention(*tokens_and_offsets[:4], True),
        )
        monkeypatch.setattr(models.sequences, "_attend_in_groups", None)
        sequences = sequences._replace(has_kernel=True)
    tokens, reference = make_tokens(), make_tokens()
    index = torch.arange(TOTAL) if rows is None else torch.tensor(rows)
    wanted = None if rows is None else index
    output = sequences.attend(tokens[0][index], *tokens[1:], wanted)
    expected = masked_attention(*reference, sequences.offsets, True)[index]
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    weights = torch.randn(output.shape, dtype=torch.float64)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(tokens, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [None, [0, 4, 8], [0, 1, 4, 5, 8, 11]])
def test_uniform_attention_equals_a_masked_one(rows):
    tokens = make_tokens(12)
    index = torch.arange(12) if rows is None else torch.tensor(rows)
    output = UniformSequences(3, 4).attend(tokens[0][index], *tokens[1:], None if rows is None else index)
    expected = masked_attention(*tokens, torch.tensor([0, 4, 8, 12]), False)[index]
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


def test_installed_torch_takes_the_arguments_of_the_kernel():
    # Meta tensors run the kernel's shape function and its backward, without a device.
    tokens = torch.empty(TOTAL, HEADS, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    offsets = torch.empty(5, dtype=torch.int32, device="meta")
    output = models.sequences._attend_unequal(tokens, tokens, tokens, offsets, 6)
    output.sum().backward()
    assert output.shape == tokens.grad.shape == tokens.shape


def test_the_cpu_has_no_kernel():
    assert not has_unequal_length_kernel(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [None, [0, 3, 12]])
def test_cuda_kernel_equals_groups(rows):
    sequences = PackedSequences.of(torch.tensor(LENGTHS), torch.device("cuda"))
    if not sequences.has_kernel:
        pytest.skip("this torch or device has no variable-length attention")
    index = torch.arange(TOTAL) if rows is None else torch.tensor(rows)
    wanted = None if rows is None else index.cuda()
    results = []
    for layout in (sequences, sequences._replace(has_kernel=False)):
        tokens = torch.randn(3, TOTAL, 2, 64, generator=torch.Generator().manual_seed(0))
        tokens = tokens.cuda().bfloat16().requires_grad_()
        output = layout.attend(tokens[0][index.cuda()], tokens[1], tokens[2], wanted)
        output.float().square().sum().backward()
        results.append((output, tokens.grad))
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)
