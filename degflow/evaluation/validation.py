"""Scores and pictures of a few crops, which a training shows while it runs."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from degflow.capture.optics import Optics
from degflow.degrader import Degrader
from degflow.evaluation.baselines import reconstruct
from degflow.evaluation.metrics import psnr
from degflow.evaluation.pictures import contact_sheet
from degflow.models import ResidualAutoencoder
from degflow.models.precision import computing
from degflow.objectives import to_float
from degflow.perceptual import Perceptual


def reconstruction(
    autoencoder: ResidualAutoencoder,
    crops: Tensor,
    levels: Mapping[str, float],
    optics: Optics | None = None,
    perceptual: Perceptual | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Scores of decode(encode(level); skips) at every level, and a picture with rows HR | LR | decoded LR ...

    Args:
        autoencoder: E and D.
        crops: uint8 "N K 3 H W", the K levels, HR first.
        levels: label -> scale.
        optics: the skips are those of HR after the optics of the level; None: HR's.
        perceptual: measures LPIPS as well.

    Returns:
        For label L `xL`, the mean PSNR in dB, and with `perceptual` `xL_lpips`, the mean LPIPS; the picture.
    """
    device = next(autoencoder.parameters()).device
    image = to_float(crops.to(device))
    hr, scalars, columns = image[:, 0], {}, []
    for level, (label, scale) in enumerate(levels.items()):
        guide = hr if optics is None else optics(hr.cpu(), torch.full((len(hr),), scale)).to(device)
        decoded = reconstruct(autoencoder, guide, image[:, level])
        scalars |= _scores(f"x{label}", decoded, image[:, level], perceptual)
        columns += [(f"x{label}", image[:, level]), (f"x{label} decoded", decoded)]
    return scalars, contact_sheet(columns)


def generation(
    degrader: Degrader, crops: Tensor, labels: Sequence[str], perceptual: Perceptual | None = None
) -> tuple[dict[str, float], np.ndarray]:
    """Scores of generated against real LR at every trained level; a picture of HR, real and generated LR, and between.

    Args:
        degrader: generates, with seed 0.
        crops: uint8 "N K 3 H W", the K levels, HR first.
        labels: of the levels.
        perceptual: measures LPIPS as well.

    Returns:
        As `reconstruction`, for all levels but HR's.
    """
    device = next(degrader.parameters()).device
    image = to_float(crops.to(device))
    scales = [degrader.levels[label] for label in labels[1:]]
    between = [(a + b) / 2 for a, b in zip(list(degrader.levels.values()), scales, strict=False)]
    made = degrader(image[:, 0], torch.tensor([scales + between], dtype=torch.float64).expand(len(image), -1))
    scalars, columns = {}, [("HR", image[:, 0])]
    for n, label in enumerate(labels[1:]):
        scalars |= _scores(f"x{label}", made[:, n], image[:, n + 1], perceptual)
        columns += [(f"x{label} real", image[:, n + 1]), (f"x{scales[n]:.2f} generated", made[:, n])]
    columns += [(f"x{scale:.2f} generated", made[:, len(scales) + n]) for n, scale in enumerate(between)]
    return scalars, contact_sheet(columns)


@torch.no_grad()
def _scores(name: str, made: Tensor, real: Tensor, perceptual: Perceptual | None) -> dict[str, float]:
    scores = {name: float(psnr(made, real).mean())}
    if perceptual:
        with computing("float32", made.device.type):
            scores[f"{name}_lpips"] = float(perceptual.to(made.device)(made, real).mean())
    return scores
