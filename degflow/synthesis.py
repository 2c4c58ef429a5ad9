"""HR images in a folder or an object store -> a dataset of LR images at sampled scales, on a pool of Ray actors.

1. `synthesize` loads the model, resolves the configuration and compares it with the one of an unfinished run.
2. The input is listed once and dealt into shards; this plan is written before any work starts and never changes.
3. Ray Data streams the numbers of the missing shards to a pool of actors, with or without GPUs. Each holds a degrader
   and turns one whole shard at a time into its objects (see `shards`), reporting finished images as it goes.
4. When every shard is done: the manifest, the card, the preview, and last `_SUCCESS` (see `dataset`).
"""

import contextlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import ray
import ray.data
import torch
from ray._private import worker as ray_worker
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from degflow import dataset
from degflow.card import card, preview
from degflow.config import dump, plain
from degflow.dataset import Record
from degflow.degrader import Degrader
from degflow.planning import SynthesizeConfig, continued, make_plan, resolve
from degflow.shards import ShardMaker
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
    if output.exists(dataset.SUCCESS) and not config.overwrite:
        print(f"{config.output}: finished already, nothing to do (overwrite=true makes it anew)")
        _name_preview(output)
        return
    plan = {} if config.overwrite else dataset.read_plan(output)
    records = dataset.finished(output, plan)
    plan = plan or make_plan(config)
    pending = {number: sources for number, sources in plan.items() if number not in records}
    print(_describe(config, plan, len(pending)), flush=True)
    if config.dry_run:
        return
    _claim(config, output, plan)
    started = time.monotonic()
    if pending:
        with _cluster(config) as pool:
            if config.actors.threads != pool.threads:
                config = replace(config, actors=replace(config.actors, threads=pool.threads))
                _save(config, output)
            _make_shards(config, degrader, pending, pool)
        records = dataset.finished(output, plan)
        if missing := sorted(set(plan) - set(records)):
            raise ValueError(f"{len(missing)} of {len(plan)} shards are missing; the same command makes them")
    _finish(config, output, records)
    _summarise(config, output, records, sum(map(len, pending.values())), time.monotonic() - started)


def _describe(config: SynthesizeConfig, plan: Mapping[int, Sequence[Source]], pending: int) -> str:
    count, size = sum(map(len, plan.values())), sum(source.size for shard in plan.values() for source in shard)
    done = f", {len(plan) - pending} of them done" if pending < len(plan) else ""
    return (
        f"{count} images ({size / 1e6:.1f} MB) in {len(plan)} shards{done}; "
        f"{config.scale.per_image} LR each, scales {_scales_in_words(config)}"
    )


def _scales_in_words(config: SynthesizeConfig) -> str:
    scale = config.scale
    if scale.distribution == "list":
        return "chosen from " + ", ".join(f"{value:g}" for value in scale.values)
    return f"{scale.distribution} in [{scale.low:g}, {scale.high:g}]"


def _claim(config: SynthesizeConfig, output: Place, plan: Mapping[int, Sequence[Source]]) -> None:
    """Make the output ours before any work: the configuration, then the plan."""
    try:
        if config.overwrite:
            for name in dataset.layout(output):
                output.delete(name)
        if not output.exists(dataset.CONFIG):
            _save(config, output)
        if not dataset.read_plan(output):
            dataset.write_plan(output, list(plan.values()))
    except OSError as error:
        raise OSError(f"output={config.output}: cannot be written ({type(error).__name__}: {error})") from error


def _save(config: SynthesizeConfig, output: Place) -> None:
    output.write(dataset.CONFIG, dump(replace(config, overwrite=False, dry_run=False)).encode())


@dataclass(frozen=True)
class _Pool:
    gpus: int  # per actor
    threads: int  # per actor
    room: int  # actors that fit now


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
    shares = [c // g if gpus else c for c, g in zip(cpus, offered, strict=True) if g or not gpus]
    threads = config.actors.threads or max(1, min([4, *shares]))
    fits = [min(c // threads, g) if gpus else c // threads for c, g in zip(cpus, offered, strict=True)]
    where = "this machine" if own else f"a Ray cluster (nodes with CPUs: {len(nodes)})"
    kind = "one GPU each" if gpus else "on CPUs"
    print(f"running on {where}: actors {kind}, with {threads} threads; room for {sum(fits)} now", flush=True)
    return _Pool(gpus, threads, sum(fits))


def _actor_limits() -> dict[str, int]:
    # A node may be taken away many times; an actor that dies each time, of one huge image say, must end the job.
    return {"max_restarts": 20, "max_task_retries": 20}


class _ShardActor:
    """A Ray Data callable: one planned shard in; finished images out, with the last of them the shard's record.

    A failure is reported like anything else, because Ray Data rewords the exceptions that it passes on.
    """

    def __init__(self, degrader: ray.ObjectRef, config: SynthesizeConfig, threads: int):
        torch.set_num_threads(threads)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.maker = ShardMaker(ray.get(degrader).to(device), config, threads)

    def __call__(self, batch: Any) -> Iterator[dict[str, list[Any]]]:
        shard = batch.to_pylist()[0]
        sources = [Source(*source) for source in zip(shard["keys"], shard["sizes"], shard["etags"], strict=True)]
        try:
            for images, rejects, record in self.maker.make(shard["shard"], sources):
                yield _report(images, rejects, record=json.dumps(asdict(record)) if record else "")
        except OSError as error:
            yield _report(storage_failure=f"shard {shard['shard']}: {type(error).__name__}: {error}")
        except Exception:
            yield _report(failure=f"shard {shard['shard']}: {traceback.format_exc()}")


def _report(images: int = 0, rejects: int = 0, **texts: str) -> dict[str, list[Any]]:
    report: dict[str, Any] = {"record": "", "storage_failure": "", "failure": ""} | texts
    return {name: [value] for name, value in report.items()} | {"images": [images], "rejects": [rejects]}


def _make_shards(
    config: SynthesizeConfig, degrader: Degrader, pending: Mapping[int, Sequence[Source]], pool: _Pool
) -> None:
    """Stream the pending shards through the pool, and show how far they are."""
    tasks = [
        {"shard": number, **dict(zip(("keys", "sizes", "etags"), map(list, zip(*sources, strict=True)), strict=True))}
        for number, sources in pending.items()
    ]
    total = sum(map(len, pending.values()))
    with _quiet_ray_data(), tqdm(total=total, desc="degrading", unit="image", mininterval=_interval()) as bar:
        reports = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            _ShardActor,
            fn_constructor_args=(ray.put(degrader), config, pool.threads),
            compute=_strategy(config, len(tasks), pool.room),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=pool.threads,
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


def _finish(config: SynthesizeConfig, output: Place, records: Mapping[int, Record]) -> None:
    """What makes the shards a dataset, `_SUCCESS` last."""
    dataset.write_manifest(output, records)
    output.write(dataset.CARD, card(records, plain(config), _scales_in_words(config)).encode())
    if sheet := preview(output, records, config.max_pixels):
        output.write(dataset.PREVIEW, sheet)
    for name in filter(dataset.is_leftover, dataset.layout(output)):
        output.delete(name)
    rejects = sum(record.rejects for record in records.values())
    files = rejects + sum(record.rows for record in records.values()) // config.scale.per_image
    if rejects > config.max_reject_rate * files:
        raise ValueError(
            f"{rejects} of {files} files were rejected, more than max_reject_rate={config.max_reject_rate}: "
            f"{_first_rejects(output, records)}"
        )
    output.write(dataset.SUCCESS, b"")


def _first_rejects(output: Place, records: Mapping[int, Record], count: int = 3) -> str:
    shown = [
        f"{reject.key} ({reject.stage}: {reject.error})"
        for reject in islice(dataset.rejects_of(output, records), count)
    ]
    return "; ".join(shown) + "; the rejects folder has all"


def _summarise(
    config: SynthesizeConfig, output: Place, records: Mapping[int, Record], made: int, seconds: float
) -> None:
    rows, rejects = (sum(getattr(record, name) for record in records.values()) for name in ("rows", "rejects"))
    print(
        f"{rows} LR images of {rows // config.scale.per_image} photographs in {len(records)} shards, {rejects} rejects"
    )
    if rejects:
        print(f"rejected: {_first_rejects(output, records)}")
    if made:
        print(f"{made} images in {seconds:.1f} s with Ray's start: {made / seconds:.2f} images/s")
    print(f"dataset: {config.output}")
    _name_preview(output)


def _name_preview(output: Place) -> None:
    if output.exists(dataset.PREVIEW):
        print(f"preview: {output.uri_of(dataset.PREVIEW)}")
