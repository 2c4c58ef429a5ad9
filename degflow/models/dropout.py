"""Dropout whose masks are a function of (seed, sample, layer) alone.

A generator's state would tie a mask to the process that draws it and to what was drawn before. Here an element's bits
are a hash of where it stands, so that a resumed training, another number of processes or another accumulation drops
the same elements. Integer arithmetic only: the same bits on every device, in eager mode and under torch.compile.
"""

import torch
from torch import Tensor, nn

_WORD = 0xFFFFFFFF


class SampleDropout(nn.Module):
    """Dropout with a mask of its own per sample and layer.

    Args:
        p: probability that an element is set to zero, in [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.layer = 0  # set by number_layers

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """ "B ..." and the samples' keys "B" (see `sample_keys`) -> the same shape; in eval mode x itself.

        Raises:
            ValueError: training without keys.
        """
        if not self.training or self.p == 0:
            return x
        if key is None:
            raise ValueError(f"dropout={self.p}: a forward pass in training mode needs the samples' keys")
        element = _mix(torch.arange(x[0].numel(), device=x.device))
        bits = _mix(element ^ _mix(_step(key, self.layer))[:, None])
        kept = (bits >= round(self.p * 2**32)).view(x.shape)
        return x * (kept.to(x.dtype) / (1 - self.p))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"p={self.p}, layer={self.layer}"


def number_layers(network: nn.Module) -> None:
    """Give every SampleDropout of a network its number, so that no two draw the same mask."""
    layers = [module for module in network.modules() if isinstance(module, SampleDropout)]
    for number, layer in enumerate(layers):
        layer.layer = number


def sample_keys(seed: int, number: Tensor) -> Tensor:
    """What decides the masks of each sample: a hash of the run's seed and the sample's number.

    Args:
        seed: the run's, not negative.
        number: int64 "B", not negative; the sample's place in the endless sequence of a training.

    Returns:
        int64 "B" in [0, 2^32).
    """
    key = torch.zeros_like(number)
    for word in (seed & _WORD, (seed >> 32) & _WORD, number & _WORD, number >> 32):
        key = _mix(_step(key, word))
    return key


def _step(key: Tensor, word: Tensor | int) -> Tensor:
    return ((key ^ word) + 0x9E3779B9) & _WORD


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash (xor-shift and multiply; constants by C. Wellons), in int64 that never overflows."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)
