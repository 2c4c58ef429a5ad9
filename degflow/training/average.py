"""The exponential average of a network's weights."""

import torch
from torch import Tensor, nn


class Average:
    """Averages of floating-point tensors; of others, such as counters, the newest values.

    Args:
        network: on the device that it stays on. Its tensors are changed in place, never replaced.
        decay: of the average, once it has forgotten the initial weights.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        pairs = [(self.state[name], tensor) for name, tensor in network.state_dict().items()]
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the network's weights after a step, counted from 1."""
        # A smaller decay in the first steps, so that the average soon forgets the initial weights.
        decay = min(self.decay, step / (step + 10))
        averages, tensors = zip(*self.floats, strict=True)
        torch._foreach_lerp_(averages, tensors, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for kept, tensor in self.others:
            kept.copy_(tensor)

    @torch.no_grad()
    def set(self, state: dict[str, Tensor]) -> None:
        """Continue from these averages."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
