"""Ray: a cluster joined or started, and a pool of actors on it that turns planned shards into their objects."""

import contextlib
import ctypes
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
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
from degflow.degrader import Degrader
from degflow.storage import Source
from degflow.synthesis.settings import SynthesizeConfig
from degflow.synthesis.shard import CodecDied, Progress, ShardMaker, Threads

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)


@dataclass(frozen=True)
class Pool:
    """What the cluster gives to this run."""

    gpus: int  # per actor
    threads: int  # per actor
    room: int  # actors that fit now

    @property
    def actor_cpus(self) -> int:
        """CPUs that an actor takes: a GPU alone places its actor, so that the CPUs are left to the codec's tasks."""
        return 0 if self.gpus else self.threads


@contextlib.contextmanager
def pool_of(config: SynthesizeConfig) -> Iterator[Pool]:
    """Join the running Ray (RAY_ADDRESS, or `ray start` on this machine), or start one; decide what an actor gets."""
    joined = ray.is_initialized()
    if not joined:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters arrives as a Python exception
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield _measured(config, own=getattr(ray_worker._global_node, "head", False))
    finally:
        if not joined:
            ray.shutdown()


def _measured(config: SynthesizeConfig, own: bool) -> Pool:
    """What an actor gets; `own`: this process started Ray, so that the cluster is this machine and will not grow."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    cpus, offered = [int(node["CPU"]) for node in nodes], [int(node.get("GPU", 0)) for node in nodes]
    gpus = int(any(offered)) if config.actors.gpus == "auto" else int(config.actors.gpus)
    if own and gpus and not any(offered):
        raise ValueError(f"actors.gpus={config.actors.gpus}: Ray finds no GPU on this machine")
    if own and config.actors.threads > max(cpus):
        raise ValueError(f"actors.threads={config.actors.threads}: Ray finds {max(cpus)} CPUs on this machine")
    if not gpus and cpus and config.actors.threads > max(cpus):
        print(f"actors.threads={config.actors.threads}: no node has so many CPUs now; waiting for one that has")
    shares = [c // g if gpus else c for c, g in zip(cpus, offered, strict=True) if g or not gpus]
    threads = config.actors.threads or max(1, min([4, *shares]))
    fits = [g if gpus else c // threads for c, g in zip(cpus, offered, strict=True)]
    where = "this machine" if own else f"a Ray cluster (nodes with CPUs: {len(nodes)})"
    kind = "one GPU each" if gpus else "on CPUs"
    print(f"running on {where}: actors {kind}, with {threads} threads; room for {sum(fits)} now", flush=True)
    return Pool(gpus, threads, sum(fits))


def _actor_limits() -> dict[str, int]:
    # A node may be taken away many times; an actor that dies each time, of one huge image say, must end the job.
    return {"max_restarts": 20, "max_task_retries": 20}


@ray.remote(max_retries=3)
def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class _Task:
    """The result of a task; see `shards.Handle`."""

    def __init__(self, reference: ray.ObjectRef):
        self.reference = reference

    def result(self) -> Any:
        """Wait for it, and raise what the function raised."""
        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise CodecDied(f"its process died, 4 times over ({type(error).__name__})") from None


class _Tasks:
    """Runs the codec's functions as Ray tasks, in processes of their own; see `shards.Workers`.

    Beside actors on GPUs a task takes one CPU of any node, and Ray prefers nodes without GPUs. Beside actors on CPUs
    it takes none, for the actors may hold them all.
    """

    def __init__(self, gpus: int):
        self.call = _call.options(num_cpus=1 if gpus else 0)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> _Task:
        """Start a call."""
        return _Task(self.call.remote(function, *(a.reference if isinstance(a, _Task) else a for a in arguments)))


def keep_freed_memory() -> None:
    """Let this process keep up to 128 MiB of free memory, for tensors of up to 32 MiB, where the C library is glibc.

    Otherwise it gives a freed tensor of some MB back at once and pages the next one in anew: in an actor 18 000 page
    faults, and a third of the time, for each image of 256 x 256 pixels; then 51.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # glibc's largest
        libc.mallopt(M_TRIM_THRESHOLD, 128 << 20)


class _ShardActor:
    """A Ray Data callable: one planned shard in; counts of finished images out, with the last the shard's record.

    A failure is reported like anything else, because Ray Data rewords the exceptions that it passes on.

    On CPUs an actor decodes and encodes in threads. One that was restarted makes its first shard with tasks: if a file
    killed it, that file now kills a task, and becomes a reject.
    """

    def __init__(self, degrader: ray.ObjectRef, config: SynthesizeConfig, gpus: int, threads: int):
        torch.set_num_threads(threads)
        keep_freed_memory()
        device = "cuda" if ray.get_gpu_ids() and config.actors.device == "auto" else "cpu"
        self.usual = _Tasks(gpus) if gpus else Threads(threads)
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        model = ray.get(degrader).to(device)
        if config.actors.compile:
            model.compile(dynamic=True)
        self.maker = ShardMaker(model, config, _Tasks(gpus) if restarted else self.usual)

    def __call__(self, batch: Any) -> Iterator[dict[str, list[Any]]]:
        shard = batch.to_pylist()[0]
        sources = [Source(*source.values()) for source in shard["sources"]]
        try:
            for images, rejects, record in _seldom(self.maker.make(shard["shard"], sources)):
                yield _report(images, rejects, record=json.dumps(asdict(record)) if record else "")
            self.maker.workers = self.usual
        except OSError as error:
            yield _report(storage_failure=f"shard {shard['shard']}: {type(error).__name__}: {error}")
        except Exception:
            yield _report(failure=f"shard {shard['shard']}: {traceback.format_exc()}")


def _seldom(reports: Iterable[Progress], seconds: float = 1.0) -> Iterator[Progress]:
    """The reports summed up over `seconds`: handing one to Ray keeps an actor from its device for some 2 ms."""
    images, rejects, begun = 0, 0, time.monotonic()
    for report in reports:
        images, rejects = images + report.images, rejects + report.rejects
        if report.record or time.monotonic() - begun >= seconds:
            yield Progress(images, rejects, report.record)
            images, rejects, begun = 0, 0, time.monotonic()


def _report(images: int = 0, rejects: int = 0, **texts: str) -> dict[str, list[Any]]:
    report: dict[str, Any] = {"record": "", "storage_failure": "", "failure": ""} | texts
    return {name: [value] for name, value in report.items()} | {"images": [images], "rejects": [rejects]}


def make_shards(config: SynthesizeConfig, degrader: Degrader, plan: Plan, pending: list[int], pool: Pool) -> None:
    """Stream the pending shards through the pool, and show how far they are."""
    total = plan.images(pending)
    with _quiet_ray_data(), tqdm(total=total, desc="degrading", unit="image", mininterval=_interval()) as bar:
        reports = ray.data.from_arrow([plan.task(number) for number in pending]).map_batches(
            _ShardActor,
            fn_constructor_args=(ray.put(degrader), config, pool.gpus, pool.threads),
            compute=_strategy(config, len(pending), pool.room),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=pool.actor_cpus,
            num_gpus=pool.gpus,
            ray_remote_args_fn=_actor_limits,
        )
        rejects = 0
        for report in reports.iter_rows():
            if report["storage_failure"]:
                raise OSError(report["storage_failure"])
            if report["failure"]:
                raise RuntimeError(report["failure"])
            rejects += report["rejects"]
            bar.set_postfix(rejects=rejects, refresh=False)
            bar.update(report["images"])
            if report["record"]:
                bar.write(_log_line(Record(**json.loads(report["record"]))))


def _strategy(config: SynthesizeConfig, shards: int, room: int) -> ActorPoolStrategy:
    most = min(shards, config.actors.max or shards)
    least = min(config.actors.min, most)
    first = min(most, max(least, room))
    # Ray Data enlarges a pool whose actors have work waiting; a pool that cannot grow hands each shard to who is free.
    waiting = 1 if first == most else 2
    return ActorPoolStrategy(min_size=least, max_size=most, initial_size=first, max_tasks_in_flight_per_actor=waiting)


def _interval() -> float:
    return 0.2 if sys.stderr.isatty() else 15.0


def _log_line(record: Record) -> str:
    quality = "" if record.psnr is None else f", LR at {record.psnr:.2f} dB"
    size = f"{record.bytes / 1e6:.1f} MB"
    return f"{record.part}: {record.rows} rows, {record.rejects} rejects, {size}, {record.seconds:.1f} s{quality}"


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data with our progress bar in place of its own, and with a report passed on as soon as it is made."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # bytes; a report is a block
    context.execution_no_progress_timeout_s = -1  # a cluster may be long in giving the first GPU
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    with DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")  # there is no other way in yet
        yield
