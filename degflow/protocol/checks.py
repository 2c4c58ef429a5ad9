"""What is checked before the first cell, so that fewer mistakes end the experiment after days of training."""

from collections.abc import Iterator, Sequence
from typing import Any

from degflow.capture.scenes import HR_LABEL, find_scenes
from degflow.capture.simulate import SimulateConfig
from degflow.config import load
from degflow.dataset.layout import SUCCESS
from degflow.degrader import Degrader
from degflow.evaluation.baseline_scenes import BaselineScenesConfig
from degflow.evaluation.run import EvaluateConfig
from degflow.perceptual import Perceptual
from degflow.protocol.plan import Cell
from degflow.restoration.networks import build
from degflow.restoration.settings import TrainSRConfig
from degflow.storage import Place
from degflow.synthesis.inventory import Input
from degflow.synthesis.settings import SynthesizeConfig
from degflow.training.lfm import TrainLFMConfig
from degflow.training.rae import TrainRAEConfig
from degflow.training.residual import TrainResidualConfig

SCHEMAS: dict[str, type] = {
    "simulate_scenes": SimulateConfig,
    "train_rae": TrainRAEConfig,
    "train_lfm": TrainLFMConfig,
    "train_residual": TrainResidualConfig,
    "evaluate": EvaluateConfig,
    "synthesize": SynthesizeConfig,
    "baseline_scenes": BaselineScenesConfig,
    "train_sr": TrainSRConfig,
}


def check(cells: Sequence[Cell], output: str) -> None:
    """Check the keys of cells, and what they name outside the experiment's folder: scenes, degraders, LPIPS weights.

    Args:
        cells: those that have yet to run.
        output: the experiment's folder. What lies there is made by an earlier cell.

    Raises:
        ValueError: something will not do; the message names the cell.
        OSError: a file cannot be read.
    """
    known: set[Any] = set()
    degraders: dict[str, dict[str, float]] = {}  # file -> its levels
    for cell in cells:
        try:
            settings = load(SCHEMAS[cell.job], cell.words)
            model = getattr(settings, "model", "")
            if model and not model.startswith(f"{output}/") and model not in degraders:
                degraders[model] = Degrader.load(model).levels
            for uri, labels in _trees(settings, degraders.get(model, {})):
                if not uri.startswith(f"{output}/") and (uri, labels) not in known and not Place(uri).exists(SUCCESS):
                    find_scenes(uri, labels)
                known.add((uri, labels))
            if isinstance(settings, TrainLFMConfig | TrainResidualConfig):
                degraders[f"{settings.output}/degrader.safetensors"] = settings.scenes.levels
            if model in degraders:
                _check_scales(settings, tuple(degraders[model].values()))
            if isinstance(settings, SynthesizeConfig) and not settings.input.startswith(f"{output}/"):
                Input(settings.input, settings.root).images()
            if isinstance(settings, TrainSRConfig) and repr(settings.network) not in known:
                build(settings.network)  # a size that cannot be, or a package that is missing
                known.add(repr(settings.network))
            for backbone in _backbones(settings):
                if backbone[0] != "none" and backbone not in known:
                    Perceptual(*backbone)
                    known.add(backbone)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{cell.name}: {cell.job}: {error}") from None


def _check_scales(settings: Any, scales: Sequence[float]) -> None:
    """Raise ValueError if a job asks a degrader for scales outside its levels."""
    wanted: list[tuple[str, float | None]] = []
    if isinstance(settings, SynthesizeConfig):
        scale = settings.scale
        wanted = [("low", scale.low), ("high", scale.high), *(("values", value) for value in scale.values)]
        wanted = [(f"scale.{name}", value) for name, value in wanted]
    elif isinstance(settings, EvaluateConfig | BaselineScenesConfig):
        wanted = [(f"levels: {label}", value) for label, value in settings.levels.items()]
    for name, value in wanted:
        if value is not None and not scales[0] <= value <= scales[-1]:
            raise ValueError(f"{name}={value:g}: must lie in [{scales[0]:g}, {scales[-1]:g}], the degrader's range")


def _trees(settings: Any, levels: dict[str, float]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The trees of scenes that a job needs, each with its labels; `levels` are those of the job's degrader."""
    if isinstance(settings, TrainRAEConfig | TrainLFMConfig | TrainResidualConfig):
        yield settings.scenes.data, tuple(settings.scenes.levels)
    elif isinstance(settings, BaselineScenesConfig):
        yield settings.data, tuple(levels or settings.levels)
    elif isinstance(settings, EvaluateConfig):
        yield from ((uri, tuple(settings.levels)) for uri in (settings.data, settings.fit_data) if uri)
    elif isinstance(settings, TrainSRConfig):
        yield from ((uri, (HR_LABEL, *settings.levels)) for uri in settings.train.values())
        yield from ((uri, (HR_LABEL, settings.test_level)) for uri in settings.test.values())


def _backbones(settings: Any) -> Iterator[tuple[Any, str]]:
    """Kind and file of each LPIPS backbone that a job measures with."""
    if isinstance(settings, EvaluateConfig):
        yield settings.lpips, settings.lpips_weights
    elif isinstance(settings, TrainSRConfig) and settings.test:
        yield settings.test_lpips, settings.test_lpips_weights
    elif isinstance(settings, TrainRAEConfig | TrainLFMConfig | TrainResidualConfig):
        yield settings.validation_lpips, settings.validation_lpips_weights
        if isinstance(settings, TrainLFMConfig) and settings.lpips_weight:
            yield "vgg", settings.lpips_weights
