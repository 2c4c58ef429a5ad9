"""Dropout whose masks are a function of (seed, sample, layer, channel, pixel) alone.

A resumed training, another number of processes or another accumulation drops the same elements; see `counter`. A hash
takes many small operations, and a GPU needs time to start each. So most of it is done once for all layers (`Bits`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from degflow.models.counter import mix, step

_WORD = 0xFFFFFFFF


class Bits(NamedTuple):
    """Random bits of one forward pass, from which each layer makes its mask."""

    pixels: Tensor  # int64 "B 1 H W" in [0, 2^32), at the finest resolution
    words: Tensor  # int64 "layers C 1 1" in [0, 2^32)

    @classmethod
    def of(cls, key: Tensor, layers: int, channels: int, height: int, width: int) -> "Bits":
        """The bits of samples with these keys "B" (see `counter.sample_keys`)."""
        place, layer, channel = (torch.arange(n, device=key.device) for n in (height * width, layers, channels))
        pixels = mix(step(key[:, None], place)).view(-1, 1, height, width)
        return cls(pixels, mix(step(mix(step(layer, 0))[:, None], channel))[..., None, None])

    def mask(self, layer: int, shape: torch.Size, p: float) -> Tensor:
        """Which elements of a layer's "B C H W" are kept; bool.

        Two rounds of multiplying: after one, pairs of layers are correlated (by up to 0.6 among 80 000 pairs).
        """
        x = self.pixels[..., : shape[2], : shape[3]] ^ self.words[layer, : shape[1]]
        x = (x * 0x21F0AAAD) & _WORD
        x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
        return x >= round(p * 2**32)


class SampleDropout(nn.Module):
    """Dropout with a mask of its own per sample and layer.

    Args:
        p: probability that an element is set to zero, in [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.layer = 0  # set by number_layers

    def forward(self, x: Tensor, bits: Bits | None) -> Tensor:
        """ "B C H W" and the pass's bits, of H and W or more -> the same shape; in eval mode x itself.

        Raises:
            ValueError: training without bits.
        """
        if not self.training or self.p == 0:
            return x
        if bits is None:
            raise ValueError(f"dropout={self.p}: a forward pass in training mode needs the samples' keys")
        return x * bits.mask(self.layer, x.shape, self.p) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"p={self.p}, layer={self.layer}"


def number_layers(network: nn.Module) -> int:
    """Give every SampleDropout of a network its number, so that no two draw the same mask; returns their count."""
    layers = [module for module in network.modules() if isinstance(module, SampleDropout)]
    for number, layer in enumerate(layers):
        layer.layer = number
    return len(layers)
