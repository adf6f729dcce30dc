"""Random numbers as arithmetic: a counter-based hash of (seed, purpose, position), the same bits on CPU and GPU.

Nothing here has a state, so which process, worker or device asks, and in which order, cannot change an answer. The mixer is
the finaliser of SplitMix64 (Steele, Lea and Flood 2014) applied twice, in wrapping 64-bit integers.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit integer
_CACHED = 1 << 16  # numbers hashed at a time: with what lies between they stay in a core's cache
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)


def hashed(seed: int, purpose: int, positions: Tensor, num: int) -> Tensor:
    """[B] int64 positions -> [B, num] int64 hashes, uniform over all 64 bits."""
    counter = torch.arange(num, device=positions.device, dtype=torch.int64)
    start = int(_mix(torch.tensor(_wrap(seed * 0x9E3779B97F4A7C15 + purpose))))  # a number, not a tensor to copy to the device
    key = _mix(positions ^ start)
    return _mix(_mix(key[:, None] + (counter + 1) * _GOLDEN) ^ key[:, None])


def uniform(seed: int, purpose: int, positions: Tensor, num: int) -> Tensor:
    """[B] int64 positions -> [B, num] float64 in [0, 1), 53 random bits each.

    ``purpose`` is a stable hash of a name (:func:`vitssl.views.purpose`); ``positions`` are global positions of the run.
    """
    return _shift(hashed(seed, purpose, positions, num), 11).to(torch.float64) * 2.0**-53


def normal(numbers: Tensor) -> Tensor:
    """[B, 2n] uniform in [0, 1) -> [B, 2n] float32, standard normal (Box and Muller 1958)."""
    first, second = numbers.chunk(2, dim=1)
    radius = torch.sqrt(-2 * torch.log((1 - first).to(torch.float32)))  # 1 - first is never 0
    angle = (2 * torch.pi * second).to(torch.float32)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)


def permutation(seed: int, purpose: int, size: int) -> Tensor:
    """[size] int64: a permutation of ``range(size)``, the order of the hashes of its members."""
    members, keys = torch.arange(size), torch.empty(size, dtype=torch.int64)
    for some, own in zip(members.split(_CACHED), keys.split(_CACHED), strict=True):
        own.copy_(hashed(seed, purpose, some, 1)[:, 0])
    return torch.argsort(keys, stable=True)


def fold(*numbers: int) -> int:
    """One 63-bit number from several: how an epoch, a lane or a step becomes part of a seed or a purpose."""
    value = torch.zeros(1, dtype=torch.int64)
    for number in numbers:
        value = _mix(_mix(value + _GOLDEN) ^ _wrap(number))
    return int(value[0]) & 0x7FFFFFFFFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_A
    x = (x ^ _shift(x, 27)) * _MIX_B
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(number: int) -> int:
    """A Python integer as the signed 64-bit integer with the same low bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
