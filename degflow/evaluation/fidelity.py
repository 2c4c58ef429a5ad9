"""Scores of every method's LR images against the captured ones, rounded to 8 bits as in a dataset."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from degflow import images
from degflow.capture.scenes import HR_LABEL, SceneImages
from degflow.degrader import Degrader
from degflow.evaluation import realism
from degflow.evaluation.baselines import BASELINES, Baselines, bicubic, reconstruct
from degflow.evaluation.crops import central, seeds_of
from degflow.evaluation.frechet import CAPTURED, Frechet
from degflow.evaluation.metrics import psnr, ssim

METHODS = ("generated", "hr", "bicubic", "autoencoder")
TITLES = {
    "generated": "generated",
    "hr": "HR unchanged",
    "bicubic": "bicubic",
    "autoencoder": "autoencoder's limit",
    "optics": "optics alone",
    "mean": "mean (spread 0)",
    "gaussian": "Gaussian blur",
    "random": "random pipeline",
    "spline": "latent spline",
    "linear": "latent line",
}
LPIPS_PIXELS = 2**21  # in one batch


class Measurement(NamedTuple):
    """One LR image of one scene, made by one method, against the captured one.

    `spectrum`, `noise`, `correlation` and `divergence` are defined in `realism`; `captured_noise` and
    `captured_correlation` are those of the captured LR image.
    """

    scene: str
    label: str
    scale: float
    method: str
    psnr: float
    ssim: float
    lpips: float
    psnr_to_hr: float
    spectrum: float
    noise: float
    correlation: float
    divergence: float
    captured_noise: float
    captured_correlation: float


def measure(
    degrader: Degrader,
    scenes: SceneImages,
    levels: Mapping[str, float],
    perceptual: nn.Module | None,
    crop: int = 0,
    baselines: Baselines | None = None,
    frechet: Frechet | None = None,
    **options: int | float | str,
) -> Iterator[Measurement]:
    """Compare every method's LR with the captured one, at every level but HR.

    Args:
        degrader: the model.
        scenes: captured scenes with the levels' images.
        levels: label -> scale, in the scenes' order; label 1 is HR, the methods' input.
        perceptual: LPIPS, or None to leave it out (NaN).
        crop: side of the central crop, less if a scene is smaller; 0 takes whole images.
        baselines: more methods, after those of METHODS.
        frechet: collects the patches of every image; its distances are complete when all measurements are.
        options: `steps`, `solver`, `spread` of the degrader.

    Raises:
        ValueError: an image side has fewer than 24 pixels.
    """
    labels = [label for label in levels if label != HR_LABEL]
    device = next(degrader.parameters()).device
    for scene, pixels in zip(scenes.scenes, scenes.pixels, strict=True):
        real = images.to_tensor(central(pixels, crop), device)
        hr = real[:1]
        flat = realism.flat_blocks(hr)
        scales = torch.tensor([[levels[label] for label in labels]], dtype=torch.float64)
        generated = degrader(hr, scales, seed=seeds_of(scene.name, labels), **options)[0]  # type: ignore[arg-type]
        for n, label in enumerate(labels):
            lr = real[n + 1 : n + 2]
            made = {
                "generated": generated[n : n + 1],
                "hr": hr,
                "bicubic": bicubic(hr.cpu(), levels[label]).to(device),
                "autoencoder": reconstruct(degrader.autoencoder, degrader.flow.guide(hr, scales[0, n : n + 1]), lr),
                **(baselines.images(scene.name, real, label) if baselines else {}),
            }
            batch = images.to_tensor(images.to_pixels(torch.cat(list(made.values()))), device)
            if frechet:
                for method, image in ((CAPTURED, lr), *zip(made, batch.split(1), strict=True)):
                    frechet.add(label, method, image)
            scores = _scores(batch, lr, hr, flat, perceptual)
            for method, row in zip(made, scores, strict=True):
                yield Measurement(scene.name, label, levels[label], method, *row)


def count(scenes: SceneImages, levels: Mapping[str, float], baselines: Baselines | None = None) -> int:
    """Number of measurements that `measure` yields."""
    labels = [label for label in levels if label != HR_LABEL]
    return len(scenes) * sum(len(METHODS) + (len(baselines.at(label)) if baselines else 0) for label in labels)


def _scores(
    batch: Tensor, lr: Tensor, hr: Tensor, flat: Tensor, perceptual: nn.Module | None
) -> list[tuple[float, ...]]:
    """The scores of a `Measurement` for each of M LR images "M 3 H W", against LR and HR "1 3 H W"."""
    lrs, hrs = lr.expand_as(batch), hr.expand_as(batch)
    noise, correlation = realism.noise(batch, flat)
    captured = [value.expand(len(batch)) for value in realism.noise(lr, flat)]
    columns = (
        psnr(batch, lrs),
        ssim(batch, lrs),
        _lpips(perceptual, batch, lr),
        psnr(batch, hrs),
        realism.spectrum_distance(batch, lr),
        noise,
        correlation,
        realism.residual_divergence(batch, lr, hr),
        *captured,
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))


@torch.inference_mode()
def _lpips(perceptual: nn.Module | None, batch: Tensor, lr: Tensor) -> Tensor:
    if perceptual is None:
        return torch.full((len(batch),), torch.nan)
    parts = batch.split(max(1, LPIPS_PIXELS // (lr.shape[-1] * lr.shape[-2])))
    return torch.cat([perceptual(part, lr) for part in parts])  # with one reference, whose features are computed once


def methods_of(measurements: Sequence[Measurement]) -> list[str]:
    """The measured methods, in the order of METHODS and BASELINES."""
    found = {row.method for row in measurements}
    return [method for method in (*METHODS, *BASELINES) if method in found]
