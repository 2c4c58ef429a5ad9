"""A window of decoded photographs -> their LR images: the stage that runs the degrader.

Images of equal size share a forward pass of at most `FORWARD_PIXELS` pixels (or of one image). So the batches depend
on the plan and the images alone, and not on the machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from degflow import images
from degflow.dataset.layout import Reject
from degflow.dataset.scales import noise_seed_of
from degflow.degrader import MEMORY, Degrader
from degflow.synthesis.buffers import Arrival, Buffers
from degflow.synthesis.codec import Draw, Handle, Loaded

FORWARD_PIXELS = 1 << 20
_FULL = (  # how PyTorch, cuDNN, cuBLAS, cuFFT and CUDA say that memory ran out
    *("DefaultCPUAllocator", "not enough memory", "CUDA error: out of memory", "CUDA out of memory"),
    *("CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
    *("CUFFT_ALLOC_FAILED", "CUFFT_INTERNAL_ERROR"),  # the second one too: pytorch/pytorch#119420
)


class Item(NamedTuple):
    """A decoded photograph, the call that decoded it, and the scales of its draws."""

    handle: Handle
    loaded: Loaded
    scales: list[float]


class _Coming(NamedTuple):
    """A photograph's LR images: the file's key, the forward pass that makes them, and which of its images they are."""

    key: str
    arrival: Arrival
    number: int

    def result(self) -> np.ndarray | Reject:
        """Wait for them; a reject if a value is not finite."""
        if self.arrival.finite()[self.number]:
            return self.arrival.pixels[self.number]
        return Reject(self.key, "degrade", "the result is not finite")


@dataclass
class WindowDegrader:
    """Runs a degrader on windows of images.

    Args:
        degrader: on the device that computes.
        memory: GB for one forward pass; see `Degrader.forward`. 0: `usual_memory` of the device.
        precision: of the networks.
        steps: of the solver; 0: the model's own number.
        solver: its name; "": the model's own.
        seed: of the run.
        spread: 1 gives draws, 0 their mean.
        buffers: for LR images.
    """

    degrader: Degrader
    memory: float
    precision: str
    steps: int
    solver: str
    seed: int
    spread: float
    buffers: Buffers = field(default_factory=Buffers)

    def degrade(self, window: Sequence[Item | Reject]) -> list[np.ndarray | Reject]:
        """The LR images of each photograph, uint8 "N H W 3", or the reject that it is or becomes.

        On a GPU, the LR images of one forward pass are copied from it while it works on the next pass.
        """
        results: dict[int, np.ndarray | Reject] = {}
        coming: dict[int, _Coming | Reject] = {}
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
                made = self._degrade_batch(items)
                results.update(_arrived(coming))  # of the pass before; a later one would have to hold more memory
                coming = dict(zip(places, made, strict=True))
        results.update(_arrived(coming))
        return [results[place] for place in range(len(window))]

    def draws(self, item: Item) -> list[Draw]:
        """The draws of a photograph."""
        times = self.degrader.timeline.time(torch.tensor(item.scales, dtype=torch.float64))
        return [Draw(*row) for row in zip(item.scales, times.tolist(), self._noise_seeds(item), strict=True)]

    @property
    def limited_by_machine(self) -> bool:
        """Whether another machine may have more memory for a forward pass; else all refuse the same photographs."""
        return not self.memory and self._device.type == "cuda"

    def _noise_seeds(self, item: Item) -> list[int]:
        return [noise_seed_of(self.seed, item.loaded.key, draw) for draw in range(len(item.scales))]

    def _degrade_batch(self, batch: Sequence[Item], memory: float = 0.0) -> list[_Coming | Reject]:
        """One forward pass over images of equal size, within `memory` GB (0: what the run has).

        A pass that runs out of memory is repeated image by image, then with half the memory, as long as there are tiles
        small enough. It is repeated outside of `except`, whose traceback would keep the failed pass's tensors alive.
        """
        memory = memory or self.memory or usual_memory(self._device)
        height, width, _ = batch[0].loaded.pixels.shape
        try:
            self.degrader.plan(height, width, memory)
        except ValueError as error:
            return [Reject(item.loaded.key, "degrade", str(error)) for item in batch]
        try:
            arrival = self._forward(batch, memory)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            arrival = None
        if arrival is None:
            return self._again(batch, memory)
        return [_Coming(item.loaded.key, arrival, number) for number, item in enumerate(batch)]

    def _again(self, batch: Sequence[Item], memory: float) -> list[_Coming | Reject]:
        """Repeat a forward pass that ran out of memory."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) > 1:
            return [result for item in batch for result in self._degrade_batch([item], memory)]
        key, (height, width, _) = batch[0].loaded.key, batch[0].loaded.pixels.shape
        try:
            self.degrader.plan(height, width, memory / 2)
        except ValueError:
            reason = f"{width} x {height} pixels: out of memory on {self._device} with memory={memory:.3g}"
            return [Reject(key, "degrade", reason)]
        return self._degrade_batch(batch, memory / 2)

    def _forward(self, batch: Sequence[Item], memory: float) -> Arrival:
        """LR images, uint8 "B N H W 3", and whether all values of each image's are finite; on their way from a GPU."""
        first, *others = (item.loaded.pixels for item in batch)
        hr = images.to_tensor(np.stack([first, *others]) if others else first[None], self._device)
        scale = torch.tensor([item.scales for item in batch], dtype=torch.float64)
        seed = torch.tensor([self._noise_seeds(item) for item in batch])
        how = {"memory": memory, "precision": self.precision, "steps": self.steps, "solver": self.solver}
        lr = self.degrader(hr, scale, seed=seed, spread=self.spread, checks_range=False, **how)
        finite = lr.isfinite().flatten(1).all(1)
        count, draws, _, height, width = lr.shape
        on_gpu = self._device.type == "cuda"
        pixels = self.buffers.empty((count, draws, height, width, 3), pinned=on_gpu)
        levels = torch.empty(pixels.shape, dtype=torch.uint8, device=lr.device) if on_gpu else torch.from_numpy(pixels)
        for number, draw in enumerate(lr.unbind(1)):  # as floats, each takes 24 bytes for a pixel while it is rounded
            levels[:, number] = images.to_levels(draw)
        return Arrival.of(levels, finite, pixels) if on_gpu else Arrival(pixels, finite)

    @property
    def _device(self) -> torch.device:
        return next(self.degrader.parameters()).device


def _arrived(coming: Mapping[int, _Coming | Reject]) -> dict[int, np.ndarray | Reject]:
    return {place: made if isinstance(made, Reject) else made.result() for place, made in coming.items()}


def usual_memory(device: torch.device) -> float:
    """GB for one forward pass where none are asked for: 3/4 of a GPU's memory, 4 GB on a CPU.

    Of all its memory, not of what is free now, so that equal GPUs cut an image into equal tiles.
    """
    if device.type == "cuda":
        return 0.75 * torch.cuda.get_device_properties(device).total_memory / 1e9
    return MEMORY


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch, cuDNN, cuBLAS or CUDA say that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in _FULL)
