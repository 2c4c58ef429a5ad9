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
from degflow.dataset.recipe import Recipe
from degflow.dataset.writer import ShardWriter, record_there
from degflow.storage import Place, Source
from degflow.synthesis.codec import DIED, Codec, CodecDied, Handle, Postponed, Workers
from degflow.synthesis.window import Item, WindowDegrader

SUSPICIOUS = 8  # photographs of a shard from which on a machine is suspected that loses most of them
FIRST_PATIENCE = 5.0  # seconds; a file that takes longer must not keep the device waiting


class Progress(NamedTuple):
    """Images finished since the last report, how many of them were rejected, and at the end the shard's record."""

    images: int
    rejects: int
    record: Record | None = None


class BrokenTurn(RuntimeError):
    """A shard of this process failed. Some errors of a GPU last as long as the process, so others may fail, too."""


class Withheld(RuntimeError):
    """The store gave some photographs of a shard not even after `storage.PATIENCE`; later it may."""


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
        """Seconds in which any shard was made and that no shard which ended earlier has counted."""
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
        elsewhere: Sequence[str] = (),
        last: bool = True,
        resigned: bool = True,
    ) -> Iterator[Progress]:
        """Make one shard and put it into the output, unless it is there; yields a report for each finished window.

        A file that cannot be used becomes a reject. Any other failure, e.g. of the output, is raised.

        Args:
            number: of the shard.
            sources: its planned files.
            workers: run the codec.
            turn: of this process; the shard is degraded while it has the turn.
            elsewhere: see `Plan.elsewhere`.
            last: no other process will try it. Else, if most photographs are lost by what may be this machine's fault,
                the shard is not put.
            resigned: photographs that the store still throttles are rejects. Else the shard is not put.

        Raises:
            Withheld: the store throttles a photograph.
            Unfinished: the part that is there is of another recipe, or damaged.
            RuntimeError: most photographs were lost: results are not finite, or did not fit into memory, or processes
                died.
            OSError: this machine does not see the output, or another run has overwritten it, or the store answers
                nothing.
        """
        self._check_output()
        if record := self.put_before(number, sources):
            yield Progress(len(sources), record.rejects, record)
            return
        digest, own = self.recipe.digest(sources), [source for source in sources if source.key not in elsewhere]
        first: _Postponed = {}
        windows = self._windows(own, workers, min(FIRST_PATIENCE, storage.PATIENCE), first)
        with ShardWriter(Place(self.output), number, digest) as writer, ThreadPoolExecutor(1) as second:
            for key in elsewhere:
                writer.reject(Reject(key, "plan", "a newer shard has it"))
            if elsewhere:
                yield Progress(len(elsewhere), 0)
            rows = _Rows(self, writer, workers, second)
            with turn.taken():
                begun = turn.begin()
                yield from (rows.follow(window, self._degrade(window)) for window in windows)
            withheld: _Postponed = {}
            if first:  # what the store did not give soon
                with turn.taken():
                    for window in self._windows_one_by_one(list(first), workers, withheld):
                        yield rows.follow(window, self._degrade(window))
                        if not resigned and any(file.throttled for file in withheld.values()):
                            break
            if withheld:
                if not resigned and any(file.throttled for file in withheld.values()):
                    turn.end(begun)
                    raise Withheld(f"the store does not give {next(iter(withheld)).key}")
                rejects = self._withheld(withheld)
                yield rows.follow(rejects, rejects)
            yield from rows.rest()
            self._check_output()
            if not last and len(own) >= SUSPICIOUS and rows.lost > len(own) / 2:
                what = f"{rows.lost} of {len(own)} photographs were lost here, the last one: {rows.why}"
                raise RuntimeError(f"{what}. Another process tries the shard, because this machine may be at fault")
            yield Progress(0, 0, writer.finish(turn.end(begun), *rows.means()))

    def _withheld(self, files: "_Postponed") -> list[Reject]:
        """Rejects of the files that the store withholds.

        Raises:
            StorageError: it withholds what is not there, too, so it is at fault, not the files.
        """
        if not Place(self.codec.root).answers():
            file = next(iter(files.values()))
            raise storage.StorageError(file.error, file.attempts)
        return [Reject(file.key, "read", file.error, file.attempts) for file in files.values()]

    def _windows_one_by_one(
        self, sources: Sequence[Source], workers: Workers, later: "_Postponed"
    ) -> Iterator[list[Item | Reject]]:
        """Windows of files that the store did not give soon; none is loaded ahead, for the caller may stop."""
        for start in range(0, len(sources), self.batch):
            window = sources[start : start + self.batch]
            yield from self._windows(window, workers, storage.PATIENCE, later, FIRST_PATIENCE)

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
        self, sources: Sequence[Source], workers: Workers, patience: float, later: "_Postponed", least: float = 0.0
    ) -> Iterator[list[Item | Reject]]:
        """The windows of some files; the first one is being loaded when this returns.

        While one is degraded, the next one is loaded. Files that the store does not give soon go to `later`.
        """

        def submit(start: int) -> list[tuple[Source, Handle]]:
            chosen = sources[start : start + self.batch]
            left = max(min(least, patience), patience / (1 + len(later)))  # while all are throttled, few wait so long
            return [(source, workers.load(self.codec, source, left)) for source in chosen]

        def windows(ahead: list[tuple[Source, Handle]]) -> Iterator[list[Item | Reject]]:
            for start in range(0, len(sources), self.batch):
                window, ahead = ahead, submit(start + self.batch)
                yield self._decoded(window, later)

        return windows(submit(0))

    def _decoded(self, window: Sequence[tuple[Source, Handle]], later: "_Postponed") -> list[Item | Reject]:
        """Wait for the files of a window. Postponed ones go to `later`."""
        started, items = time.monotonic(), []
        for source, call in window:
            loaded = _result(source.key, "decode", call)
            if isinstance(loaded, Postponed):
                later[source] = loaded
            else:
                items.append(loaded if isinstance(loaded, Reject) else Item(call, loaded, self.scales(source.key)))
        self.tally["waiting"] += time.monotonic() - started
        return items


_Postponed = dict[Source, Postponed]


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
        self.lost, self.why = 0, ""  # photographs, perhaps by this machine's fault, and how the last one was
        self.taken: Future[_Taken] = second.submit(self.take, [], [])

    def follow(self, window: Sequence[Item | Reject], lrs: Sequence[np.ndarray | Reject]) -> Progress:
        """Start to write a window when the one before is written; returns the one before's counts."""
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
                if self._lost_here(result):
                    self.lost, self.why = self.lost + 1, f"{result.key} ({result.stage}: {result.error})"
            else:
                self.writer.add(result.rows)
                self.sums, self.count = self.sums + result.statistics, self.count + len(result.rows)
        return _Taken(len(done), rejects)

    def _lost_here(self, reject: Reject) -> bool:
        """Whether another machine might make rows of the photograph."""
        refused = reject.error.startswith("memory=") and not self.maker.degrader.limited_by_machine
        device = reject.stage in ("degrade", "encode") and not refused
        return device or DIED in reject.error or reject.error.startswith("MemoryError")

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
