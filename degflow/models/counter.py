"""Random numbers that depend only on a key and a position, and on nothing that was drawn before.

A generator's state ties a number to the process that draws it. A hash of the position gives the same bits whatever the
batch, the tiles, the processes or the interruptions. Integer arithmetic makes the bits the same on every device, in
eager mode and under torch.compile.
"""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_NOISE = 0x6E6F6973  # keeps the keys of noise apart from those of dropout
_SECOND = 0x32777264  # and second keys apart from first ones


def sample_keys(seed: int, number: Tensor) -> Tensor:
    """Hash a seed and numbers to keys.

    Args:
        seed: not negative.
        number: int64 "B", not negative, e.g. a sample's place in the endless sequence of a training.

    Returns:
        int64 "B" in [0, 2^32).
    """
    key = torch.zeros_like(number)
    for word in (seed & _WORD, (seed >> 32) & _WORD, number & _WORD, number >> 32):
        key = mix(step(key, word))
    return key


def gaussian(
    seed: Tensor, channels: int, height: int, width: int, *, place: Tensor | None = None, first: int = 0
) -> Tensor:
    """Standard normal numbers by Box and Muller's method.

    Args:
        seed: int64 "B" in [0, 2^63), one for each image.
        channels, height, width: of the result. A number depends on its seed, channel, row and column alone.
        place: int64 "B 2", row and column that each image begins at, not negative; None: at 0, 0.
        first: number of the first channel, even.

    Returns:
        float32 "B C H W".
    """
    key = sample_keys(_NOISE, seed)
    # Keys of 32 bits tell all seeds below 2^32 apart; of a million larger ones some hundred pairs would have one key.
    second = torch.where(seed >> 32 > 0, sample_keys(_SECOND, seed), 0)
    for axis, count in enumerate((channels + channels % 2, height, width)):
        word = torch.arange(count, device=seed.device)
        if not axis:
            word = word + first
        elif place is not None:
            word = word + place[:, axis - 1].view(-1, *[1] * key.ndim)
        if axis == 2:  # only here: a second key mixed in earlier would be hashed to 32 bits
            key = key ^ second.view(-1, 1, 1)
        key = mix(step(key[..., None], word))
    radius, angle = ((key.float().unflatten(1, (-1, 2)) + 0.5) * 2.0**-32).unbind(2)
    radius = (-2 * radius.log()).sqrt()
    pair = torch.stack((radius * (2 * math.pi * angle).cos(), radius * (2 * math.pi * angle).sin()), 2)
    return pair.flatten(1, 2)[:, :channels]


def step(key: Tensor, word: Tensor | int) -> Tensor:
    """Add a word to a key; `mix` must follow."""
    return ((key ^ word) + 0x9E3779B9) & _WORD


def mix(x: Tensor) -> Tensor:
    """A 32-bit hash (xor-shift and multiply; constants by C. Wellons), in int64 that never overflows."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)
