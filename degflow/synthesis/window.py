"""A window of decoded photographs -> their LR images: the stage that runs the degrader.

Images of equal size share a forward pass of at most `FORWARD_PIXELS` pixels (or of one image). So the batches depend
on the plan and the images alone, and not on the machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from degflow import images
from degflow.dataset.layout import Reject
from degflow.dataset.scales import noise_seed_of
from degflow.degrader import Degrader
from degflow.synthesis.codec import Draw, Handle, Loaded

FORWARD_PIXELS = 1 << 20


class Item(NamedTuple):
    """A decoded photograph, the call that decoded it, and the scales of its draws."""

    handle: Handle
    loaded: Loaded
    scales: list[float]


@dataclass
class WindowDegrader:
    """Runs a degrader on windows of images.

    Args:
        degrader: on the device that computes.
        memory: GB for one forward pass; see `Degrader.forward`.
        precision: of the networks.
        steps: of the solver; 0: the model's own number.
        solver: its name; "": the model's own.
        seed: of the run.
        spread: 1 gives draws, 0 their mean.
    """

    degrader: Degrader
    memory: float
    precision: str
    steps: int
    solver: str
    seed: int
    spread: float

    def degrade(self, window: Sequence[Item | Reject]) -> list[np.ndarray | Reject]:
        """The LR images of each photograph, uint8 "N H W 3", or the reject that it is or becomes."""
        results: dict[int, np.ndarray | Reject] = {}
        sizes: dict[tuple[int, ...], list[tuple[int, Item]]] = {}
        for place, item in enumerate(window):
            if isinstance(item, Reject):
                results[place] = item
            else:
                sizes.setdefault(item.loaded.pixels.shape, []).append((place, item))
        for (height, width, _), placed in sizes.items():
            count = max(1, FORWARD_PIXELS // (height * width))
            for first in range(0, len(placed), count):
                places, items = zip(*placed[first : first + count], strict=True)
                results.update(zip(places, self._degrade_batch(items), strict=True))
        return [results[place] for place in range(len(window))]

    def draws(self, item: Item) -> list[Draw]:
        """The draws of a photograph."""
        times = self.degrader.timeline.time(torch.tensor(item.scales, dtype=torch.float64))
        return [Draw(*row) for row in zip(item.scales, times.tolist(), self._noise_seeds(item), strict=True)]

    def _noise_seeds(self, item: Item) -> list[int]:
        return [noise_seed_of(self.seed, item.loaded.key, draw) for draw in range(len(item.scales))]

    def _degrade_batch(self, batch: Sequence[Item]) -> list[np.ndarray | Reject]:
        """One forward pass over images of equal size; image by image if the batch does not fit the memory."""
        height, width, _ = batch[0].loaded.pixels.shape
        try:
            self.degrader.plan(height, width, self.memory)
        except ValueError as error:
            return [Reject(item.loaded.key, "degrade", str(error)) for item in batch]
        try:
            pixels, finite = self._forward(batch)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch) > 1:
                return [result for item in batch for result in self._degrade_batch([item])]
            reason = f"{width} x {height} pixels: out of memory on {self._device}"
            return [Reject(batch[0].loaded.key, "degrade", reason)]
        return [
            image if good else Reject(item.loaded.key, "degrade", "the result is not finite")
            for item, image, good in zip(batch, pixels, finite, strict=True)
        ]

    def _forward(self, batch: Sequence[Item]) -> tuple[np.ndarray, list[bool]]:
        """LR images, uint8 "B N H W 3", and whether all values of each image's are finite."""
        hr = images.to_tensor(np.stack([item.loaded.pixels for item in batch]), self._device)
        scale = torch.tensor([item.scales for item in batch], dtype=torch.float64)
        seed = torch.tensor([self._noise_seeds(item) for item in batch])
        how = {"memory": self.memory, "precision": self.precision, "steps": self.steps, "solver": self.solver}
        lr = self.degrader(hr, scale, seed=seed, spread=self.spread, **how)
        return images.to_pixels(lr), lr.isfinite().flatten(1).all(1).tolist()

    @property
    def _device(self) -> torch.device:
        return next(self.degrader.parameters()).device


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator", "not enough memory"))
