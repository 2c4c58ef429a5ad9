"""A degrader with the optics of another camera, fitted on a few of its scenes; nothing is trained."""

from dataclasses import dataclass
from typing import cast

import torch

from degflow import evaluation
from degflow.capture.optics import Optics
from degflow.capture.scenes import SceneConfig, SceneImages, check_levels
from degflow.config import option, required
from degflow.degrader import Degrader
from degflow.models import ResidualFlow
from degflow.objectives import to_float
from degflow.training.lfm import provenance


@dataclass(frozen=True)
class FitOpticsConfig:
    """Keys of fit-optics."""

    data: str = required("one split of a RealSR-like tree, captured by the camera; one scene is enough")
    output: str = required("degrader file or URI to write")
    model: str = option(
        "shipped", "file or URI of the degrader to begin with; shipped: the one that comes with degflow", common=True
    )
    levels: dict[str, float] = option(
        {"1": 1.0, "2": 2.0, "4": 4.0}, "label -> scale of the levels, HR first; the last at least the degrader's"
    )
    resize_lr: bool = option(False, "enlarge LR images smaller than HR (RealSR V3) to HR's size by bicubic")
    half: bool = option(False, "store the degrader in float16 (computed in float32 all the same)")

    def __post_init__(self):
        check_levels(self.levels)


def fit_optics(config: FitOpticsConfig) -> None:
    """Write the degrader with the optics of these scenes; print how close the old and the new ones come to captured LR.

    Raises:
        ValueError, OSError: scenes, degrader or storage that will not do; the message says which.
    """
    degrader = Degrader.load(config.model)
    if not isinstance(degrader.flow, ResidualFlow):
        raise ValueError(f"model={config.model}: has no optics; the published method does without")
    scales = list(config.levels.values())
    if scales[0] > degrader.low or scales[-1] < degrader.high:
        rule = f"must reach from {degrader.low:g} to {degrader.high:g}, as the degrader's do"
        raise ValueError(f"levels={config.levels}: {rule}")
    scenes = SceneImages(SceneConfig(config.data, config.levels, crop=32, resize_lr=config.resize_lr))
    print(scenes.describe())
    optics = Optics.fit(scenes)
    for name, which in (("before", cast(Optics, degrader.flow.optics)), ("now", optics)):
        print(f"PSNR-Y of the optics alone on these scenes, {name}: {_fidelity(which, scenes, degrader.high)}")
    degrader.flow.optics = optics
    degrader.save(config.output, provenance(config, scenes) | {"began_with": degrader.provenance}, half=config.half)
    print(f"degrader: {config.output}")


def _fidelity(optics: Optics, scenes: SceneImages, high: float) -> str:
    """PSNR-Y against captured LR at the levels up to `high`, as a text."""
    image, found = to_float(evaluation.validation_crops(scenes)), []
    for level, (label, scale) in enumerate(scenes.config.levels.items()):
        if level > 0 and scale <= high:
            made = optics(image[:, 0], torch.full((len(image),), scale))
            found.append(f"x{label} {float(evaluation.psnr(made, image[:, level]).mean()):.2f} dB")
    return ", ".join(found)
