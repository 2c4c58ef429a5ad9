"""One planned shard of HR images -> its rows, in four stages: read, decode, degrade at sampled scales, encode.

Images are taken in windows of `batch` places in the plan. While the flow runs on one window, workers read and decode
the next and encode the one before, so memory holds at most three windows of decoded images and their LR images, one
row group of PNGs, and the `memory` GB of one forward pass. Images of equal size in a window share a forward pass of at
most `FORWARD_PIXELS` pixels (or one image): batches follow from the plan and the images alone, whoever computes them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from degflow import images
from degflow.dataset.layout import Record, Reject
from degflow.dataset.scales import scales_of
from degflow.dataset.writer import ShardWriter
from degflow.degrader import Degrader
from degflow.storage import Place, Source
from degflow.synthesis.codec import Codec, Draw, Loaded
from degflow.synthesis.inventory import root_of
from degflow.synthesis.resuming import is_still_wanted, recipe_of
from degflow.synthesis.settings import SynthesizeConfig

FORWARD_PIXELS = 1 << 20


class Handle(Protocol):
    """The result of a submitted call, some time."""

    def result(self) -> Any:
        """Wait for it."""


class CodecDied(RuntimeError):
    """The process that ran a codec's function ended, as often as it was tried."""


class Workers(Protocol):
    """Whoever runs the codec's functions."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Handle:
        """Start a call; arguments that are handles are replaced by their results."""
        ...


class Threads:
    """Workers that are threads of this process: quick to start, and a crash of theirs is everybody's."""

    def __init__(self, count: int):
        self.pool = ThreadPoolExecutor(count)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Start a call."""
        return self.pool.submit(lambda: function(*(a.result() if isinstance(a, Future) else a for a in arguments)))


def codec_of(config: SynthesizeConfig) -> Codec:
    """How a run with this resolved configuration reads and writes."""
    return Codec(
        root=root_of(config.input, config.root).uri,
        max_pixels=config.max_pixels,
        embed=config.hr == "embed",
        scaled=config.size == "scaled",
        png_level=config.png_level,
        seed=config.seed,
        model_sha256=config.model_sha256,
    )


class Progress(NamedTuple):
    """Images finished since the last report, those of them rejected, and at the end the shard's record."""

    images: int
    rejects: int
    record: Record | None = None


class _Item(NamedTuple):
    """An image of a window: where its pixels are, and they themselves."""

    handle: Handle
    loaded: Loaded
    scales: list[float]


class ShardMaker:
    """Makes shards, one after the other.

    Args:
        degrader: on the device that computes.
        config: with `scale.low`, `scale.high` and `hr` resolved.
        workers: for reading, decoding and encoding.
    """

    def __init__(self, degrader: Degrader, config: SynthesizeConfig, workers: Workers):
        self.degrader, self.config, self.workers = degrader, config, workers
        self.device = next(degrader.parameters()).device
        self.output = Place(config.output)
        self.codec = codec_of(config)

    def make(self, number: int, sources: Sequence[Source]) -> Iterator[Progress]:
        """Make one shard and put it, reporting as images are finished.

        A file that cannot be used becomes a reject. Anything else, such as a failing output, is raised.
        """
        started, sums, rows, waiting = time.monotonic(), np.zeros(3), 0, []
        with ShardWriter(self.output, number, recipe_of(self.config, sources)) as writer:
            for window in chain(self._windows(sources), [[]]):
                waiting, done = [self._encode(*pair) for pair in self._degrade(window)], waiting
                results = [self._encoded(*pair) for pair in done]
                for result in results:
                    if isinstance(result, Reject):
                        writer.reject(result)
                    else:
                        writer.add(result.rows)
                        sums, rows = sums + result.statistics, rows + len(result.rows)
                yield Progress(len(results), sum(isinstance(result, Reject) for result in results))
            means = tuple((sums / rows).tolist()) if rows else (None, None, None)
            if not is_still_wanted(self.config, sources):
                raise OSError(f"output={self.config.output}: another run has taken its place (overwrite=true)")
            yield Progress(0, 0, writer.finish(time.monotonic() - started, *means))

    def _windows(self, sources: Sequence[Source]) -> Iterator[list[_Item | Reject]]:
        def submit(start: int) -> list[tuple[Source, Handle]]:
            chosen = sources[start : start + self.config.batch]
            return [(source, self.workers.submit(self.codec.load, source)) for source in chosen]

        ahead = submit(0)
        for start in range(0, len(sources), self.config.batch):
            window, ahead = ahead, submit(start + self.config.batch)
            yield [self._loaded(source, handle) for source, handle in window]

    def _loaded(self, source: Source, handle: Handle) -> _Item | Reject:
        try:
            loaded = handle.result()
        except CodecDied as error:
            return Reject(source.key, "decode", str(error))
        if isinstance(loaded, Reject):
            return loaded
        return _Item(handle, loaded, scales_of(self.config.scale, self.config.seed, source.key))

    def _degrade(self, window: Sequence[_Item | Reject]) -> list[tuple[_Item | Reject, np.ndarray | Reject | None]]:
        """Each place of the window with its LR images, uint8 "N H W 3", or with the reject that it became."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, item in enumerate(window):
            if isinstance(item, _Item):
                groups.setdefault(item.loaded.pixels.shape, []).append(place)
        results: list[np.ndarray | Reject | None] = [None] * len(window)
        for (height, width, _), places in groups.items():
            together = max(1, FORWARD_PIXELS // (height * width))
            for first in range(0, len(places), together):
                chosen = places[first : first + together]
                lrs = self._flow([item for item in map(window.__getitem__, chosen) if isinstance(item, _Item)])
                for place, lr in zip(chosen, lrs, strict=True):
                    results[place] = lr
        return list(zip(window, results, strict=True))

    def _flow(self, batch: Sequence[_Item]) -> list[np.ndarray | Reject]:
        height, width, _ = batch[0].loaded.pixels.shape
        try:
            self.degrader.plan(height, width, self.config.memory)
        except ValueError as error:
            return [Reject(item.loaded.key, "degrade", str(error)) for item in batch]
        try:
            hr = images.to_tensor(np.stack([item.loaded.pixels for item in batch]), self.device)
            scale = torch.tensor([item.scales for item in batch], dtype=torch.float64)
            how = {"memory": self.config.memory, "precision": self.config.precision}
            lr = self.degrader(hr, scale, steps=self.config.solver.steps, solver=self.config.solver.solver, **how)
            finite = lr.isfinite().flatten(1).all(1).tolist()
            pixels = images.to_pixels(lr)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch) > 1:
                return [result for item in batch for result in self._flow([item])]
            height, width, _ = batch[0].loaded.pixels.shape
            return [
                Reject(batch[0].loaded.key, "degrade", f"{width} x {height} pixels: out of memory on {self.device}")
            ]
        return [
            image if good else Reject(item.loaded.key, "degrade", "the result is not finite")
            for item, image, good in zip(batch, pixels, finite, strict=True)
        ]

    def _encode(self, item: _Item | Reject, lr: np.ndarray | Reject | None) -> tuple[str, Handle | Reject]:
        if isinstance(item, Reject):
            return item.key, item
        key = item.loaded.key
        if not isinstance(lr, np.ndarray):
            return key, lr or Reject(key, "degrade", "no result")
        times = self.degrader.timeline.time(torch.tensor(item.scales, dtype=torch.float64))
        draws = [Draw(*pair) for pair in zip(item.scales, times.tolist(), strict=True)]
        return key, self.workers.submit(self.codec.encode, item.handle, draws, lr)

    def _encoded(self, key: str, found: Handle | Reject) -> Any:
        if isinstance(found, Reject):
            return found
        try:
            return found.result()
        except CodecDied as error:
            return Reject(key, "encode", str(error))


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator", "not enough memory"))
