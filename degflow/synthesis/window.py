"""A window of decoded photographs -> their LR images: the stage that runs the degrader.

Images of equal size share a forward pass of at most `FORWARD_PIXELS` pixels (or of one image). So the batches depend
on the plan and the images alone, and not on the machine.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from degflow import images
from degflow.dataset.layout import Reject
from degflow.dataset.scales import noise_seed_of
from degflow.degrader import MEMORY, Degrader
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


class Buffers:
    """Memory for large arrays, taken again when nothing refers to the array in it any more.

    For each large array malloc gets fresh memory from the kernel. To have it cleared takes much longer than to copy
    pixels into it: for four LR images of 12 megapixels 90 ms beside 11 ms.
    """

    LEAST = 32 << 20  # bytes; what smaller arrays free, malloc keeps (`config.keep_freed_memory`)
    WASTE = 4  # memory of this many times the array's size is not used for it

    def __init__(self):
        self._kept: list[tuple[bytearray, weakref.ref[np.ndarray] | None]] = []  # memory, and the array in it

    def empty(self, shape: Sequence[int]) -> np.ndarray:
        """A uint8 array of this shape, with any content."""
        size = math.prod(shape)
        if size < self.LEAST:
            return np.empty(shape, np.uint8)
        chosen, kept = bytearray(), list[tuple[bytearray, weakref.ref[np.ndarray] | None]]()
        for memory, array in self._kept:
            if array and array() is not None:
                kept.append((memory, array))
            elif size <= len(memory) <= self.WASTE * size:
                kept += [(chosen, None)] if chosen else []
                chosen = memory
        chosen = chosen or bytearray(size)
        whole = np.frombuffer(chosen, np.uint8, size)  # every view of it, and PyTorch, refer to this very array
        self._kept = [*kept, (chosen, weakref.ref(whole))]
        return whole.reshape(shape)


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

    @property
    def limited_by_machine(self) -> bool:
        """Whether another machine may have more memory for a forward pass; else all refuse the same photographs."""
        return not self.memory and self._device.type == "cuda"

    def _noise_seeds(self, item: Item) -> list[int]:
        return [noise_seed_of(self.seed, item.loaded.key, draw) for draw in range(len(item.scales))]

    def _degrade_batch(self, batch: Sequence[Item], memory: float = 0.0) -> list[np.ndarray | Reject]:
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
            pixels, finite = self._forward(batch, memory)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            pixels, finite = None, []
        if pixels is None:
            return self._again(batch, memory)
        return [
            image if good else Reject(item.loaded.key, "degrade", "the result is not finite")
            for item, image, good in zip(batch, pixels, finite, strict=True)
        ]

    def _again(self, batch: Sequence[Item], memory: float) -> list[np.ndarray | Reject]:
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

    def _forward(self, batch: Sequence[Item], memory: float) -> tuple[np.ndarray, list[bool]]:
        """LR images, uint8 "B N H W 3", and whether all values of each image's are finite."""
        first, *others = (item.loaded.pixels for item in batch)
        hr = images.to_tensor(np.stack([first, *others]) if others else first[None], self._device)
        scale = torch.tensor([item.scales for item in batch], dtype=torch.float64)
        seed = torch.tensor([self._noise_seeds(item) for item in batch])
        how = {"memory": memory, "precision": self.precision, "steps": self.steps, "solver": self.solver}
        lr = self.degrader(hr, scale, seed=seed, spread=self.spread, checks_range=False, **how)
        finite = lr.isfinite().flatten(1).all(1).tolist()
        count, draws, _, height, width = lr.shape
        pixels = self.buffers.empty((count, draws, height, width, 3))
        for number, draw in enumerate(lr.unbind(1)):  # as floats, each takes 24 bytes for a pixel while it is rounded
            images.to_pixels(draw, out=pixels[:, number])
        return pixels, finite

    @property
    def _device(self) -> torch.device:
        return next(self.degrader.parameters()).device


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
