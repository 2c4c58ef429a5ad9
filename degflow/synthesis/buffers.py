"""Memory for LR images, and their way into it from the device that made them."""

import contextlib
import functools
import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Memory for large arrays, taken again when nothing refers to the array in it any more.

    For each large array malloc gets fresh memory from the kernel. To have it cleared takes much longer than to copy
    pixels into it: for four LR images of 12 megapixels 90 ms beside 11 ms.
    """

    LEAST = 32 << 20  # bytes; what smaller arrays free, malloc keeps (`config.keep_freed_memory`), or PyTorch if pinned
    WASTE = 4  # memory of this many times the array's size is not used for it

    def __init__(self):
        self._kept: list[tuple[Tensor, weakref.ref[np.ndarray] | None]] = []  # memory, and the array in it

    def empty(self, shape: Sequence[int], *, pinned: bool = False) -> np.ndarray:
        """A uint8 array of this shape, with any content.

        Args:
            shape: of the array.
            pinned: in page-locked memory, into which a GPU copies by itself and several times as fast; needs CUDA. The
                arrays of one object are all pinned, or none is.
        """
        size = math.prod(shape)
        if size < self.LEAST:
            return _memory(size, pinned)[:size].numpy().reshape(shape)
        chosen = self._taken(size)
        if chosen is None:
            if pinned:
                _free_pinned()
            chosen = _memory(size, pinned)
        whole = chosen[:size].numpy()  # every view of it, and PyTorch, refer to this very array
        self._kept.append((chosen, weakref.ref(whole)))
        return whole.reshape(shape)

    def _taken(self, size: int) -> Tensor | None:
        """Take memory that nothing refers to and that fits; drop what does not."""
        chosen, kept = None, list[tuple[Tensor, weakref.ref[np.ndarray] | None]]()
        for memory, array in self._kept:
            if array and array() is not None:
                kept.append((memory, array))
            elif size <= len(memory) <= self.WASTE * size:
                kept += [] if chosen is None else [(chosen, None)]
                chosen = memory
        self._kept = kept
        return chosen


def _memory(size: int, pinned: bool) -> Tensor:
    """At least so many bytes; usual memory where the system gives no more that is page-locked."""
    if pinned:
        with contextlib.suppress(RuntimeError):  # PyTorch takes a power of two, which the next array may need
            return torch.empty(1 << max(0, size - 1).bit_length(), dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8)


def _free_pinned() -> None:
    """Give page-locked memory that no tensor has back to the system; PyTorch alone never does."""
    if empty := getattr(torch._C, "_host_emptyCache", None):
        empty()


class Arrival:
    """LR images of a forward pass, which may still be on their way from a GPU.

    Args:
        pixels: where they will be, uint8 "B N H W 3"; not to be read before `finite` has returned.
        finite: bool "B" in the CPU's memory: whether all values of an image's are finite.
        there: when both have arrived; None: they are there.
    """

    def __init__(self, pixels: np.ndarray, finite: Tensor, there: torch.cuda.Event | None = None):
        self.pixels, self._finite, self._there = pixels, finite, there

    @classmethod
    def of(cls, levels: Tensor, finite: Tensor, pixels: np.ndarray) -> "Arrival":
        """Begin to copy from a GPU, in a stream of its own, beside what the GPU does next.

        Args:
            levels: uint8 "B N H W 3" on the GPU.
            finite: bool "B" on the GPU.
            pixels: pinned memory of `Buffers`, for `levels`.
        """
        stream = _copying(levels.device)
        stream.wait_stream(torch.cuda.current_stream(levels.device))
        known = _memory(len(finite), pinned=True)[: len(finite)].view(torch.bool)
        there = torch.cuda.Event()
        with torch.cuda.stream(stream):
            for host, made in ((torch.from_numpy(pixels), levels), (known, finite)):
                host.copy_(made, non_blocking=True)
                made.record_stream(stream)  # its memory is not used again before it is copied
            there.record(stream)
        return cls(pixels, known, there)

    def finite(self) -> list[bool]:
        """Wait until all has arrived; whether all values of each image's are finite."""
        if self._there is not None:
            self._there.synchronize()
        return self._finite.tolist()


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU's copies."""
    return torch.cuda.Stream(device)
