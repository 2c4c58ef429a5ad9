"""LR images made by simpler means, for comparison with the generated ones.

From HR alone:
- `bicubic`: downsampling and upsampling.
- `blur`: one Gaussian per level, its sigma fitted by `fit_sigmas`.
- `random_degradation` (see `random_pipeline`): a degradation model without a camera.

With the captured LR, as upper limits:
- `reconstruct`: the captured LR through the autoencoder.
- `interpolate`: a path through the latents of the captured trained levels, which no degrader has.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from degflow import images
from degflow.capture.filters import blur
from degflow.capture.scenes import HR_LABEL, SceneImages
from degflow.degrader import Degrader, pad
from degflow.evaluation.crops import central
from degflow.evaluation.metrics import SHAVE, luma
from degflow.evaluation.random_pipeline import random_degradation
from degflow.models import ResidualAutoencoder
from degflow.models.precision import computing
from degflow.trajectory import NaturalCubicSpline, PiecewiseLinear

BASELINES = ("optics", "mean", "gaussian", "random", "spline", "linear")
FIT_SIDE = 512  # pixels of each scene that a sigma is fitted on
SHARPEST = 0.05  # sigma in pixels, practically no blur
PATHS = {"spline": NaturalCubicSpline, "linear": PiecewiseLinear}


def bicubic(hr: Tensor, scale: float) -> Tensor:
    """Antialiased bicubic down by `scale` and up again, with 8-bit rounding; "B 3 H W" in [-1, 1]."""

    def there_and_back(pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        return images.resize(images.resize(pixels, *images.shrunk_size(height, width, scale)), height, width)

    return images.to_tensor(np.stack([there_and_back(pixels) for pixels in images.to_pixels(hr)]))


@torch.inference_mode()
def reconstruct(autoencoder: ResidualAutoencoder, guide: Tensor, lr: Tensor) -> Tensor:
    """decode(encode(LR); skips of the guide), the best that a flow could reach; the guide is HR, or HR after optics."""
    multiple = autoencoder.config.compression
    with computing("float32", lr.device.type):
        latent, _ = autoencoder.encode(pad(lr, multiple))
        decoded = autoencoder.decode(latent, autoencoder.skips(pad(guide, multiple)))
    return decoded[..., : guide.shape[-2], : guide.shape[-1]].clamp(-1, 1)


@torch.inference_mode()
def interpolate(degrader: Degrader, captured: Tensor, scale: float, path: str) -> Tensor:
    """Decode a point of a path through the latents of captured images, with HR's skips.

    Args:
        degrader: whose autoencoder and trained levels are taken.
        captured: "K 3 H W" in [-1, 1], one scene at the degrader's levels, HR first.
        scale: in the degrader's range.
        path: spline or linear.

    Returns:
        "1 3 H W" in [-1, 1].
    """
    autoencoder = degrader.autoencoder
    levels = pad(captured, autoencoder.config.compression).split(1)
    time = degrader.timeline.time(torch.tensor([scale], dtype=torch.float64, device=captured.device))
    with computing("float32", captured.device.type):
        guide = degrader.flow.guide(captured[:1], torch.tensor([scale], dtype=torch.float64))
        skips = autoencoder.skips(pad(guide, autoencoder.config.compression))
        latents = torch.cat([autoencoder.encode(level)[0] for level in levels])
        latent = PATHS[path](degrader.timeline.knots).to(captured.device).at(latents[None], time).position
        decoded = autoencoder.decode(latent, skips)
    return decoded[..., : captured.shape[-2], : captured.shape[-1]].clamp(-1, 1)


def fit_sigmas(scenes: SceneImages, levels: Mapping[str, float], crop: int = 0) -> dict[str, float]:
    """For each level but HR, the sigma in pixels of the Gaussian that makes HR most like the captured LR.

    It has the highest mean PSNR-Y over the central 512 pixels of the scenes, between no blur and four times the
    level's scale; golden-section search to 0.005 pixels.
    """
    side = min(crop or FIT_SIDE, FIT_SIDE)
    scene_lumas = [luma(images.to_tensor(central(pixels, side)))[:, None].float() for pixels in scenes.pixels]
    return {
        label: fit_sigma([(y[:1], y[level]) for y in scene_lumas], 4 * max(scale, 1.0))
        for level, (label, scale) in enumerate(levels.items())
        if label != HR_LABEL
    }


def fit_sigma(pairs: Sequence[tuple[Tensor, Tensor]], most: float) -> float:
    """The sigma in pixels of the Gaussian that makes HR most like LR: the highest mean PSNR of the pairs.

    Args:
        pairs: Y of HR "1 1 H W" and of LR "1 H W" or "1 1 H W"; 4 pixels of each border are left out.
        most: the largest sigma.

    Returns:
        Between practically no blur and `most`, to 0.005 pixels.
    """
    inner = slice(SHAVE, -SHAVE)

    def loss(sigma: float) -> float:
        departures = (blur(hr, sigma) - lr for hr, lr in pairs)
        return sum(math.log(float(d[..., inner, inner].square().mean()) + 1e-12) for d in departures)

    return _lowest(loss, SHARPEST, most)


def _lowest(function, low: float, high: float, tolerance: float = 0.005) -> float:
    """The minimum of a function that has one in [low, high], by golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    while high - low > tolerance:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (low + high) / 2


class Baselines:
    """The baselines of a table, beside HR, bicubic and the autoencoder's limit.

    Args:
        degrader: for the latent paths.
        levels: label -> scale of the scenes' levels, HR first.
        sigmas: label -> sigma of the Gaussian blur.
        names: which of BASELINES. The degrader's optics alone and its image at spread 0 (mean) are left out for a
            degrader that does not draw; the latent paths (spline, linear) need the captured LR of every trained level.
    """

    def __init__(
        self,
        degrader: Degrader,
        levels: Mapping[str, float],
        sigmas: Mapping[str, float],
        names: Sequence[str] = BASELINES,
    ):
        self.degrader, self.levels, self.sigmas = degrader, dict(levels), dict(sigmas)
        self.lacking = [label for label in degrader.levels if label not in levels]
        draws = degrader.draws
        left_out = {*(PATHS if self.lacking else ()), *(() if draws else ("optics", "mean"))}
        self.names = [name for name in names if name not in left_out]
        self.knots = [] if self.lacking else [list(levels).index(label) for label in degrader.levels]

    def at(self, label: str) -> list[str]:
        """Names at one level. At a trained level the latent paths equal the autoencoder's limit and are left out."""
        trained = self.degrader.levels.get(label) == self.levels[label]
        return [name for name in self.names if not (name in PATHS and trained)]

    def images(self, scene: str, captured: Tensor, label: str) -> dict[str, Tensor]:
        """Name -> "1 3 H W", for one scene "K 3 H W" in [-1, 1] at all levels."""
        return {name: self._image(name, scene, captured, label) for name in self.at(label)}

    def _image(self, name: str, scene: str, captured: Tensor, label: str) -> Tensor:
        if name == "gaussian":
            return blur(captured[:1], self.sigmas[label])
        trained = captured[self.knots] if name in PATHS else captured[:1]
        return baseline(name, self.degrader, trained, self.levels[label], f"{label} {scene}")


def baseline(name: str, degrader: Degrader, captured: Tensor, scale: float, identity: str) -> Tensor:
    """One LR image of a baseline that needs no fit.

    Args:
        name: optics, mean, random, spline or linear.
        degrader: whose optics, mean or autoencoder is taken.
        captured: "K 3 H W" in [-1, 1], HR first; for spline and linear all of the degrader's levels.
        scale: in the degrader's range.
        identity: names the image; the random pipeline's random numbers follow from it.

    Returns:
        "1 3 H W" in [-1, 1].
    """
    hr = captured[:1]
    if name == "optics":
        return degrader.flow.guide(hr, torch.tensor([scale], dtype=torch.float64))
    if name == "mean":
        return degrader(hr, torch.tensor([scale], dtype=torch.float64), spread=0.0)
    if name == "random":
        seed = f"0 {identity}".encode()  # 0: a fixed seed, so that tables repeat
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed).digest()[:8], "big"))
        return images.to_tensor(random_degradation(images.to_pixels(hr)[0], scale, rng), hr.device)[None]
    return interpolate(degrader, captured, scale, name)
