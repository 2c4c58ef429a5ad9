"""An actor: a process that makes one shard after another, and reports them."""

import contextlib
import errno
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import ray
import torch

from degflow import storage
from degflow.config import keep_freed_memory
from degflow.storage import Source
from degflow.synthesis.cluster import NoCompiler, check_compiler
from degflow.synthesis.codec import Threads
from degflow.synthesis.metrics import ActorMetrics
from degflow.synthesis.reports import between_reports, columns, seldom
from degflow.synthesis.settings import ActorsConfig
from degflow.synthesis.shard import BrokenTurn, ShardMaker, Turn
from degflow.synthesis.tasks import Tasks, attempts_before

T = TypeVar("T")
_OF_ONE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors of its disk; those of storage end the run


class ShardActor:
    """A Ray Data callable: takes one planned shard, yields reports; the last one has the shard's record.

    A failure is reported as well, because an exception in one actor would end Ray Data's whole run. The actor then
    waits `PAUSE` seconds, lest one bad machine take the shards of all good ones. Then its process ends, because some
    errors of a GPU stay with their process: as soon as it is given another shard, or has one that waits for its turn.
    Ray starts it anew and gives it that shard again.

    On CPUs an actor loads and encodes in threads. A shard whose actor died uses tasks: if a file killed the actor, that
    file now kills only a task, and becomes a reject. If the actor dies `DEATHS` times, that is a failure of the shard.
    A process in which nothing is finished for `actors.timeout` seconds ends itself: a GPU or a disk may hang.
    """

    PAUSE, GRACE = 30.0, 5.0  # seconds; the second one for Ray to take the last reports of a process
    DEATHS = 3
    TIMEOUTS = 14400.0, 1800.0  # seconds, on CPUs and with a GPU

    def __init__(self, maker: ray.ObjectRef, actors: ActorsConfig, gpus: int, threads: int, most: int):
        keep_freed_memory()
        self.threads, self.reference, self.compiled = threads, maker, actors.compile
        self.tasks = Tasks(gpus)
        self.usual = self.tasks if gpus else Threads(threads)
        self.between_reports = between_reports(most, gpus, threads)
        self.maker: ShardMaker | None = None
        self.metrics: ActorMetrics | None = None
        self.calls = _Calls(actors.timeout or (self.TIMEOUTS[1] if gpus else self.TIMEOUTS[0]))
        self.turn = Turn()

    def device(self) -> str:
        """The device that computes."""
        return "cuda" if ray.get_gpu_ids() else "cpu"

    def load(self) -> ShardMaker:
        """The run's maker, its networks on the device."""
        maker: ShardMaker = ray.get(self.reference)
        degrader = maker.degrader.degrader.to(self.device())
        if self.compiled:
            check_compiler(self.device())
            degrader.compile(dynamic=True)
        return maker

    def loaded(self) -> tuple[ShardMaker, ActorMetrics]:
        """What `load` gave, which is called once, and what counts its work."""
        if not self.maker or not self.metrics:
            with self.turn.taken():
                self.maker = self.maker or self.load()
                storage.PATIENCE = self.maker.codec.patience or storage.PATIENCE
                self.metrics = self.metrics or ActorMetrics(self.maker.output)
        return self.maker, self.metrics

    def __call__(self, batch: Any) -> Iterator[dict[str, list[Any]]]:
        """Make the shard of a batch of one row, which `Plan.task` gives; yields reports."""
        shard = batch.to_pylist()[0]
        sources = [Source(*source.values()) for source in shard["sources"]]
        try:
            with self.calls.counted():
                if self.turn.broken:
                    raise BrokenTurn
                torch.set_num_threads(self.threads)  # of this call's thread
                yield from self._make(shard["shard"], sources, shard["elsewhere"])
        except BrokenTurn:
            self.calls.wait()
            time.sleep(self.GRACE)
            os._exit(1)

    def _make(self, number: int, sources: list[Source], elsewhere: list[str]) -> Iterator[dict[str, list[Any]]]:
        again = attempts_before() > 0
        workers = self.tasks if again else self.usual
        try:
            if attempts_before() >= self.DEATHS:
                raise RuntimeError(f"its process died {self.DEATHS} times; Ray's logs of the nodes may say why")
            maker, metrics = self.loaded()
            maker = replace(maker, tally=defaultdict(float))
            reports = metrics.counting(maker, maker.make(number, sources, workers, self.turn, again, elsewhere))
            for images, rejects, record in seldom(self.calls.noted(reports), self.between_reports):
                yield columns(number, images, rejects, record=record)
        except BrokenTurn:
            raise
        except Exception as error:
            self.turn.broken = True
            if isinstance(error, NoCompiler) or (isinstance(error, OSError) and error.errno not in _OF_ONE_MACHINE):
                yield columns(number, fatal=f"shard {number}: {type(error).__name__}: {error}")  # at once
                time.sleep(self.PAUSE)
                return
            time.sleep(self.PAUSE)
            yield columns(number, failure=traceback.format_exc())


class _Calls:
    """The calls of an actor that run now, each in a thread of its own.

    Args:
        timeout: seconds after which the process ends, if a call runs and none gets on.
    """

    def __init__(self, timeout: float):
        self._ended, self._running, self._moved = threading.Condition(), 0, time.monotonic()
        threading.Thread(target=self._watch, args=(timeout,), daemon=True).start()

    def noted(self, steps: Iterable[T]) -> Iterator[T]:
        """The same, as what shows that a call gets on."""
        for step in steps:
            self._moved = time.monotonic()
            yield step

    def _watch(self, timeout: float) -> None:
        while True:
            time.sleep(min(timeout / 4, 10.0))
            if self._running and time.monotonic() - self._moved > timeout:
                print(f"nothing finished for {timeout:g} s (actors.timeout): this process ends", file=sys.stderr)
                os._exit(1)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the block as a call."""
        with self._ended:
            self._running, self._moved = self._running + 1, time.monotonic()
        try:
            yield
        finally:
            with self._ended:
                self._running -= 1
                self._ended.notify_all()

    def wait(self) -> None:
        """Wait until no call runs."""
        with self._ended:
            self._ended.wait_for(lambda: not self._running)
