"""One run of the job, from its configuration to `_SUCCESS`: see `degflow.synthesis`."""

import resource
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from degflow.config import dump, plain
from degflow.dataset.card import card, preview
from degflow.dataset.layout import CARD, CONFIG, PREVIEW, SUCCESS, Record, find_objects, is_leftover
from degflow.dataset.manifest import finished_shards, parts_in_manifest, rejects_of, write_manifest
from degflow.dataset.plan import Part, Plan, count_parts, joined, read_plan, write_part
from degflow.degrader import Degrader
from degflow.storage import Place
from degflow.synthesis.codec import Loaded
from degflow.synthesis.pool import make_shards, pool_of
from degflow.synthesis.resuming import continued, first_part, news, recipe_of, rejected
from degflow.synthesis.settings import SynthesizeConfig, resolve
from degflow.synthesis.shard import codec_of


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
    plan = Plan.empty() if config.overwrite else read_plan(output)
    records = finished_shards(output, plan, recipe)
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
            with pool_of(config) as pool:
                if config.actors.threads != pool.threads:
                    config = replace(config, actors=replace(config.actors, threads=pool.threads))
                    _save(config, output)
                make_shards(config, degrader, plan, pending, pool)
            records, made = finished_shards(output, plan, recipe), made + plan.images(pending)
            if missing := sorted(set(range(len(plan))) - set(records)):
                same = "the same command without overwrite=true" if config.overwrite else "the same command"
                raise ValueError(f"{len(missing)} of {len(plan)} shards are missing; {same} makes them")
        if _finish(config, output, plan, records):
            break
        plan = read_plan(output)  # another driver has extended it
        records = finished_shards(output, plan, recipe)
    _summarise(config, output, plan, records, made, time.monotonic() - started)


def _is_finished(output: Place, plan: Plan, records: Mapping[int, Record]) -> bool:
    there = output.exists(SUCCESS) and len(records) == len(plan)
    return there and parts_in_manifest(output) == len(plan)


def _next_part(config: SynthesizeConfig, plan: Plan, records: Mapping[int, Record], output: Place) -> Part | None:
    """What the plan is to get: all of the input at first; later what is new, and what was rejected, as asked for."""
    if not len(plan):
        return first_part(config)
    part = None
    if config.extend:
        part = news(config, plan)
    elif (config.dry_run or output.exists(SUCCESS)) and (new := news(config, plan)):
        first = ", ".join(new["key"].slice(0, 3).to_pylist()) + (", ..." if len(new) > 3 else "")
        print(f"{len(new)} new in {config.input} since the plan was made ({first}); extend=true takes them")
    if config.retry_rejects:
        again = rejected(config, plan if part is None else plan.plus(part), records, output)
        part = joined(part, again)
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
            for name in find_objects(output):
                if name != CONFIG:
                    output.delete(name)
            _save(config, output)
        elif not _save(config, output, new=True):
            continued(config, output)
        if part:
            output.delete(SUCCESS)
            if not write_part(output, plan.parts, part):
                print("another driver planned at the same time: its plan counts", flush=True)
            plan = read_plan(output)
            if not len(plan):
                raise OSError("another driver is overwriting it")
        return plan
    except OSError as error:
        raise OSError(f"output={config.output}: cannot be written ({type(error).__name__}: {error})") from error


def _save(config: SynthesizeConfig, output: Place, new: bool = False) -> bool:
    asked = {"overwrite": False, "dry_run": False, "extend": False, "retry_rejects": False}
    return output.write(CONFIG, dump(replace(config, **asked)).encode(), new=new)


def _finish(config: SynthesizeConfig, output: Place, plan: Plan, records: Mapping[int, Record]) -> bool:
    """What makes the shards a dataset, `_SUCCESS` last; False, and not that, when the plan has grown meanwhile."""
    if count_parts(output) != plan.parts:
        return False
    write_manifest(output, plan, records)
    totals = _totals(config, plan, records)
    output.write(CARD, card(records, totals.rejects, plain(config), _scales_in_words(config)).encode())
    try:
        if sheet := preview(output, records, config.max_pixels):
            output.write(PREVIEW, sheet)
    except Exception as error:  # a picture is not worth failing a finished dataset for
        print(f"no preview: {type(error).__name__}: {error}")
    for name in filter(is_leftover, find_objects(output)):
        output.delete(name)
    if totals.rejects > config.max_reject_rate * totals.files:
        raise ValueError(
            f"{totals.rejects} of {totals.files} files were rejected, more than "
            f"max_reject_rate={config.max_reject_rate}: {_first_rejects(output, plan, records)}"
        )
    if count_parts(output) != plan.parts:
        return False
    output.write(SUCCESS, b"")
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
        f"{reject.key} ({reject.stage}: {reject.error})" for reject in islice(rejects_of(output, plan, records), count)
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
    if output.exists(PREVIEW):
        print(f"preview: {output.uri_of(PREVIEW)}")
