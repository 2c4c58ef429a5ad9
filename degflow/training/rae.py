"""Stage 1: the residual autoencoder, trained on a RealSR-like tree."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from degflow import evaluation
from degflow.capture.scenes import AlignedCrops, SceneConfig, SceneImages
from degflow.config import option, plain, required
from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.models.files import save_checkpoint
from degflow.objectives import RAEObjective, to_float
from degflow.training.loop import Validation, fit
from degflow.training.processes import is_main_process, local_share
from degflow.training.settings import FitConfig


@dataclass(frozen=True)
class TrainRAEConfig:
    """Keys of train_rae."""

    scenes: SceneConfig = option(SceneConfig())
    validation: str = option(
        "", "another split of the tree, for validation; empty: central crops of the training scenes"
    )
    output: str = required("folder or URI for checkpoints, previews and rae.safetensors")
    autoencoder: AutoencoderConfig = option(AutoencoderConfig())
    blurred: float = option(
        0.0, "share of samples whose target is HR blurred; teaches the decoder to leave out HR's noise; 0: as published"
    )
    freeze_encoder: bool = option(
        False, "train the decoder alone (of fit.start_from), so that flows of its latents remain good"
    )
    fit: FitConfig = option(FitConfig())

    def __post_init__(self):
        multiple = self.autoencoder.compression
        if self.scenes.crop % multiple:
            raise ValueError(f"scenes.crop={self.scenes.crop}: must be a multiple of the autoencoder's r = {multiple}")
        if not 0 <= self.blurred < 1:
            raise ValueError(f"blurred={self.blurred}: must lie in [0, 1)")
        if self.freeze_encoder and not self.fit.start_from:
            raise ValueError("freeze_encoder=True: needs fit.start_from, the autoencoder whose encoder is kept")


def train_rae(config: TrainRAEConfig) -> None:
    """Train, then write rae.safetensors."""
    main = is_main_process()
    scenes = SceneImages(config.scenes, quiet=not main, share=local_share())
    if main:
        print(scenes.describe())
    watched = replace(config.scenes, data=config.validation) if config.validation else config.scenes
    crops = evaluation.validation_crops(SceneImages(watched, quiet=True) if config.validation else scenes)
    torch.manual_seed(config.fit.seed)
    objective = RAEObjective(ResidualAutoencoder(config.autoencoder), config.blurred, config.freeze_encoder)
    samples = AlignedCrops(scenes, config.scenes.crop, config.fit.seed)

    def validate(network: nn.Module) -> Validation:
        scored = evaluation.reconstruction(cast(ResidualAutoencoder, network), crops, list(config.scenes.levels))
        return Validation(*scored)

    result = fit(objective, samples, config.fit, config.output, config, validate)
    if result:
        network = cast(ResidualAutoencoder, result.network)
        if not config.freeze_encoder:
            network.rescale_latent(1 / latent_spread(network, evaluation.validation_crops(scenes, count=32)))
        description = {"kind": "autoencoder", "autoencoder": plain(config.autoencoder), "levels": config.scenes.levels}
        save_checkpoint(f"{config.output}/rae.safetensors", network.state_dict(), description)
        print(f"autoencoder: {config.output}/rae.safetensors")


@torch.no_grad()
def latent_spread(network: ResidualAutoencoder, crops: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each latent channel over all levels, "C_z": the unit that stage 2 learns easily in."""
    latent, _ = network.encode(to_float(crops.flatten(0, 1)))
    return latent.std((0, 2, 3)).clamp(min=1e-6)
