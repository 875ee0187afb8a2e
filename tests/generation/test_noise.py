"""The noise of sampling: Gumbel-distributed, independent along every axis, and pinned."""

import pytest
import torch

from bcft.generation.noise import gumbel, identity_seed, sample


def test_noise_is_standard_gumbel_along_tokens_positions_and_attempts():
    seeds = torch.tensor([identity_seed(0, "test", 0, f"p{i}", 0, 0) for i in range(400)], dtype=torch.int32)
    noise = torch.stack([gumbel(seeds, torch.full((400,), t, dtype=torch.int32), 50) for t in range(20)])
    assert torch.isfinite(noise).all()
    # Mean and variance of the standard Gumbel distribution: 0.57722 and pi^2 / 6.
    assert abs(noise.mean() - 0.57722) < 5 * (1.6449 / noise.numel()) ** 0.5
    assert abs(noise.var() - 1.6449) < 0.02
    for dim in range(3):
        means = noise.mean(dim=[d for d in range(3) if d != dim])
        expected = (1.6449 / (noise.numel() / len(means))) ** 0.5
        assert 0.6 < means.std() / expected < 1.5
    flat = noise - noise.mean()
    for lagged in (flat[1:] * flat[:-1], flat[:, 1:] * flat[:, :-1], flat[..., 1:] * flat[..., :-1]):
        assert abs(lagged.mean()) < 5 * 1.6449 / lagged.numel() ** 0.5


def test_one_value_of_the_noise_is_pinned():
    """Other noise would change every run: runs could not be resumed or compared. Change it with a reason only."""
    seeds = torch.tensor([identity_seed(42, "test", 0, "0123456789abcdef", 3, 0)], dtype=torch.int32)
    noise = gumbel(seeds, torch.tensor([7], dtype=torch.int32), 5)[0].tolist()
    assert noise == pytest.approx([-0.311211, -0.194526, -0.227373, 0.003328, 0.865346], abs=1e-5)


@pytest.mark.parametrize("vocabulary", [30, 5000])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 30.0])
def test_a_token_is_the_argmax_of_scores_and_noise_however_few_tokens_get_noise(scale: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**31), 2**31, (64, 2), generator=generator).int()
    for position in range(4):
        scores = torch.randn(64, vocabulary, generator=generator) * scale
        scores[0, 3:] = -torch.inf  # as a warper leaves them
        positions = torch.full((64,), position).int()
        expected = (scores + gumbel(seeds, positions, vocabulary)).argmax(-1)
        assert torch.equal(sample(scores, seeds, positions), expected)


def test_scores_that_are_not_numbers_still_give_a_token_of_the_vocabulary() -> None:
    seeds = torch.tensor([[1, 2]], dtype=torch.int32)
    nan = torch.full((1, 5000), torch.nan)
    assert 0 <= int(sample(nan, seeds, torch.zeros(1).int())) < 5000
