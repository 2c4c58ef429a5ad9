"""The configuration of a synthesis run."""

from dataclasses import dataclass, replace

from degflow import images
from degflow.config import option, required
from degflow.dataset.scales import ScaleConfig
from degflow.degrader import PRECISIONS, Degrader
from degflow.flow import SOLVER, SOLVERS, STEPS


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
