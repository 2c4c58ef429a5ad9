"""The configuration of a synthesis run."""

import os
from dataclasses import dataclass, replace

from degflow import images
from degflow.config import option, plain, required
from degflow.dataset.scales import ScaleConfig
from degflow.degrader import Degrader
from degflow.flow import SOLVERS
from degflow.models.precision import PRECISIONS


@dataclass(frozen=True)
class SolverConfig:
    """How the flow is integrated."""

    solver: str = option("", f"one of {', '.join(SOLVERS)}; empty: the model's own")
    steps: int = option(0, "solver steps; 0: the model's own number")

    def __post_init__(self):
        if self.solver and self.solver not in SOLVERS:
            raise ValueError(f"solver.solver={self.solver}: must be one of {', '.join(SOLVERS)}")
        if self.steps < 0:
            raise ValueError(f"solver.steps={self.steps}: must not be negative")


@dataclass(frozen=True)
class ActorsConfig:
    """How many actors make the images, and what each one gets."""

    min: int = option(1, "smallest number of actors")
    max: int = option(0, "largest number of actors; 0: as many as the cluster has room for", common=True)
    gpus: str = option("auto", "GPUs per actor: 0, 1, or auto (1 if the running cluster has any, else 0)", common=True)
    threads: int = option(0, "threads per actor; 0: up to 4, limited by the smallest node's CPUs (per GPU)")
    compile: bool = option(False, "torch.compile the networks; takes minutes, so it pays off in long runs only")
    timeout: float = option(
        0.0,
        "seconds that the networks may take for `batch` photographs; after them the actor's process ends, and another "
        "one tries. 0: 1800 with a GPU, 14400 on CPUs",
    )

    def __post_init__(self):
        rules = (
            ("min", self.min >= 1, "must be at least 1"),
            ("max", self.max == 0 or self.max >= self.min, f"must be 0 or at least actors.min={self.min}"),
            ("gpus", self.gpus in ("auto", "0", "1"), "must be auto, 0 or 1"),
            ("threads", self.threads >= 0, "must not be negative"),
            ("timeout", self.timeout >= 0, "must not be negative"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"actors.{name}={getattr(self, name)}: {rule}")


@dataclass(frozen=True)
class ShardConfig:
    """How the photographs are divided into shards."""

    images: int = option(256, "largest number of HR images per shard; a shard is the unit of work and of resuming")
    bytes: int = option(
        512_000_000,
        "largest number of bytes per shard, estimated from the sizes of the files; 0: cut by images alone",
    )

    def __post_init__(self):
        if self.images < 1:
            raise ValueError(f"shard.images={self.images}: must be at least 1")
        if self.bytes < 0:
            raise ValueError(f"shard.bytes={self.bytes}: must not be negative")


@dataclass(frozen=True)
class PriceConfig:
    """What the machines cost."""

    per_hour: float = option(0.0, "price of an actor's hour: the progress and dry_run show costs; 0: unknown")

    def __post_init__(self):
        if self.per_hour < 0:
            raise ValueError(f"price.per_hour={self.per_hour}: must not be negative")


@dataclass(frozen=True)
class SynthesizeConfig:
    """Keys of synthesize."""

    input: str = required(
        "HR images: a folder, a prefix (s3://bucket/photos), a glob (s3://bucket/photos/**/*.jpg), one file, or an "
        "inventory (a .parquet or .csv file with a column key, and optional columns size and etag)"
    )
    root: str = option("", "folder or prefix that an inventory's paths are relative to; empty: the inventory's folder")
    output: str = required("folder or URI of the dataset; an unfinished dataset is continued")
    model: str = option("shipped", "degrader file; shipped: the one that comes with degflow", common=True)
    scale: ScaleConfig = option(ScaleConfig(), common=True)
    seed: int = option(
        0, "decides all scales and noise, with the photograph's path and the number of the draw", common=True
    )
    spread: float = option(
        1.0,
        "1: random LR images with the camera's noise; 0: the mean of all such images; between: less noise. No effect "
        "with the published method",
        common=True,
    )
    solver: SolverConfig = option(SolverConfig())
    size: str = option("same", "LR images have HR's size (same), or are shrunk by their scale (scaled)")
    hr: str = option(
        "embed", "rows hold HR's pixels (embed; a file stores them once), or only its URI or path (reference)"
    )
    codec: str = option(
        "png", "LR and embedded HR, without loss: png, or webp (a sixth smaller, and written in a third of the time)"
    )
    gray: str = option(
        "camera", "LR images of a gray photograph have a colour camera's slight colour (camera), or stay gray (keep)"
    )
    max_pixels: int = option(images.MAX_PIXELS, "images with more pixels are rejected")
    memory: float = option(
        0.0,
        "GB for one forward pass, besides weights and images; larger images are cut into tiles; 0: 3/4 of a GPU's "
        "memory, 4 GB on CPUs",
    )
    precision: str = option("float32", f"of the networks: {', '.join(PRECISIONS)}; all but float32 are for GPUs")
    batch: int = option(
        4,
        "photographs that are loaded, degraded or encoded at a time; small ones of equal size share a forward pass (up "
        "to 1 megapixel)",
    )
    actors: ActorsConfig = option(ActorsConfig())
    price: PriceConfig = option(PriceConfig())
    shard: ShardConfig = option(ShardConfig())
    max_reject_rate: float = option(0.05, "the job fails if a larger share of the files is rejected")
    limit: int = option(0, "use the first N images only; 0: all", common=True)
    dry_run: bool = option(False, "print what the job would do, and stop", common=True)
    overwrite: bool = option(False, "first delete the dataset in output (no other file)")
    extend: bool = option(False, "add the files that are new in the input, as new shards", common=True)
    retry_rejects: bool = option(False, "try the rejected files again, as new shards")
    model_sha256: str = option("", "refuse a model file with another sha256; a dataset's config.yaml has this key")

    def __post_init__(self):
        rules = (
            ("seed", 0 <= self.seed < 2**63, "must lie in [0, 2^63)"),
            ("spread", 0 <= self.spread <= 1, "must lie in [0, 1]"),
            ("size", self.size in ("same", "scaled"), "must be same or scaled"),
            ("hr", self.hr in ("embed", "reference"), "must be embed or reference"),
            ("codec", self.codec in images.CODECS, f"must be one of {', '.join(images.CODECS)}"),
            ("gray", self.gray in images.GRAY, f"must be one of {', '.join(images.GRAY)}"),
            ("max_pixels", self.max_pixels >= images.SMALLEST_SIDE**2, f"must be at least {images.SMALLEST_SIDE**2}"),
            ("memory", self.memory >= 0, "must not be negative"),
            ("precision", self.precision in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}"),
            ("batch", self.batch >= 1, "must be at least 1"),
            ("max_reject_rate", 0 <= self.max_reject_rate <= 1, "must lie in [0, 1]"),
            ("limit", self.limit >= 0, "must not be negative"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"{name}={getattr(self, name)}: {rule}")


def resolve(config: SynthesizeConfig, degrader: Degrader) -> SynthesizeConfig:
    """Fill in the keys whose values follow from the model and the other keys.

    Raises:
        ValueError: a scale outside the model's range, a model with another sha256 than `model_sha256`, or solver keys
            for a model without a solver.
    """
    model = f"model={config.model}"
    if config.model_sha256 and config.model_sha256 != degrader.sha256:
        raise ValueError(f"model_sha256={config.model_sha256}: {model} has {degrader.sha256}")
    solver = config.solver
    for name, value in plain(solver).items():
        if value and not degrader.has_solver:
            raise ValueError(f"solver.{name}={value}: {model} has no solver; leave it out")
    if degrader.has_solver:
        own_solver, own_steps = degrader.flow.solver
        solver = SolverConfig(solver.solver or own_solver, solver.steps or own_steps)
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
    if config.hr == "reference":  # readers compare the references with these, wherever they run
        config = replace(config, input=_absolute(config.input), root=_absolute(config.root))
    return replace(config, scale=scale, solver=solver, model_sha256=degrader.sha256)


def _absolute(uri: str) -> str:
    return os.path.abspath(os.path.expanduser(uri)) if uri and "://" not in uri else uri
