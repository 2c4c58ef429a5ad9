"""One planned shard of photographs -> its rows, in four stages: read and decode, draw scales, degrade, encode.

Photographs are taken in windows of `batch` places in the plan; what the store does not give soon comes last. While the
degrader works on one window, workers load the next one and encode the one before, and a second thread of the actor
writes the rows of the one before that. So memory holds at most four windows of decoded images with their LR images,
one row group of encoded images, and the `memory` GB of one forward pass. An actor may make two shards at a time: while
the last rows of one are written and uploaded, the next one is degraded. That adds at most two windows and a row group.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from degflow import storage
from degflow.dataset.layout import CONFIG, DATA, Record, Reject, part_name
from degflow.dataset.writer import ShardWriter, record_there
from degflow.storage import Place, Source
from degflow.synthesis.codec import Codec, CodecDied, Handle, Postponed, Workers
from degflow.synthesis.resuming import Recipe
from degflow.synthesis.window import Item, WindowDegrader

FIRST_PATIENCE = 5.0  # seconds; a file that takes longer must not keep the device waiting


class Progress(NamedTuple):
    """Images finished since the last report, how many of them were rejected, and at the end the shard's record."""

    images: int
    rejects: int
    record: Record | None = None


class BrokenTurn(RuntimeError):
    """A shard of this process has failed, and all others may: some errors of a GPU stay with their process."""


class Turn:
    """One shard of a process at a time has it, while its windows are degraded; the others wait.

    Attributes:
        broken: a shard has failed, and no other one gets the turn.
    """

    def __init__(self):
        self.broken = False
        self._turn, self._count = threading.Lock(), threading.Lock()
        self._begun: list[float] = []  # of the shards that are being made
        self._counted = float("-inf")  # until when

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn, and hold it for the block.

        Raises:
            BrokenTurn: it is broken; a block that fails breaks it.
        """
        with self._turn:
            if self.broken:
                raise BrokenTurn
            try:
                yield
            except Exception:
                self.broken = True
                raise

    def begin(self) -> float:
        """Note that a shard is being made from now on; gives the time."""
        with self._count:
            self._begun.append(time.monotonic())
            return self._begun[-1]

    def end(self, begun: float) -> float:
        """Seconds for which a shard or more were made, and which were not counted for a shard that ended before."""
        with self._count:
            now = time.monotonic()
            spent = now - max(min(self._begun), self._counted)
            self._begun.remove(begun)
            self._counted = now
            return spent


@dataclass
class ShardMaker:
    """Makes shards. The driver builds one, and Ray copies it to every actor.

    Args:
        output: URI of the dataset.
        recipe: of the run.
        codec: loads photographs and makes rows.
        scales: key -> the scales of its draws.
        degrader: runs the degrader.
        batch: photographs in a window.
        tally: seconds `waiting` for pixels and on the `device`, and numbers of rejects by stage, e.g. `reject read`.
        watched: a context for each window that is degraded.
    """

    output: str
    recipe: Recipe
    codec: Codec
    scales: Callable[[str], list[float]]
    degrader: WindowDegrader
    batch: int
    tally: dict[str, float] = field(default_factory=partial(defaultdict, float))
    watched: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def make(
        self,
        number: int,
        sources: Sequence[Source],
        workers: Workers,
        turn: Turn,
        again: bool = False,
        elsewhere: Sequence[str] = (),
    ) -> Iterator[Progress]:
        """Make one shard and put it into the output; yields a report for each finished window.

        A file that cannot be used becomes a reject. Any other failure, e.g. of the output, is raised.

        Args:
            number: of the shard.
            sources: its planned files.
            workers: run the codec.
            turn: of this process; the shard is degraded while it has the turn.
            again: another process began it, and perhaps put it.
            elsewhere: see `Plan.elsewhere`.

        Raises:
            OSError: this machine does not see the output, or another run has overwritten it.
        """
        self._check_output()
        if again and (record := self.put_before(number, sources)):
            yield Progress(len(sources), record.rejects, record)
            return
        digest, later = self.recipe.digest(sources), list[Source]()
        own = [source for source in sources if source.key not in elsewhere]
        windows = self._windows(own, workers, min(FIRST_PATIENCE, storage.PATIENCE), later)
        with ShardWriter(Place(self.output), number, digest) as writer, ThreadPoolExecutor(1) as second:
            for key in elsewhere:
                writer.reject(Reject(key, "plan", "a newer shard has it"))
            if elsewhere:
                yield Progress(len(elsewhere), 0)
            rows = _Rows(self, writer, workers, second)
            with turn.taken():
                begun = turn.begin()
                yield from (rows.follow(window, self._degrade(window)) for window in windows)
            if later:  # what the store did not give soon
                windows = self._windows(later, workers, None, [])
                with turn.taken():
                    yield from (rows.follow(window, self._degrade(window)) for window in windows)
            yield from rows.rest()
            self._check_output()
            yield Progress(0, 0, writer.finish(turn.end(begun), *rows.means()))

    def put_before(self, number: int, sources: Sequence[Source]) -> Record | None:
        """The record of a shard that is in the output; None if it is not.

        Raises:
            Unfinished: its part is of another recipe, or damaged.
        """
        return record_there(Place(self.output), part_name(DATA, number), self.recipe.digest(sources))

    def _check_output(self) -> None:
        """Raise an OSError unless the output holds this run's configuration; a machine may not see a shared folder."""
        try:
            ours = self.recipe.is_stored_in(Place(self.output))
        except FileNotFoundError:
            raise OSError(f"output={self.output}: this machine does not see it: there is no {CONFIG}") from None
        if not ours:
            raise OSError(f"output={self.output}: another run has overwritten it (overwrite=true)")

    def _degrade(self, window: Sequence[Item | Reject]) -> list[np.ndarray | Reject]:
        begun = time.monotonic()
        with self.watched():
            lrs = self.degrader.degrade(window)
        self.tally["device"] += time.monotonic() - begun
        return lrs

    def _windows(
        self, sources: Sequence[Source], workers: Workers, patience: float | None, later: list[Source]
    ) -> Iterator[list[Item | Reject]]:
        """The windows of some files; the first one is being loaded when this returns.

        While one is degraded, the next one is loaded. Files that the store does not give soon go to `later`.
        """

        def submit(start: int) -> list[tuple[Source, Handle]]:
            chosen = sources[start : start + self.batch]
            return [(source, workers.load(self.codec, source, patience)) for source in chosen]

        def windows(ahead: list[tuple[Source, Handle]]) -> Iterator[list[Item | Reject]]:
            for start in range(0, len(sources), self.batch):
                window, ahead = ahead, submit(start + self.batch)
                yield self._decoded(window, later)

        return windows(submit(0))

    def _decoded(self, window: Sequence[tuple[Source, Handle]], later: list[Source]) -> list[Item | Reject]:
        """Wait for the files of a window. Postponed ones go to `later`."""
        started, items = time.monotonic(), []
        for source, call in window:
            loaded = _result(source.key, "decode", call)
            if isinstance(loaded, Postponed):
                later.append(source)
            else:
                items.append(loaded if isinstance(loaded, Reject) else Item(call, loaded, self.scales(source.key)))
        self.tally["waiting"] += time.monotonic() - started
        return items


class _Taken(NamedTuple):
    """How many images were written, and the stages at which some of them became rejects."""

    images: int
    rejects: list[str]


class _Rows:
    """Windows with their LR images -> rows in the shard. The work is done beside the degrader, in a second thread.

    Args:
        maker: of the shard.
        writer: of the shard.
        workers: run the codec.
        second: the thread.
    """

    def __init__(self, maker: ShardMaker, writer: ShardWriter, workers: Workers, second: ThreadPoolExecutor):
        self.maker, self.writer, self.workers, self.second = maker, writer, workers, second
        self.waiting: list[tuple[str, Handle | Reject]] = []  # the last window, which is being encoded
        self.sums, self.count = np.zeros(3), 0
        self.taken: Future[_Taken] = second.submit(self.take, [], [])

    def follow(self, window: Sequence[Item | Reject], lrs: Sequence[np.ndarray | Reject]) -> Progress:
        """Have a window taken, as soon as the one before is; returns what that one's taking wrote."""
        done = self.taken.result()
        self.taken = self.second.submit(self.take, window, lrs)
        return self._counted(done)

    def rest(self) -> Iterator[Progress]:
        """Write all that is left."""
        yield self.follow([], [])
        yield self._counted(self.taken.result())

    def _counted(self, taken: _Taken) -> Progress:
        # In the caller's thread, which reads the tally between two reports.
        for stage in taken.rejects:
            self.maker.tally[f"reject {stage}"] += 1
        return Progress(taken.images, len(taken.rejects))

    def take(self, window: Sequence[Item | Reject], lrs: Sequence[np.ndarray | Reject]) -> _Taken:
        """Have a window encoded, and write the rows of the one before."""
        started = [self._encode(*pair) for pair in zip(window, lrs, strict=True)]
        done, self.waiting, rejects = self.waiting, started, list[str]()
        for key, call in done:
            result = _result(key, "encode", call)
            if isinstance(result, Reject):
                self.writer.reject(result)
                rejects.append(result.stage)
            else:
                self.writer.add(result.rows)
                self.sums, self.count = self.sums + result.statistics, self.count + len(result.rows)
        return _Taken(len(done), rejects)

    def means(self) -> tuple[float | None, ...]:
        """Of psnr, clipped and colour_shift; None where there are no rows."""
        return tuple((self.sums / self.count).tolist()) if self.count else (None, None, None)

    def _encode(self, item: Item | Reject, lrs: np.ndarray | Reject) -> tuple[str, Handle | Reject]:
        if isinstance(item, Reject):
            return item.key, item
        if isinstance(lrs, Reject):
            return lrs.key, lrs
        draws = self.maker.degrader.draws(item)
        return item.loaded.key, self.workers.encode(self.maker.codec, item.handle, draws, lrs)


def _result(key: str, stage: str, call: Handle | Reject) -> Any:
    """What a call gave; a reject if its process died."""
    if isinstance(call, Reject):
        return call
    try:
        return call.result()
    except CodecDied as error:
        return Reject(key, stage, str(error))
