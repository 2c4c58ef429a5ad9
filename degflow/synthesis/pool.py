"""Ray: join or start a cluster, and make the planned shards on a pool of actors.

Ray Data maps the actors over the shards: it places and adds actors, hands out shards, restarts an actor whose process
or node is gone, and gives its shard to another. What exactly-once and long runs need beyond that is ours: a shard is
put once (`dataset.writer`), an exception costs one attempt of one shard, and what fails three times is set aside.
"""

import contextlib
import ctypes
import errno
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.data
import ray.exceptions
import torch
from ray._private import worker as ray_worker
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from degflow.dataset.layout import Record
from degflow.dataset.plan import Plan
from degflow.storage import Source
from degflow.synthesis.cluster import NoCompiler, Watch, check_address, check_compiler, lack, unstarted
from degflow.synthesis.codec import Threads
from degflow.synthesis.metrics import ActorMetrics, DriverMetrics
from degflow.synthesis.settings import ActorsConfig
from degflow.synthesis.shard import BrokenTurn, Progress, ShardMaker, Turn
from degflow.synthesis.tasks import Tasks, attempts_before

ATTEMPTS = 3  # of a shard
HOPELESS = 10  # failures end the run as long as no shard is made
_OF_ONE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors of its disk; those of storage end the run
SHARDS_AT_ONCE = 2  # of an actor: while one is being stored, the next one is degraded
REPORTS = 100  # a second, from all actors of a run: they take half of the driver's core
JUDGED = 200  # images in made shards, after which a run ends if most of them are rejects
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)


@dataclass(frozen=True)
class Pool:
    """The actors of a run, on a running Ray.

    Args:
        actors: the configuration.
        gpus: for each actor.
        threads: for each actor.
        room: how many actors fit into the cluster now.
    """

    actors: ActorsConfig
    gpus: int
    threads: int
    room: int

    def make(self, maker: ShardMaker, plan: Plan, pending: list[int], price: float = 0.0) -> None:
        """Make the pending shards of the plan, and show the progress, with what it costs at a `price` per actor's hour.

        A shard whose actor failed is tried again, by another process, after all others; after `ATTEMPTS` failures it is
        set aside.

        Raises:
            OSError: storage that failed, or a node without a compiler.
            ValueError: shards that were set aside, when all others are made; or going on makes no sense, because
                `HOPELESS` shards failed and none was made, or most images were rejected.
        """
        total, ray_maker = plan.images(pending), ray.put(maker)
        bar = tqdm(total=total, desc="degrading", unit="image", mininterval=_interval())
        with _quiet_ray_data(), bar, Watch(partial(unstarted, self.gpus, self.threads), bar.write):
            count = _Count(bar, len(pending), price, DriverMetrics(maker.output))
            waiting = pending
            while waiting:
                for report in self._reports(ray_maker, plan, waiting):
                    count.take(report)
                # Ray drops what an actor's second process reports, until it has reported as often as the first one.
                for number, seen in list(count.open.items()):
                    if record := maker.put_before(number, plan[number]):
                        left = len(plan[number]) - seen["images"], record.rejects - seen["rejects"]
                        count.take(_row(number, *left, record=_text(record)))
                waiting = count.to_repeat(waiting)
        count.check()

    def _reports(self, maker: ray.ObjectRef, plan: Plan, waiting: list[int]) -> Iterator[dict[str, Any]]:
        """Map a pool of actors over the shards once. A pool that breaks ends the reports early, and says why."""
        strategy = self._strategy(len(waiting))
        reports = ray.data.from_arrow([plan.task(number) for number in waiting]).map_batches(
            _ShardActor,
            fn_constructor_args=(maker, self.gpus, self.threads, self.actors.compile, strategy.max_size),
            compute=strategy,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0 if self.gpus else self.threads,  # a GPU places its actor; the CPUs are left to the tasks
            num_gpus=self.gpus,
            ray_remote_args_fn=_actor_limits,
        )
        try:
            yield from reports.iter_rows()
        except ray.exceptions.RayError as error:  # an actor that could not be restarted any more
            yield _row(failure=f"as the pool of actors broke: {type(error).__name__}: {error}")

    def _strategy(self, shards: int) -> ActorPoolStrategy:
        most = min(shards, self.actors.max or shards)
        least = min(self.actors.min, most)
        first = min(most, max(least, self.room))
        # Of few shards, each actor has its share. How many actors a pool without a limit will have, nobody knows.
        at_once = SHARDS_AT_ONCE if shards >= SHARDS_AT_ONCE * (most if self.actors.max else first) else 1
        return ActorPoolStrategy(
            min_size=least,
            max_size=most,
            initial_size=first,
            max_tasks_in_flight_per_actor=at_once,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=True,  # `Turn` keeps two shards from the device at a time
        )


@contextlib.contextmanager
def pool_of(actors: ActorsConfig) -> Iterator[Pool]:
    """Join the running Ray (RAY_ADDRESS, or `ray start` on this machine), or start one for the time of the block.

    Raises:
        OSError: a running Ray is named, but does not answer.
        ValueError: an actor needs what this machine has not, and Ray was started here.
    """
    joined = ray.is_initialized()
    if not joined:
        check_address()
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # real failures arrive as Python exceptions
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield _measured(actors, own=getattr(ray_worker._global_node, "head", False))
    finally:
        if not joined:
            ray.shutdown()


def _measured(actors: ActorsConfig, own: bool) -> Pool:
    """The pool that fits the cluster; `own`: this process started Ray, so the cluster is this machine, and fixed."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    cpus, offered = [int(node["CPU"]) for node in nodes], [int(node.get("GPU", 0)) for node in nodes]
    gpus = int(any(offered)) if actors.gpus == "auto" else int(actors.gpus)
    if own and gpus and not any(offered):
        raise ValueError(f"actors.gpus={actors.gpus}: Ray finds no GPU on this machine")
    if own and actors.threads > max(cpus):
        raise ValueError(f"actors.threads={actors.threads}: Ray finds {max(cpus)} CPUs on this machine")
    if own and actors.compile:
        check_compiler("cuda" if gpus else "cpu")
    shares = [c // g if gpus else c for c, g in zip(cpus, offered, strict=True) if g or not gpus]
    threads = actors.threads or max(1, min([4, *shares]))
    fits = [g if gpus else c // threads for c, g in zip(cpus, offered, strict=True)]
    cluster = "this machine" if own else f"a Ray cluster (nodes with CPUs: {len(nodes)})"
    kind = "one GPU each" if gpus else "on CPUs"
    print(f"running on {cluster}: actors {kind}, with {threads} threads; room for {sum(fits)} now", flush=True)
    if missing := lack(gpus, threads):
        print(missing, flush=True)
    return Pool(actors, gpus, threads, sum(fits))


def _actor_limits() -> dict[str, int]:
    # Nodes may be taken away many times; but an actor that always dies, e.g. of one huge image, must end the job.
    return {"max_restarts": 20, "max_task_retries": 20}


def keep_freed_memory() -> None:
    """Let glibc keep up to 128 MiB of free memory, for tensors of up to 32 MiB.

    By default it returns every freed tensor of some MB to the system, and the next tensor causes page faults. For an
    image of 256 x 256 pixels an actor had 18 000 of them, a third of its time; with this it has 51.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # glibc's largest
        libc.mallopt(M_TRIM_THRESHOLD, 128 << 20)


class _ShardActor:
    """A Ray Data callable: takes one planned shard, yields reports; the last one has the shard's record.

    A failure is reported as well, because an exception in one actor would end Ray Data's whole run. The actor then
    waits `PAUSE` seconds, lest one bad machine take the shards of all good ones. Then its process ends, because some
    errors of a GPU stay with their process: as soon as it is given another shard, or has one that waits for its turn.
    Ray starts it anew and gives it that shard again.

    On CPUs an actor loads and encodes in threads. A shard whose actor died uses tasks: if a file killed the actor, that
    file now kills only a task, and becomes a reject.
    """

    PAUSE, GRACE = 30.0, 5.0  # seconds; the second one for Ray to take the last reports of a process

    def __init__(self, maker: ray.ObjectRef, gpus: int, threads: int, compiled: bool, most: int):
        keep_freed_memory()
        self.threads, self.reference, self.compiled = threads, maker, compiled
        self.tasks = Tasks(gpus)
        self.usual = self.tasks if gpus else Threads(threads)
        self.between_reports = _between_reports(most, gpus, threads)
        self.maker: ShardMaker | None = None
        self.metrics: ActorMetrics | None = None
        self.calls, self.turn = _Calls(), Turn()

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
                self.metrics = self.metrics or ActorMetrics(self.maker.output)
        return self.maker, self.metrics

    def __call__(self, batch: Any) -> Iterator[dict[str, list[Any]]]:
        shard = batch.to_pylist()[0]
        sources = [Source(*source.values()) for source in shard["sources"]]
        try:
            with self.calls.counted():
                if self.turn.broken:
                    raise BrokenTurn
                torch.set_num_threads(self.threads)  # of this call's thread
                yield from self._make(shard["shard"], sources)
        except BrokenTurn:
            self.calls.wait()
            time.sleep(self.GRACE)
            os._exit(1)

    def _make(self, number: int, sources: list[Source]) -> Iterator[dict[str, list[Any]]]:
        again = attempts_before() > 0
        workers = self.tasks if again else self.usual
        try:
            maker, metrics = self.loaded()
            maker = replace(maker, tally=defaultdict(float))
            reports = metrics.counting(maker, maker.make(number, sources, workers, self.turn, again))
            for images, rejects, record in _seldom(reports, self.between_reports):
                yield _report(number, images, rejects, record=_text(record))
        except BrokenTurn:
            raise
        except Exception as error:
            if isinstance(error, NoCompiler) or (isinstance(error, OSError) and error.errno not in _OF_ONE_MACHINE):
                yield _report(number, fatal=f"shard {number}: {type(error).__name__}: {error}")
                return
            self.turn.broken = True
            time.sleep(self.PAUSE)
            yield _report(number, failure=f"on {socket.gethostname()}: {traceback.format_exc()}")


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


class _Count:
    """What the reports of a run add up to.

    Args:
        bar: shows the images.
        shards: of the run.
        price: of an hour of an actor; 0: unknown.
        metrics: show the numbers of shards.
    """

    def __init__(self, bar: tqdm, shards: int, price: float = 0.0, metrics: DriverMetrics | None = None):
        self.bar, self.shards, self.price, self.metrics = bar, shards, price, metrics
        self.seconds = 0.0  # of actors, for the shards that are made
        self.open: dict[int, Counter[str]] = {}  # images and rejects of each shard that is being made
        self.whole: Counter[str] = Counter()  # of all shards that are made
        self.rejects = 0
        self.failures: dict[int, list[str]] = {}
        self.made: set[int] = set()
        self.failed: set[int] = set()  # in this round
        self.broke = "on an unknown machine: no report came back"

    def take(self, report: dict[str, Any]) -> None:
        """Count one report.

        Raises:
            OSError, ValueError: see `Pool.make`.
        """
        if report["fatal"]:
            raise OSError(report["fatal"])
        number = report["shard"]
        if report["failure"]:
            self._failed(number, report["failure"])
            return
        shard = self.open.setdefault(number, Counter())
        shard.update(images=report["images"], rejects=report["rejects"])
        self.rejects += report["rejects"]
        if report["record"]:
            record = Record(**json.loads(report["record"]))
            self.made.add(number)
            self.whole.update(self.open.pop(number))
            self.seconds += record.seconds
            self.bar.write(_log_line(record))
            self._show()
            self._judge()
        self.bar.set_postfix({"rejects": self.rejects, **self._cost()}, refresh=False)
        self.bar.update(report["images"])

    def _cost(self) -> dict[str, str]:
        """What the made shards cost, and by them all images of the run; nothing before the first one."""
        if not self.price or not self.whole["images"]:
            return {}
        cost = self.price * self.seconds / 3600
        total = cost * (self.bar.total or 0) / self.whole["images"]
        return {"cost": f"{cost:.2f}", "in all": f"{total:.2f}"}

    def _show(self) -> None:
        if self.metrics:
            aside = sum(len(texts) >= ATTEMPTS for number, texts in self.failures.items() if number not in self.made)
            self.metrics.show(self.shards - len(self.made) - aside, aside)

    def _judge(self) -> None:
        """End a run that mostly makes rejects. Shards that are made count alone: their rejects can be read."""
        images, rejects = self.whole["images"], self.whole["rejects"]
        if images >= JUDGED and rejects > images / 2:
            raise ValueError(f"{rejects} of the first {images} images were rejected; the rejects folder says why")

    def _failed(self, number: int, why: str) -> None:
        if number < 0:
            self.broke = why
            return
        lost = self.open.pop(number, Counter())
        self.bar.update(-lost["images"])
        self.rejects -= lost["rejects"]
        self.failed.add(number)
        times = self.failures.setdefault(number, [])
        times.append(why)
        last = why.strip().splitlines()[-1]
        self.bar.write(f"shard {number} failed {why.partition(':')[0]}, attempt {len(times)} of {ATTEMPTS}: {last}")
        if not self.made and sum(map(len, self.failures.values())) >= HOPELESS:
            raise ValueError(f"{HOPELESS} attempts failed and no shard was made; the last one {why}")

    def to_repeat(self, tried: list[int]) -> list[int]:
        """The shards of the last round that are to be tried again."""
        left = [number for number in tried if number not in self.made]
        for number in left:
            if number not in self.failed:
                self._failed(number, self.broke)
        self.failed = set()
        self._show()
        return [number for number in left if len(self.failures.get(number, [])) < ATTEMPTS]

    def check(self) -> None:
        """Raise a ValueError that names the shards that were set aside, if there are any."""
        aside = {number: texts for number, texts in self.failures.items() if number not in self.made}
        if aside:
            names = ", ".join(str(number) for number in sorted(aside)[:10]) + (", ..." if len(aside) > 10 else "")
            raise ValueError(
                f"{len(aside)} of {self.shards} shards were set aside after {ATTEMPTS} failures each (shards {names}). "
                f"All others are made; the same command tries these again. The last failure, {aside[max(aside)][-1]}"
            )


def _between_reports(most: int, gpus: int, threads: int) -> float:
    """Seconds between two reports of an actor: 1, or more if the run may have, and the cluster holds, many actors."""
    kind, each = ("GPU", gpus) if gpus else ("CPU", threads)
    try:
        room = ray.cluster_resources().get(kind, 0) / each
    except Exception:  # Ray's head may be away for a moment, and an actor need not wait for it
        room = 0
    return max(1.0, min(most, room) / REPORTS)


def _seldom(reports: Iterable[Progress], seconds: float) -> Iterator[Progress]:
    """Sums of the reports over `seconds`: each report costs an actor some 2 ms, and the driver some 4."""
    images, rejects, begun = 0, 0, time.monotonic()
    for report in reports:
        images, rejects = images + report.images, rejects + report.rejects
        if report.record or time.monotonic() - begun >= seconds:
            yield Progress(images, rejects, report.record)
            images, rejects, begun = 0, 0, time.monotonic()


def _text(record: Record | None) -> str:
    return json.dumps(asdict(record)) if record else ""


def _row(shard: int = -1, images: int = 0, rejects: int = 0, **texts: str) -> dict[str, Any]:
    texts = {"record": "", "fatal": "", "failure": ""} | texts
    return {"shard": shard, "images": images, "rejects": rejects, **texts}


def _report(shard: int, images: int = 0, rejects: int = 0, **texts: str) -> dict[str, list[Any]]:
    return {name: [value] for name, value in _row(shard, images, rejects, **texts).items()}


def _interval() -> float:
    return 0.2 if sys.stderr.isatty() else 15.0


def _log_line(record: Record) -> str:
    quality = "" if record.psnr is None else f", LR at {record.psnr:.2f} dB"
    size = f"{record.bytes / 1e6:.1f} MB"
    return f"{record.part}: {record.rows} rows, {record.rejects} rejects, {size}, {record.seconds:.1f} s{quality}"


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without its own progress bar, and without delay of the reports."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # byte, so that every report is a block, which is passed on at once
    # A pool grows as soon as all its actors have all the shards that they take.
    context.autoscaling_config = replace(context.autoscaling_config, actor_pool_util_upscaling_threshold=1.0)
    context.execution_no_progress_timeout_s = -1  # a cluster may need long for its first GPU
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    with DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`ray_remote_args_fn` is deprecated"
        )  # Ray has no other way to bound restarts
        yield
