"""What a synthesis run will do: its configuration, whether that continues the run in its output, and its plan."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute

from degflow import dataset, images
from degflow.config import option, parse, plain, read, required
from degflow.dataset import Part, Plan, Record
from degflow.degrader import PRECISIONS, Degrader
from degflow.flow import SOLVER, SOLVERS, STEPS
from degflow.listing import SOURCE, Listing, list_input, root_of
from degflow.storage import Place, Source

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

DISTRIBUTIONS = ("uniform", "loguniform", "list", "grid")
# A run may be continued with other values of these; of the rest, it may not.
# The model is compared by its sha256.
FREE = (
    *("actors.min", "actors.max", "actors.gpus", "actors.threads", "actors.device", "actors.compile"),
    *("output", "model", "max_reject_rate", "dry_run", "overwrite", "extend", "retry_rejects"),
)


@dataclass(frozen=True)
class ScaleConfig:
    """Which scales the draws of an image have."""

    distribution: str = option(
        "uniform", "uniform, loguniform, list (one of `values`), or grid (evenly spaced, no chance)"
    )
    low: float | None = option(None, "smallest scale; null: the smallest that the model was trained on")
    high: float | None = option(None, "largest scale; null: the largest that the model was trained on")
    values: tuple[float, ...] = option((), "scales to choose from, for distribution=list")
    per_image: int = option(1, "LR images made of each HR image; one draw of a grid is its middle")

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"scale.distribution={self.distribution}: must be one of {', '.join(DISTRIBUTIONS)}")
        if self.per_image < 1:
            raise ValueError(f"scale.per_image={self.per_image}: must be at least 1")
        if (self.distribution == "list") != bool(self.values):
            rule = "needs at least one scale" if not self.values else "has a meaning for scale.distribution=list only"
            raise ValueError(f"scale.values={list(self.values)}: {rule}")
        for name in ("low", "high"):
            bound = getattr(self, name)
            if bound is not None and self.distribution == "list":
                raise ValueError(f"scale.{name}={bound}: has no meaning for scale.distribution=list")
            if bound is not None and not (bound > 0 and math.isfinite(bound)):
                raise ValueError(f"scale.{name}={bound}: must be a positive number")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"scale.low={self.low}: must not be above scale.high={self.high}")


@dataclass(frozen=True)
class SolverConfig:
    """How the flow is integrated."""

    solver: str = option(SOLVER, f"one of {', '.join(SOLVERS)}")
    steps: int = option(STEPS, "steps over the whole range of scales")

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"solver.solver={self.solver}: must be one of {', '.join(SOLVERS)}")
        if self.steps < 1:
            raise ValueError(f"solver.steps={self.steps}: must be at least 1")


@dataclass(frozen=True)
class ActorsConfig:
    """The pool."""

    min: int = option(1, "actors to keep")
    max: int = option(0, "actors at most; 0: as many as the cluster has room for")
    gpus: str = option("auto", "GPUs per actor: 0, 1, or auto (1 when the running cluster offers any, else 0)")
    threads: int = option(0, "threads per actor; 0: up to 4, as many as the smallest node has CPUs (per GPU)")
    device: str = option("auto", "auto: the actor's GPU when it has one; cpu: CPUs, whatever Ray hands out")
    compile: bool = option(
        False, "torch.compile the networks, once for all sizes: faster after some minutes, for long runs"
    )

    def __post_init__(self):
        rules = (
            ("min", self.min >= 1, "must be at least 1"),
            ("max", self.max == 0 or self.max >= self.min, f"must be 0 or at least actors.min={self.min}"),
            ("gpus", self.gpus in ("auto", "0", "1"), "must be auto, 0 or 1"),
            ("threads", self.threads >= 0, "must not be negative"),
            ("device", self.device in ("auto", "cpu"), "must be auto or cpu"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"actors.{name}={getattr(self, name)}: {rule}")


@dataclass(frozen=True)
class ShardConfig:
    """How the plan is cut."""

    images: int = option(256, "HR images per shard, the unit of work and of resuming")

    def __post_init__(self):
        if self.images < 1:
            raise ValueError(f"shard.images={self.images}: must be at least 1")


@dataclass(frozen=True)
class SynthesizeConfig:
    """Keys of synthesize."""

    input: str = required(
        "HR images: a folder, a prefix (s3://bucket/photos), a glob (s3://bucket/photos/**/*.jpg), or an inventory "
        "(a .parquet or .csv file with a column key; size and etag where they are known)"
    )
    root: str = option("", "what an inventory's keys are below; empty: the folder that holds it")
    output: str = required("folder or URI for the dataset; an unfinished one is continued")
    model: str = option("", "degrader file; empty: the one that ships")
    scale: ScaleConfig = option(ScaleConfig(), "")
    seed: int = option(0, "with the key and the number of the draw it decides every scale")
    solver: SolverConfig = option(SolverConfig(), "")
    size: str = option(
        "same", "LR images of HR's size (same), or shrunk by the scale with antialiased bicubic (scaled)"
    )
    hr: str = option(
        "auto", "HR as PNG in every row (embed), as URI of the source (reference), auto: embed for one draw"
    )
    max_pixels: int = option(images.MAX_PIXELS, "larger images are rejected")
    memory: float = option(4.0, "GB for one forward pass, beside weights and images; larger ones are done in tiles")
    precision: str = option("float32", f"of the networks: one of {', '.join(PRECISIONS)}; float16 is for GPUs")
    batch: int = option(4, "images in flight per stage; those of equal size share a forward pass")
    png_level: int = option(3, "PNG compression, 0 (fast) to 9 (small)")
    actors: ActorsConfig = option(ActorsConfig(), "")
    shard: ShardConfig = option(ShardConfig(), "")
    max_reject_rate: float = option(0.05, "the job fails when a larger share of the files gives no rows")
    limit: int = option(0, "take the first N images only; 0: all")
    dry_run: bool = option(False, "say what would be done, and stop")
    overwrite: bool = option(False, "delete a dataset of this job in output first (and nothing else there)")
    extend: bool = option(False, "take files that came to the input since the plan was made, as new shards")
    retry_rejects: bool = option(False, "take the rejected files again, as new shards")
    model_sha256: str = option("", "refuse a model file with another sha256; config.yaml of a dataset has it")

    def __post_init__(self):
        rules = (
            ("seed", 0 <= self.seed < 2**63, "must lie in [0, 2^63)"),
            ("size", self.size in ("same", "scaled"), "must be same or scaled"),
            ("hr", self.hr in ("auto", "embed", "reference"), "must be auto, embed or reference"),
            ("max_pixels", self.max_pixels >= images.SMALLEST_SIDE**2, f"must be at least {images.SMALLEST_SIDE**2}"),
            ("memory", self.memory > 0, "must be above 0"),
            ("precision", self.precision in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}"),
            ("batch", self.batch >= 1, "must be at least 1"),
            ("png_level", 0 <= self.png_level <= 9, "must lie in [0, 9]"),
            ("max_reject_rate", 0 <= self.max_reject_rate <= 1, "must lie in [0, 1]"),
            ("limit", self.limit >= 0, "must not be negative"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"{name}={getattr(self, name)}: {rule}")


def resolve(config: SynthesizeConfig, degrader: Degrader) -> SynthesizeConfig:
    """The configuration with everything filled in that the model and the other keys decide.

    Raises:
        ValueError: a scale outside the model's range, or another model than `model_sha256` says.
    """
    model = config.model or "the model that ships"
    if config.model_sha256 and config.model_sha256 != degrader.sha256:
        raise ValueError(f"model_sha256={config.model_sha256}: {model} has {degrader.sha256}")
    scale = config.scale
    if scale.distribution != "list":
        low = degrader.low if scale.low is None else scale.low
        high = degrader.high if scale.high is None else scale.high
        scale = replace(scale, low=low, high=high)
    asked = {f"scale.values={value}": value for value in scale.values}
    asked |= {f"scale.{name}={getattr(scale, name)}": getattr(scale, name) for name in ("low", "high")}
    for name, value in asked.items():
        if value is not None and not degrader.low <= value <= degrader.high:
            raise ValueError(f"{name}: {model} was trained on scales in [{degrader.low}, {degrader.high}]")
    hr = ("embed" if scale.per_image == 1 else "reference") if config.hr == "auto" else config.hr
    return replace(config, scale=scale, hr=hr, model_sha256=degrader.sha256)


def continued(config: SynthesizeConfig, output: Place) -> SynthesizeConfig:
    """The configuration, checked against the run that `output` holds; with `overwrite` it may differ.

    Raises:
        ValueError: the output holds something else, or a run that differs.
    """
    stored = _stored(config, output)
    if stored is None or config.overwrite:
        return config
    if config.actors.threads == 0:
        config = replace(config, actors=replace(config.actors, threads=stored.actors.threads))
    old, new = dict(_flat(plain(stored))), dict(_flat(plain(config)))
    for name in ("input", "root"):
        if old[name] and new[name] and Place(old[name]).is_same(Place(new[name])):
            old[name] = new[name]
    differing = [name for name in new if name not in FREE and old[name] != new[name]]
    if differing:
        changes = "; ".join(f"{name} was {old[name]}, now {new[name]}" for name in differing)
        raise ValueError(
            f"output={config.output}: holds a run with another configuration ({changes}); "
            "choose another output, or overwrite=true"
        )
    return config


def _stored(config: SynthesizeConfig, output: Place) -> SynthesizeConfig | None:
    """The configuration of the run that the output holds; None when it holds nothing."""
    elsewhere = f"output={config.output}: is not empty and holds no dataset of this job; choose another"
    try:
        return parse(SynthesizeConfig, read(output.read(dataset.CONFIG).decode()))
    except FileNotFoundError:
        names = _names_in(config, output)
        if dataset.CONFIG in names:  # another driver has just written it
            return _stored(config, output)
        if names:
            raise ValueError(elsewhere) from None
        return None
    except NotADirectoryError:
        raise ValueError(f"output={config.output}: is a file, or lies in one") from None
    except OSError as error:
        raise OSError(f"output={config.output}: cannot be read ({type(error).__name__}: {error})") from error
    except Exception as error:  # whatever a foreign file of that name makes a YAML reader say
        raise ValueError(f"{elsewhere} (its config.yaml: {error})") from None


def _names_in(config: SynthesizeConfig, output: Place) -> list[str]:
    try:
        return [file.key for file in output.files() if not dataset.is_leftover(file.key)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"output={config.output}: cannot be written ({error})") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def recipe_of(config: SynthesizeConfig, sources: Sequence[Source]) -> str:
    """Digest of all that decides a shard's rows: the resolved configuration and the planned files."""
    decisive = {name: value for name, value in _flat(plain(config)) if name not in (*FREE, "input", "root")}
    text = json.dumps([decisive, [list(source) for source in sources]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_still_wanted(config: SynthesizeConfig, sources: Sequence[Source]) -> bool:
    """Whether the output's configuration is still this one: a driver with overwrite=true may have come since."""
    try:
        stored = parse(SynthesizeConfig, read(Place(config.output).read(dataset.CONFIG).decode()))
    except FileNotFoundError:
        return True
    return recipe_of(stored, sources) == recipe_of(config, sources)


def first_part(config: SynthesizeConfig) -> Part:
    """List the input, keep images, and deal them into shards in the order of their keys.

    Raises:
        ValueError: no images there.
        OSError: the input cannot be listed.
    """
    listing = _list(config)
    if not len(listing.sources):
        found = _count(listing.others, "other file") if listing.others else "nothing"
        raise ValueError(f"input={config.input}: {found} there, but no file ending in {', '.join(images.SUFFIXES)}")
    return Plan.empty().next_part(listing.sources, config.shard.images)


def _list(config: SynthesizeConfig) -> Listing:
    listing = list_input(config.input, config.root, without=Place(config.output))
    if listing.others and len(listing.sources):
        print(f"{_count(listing.others, 'file')} in {config.input} without an image's suffix: left out")
    if listing.unnamed:
        first = listing.unnamed[0]
        print(f"{_count(len(listing.unnamed), 'name')} in {config.input} not in UTF-8: left out, e.g. {first!a}")
    return listing._replace(sources=listing.sources.slice(0, config.limit or None))


def news(config: SynthesizeConfig, plan: Plan) -> Part:
    """The files that came to the input since the plan was made, as its next part."""
    listed = _list(config).sources
    new = listed.filter(pc.invert(pc.is_in(listed["key"], plan.table["key"])))
    room = max(0, config.limit - plan.files) if config.limit else len(new)
    return plan.next_part(new.slice(0, room), config.shard.images)


def rejected(config: SynthesizeConfig, plan: Plan, records: Mapping[int, Record], output: Place) -> Part:
    """The files that stand rejected, with the size and tag that they have now, as the plan's next part."""
    keys = sorted(reject.key for reject in dataset.rejects_of(output, plan, records))
    rows = plan.table.filter(pc.is_in(plan.table["key"], pa.array(keys, pa.string())))
    planned = {row["key"]: Source(row["key"], row["size"], row["etag"]) for row in rows.to_pylist()}
    root = root_of(config.input, config.root)
    with ThreadPoolExecutor(16) as pool:
        now = list(pool.map(lambda key: _as_it_is_now(root, planned[key]), keys))
    columns = list(zip(*now, strict=True)) or [[], [], []]
    sources = [pa.array(column, field.type) for column, field in zip(columns, SOURCE, strict=True)]
    return plan.next_part(pa.table(sources, SOURCE), config.shard.images)


def _as_it_is_now(root: Place, source: Source) -> Source:
    try:
        found = root.source(source.key)
    except OSError:
        return source  # whatever is wrong with it, the shard will say
    return Source(source.key, found.size if source.size >= 0 else -1, found.etag if source.etag else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
