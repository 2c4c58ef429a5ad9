"""An actor: a process that makes one shard after another, and reports them."""

import contextlib
import errno
import math
import os
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch
from ray.experimental import internal_kv

from degflow import storage
from degflow.config import keep_freed_memory
from degflow.storage import Source
from degflow.synthesis.cluster import NoCompiler, check_compiler
from degflow.synthesis.codec import Threads
from degflow.synthesis.metrics import ActorMetrics
from degflow.synthesis.reports import between_reports, columns, note_failure, seldom
from degflow.synthesis.settings import ActorsConfig
from degflow.synthesis.shard import BrokenTurn, ShardMaker, Turn, Withheld
from degflow.synthesis.tasks import Tasks, attempts_before

# Errors of a machine's own disk, memory or limits; others are those of storage.
_OF_ONE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_OF_ONE_MACHINE |= {errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE}


class ShardActor:
    """A Ray Data callable: takes one planned shard, yields reports; the last one has the shard's record.

    A failure is reported as well, because an exception in one actor would end Ray Data's whole run. The actor then
    waits `PAUSE` seconds, lest one bad machine take the shards of all good ones. When it gets another shard, or one
    waits for its turn, its process ends, because some errors of a GPU stay with their process. Ray starts it again and
    gives it that shard again.

    On CPUs an actor loads and encodes in threads. A shard whose actor died uses tasks: if a file killed the actor, that
    file now kills only a task, and becomes a reject. If Ray has given the shard to the actor `TRIES` times, because its
    process died or could not be reached, that is a failure of the shard. A process ends itself if its device works on a
    window, or loads the networks, for more than `actors.timeout` seconds, for a GPU may hang; the next process reports
    the failure.
    """

    PAUSE, GRACE = 30.0, 5.0  # seconds; the second one for Ray to take the last reports of a process
    TRIES = 20
    TIMEOUTS = 14400.0, 1800.0  # seconds, on CPUs and with a GPU

    def __init__(self, maker: ray.ObjectRef, actors: ActorsConfig, gpus: int, threads: int, most: int):
        keep_freed_memory()
        self.threads, self.reference, self.compiled = threads, maker, actors.compile
        self.tasks = Tasks(gpus)
        self.usual = self.tasks if gpus else Threads(threads)
        self.between_reports = between_reports(most, gpus, threads)
        self.maker: ShardMaker | None = None
        self.metrics: ActorMetrics | None = None
        self.calls, self.turn, self.rests_until = _Calls(), Turn(), 0.0
        self.watch = _Watch(actors.timeout or self.TIMEOUTS[bool(gpus)])

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

    def loaded(self, mark: bytes) -> tuple[ShardMaker, ActorMetrics]:
        """What `load` gave, which is called once, and what counts its work; `mark` is that of the `_Watch`."""
        if not self.maker or not self.metrics:
            with self.turn.taken(), self.watch(mark):
                self.maker = self.maker or self.load()
                if self.maker.codec.patience is not None:
                    storage.PATIENCE = self.maker.codec.patience
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
                yield from self._make(shard["shard"], sources, shard["elsewhere"], shard["last"], shard["resigned"])
        except BrokenTurn:
            self.calls.wait()
            time.sleep(max(self.GRACE, self.rests_until - time.monotonic()))
            os._exit(1)

    def _make(
        self, number: int, sources: list[Source], elsewhere: list[str], last: bool, resigned: bool
    ) -> Iterator[dict[str, list[Any]]]:
        again = attempts_before() > 0
        workers = self.tasks if again else self.usual
        try:
            if attempts_before() >= self.TRIES:
                raise RuntimeError(f"its process died, or was not reached, {self.TRIES} times; Ray's logs may say why")
            mark = f"degflow hung {ray.get_runtime_context().get_actor_id()} {number}".encode()
            if internal_kv._internal_kv_del(mark):
                raise RuntimeError(f"its device hung for {self.watch.timeout:g} s (actors.timeout)")
            maker, metrics = self.loaded(mark)
            maker = replace(maker, tally=defaultdict(float), watched=partial(self.watch, mark))
            made = maker.make(number, sources, workers, self.turn, elsewhere, last, resigned)
            reports = metrics.counting(maker, made)
            for images, rejects, record in seldom(reports, self.between_reports):
                yield columns(number, images, rejects, record=record)
        except BrokenTurn:
            raise
        except Withheld as error:
            if again:
                note_failure(self.reference, number, withheld=str(error))
            yield columns(number, withheld=str(error))
        except Exception as error:
            self.turn.broken = True
            if again:
                note_failure(self.reference, number, failure=traceback.format_exc())
            if isinstance(error, NoCompiler) or (isinstance(error, OSError) and error.errno not in _OF_ONE_MACHINE):
                why, host = f"shard {number}: {type(error).__name__}: {error}", getattr(error, "host", "")
                self.rests_until = time.monotonic() + self.PAUSE  # but the report goes at once: it may end the run
                yield columns(number, fatal=why, host=host)
                return
            time.sleep(self.PAUSE)
            yield columns(number, failure=traceback.format_exc())


class _Calls:
    """The calls of an actor that run now, each in a thread of its own."""

    def __init__(self):
        self._ended, self._running = threading.Condition(), 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the block as a call."""
        with self._ended:
            self._running += 1
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


class _Watch:
    """Ends the process if a block runs longer than it may, and notes it in Ray; blocks run one at a time (`Turn`).

    Args:
        timeout: seconds.
    """

    def __init__(self, timeout: float):
        self.timeout, self._begun, self._mark = timeout, math.inf, b""
        threading.Thread(target=self._look, daemon=True).start()

    @contextlib.contextmanager
    def __call__(self, mark: bytes) -> Iterator[None]:
        """Watch the block; `mark` is the key of the note."""
        self._mark, self._begun = mark, time.monotonic()
        try:
            yield
        finally:
            self._begun = math.inf

    def _look(self) -> None:
        while time.monotonic() - self._begun < self.timeout:
            time.sleep(min(self.timeout / 4, 10.0))
        with contextlib.suppress(Exception):
            internal_kv._internal_kv_put(self._mark, b"hung")
        os._exit(1)
