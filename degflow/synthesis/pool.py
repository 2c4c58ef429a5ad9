"""Ray: join or start a cluster, and make the planned shards on a pool of actors.

Ray Data maps the actors over the shards: it places and adds actors, hands out shards, restarts an actor whose process
or node is gone, and gives its shard to another. What exactly-once and long runs need beyond that is ours: a shard is
put once (`dataset.writer`), an exception or a process that dies again and again costs one attempt of one shard, and
what fails three times is set aside.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray._private import worker as ray_worker
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from degflow.dataset.plan import Plan
from degflow.synthesis.actor import ShardActor
from degflow.synthesis.cluster import FailedStarts, Watch, check_address, check_compiler, lack, machines, unstarted
from degflow.synthesis.metrics import DriverMetrics
from degflow.synthesis.reports import BROKE, Count, noted_failure, row
from degflow.synthesis.settings import ActorsConfig
from degflow.synthesis.shard import ShardMaker

SHARDS_AT_ONCE = 2  # of an actor: while one is being stored, the next one is degraded
ROUND = 20_000  # shards that Ray Data gets at a time: each is a task, and some 7 kB of the driver's memory


@dataclass(frozen=True)
class Pool:
    """The actors of a run, on a running Ray.

    Args:
        actors: the configuration.
        gpus: for each actor.
        threads: for each actor.
        room: how many actors fit into the cluster now.
        own: this process started Ray, so the cluster is this machine, and fixed.
    """

    actors: ActorsConfig
    gpus: int
    threads: int
    room: int
    own: bool = False

    def make(self, maker: ShardMaker, plan: Plan, pending: list[int], price: float = 0.0) -> None:
        """Make the pending shards of the plan, and show the progress, with what it costs at a `price` per actor's hour.

        A shard whose actor failed is tried again, by another process, after all others; after three failures it is set
        aside. A shard with a photograph that the store withholds comes again after all others, too; in the third
        attempt such a photograph is a reject.

        Raises:
            OSError: storage that failed, or a node without a compiler.
            ValueError: most of the first images were rejected.
            Unfinished: shards that were set aside, when all others are made; or ten attempts failed and no shard was
                made.
        """
        total, ray_maker = plan.images(pending), ray.put(maker)
        bar = tqdm(total=total, desc="degrading", unit="image", mininterval=_interval())
        watch = Watch(self._trouble(), lambda: bar.n, bar.write)
        with self._quiet_ray_data(), bar, watch:
            count = Count(bar, len(pending), price, DriverMetrics(maker.output), self._machines)
            while pending:
                left = []
                for first in range(0, len(pending), ROUND):
                    some = pending[first : first + ROUND]
                    self._try(maker, ray_maker, plan, some, all(number in count.failures for number in some), count)
                    left += count.to_repeat(some)
                pending = left
        count.check()

    def _trouble(self) -> Callable[[bool], str]:
        """What a `Watch` asks: where actors do not start, and why none runs."""
        failed = FailedStarts()
        return lambda stuck: "; ".join(filter(None, (unstarted(self.gpus, self.threads, stuck), failed())))

    def _try(
        self, maker: ShardMaker, ray_maker: ray.ObjectRef, plan: Plan, waiting: list[int], alone: bool, count: Count
    ) -> None:
        """Try to make each of the shards once, and count what is reported of them."""
        tasks = [plan.task(n, last=count.is_last(n), resigned=count.is_resigned(n)) for n in waiting]
        for report in self._reports(ray_maker, tasks, alone):
            count.take(report)
        # Ray drops what an actor's second process reports, until it has reported as often as the first one.
        seen = dict(count.open)
        with ThreadPoolExecutor(16) as threads:
            for number, record in zip(seen, threads.map(lambda n: maker.put_before(n, plan[n]), seen), strict=True):
                if record:
                    left = len(plan[number]) - seen[number]["images"], record.rejects - seen[number]["rejects"]
                    count.take(row(number, *left, record=record))
        for number in count.silent(waiting):
            if report := noted_failure(ray_maker, number):
                count.take(report)

    @contextlib.contextmanager
    def _quiet_ray_data(self) -> Iterator[None]:
        """Ray Data without its own progress bar, and without delay of the reports."""
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = 1  # byte, so that every report is a block, which is passed on at once
        # A pool grows as soon as all its actors have all the shards that they take.
        context.autoscaling_config = replace(context.autoscaling_config, actor_pool_util_upscaling_threshold=1.0)
        # One machine of many where actors cannot start (a package is missing) must not break the pool. There they are
        # started again and again, and once the other machines are full no start succeeds, which would set the count to
        # 0. If none starts anywhere, `Watch` says so every minute.
        most = max(3, self.room)
        context.max_consecutive_actor_init_deaths = most if self.own else 100 * most
        context.execution_no_progress_timeout_s = -1  # a cluster may need long for its first GPU
        for handler in logging.getLogger("ray.data").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.CRITICAL)
        with DataContext.current(context):
            yield

    def _machines(self) -> int:
        count = machines(self.gpus, self.threads)
        return min(count, self.actors.max) if self.actors.max else count

    def _reports(self, maker: ray.ObjectRef, tasks: list[pa.Table], alone: bool) -> Iterator[dict[str, Any]]:
        """Map a pool of actors over the shards' tasks once. A pool that breaks ends the reports early, and says why.

        An actor has one shard at a time if they are `alone`, for one of them may kill its actor and the other with it.
        """
        strategy = self._strategy(len(tasks), 1 if alone else SHARDS_AT_ONCE)
        try:
            reports = ray.data.from_arrow(tasks).map_batches(
                ShardActor,
                fn_constructor_args=(maker, self.actors, self.gpus, self.threads, strategy.max_size),
                compute=strategy,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=0 if self.gpus else self.threads,  # a GPU places its actor; the CPUs are left to the tasks
                num_gpus=self.gpus,
            )
            yield from reports.iter_rows()
        except Exception as error:  # Ray Data does not only raise RayErrors: it also asserts
            yield row(failure=f"{BROKE}{type(error).__name__}: {error}")

    def _strategy(self, shards: int, at_once: int) -> ActorPoolStrategy:
        most = min(shards, self.actors.max or shards)
        least = min(self.actors.min, most)
        first = min(most, max(least, self.room))
        # Of few shards, each actor has its share. How many actors a pool without a limit will have, nobody knows.
        at_once = at_once if shards >= at_once * (most if self.actors.max else first) else 1
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
    nodes = _nodes(own)
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
    return Pool(actors, gpus, threads, sum(fits), own)


def _nodes(own: bool) -> list[dict[str, float]]:
    """The resources of the nodes with CPUs.

    Raises:
        OSError: the Ray that this process started names no node for 30 s. On a busy machine it needs a moment.
    """
    deadline = time.monotonic() + 30
    while True:
        found = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if found or not own:
            return found
        if time.monotonic() > deadline:
            raise OSError("Ray was started on this machine, but does not name its node")
        time.sleep(0.1)


def _interval() -> float:
    return 0.2 if sys.stderr.isatty() else 15.0
