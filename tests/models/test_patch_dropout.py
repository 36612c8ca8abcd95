import torch

from models.patch_dropout import kept_patches, splitmix64


def make_keys(count: int) -> torch.Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0))


def test_noise_is_the_published_generator():
    words = [word % 2**64 for word in splitmix64(torch.tensor([1234567]), 5)[0].tolist()]
    assert words == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_subset_depends_on_the_key_alone():
    keys = make_keys(12)
    whole = kept_patches(keys, 49, 24)
    for rows in (slice(0, 5), slice(7, 8), torch.tensor([11, 3, 3])):
        assert torch.equal(kept_patches(keys[rows], 49, 24), whole[rows])
    torch.manual_seed(5)
    assert torch.equal(kept_patches(keys, 49, 24), whole)
    assert len({tuple(sorted(row)) for row in whole.tolist()}) == 12


def test_every_patch_is_equally_likely_and_the_count_exact():
    kept = kept_patches(make_keys(8000), 16, 4)
    assert kept.shape == (8000, 4)
    in_order = kept.sort(dim=1).values
    assert (in_order.diff(dim=1) > 0).all() and in_order.min() >= 0 and in_order.max() < 16
    mask = torch.zeros(8000, 16).scatter_(1, kept, 1.0)
    # Standard errors: 0.0048 for a patch, 0.0024 for a pair.
    torch.testing.assert_close(mask.mean(0), torch.full((16,), 0.25), atol=0.02, rtol=0)
    pairs = (mask.T @ mask / 8000)[~torch.eye(16, dtype=torch.bool)]
    torch.testing.assert_close(pairs, torch.full_like(pairs, 4 * 3 / (16 * 15)), atol=0.012, rtol=0)
