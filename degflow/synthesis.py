"""HR images in a folder or an object store -> a dataset of LR images at sampled scales, on a pool of Ray actors.

1. `synthesize` loads the model, resolves the configuration and compares it with the one of an unfinished run.
2. The input is listed once and dealt into shards; this plan is written before any work starts. It never changes, but
   `extend` and `retry_rejects` add shards to it.
3. Ray Data streams the missing shards to a pool of actors, with or without GPUs. Each holds a degrader and turns one
   whole shard at a time into its objects (see `shards`), reporting finished images as it goes. Beside GPUs, files are
   decoded and encoded by Ray tasks on any node's CPUs (see `codec`).
4. When every shard is done: the manifest, the card, the preview, and last `_SUCCESS` (see `dataset`).
"""

import contextlib
import json
import logging
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import ray
import ray.data
import ray.exceptions
import torch
from ray._private import worker as ray_worker
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from degflow import dataset
from degflow.card import card, preview
from degflow.codec import Loaded
from degflow.config import dump, plain
from degflow.dataset import Part, Plan, Record
from degflow.degrader import Degrader
from degflow.planning import SynthesizeConfig, continued, first_part, news, recipe_of, rejected, resolve
from degflow.shards import CodecDied, ShardMaker, Threads, codec_of
from degflow.storage import Place, Source


def synthesize(config: SynthesizeConfig) -> None:
    """Make the dataset, or what is missing of it.

    Raises:
        ValueError: a broken rule, no images, an output that holds something else, or too many rejects.
        OSError: storage that cannot be read or written.
    """
    degrader = Degrader.load(config.model or None)
    output = Place(config.output)
    config = continued(resolve(config, degrader), output)
    recipe = partial(recipe_of, config)
    plan = Plan.empty() if config.overwrite else dataset.read_plan(output)
    records = dataset.finished(output, plan, recipe)
    part = _next_part(config, plan, records, output)
    if not config.overwrite and not part and _is_finished(output, plan, records):
        print(f"{config.output}: finished already, nothing to do (overwrite=true makes it anew)")
        _name_preview(output)
        return
    if config.dry_run:
        plan = plan.plus(part) if part else plan
        print(_describe(config, plan, records))
        print(_estimate(config, plan))
        return
    plan = _claim(config, output, plan, part)
    print(_describe(config, plan, records), flush=True)
    started, made = time.monotonic(), 0
    while True:
        pending = [number for number in range(len(plan)) if number not in records]
        if pending:
            with _cluster(config) as pool:
                if config.actors.threads != pool.threads:
                    config = replace(config, actors=replace(config.actors, threads=pool.threads))
                    _save(config, output)
                _make_shards(config, degrader, plan, pending, pool)
            records, made = dataset.finished(output, plan, recipe), made + plan.images(pending)
            if missing := sorted(set(range(len(plan))) - set(records)):
                same = "the same command without overwrite=true" if config.overwrite else "the same command"
                raise ValueError(f"{len(missing)} of {len(plan)} shards are missing; {same} makes them")
        if _finish(config, output, plan, records):
            break
        plan = dataset.read_plan(output)  # another driver has extended it
        records = dataset.finished(output, plan, recipe)
    _summarise(config, output, plan, records, made, time.monotonic() - started)


def _is_finished(output: Place, plan: Plan, records: Mapping[int, Record]) -> bool:
    there = output.exists(dataset.SUCCESS) and len(records) == len(plan)
    return there and dataset.parts_in_manifest(output) == len(plan)


def _next_part(config: SynthesizeConfig, plan: Plan, records: Mapping[int, Record], output: Place) -> Part | None:
    """What the plan is to get: all of the input at first; later what is new, and what was rejected, as asked for."""
    if not len(plan):
        return first_part(config)
    part = None
    if config.extend:
        part = news(config, plan)
    elif (config.dry_run or output.exists(dataset.SUCCESS)) and (new := news(config, plan)):
        first = ", ".join(new["key"].slice(0, 3).to_pylist()) + (", ..." if len(new) > 3 else "")
        print(f"{len(new)} new in {config.input} since the plan was made ({first}); extend=true takes them")
    if config.retry_rejects:
        again = rejected(config, plan if part is None else plan.plus(part), records, output)
        part = dataset.joined(part, again)
    return part or None


def _describe(config: SynthesizeConfig, plan: Plan, records: Mapping[int, Record]) -> str:
    count = plan.files
    done = f", {len(records)} of them done" if records else ""
    return (
        f"{count} images ({plan.bytes / 1e6:.1f} MB) in {len(plan)} shards{done}; "
        f"{config.scale.per_image} LR each, scales {_scales_in_words(config)}"
    )


def _estimate(config: SynthesizeConfig, plan: Plan, samples: int = 8) -> str:
    """What the run will take, from some of its files, and what planning took."""
    sources = plan.sample(samples)
    with ThreadPoolExecutor(samples) as pool:
        loaded = list(pool.map(codec_of(config).load, sources))
    sizes = [item.pixels.shape[0] * item.pixels.shape[1] for item in loaded if isinstance(item, Loaded)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    planned = f"planned with {peak:.0f} MB of memory at most; dry_run=true: nothing was started or written"
    if not sizes:
        return f"none of {len(sources)} sampled files is a readable image, so there is no estimate\n{planned}"
    mean = sum(sizes) / len(sizes)
    total = mean * plan.files * config.scale.per_image * len(sizes) / len(sources)
    return (
        f"some {total / 1e6:,.0f} megapixels of LR to make: of {len(sources)} sampled files {len(sizes)} are readable, "
        f"of {mean / 1e6:.2f} megapixels in the mean\n{planned}"
    )


def _scales_in_words(config: SynthesizeConfig) -> str:
    scale = config.scale
    if scale.distribution == "list":
        return "chosen from " + ", ".join(f"{value:g}" for value in scale.values)
    return f"{scale.distribution} in [{scale.low:g}, {scale.high:g}]"


def _claim(config: SynthesizeConfig, output: Place, plan: Plan, part: Part | None) -> Plan:
    """Make the output ours before any work: the configuration, then the plan, of which the first writer's counts."""
    try:
        if config.overwrite:
            for name in dataset.layout(output):
                if name != dataset.CONFIG:
                    output.delete(name)
            _save(config, output)
        elif not _save(config, output, new=True):
            continued(config, output)
        if part:
            output.delete(dataset.SUCCESS)
            if not dataset.write_part(output, plan.parts, part):
                print("another driver planned at the same time: its plan counts", flush=True)
            plan = dataset.read_plan(output)
            if not len(plan):
                raise OSError("another driver is overwriting it")
        return plan
    except OSError as error:
        raise OSError(f"output={config.output}: cannot be written ({type(error).__name__}: {error})") from error


def _save(config: SynthesizeConfig, output: Place, new: bool = False) -> bool:
    asked = {"overwrite": False, "dry_run": False, "extend": False, "retry_rejects": False}
    return output.write(dataset.CONFIG, dump(replace(config, **asked)).encode(), new=new)


@dataclass(frozen=True)
class _Pool:
    gpus: int  # per actor
    threads: int  # per actor
    room: int  # actors that fit now

    @property
    def actor_cpus(self) -> int:
        """CPUs that an actor takes: a GPU alone places its actor, so that the CPUs are left to the codec's tasks."""
        return 0 if self.gpus else self.threads


@contextlib.contextmanager
def _cluster(config: SynthesizeConfig) -> Iterator[_Pool]:
    """Join the running Ray (RAY_ADDRESS, or `ray start` on this machine), or start one; decide what an actor gets."""
    joined = ray.is_initialized()
    if not joined:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters arrives as a Python exception
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield _pool(config, own=getattr(ray_worker._global_node, "head", False))
    finally:
        if not joined:
            ray.shutdown()


def _pool(config: SynthesizeConfig, own: bool) -> _Pool:
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
    return _Pool(gpus, threads, sum(fits))


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


class _ShardActor:
    """A Ray Data callable: one planned shard in; finished images out, with the last of them the shard's record.

    A failure is reported like anything else, because Ray Data rewords the exceptions that it passes on.

    On CPUs an actor decodes and encodes in threads. One that was restarted makes its first shard with tasks: if a file
    killed it, that file now kills a task, and becomes a reject.
    """

    def __init__(self, degrader: ray.ObjectRef, config: SynthesizeConfig, gpus: int, threads: int):
        torch.set_num_threads(threads)
        device = "cuda" if ray.get_gpu_ids() and config.actors.device == "auto" else "cpu"
        self.usual = _Tasks(gpus) if gpus else Threads(threads)
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.maker = ShardMaker(ray.get(degrader).to(device), config, _Tasks(gpus) if restarted else self.usual)

    def __call__(self, batch: Any) -> Iterator[dict[str, list[Any]]]:
        shard = batch.to_pylist()[0]
        sources = [Source(*source.values()) for source in shard["sources"]]
        try:
            for images, rejects, record in self.maker.make(shard["shard"], sources):
                yield _report(images, rejects, record=json.dumps(asdict(record)) if record else "")
            self.maker.workers = self.usual
        except OSError as error:
            yield _report(storage_failure=f"shard {shard['shard']}: {type(error).__name__}: {error}")
        except Exception:
            yield _report(failure=f"shard {shard['shard']}: {traceback.format_exc()}")


def _report(images: int = 0, rejects: int = 0, **texts: str) -> dict[str, list[Any]]:
    report: dict[str, Any] = {"record": "", "storage_failure": "", "failure": ""} | texts
    return {name: [value] for name, value in report.items()} | {"images": [images], "rejects": [rejects]}


def _make_shards(config: SynthesizeConfig, degrader: Degrader, plan: Plan, pending: list[int], pool: _Pool) -> None:
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


def _finish(config: SynthesizeConfig, output: Place, plan: Plan, records: Mapping[int, Record]) -> bool:
    """What makes the shards a dataset, `_SUCCESS` last; False, and not that, when the plan has grown meanwhile."""
    if dataset.count_parts(output) != plan.parts:
        return False
    dataset.write_manifest(output, plan, records)
    totals = _totals(config, plan, records)
    output.write(dataset.CARD, card(records, totals.rejects, plain(config), _scales_in_words(config)).encode())
    try:
        if sheet := preview(output, records, config.max_pixels):
            output.write(dataset.PREVIEW, sheet)
    except Exception as error:  # a picture is not worth failing a finished dataset for
        print(f"no preview: {type(error).__name__}: {error}")
    for name in filter(dataset.is_leftover, dataset.layout(output)):
        output.delete(name)
    if totals.rejects > config.max_reject_rate * totals.files:
        raise ValueError(
            f"{totals.rejects} of {totals.files} files were rejected, more than "
            f"max_reject_rate={config.max_reject_rate}: {_first_rejects(output, plan, records)}"
        )
    if dataset.count_parts(output) != plan.parts:
        return False
    output.write(dataset.SUCCESS, b"")
    return True


@dataclass(frozen=True)
class _Totals:
    files: int
    used: int

    @property
    def rejects(self) -> int:
        """Files that gave no rows."""
        return self.files - self.used


def _totals(config: SynthesizeConfig, plan: Plan, records: Mapping[int, Record]) -> _Totals:
    """A file is all of its draws or one reject, however often it was taken."""
    used = sum(record.rows for record in records.values()) // config.scale.per_image
    return _Totals(plan.files, used)


def _first_rejects(output: Place, plan: Plan, records: Mapping[int, Record], count: int = 3) -> str:
    shown = [
        f"{reject.key} ({reject.stage}: {reject.error})"
        for reject in islice(dataset.rejects_of(output, plan, records), count)
    ]
    return "; ".join(shown) + "; the rejects folder has all"


def _summarise(
    config: SynthesizeConfig, output: Place, plan: Plan, records: Mapping[int, Record], made: int, seconds: float
) -> None:
    totals, rows = _totals(config, plan, records), sum(record.rows for record in records.values())
    print(f"{rows} LR images of {totals.used} photographs in {len(records)} shards, {totals.rejects} rejects")
    if totals.rejects:
        print(f"rejected: {_first_rejects(output, plan, records)}")
    if made:
        print(f"{made} images in {seconds:.1f} s with Ray's start: {made / seconds:.2f} images/s")
    print(f"dataset: {config.output}")
    _name_preview(output)


def _name_preview(output: Place) -> None:
    if output.exists(dataset.PREVIEW):
        print(f"preview: {output.uri_of(dataset.PREVIEW)}")
