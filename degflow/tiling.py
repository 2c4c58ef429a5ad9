"""Windows over an image that is too large to be worked on at once, and how many fit a memory budget.

Encoder, decoder and what finishes a decoded image see only a `halo` around what they compute. So the inner part of a
window, which is its halo away from every edge where the window was cut, comes out as from the whole image. Lengths are
in latent pixels.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """One side of a tile: the window [start, stop), and its part [first, last) that is exact and taken."""

    start: int
    stop: int
    first: int
    last: int


class Tile(NamedTuple):
    """A window of the latent, and through a factor the same window of the image or of a skip."""

    rows: Span
    columns: Span

    def cut(self, whole: Tensor, factor: int) -> Tensor:
        """The window's part of "... H W", a view; `factor`: pixels of `whole` along a latent pixel."""
        (top, bottom, _, _), (left, right, _, _) = self.rows, self.columns
        return whole[..., top * factor : bottom * factor, left * factor : right * factor]

    def paste(self, whole: Tensor, result: Tensor, factor: int) -> None:
        """Write the inner part of a window's `result` where it belongs; what lies beyond `whole` is cropped."""
        (top, _, first, last), (left, _, begin, end) = self.rows, self.columns
        place = whole[..., first * factor : last * factor, begin * factor : end * factor]
        height, width = place.shape[-2:]
        inner = result[..., (first - top) * factor :, (begin - left) * factor :]
        place.copy_(inner[..., :height, :width])


class Grid(NamedTuple):
    """How a latent of height x width is cut."""

    height: int
    width: int
    rows: int = 1
    columns: int = 1
    halo: int = 0

    @property
    def whole(self) -> bool:
        """One window holds everything."""
        return self.rows == self.columns == 1

    @property
    def window(self) -> int:
        """Latent pixels of a window."""
        return _length(self.height, self.rows, self.halo) * _length(self.width, self.columns, self.halo)

    @property
    def work(self) -> int:
        """Latent pixels of all windows together."""
        return self.rows * self.columns * self.window

    def tiles(self) -> Iterator[Tile]:
        """The windows, row by row; all of one size."""
        columns = spans(self.width, self.columns, self.halo)
        for row in spans(self.height, self.rows, self.halo):
            yield from (Tile(row, column) for column in columns)


def spans(size: int, count: int, halo: int) -> list[Span]:
    """Cut `size` into `count` windows of equal length (fewer where those suffice), their inner parts side by side."""
    length = _length(size, count, halo)
    stride, found, first = length - 2 * halo, [], 0
    while first < size:
        start = min(max(0, first - halo), size - length)
        last = size if start + length == size else start + stride + halo
        found.append(Span(start, start + length, first, last))
        first = last
    return found


def cheapest(height: int, width: int, halo: int, room: float) -> Grid | None:
    """The grid with the least work whose windows have at most `room` latent pixels.

    None where a window would have an inner part shorter than its halo.
    """
    grids = []
    for columns in _counts(width, halo):
        tallest = int(room // _length(width, columns, halo))
        rows = 1 if tallest >= height else -(-(height - 2 * halo) // (tallest - 2 * halo)) if tallest > 2 * halo else 0
        if rows in _counts(height, halo):
            grids.append(Grid(height, width, rows, columns, halo))
    return min(grids, key=lambda grid: (grid.work, grid.columns), default=None)


def finest(height: int, width: int, halo: int) -> Grid:
    """The grid with the smallest windows that `cheapest` would take."""
    return Grid(height, width, _counts(height, halo)[-1], _counts(width, halo)[-1], halo)


def _counts(size: int, halo: int) -> range:
    """How many windows a side may be cut into."""
    return range(1, max(1, (size - 2 * halo) // max(1, halo)) + 1)


def _length(size: int, count: int, halo: int) -> int:
    return size if count == 1 else -(-(size - 2 * halo) // count) + 2 * halo


LARGEST = 2**31 - 1  # numbers in a tensor: some of CUDA's and cuDNN's functions are wrong, or refuse, beyond
OVERHEAD = 150e6  # bytes that libraries and the allocator take whatever the size


class Costs(NamedTuple):
    """Bytes per latent pixel of one image."""

    held: float  # from beginning to end: images and latents
    whole: float  # at the peak of what is done on the whole image: optics, an evaluation of the velocity network
    skips: float  # the decoder's skips
    work: float  # at the peak of encoding or decoding, the skips apart
    largest: float = 0.0  # no bytes: numbers in the largest tensor of encoding or decoding


class Plan(NamedTuple):
    """How images of one size are worked on."""

    batch: int  # images at once
    grid: Grid  # how each is cut
    keep: bool  # whether skips are kept from encoding to decoding, or made again

    @classmethod
    def fit(cls, rows: int, columns: int, halo: int, costs: Costs, memory: float) -> "Plan":
        """The fastest plan that stays within the memory.

        Args:
            rows, columns: of the latent.
            halo: of the networks and of what finishes the image.
            costs: of one image.
            memory: GB (1e9 bytes).

        Raises:
            ValueError: not even one image in small tiles fits; the message says what it needs.
        """
        if math.isnan(memory):
            raise ValueError("memory=nan: must be a number of GB")
        pixels, room = rows * columns, memory * 1e9 - OVERHEAD
        held, whole, skips, work, _ = (pixels * cost for cost in costs)
        window = LARGEST / costs.largest if costs.largest else 2.0**31 * pixels
        batch = min(room / (held + skips + max(whole, work)), window / pixels)
        if batch >= 1:
            return cls(int(batch), Grid(rows, columns), True)
        # Otherwise: keep all skips and decode in small windows, or encode again beside decoding in larger ones.
        plans = []
        for keep, fixed, each in ((True, held + skips, work), (False, held, skips + work)):
            grid = cheapest(rows, columns, halo, min((room - fixed) / each * pixels, window))
            if grid and fixed + whole <= room:
                plans.append(((2 if keep else 3) * grid.work, cls(1, grid, keep)))
        if not plans:
            share = finest(rows, columns, halo).window / pixels
            least = held + min(skips + max(whole, work * share), max(whole, (skips + work) * share))
            raise ValueError(f"memory={memory:g}: needs at least {(least + OVERHEAD) / 1e9 + 0.005:.2f} GB")
        return min(plans, key=lambda plan: plan[0])[1]
