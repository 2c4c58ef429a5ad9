"""How well a degrader's draws follow the distribution of captured LR images.

PSNR asks for a mean. These measures ask whether a draw could be a capture, and whether draws vary as much as captures
do. All on Y in 16..235 with 4 pixels shaved, unless said otherwise.

- `flat_noise`: noise level and its correlation in flat blocks, by brightness (dark, middle, bright).
- `comb`: how far the spectrum at multiples of 1/8 and 1/4 cycles per pixel stands above its neighbours, in dB. A weave
  of the autoencoder's grid shows there.
- `gray_chroma`: mean colour offset and its spread where HR is gray, in levels of Cb and Cr.
- `energy_score`: of several draws against the capture, over patches: low for sharp and calibrated draws (Gneiting and
  Raftery, "Strictly Proper Scoring Rules", 2007).
- `ranks`: the captured pixel's rank among the draws, in bands of frequency: all ranks are equally frequent where draws
  are calibrated; captures beyond all draws betray draws that vary too little.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from degflow import images
from degflow.capture.filters import blur
from degflow.capture.scenes import HR_LABEL, SceneImages
from degflow.degrader import Degrader
from degflow.evaluation.crops import central, seeds_of
from degflow.evaluation.metrics import psnr, shaved_luma
from degflow.evaluation.realism import flat_blocks, noise

BRIGHTNESS = {"dark": (0.05, 0.35), "middle": (0.35, 0.65), "bright": (0.65, 0.95)}  # of Y, black 0 to white 1
PATCH = 8  # pixels along the side of the energy score's patches
BANDS = (0.7, 1.4, 2.8)  # sigmas in pixels that part the bands of frequency, fine to coarse
GRAY = 4 / 127.5  # most difference of R, G and B of a gray HR pixel, in [-1, 1]


class DrawScore(NamedTuple):
    """The measures of one captured LR image and a degrader's draws of it; of the captured image and of the draws."""

    scene: str
    label: str
    psnr: float
    mean_psnr: float
    optics_psnr: float
    dark: float
    dark_drawn: float
    middle: float
    middle_drawn: float
    bright: float
    bright_drawn: float
    correlation: float
    correlation_drawn: float
    comb8: float
    comb8_drawn: float
    comb4: float
    comb4_drawn: float
    chroma: float
    chroma_drawn: float
    energy: float
    energy_of_mean: float
    fine_rank_error: float
    rank_error: float


def distribution(
    degrader: Degrader,
    scenes: SceneImages,
    levels: Mapping[str, float],
    count: int,
    crop: int = 0,
    **options: int | float | str,
) -> Iterator[DrawScore]:
    """Compare `count` draws of each LR image with the captured one, at every level but HR's.

    Args:
        degrader: one that draws.
        scenes: captured scenes with the levels' images.
        levels: label -> scale, in the scenes' order, HR first.
        count: draws, at least 2.
        crop: side of the central crop; 0 takes whole images.
        options: `steps`, `solver`, `spread` of the degrader.
    """
    device = next(degrader.parameters()).device
    for scene, pixels in zip(scenes.scenes, scenes.pixels, strict=True):
        real = images.to_tensor(central(pixels, crop), device)
        for n, (label, scale) in enumerate(levels.items()):
            if label != HR_LABEL:
                seeds = seeds_of(scene.name, [label], count)
                yield DrawScore(scene.name, label, *_scores(degrader, real[:1], real[n : n + 1], scale, seeds, options))


def _scores(
    degrader: Degrader, hr: Tensor, lr: Tensor, scale: float, seeds: Tensor, options: dict[str, Any]
) -> tuple[float, ...]:
    scales = torch.full(seeds.shape, scale, dtype=torch.float64)
    made = _rounded(degrader(hr, scales, seed=seeds, **options)[0])
    mean = _rounded(degrader(hr, scales[:, :1], **{**options, "spread": 0.0})[0])
    optics = _rounded(degrader.flow.guide(hr, scales[0, :1]))
    captured, drawn = (flat_noise(image, hr) for image in (lr, made[:1]))
    together = ranks(made, lr)
    return (
        float(psnr(made, lr.expand_as(made)).mean()),
        float(psnr(mean, lr)),
        float(psnr(optics, lr)),
        *(noises[name].level for name in BRIGHTNESS for noises in (captured, drawn)),
        *(_mean([part.correlation for part in noises.values()]) for noises in (captured, drawn)),
        *(float(comb(image, period)[0]) for period in (8, 4) for image in (lr, made[:1])),
        *(gray_chroma(image, hr)[0] for image in (lr, made[:1])),
        energy_score(made, lr),
        energy_score(mean.expand(2, -1, -1, -1), lr),
        rank_error(together[0]),
        float(np.mean([rank_error(shares) for shares in together])),
    )


def _mean(values: Sequence[float]) -> float:
    """Mean without NaN; NaN where there is nothing else."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _rounded(image: Tensor) -> Tensor:
    return images.to_tensor(images.to_pixels(image), image.device)


class Noise(NamedTuple):
    """Noise in flat blocks: standard deviation in levels of Y, and the correlation of neighbours."""

    level: float
    correlation: float


def flat_noise(image: Tensor, hr: Tensor) -> dict[str, Noise]:
    """Noise of "1 3 H W" in [-1, 1] by brightness, in the flattest 5% of HR's blocks of each; NaN without a block."""
    found = {}
    for name, (low, high) in BRIGHTNESS.items():
        blocks = flat_blocks(hr, low, high)
        values = noise(image, blocks) if len(blocks) else (torch.tensor([torch.nan]),) * 2
        found[name] = Noise(*(float(value[0]) for value in values))
    return found


def comb(image: Tensor, period: int) -> Tensor:
    """Power of the lines at multiples of 1/period over that of the lines beside them, "B 3 H W" -> "B" in dB.

    Of the 1-D spectra along rows and along columns, the mean of both; 0 for an image without a weave. NaN for an image
    of less than 72 pixels.
    """
    y = shaved_luma(image, 1)
    if min(y.shape[1:]) < 64:
        return torch.full((len(image),), torch.nan, dtype=y.dtype)
    ratios = []
    for plane in (y, y.transpose(1, 2)):
        length = plane.shape[2] // 64 * 64
        windows = plane[:, :, :length].unfold(2, 64, 32)
        window = torch.hann_window(64, dtype=y.dtype, device=y.device)
        power = torch.fft.rfft((windows - windows.mean(3, keepdim=True)) * window).abs().square().mean((1, 2))
        lines = torch.arange(64 // period, 32, 64 // period, device=y.device)
        beside = torch.stack([power[:, lines + offset] for offset in (-3, 3)]).log().mean(0)
        ratios.append((power[:, lines].log() - beside).mean(1))
    return torch.stack(ratios).mean(0) * (10 / torch.log(torch.tensor(10.0, dtype=y.dtype)))


def gray_chroma(image: Tensor, hr: Tensor) -> tuple[float, float]:
    """Mean length of the (Cb, Cr) offset, smoothed over 4 pixels, and standard deviation of both, where HR is gray.

    "1 3 H W" in [-1, 1]; NaN where fewer than 64 pixels are gray.
    """
    gray = ((hr.amax(1) - hr.amin(1)) <= GRAY)[0]
    if int(gray.sum()) < 64:
        return float("nan"), float("nan")
    red, green, blue = (127.5 * image.double()).unbind(1)
    chroma = torch.stack((-0.1687 * red - 0.3313 * green + 0.5 * blue, 0.5 * red - 0.4187 * green - 0.0813 * blue), 1)
    offset = blur(chroma, 4.0)[0][:, gray].norm(dim=0).mean()
    return float(offset), float(chroma[0][:, gray].std(1).mean())


def energy_score(draws: Tensor, captured: Tensor) -> float:
    """Mean over 8 x 8 patches of E|X - y| - E|X - X'| / 2, in levels of Y per pixel; N >= 2 draws "N 3 H W"."""
    made, real = (_patches(shaved_luma(image, PATCH)) for image in (draws, captured))
    count = len(made)
    to_real = (made - real).square().sum(-1).sqrt().mean(0)
    pairs = [(made[n] - made[m]).square().sum(-1).sqrt() for n in range(count) for m in range(n)]
    return float((to_real - torch.stack(pairs).mean(0) / 2).mean() / PATCH)


def _patches(y: Tensor) -> Tensor:
    return y.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)


def ranks(draws: Tensor, captured: Tensor) -> list[Tensor]:
    """For each band of frequency, fine to coarse: how often the captured pixel has each rank among N draws, "N + 1".

    Shares that sum to 1; 1 / (N + 1) each where the draws are calibrated. A pixel that is equal to some draws, as in a
    white sky, counts in equal parts at all the ranks that it could have among them.
    """
    y = torch.cat((shaved_luma(draws, 1), shaved_luma(captured, 1)))[:, None]
    found, rest, count = [], y, len(draws)
    for sigma in (*BANDS, None):
        coarse = blur(y, sigma) if sigma else torch.zeros_like(y)
        band, rest = rest - coarse, coarse
        below, ties = ((relation(band[:-1], band[-1:])).sum(0).flatten() for relation in (torch.lt, torch.eq))
        part = 1 / (ties + 1).double()
        first, last = (torch.bincount(rank, part, count + 2) for rank in (below, below + ties + 1))
        found.append((first - last).cumsum(0)[: count + 1] / len(part))
    return found


def rank_error(shares: Tensor) -> float:
    """How far a rank histogram is from flat: half the sum of absolute differences, 0 to 1."""
    return float((shares - 1 / len(shares)).abs().sum() / 2)
