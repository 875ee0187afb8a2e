"""Sampling noise as a function of the rollout's identity.

The sampled token is the argmax of the processed logits plus Gumbel noise (the Gumbel-max trick, Gumbel 1954; Maddison
et al. 2014, arXiv 1411.0030, section 2), and the noise of (attempt, position, token) is a hash. So batch size, batch
order, process count and resumption do not change any token. An inverse-CDF draw would be cheaper, but rounding moves
every one of its V boundaries; Gumbel noise changes the token on near ties only.
"""

import hashlib

import torch

_GOLDEN = -1640531527  # 0x9E3779B9 as int32: odd, so that all its multiples are different
_MOST = 16.64
"""No noise is greater: -log(-log(1 - 2^-24)) is 16.6355."""
_LARGE = 4096
"""The vocabulary from which on, and the share of tokens up to which, it is faster to choose those that get noise."""
_FEW = 0.25
_ROUNDING = 0.01
"""More than sums of fp32 are rounded by, for scores of up to some 100,000."""


def identity_seed(*parts: str | int) -> tuple[int, int]:
    """Return two int32 that depend on every part, such as (run seed, phase, round, problem id, sample, turn)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big", signed=True), int.from_bytes(digest[4:8], "big", signed=True)


def sample(scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the argmax (B,) of scores (B, V) plus the noise of each token, the first one of equals.

    seeds and positions: as `gumbel` takes them. On a CPU only those tokens get noise that could win with it: the noise
    is bounded, and a large vocabulary has few tokens within that bound of the best.
    """
    if scores.device.type == "cpu" and scores.shape[1] >= _LARGE:
        best, favorite = scores.max(1)
        reached = best + _gumbel(seeds, positions, favorite)
        able = scores > (reached - _MOST - _ROUNDING)[:, None]
        if int(able.sum()) < scores.numel() * _FEW:
            rows, tokens = able.nonzero(as_tuple=True)
            noisy = scores[rows, tokens] + _gumbel(seeds[rows], positions[rows], tokens)
            wins = noisy == reached.scatter_reduce(0, rows, noisy, "amax")[rows]
            last = torch.full_like(favorite, scores.shape[1] - 1)
            return last.scatter_reduce(0, rows[wins], tokens[wins], "amin")
    return (scores + gumbel(seeds, positions, scores.shape[1])).argmax(-1)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return standard Gumbel noise (B, V) in fp32.

    seeds: (B, 2) int32 from `identity_seed`; positions: (B,) int32, the index of the token in its action.
    """
    tokens = torch.arange(vocabulary, device=seeds.device)
    return _gumbel(seeds[:, None], positions[:, None], tokens)


def _gumbel(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the noise of tokens; seeds (..., 2), positions (...) and tokens are broadcast together."""
    row = _mix(seeds[..., 0] + _mix(positions * _GOLDEN + 1))
    hashed = _mix(_mix(row + (tokens.int() + 1) * _GOLDEN) + seeds[..., 1])
    # 23 bits plus one half: every value is exact in fp32 and neither 0 nor 1, so the noise is finite.
    uniform = (_shift(hashed, 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int32 right, filling with zeros."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble int32 (the finalizer of MurmurHash3, Appleby 2011)."""
    x = x ^ _shift(x, 16)
    x = x * -2048144789
    x = x ^ _shift(x, 13)
    x = x * -1028477387
    return x ^ _shift(x, 16)
