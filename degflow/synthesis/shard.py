"""One planned shard of photographs -> its rows, in four stages: read and decode, draw scales, degrade, encode.

Photographs are taken in windows of `batch` places in the plan; what the store does not give soon comes last. While the
degrader works on one window, workers load the next one and encode the one before. So memory holds at most three windows
of decoded images with their LR images, one row group of encoded images, and the `memory` GB of one forward pass.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from degflow import storage
from degflow.dataset.layout import Record, Reject
from degflow.dataset.writer import ShardWriter
from degflow.storage import Place, Source
from degflow.synthesis.codec import Codec, CodecDied, Encoded, Handle, Postponed, Workers
from degflow.synthesis.resuming import Recipe
from degflow.synthesis.window import Item, WindowDegrader

FIRST_PATIENCE = 5.0  # seconds; a file that takes longer must not keep the device waiting


class Progress(NamedTuple):
    """Images finished since the last report, how many of them were rejected, and at the end the shard's record."""

    images: int
    rejects: int
    record: Record | None = None


@dataclass
class ShardMaker:
    """Makes shards, one after the other. The driver builds one, and Ray copies it to every actor.

    Args:
        output: URI of the dataset.
        recipe: of the run.
        codec: loads photographs and makes rows.
        scales: key -> the scales of its draws.
        degrader: runs the degrader.
        batch: photographs in a window.
        tally: seconds `waiting` for pixels and on the `device`, and numbers of rejects by stage, e.g. `reject read`.
    """

    output: str
    recipe: Recipe
    codec: Codec
    scales: Callable[[str], list[float]]
    degrader: WindowDegrader
    batch: int
    tally: dict[str, float] = field(default_factory=partial(defaultdict, float))

    def make(self, number: int, sources: Sequence[Source], workers: Workers) -> Iterator[Progress]:
        """Make one shard and put it into the output; yields a report for each finished window.

        A file that cannot be used becomes a reject. Any other failure, e.g. of the output, is raised.

        Args:
            number: of the shard.
            sources: its planned files.
            workers: run the codec.
        """
        started, sums, rows = time.monotonic(), np.zeros(3), 0
        with ShardWriter(Place(self.output), number, self.recipe.digest(sources)) as writer:
            for results in self._encoded(sources, workers):
                for result in results:
                    if isinstance(result, Reject):
                        writer.reject(result)
                    else:
                        writer.add(result.rows)
                        sums, rows = sums + result.statistics, rows + len(result.rows)
                yield Progress(len(results), sum(isinstance(result, Reject) for result in results))
            means = tuple((sums / rows).tolist()) if rows else (None, None, None)
            if not self.recipe.is_stored_in(Place(self.output)):
                raise OSError(f"output={self.output}: another run has overwritten it (overwrite=true)")
            yield Progress(0, 0, writer.finish(time.monotonic() - started, *means))

    def _encoded(self, sources: Sequence[Source], workers: Workers) -> Iterator[list[Encoded | Reject]]:
        """The results of each window; a window is encoded while the next one is degraded."""
        waiting: list[tuple[str, Handle | Reject]] = []
        for window in chain(self._loaded(sources, workers), [[]]):
            started = time.monotonic()
            lrs = self.degrader.degrade(window)
            self.tally["device"] += time.monotonic() - started
            waiting, done = [self._encode(*pair, workers) for pair in zip(window, lrs, strict=True)], waiting
            results = [_result(key, "encode", call) for key, call in done]
            for reject in (result for result in results if isinstance(result, Reject)):
                self.tally[f"reject {reject.stage}"] += 1
            yield results

    def _loaded(self, sources: Sequence[Source], workers: Workers) -> Iterator[list[Item | Reject]]:
        """The windows. A file that the store does not give soon is asked for again after all others."""
        later: list[Source] = []
        yield from self._windows(sources, workers, min(FIRST_PATIENCE, storage.PATIENCE), later)
        yield from self._windows(later, workers, None, [])

    def _windows(
        self, sources: Sequence[Source], workers: Workers, patience: float | None, later: list[Source]
    ) -> Iterator[list[Item | Reject]]:
        """The windows of some files; while one is degraded, the next one is loaded. Postponed files go to `later`."""

        def submit(start: int) -> list[tuple[Source, Handle]]:
            chosen = sources[start : start + self.batch]
            return [(source, workers.load(self.codec, source, patience)) for source in chosen]

        ahead = submit(0)
        for start in range(0, len(sources), self.batch):
            window, ahead = ahead, submit(start + self.batch)
            started, items = time.monotonic(), []
            for source, call in window:
                loaded = _result(source.key, "decode", call)
                if isinstance(loaded, Postponed):
                    later.append(source)
                else:
                    items.append(loaded if isinstance(loaded, Reject) else Item(call, loaded, self.scales(source.key)))
            self.tally["waiting"] += time.monotonic() - started
            yield items

    def _encode(self, item: Item | Reject, lrs: np.ndarray | Reject, workers: Workers) -> tuple[str, Handle | Reject]:
        if isinstance(item, Reject):
            return item.key, item
        if isinstance(lrs, Reject):
            return lrs.key, lrs
        return item.loaded.key, workers.encode(self.codec, item.handle, self.degrader.draws(item), lrs)


def _result(key: str, stage: str, call: Handle | Reject) -> Any:
    """What a call gave; a reject if its process died."""
    if isinstance(call, Reject):
        return call
    try:
        return call.result()
    except CodecDied as error:
        return Reject(key, stage, str(error))
