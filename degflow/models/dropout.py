"""Dropout whose masks are a function of (seed, sample, layer) alone.

A resumed training, another number of processes or another accumulation drops the same elements; see `counter`.
"""

import torch
from torch import Tensor, nn

from degflow.models.counter import mix, step


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
        element = mix(torch.arange(x[0].numel(), device=x.device))
        bits = mix(element ^ mix(step(key, self.layer))[:, None])
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
