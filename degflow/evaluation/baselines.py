"""What a generated LR image is compared with, from HR alone or with an eye on the captured LR.

- `bicubic`: down and back.
- `blur`: one Gaussian per level, its sigma fitted by `fit_sigmas`.
- `random_degradation` (see `random_pipeline`): what a degradation model that knows no camera makes.
- `reconstruct` and `interpolate` see the captured LR: the autoencoder's limit, and a path through the latents of the
  captured trained levels, what a flow could learn at best.
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
from degflow.trajectory import NaturalCubicSpline, PiecewiseLinear

BASELINES = ("gaussian", "random", "spline", "linear")
FIT_SIDE = 512  # pixels of each scene that a sigma is fitted on
SHARPEST = 0.05  # sigma in pixels: no blur
_PATHS = {"spline": NaturalCubicSpline, "linear": PiecewiseLinear}


def bicubic(hr: Tensor, scale: float) -> Tensor:
    """The baseline: antialiased bicubic down by `scale` and back, through 8-bit, "B 3 H W" in [-1, 1]."""

    def there_and_back(pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        return images.resize(images.resize(pixels, *images.shrunk_size(height, width, scale)), height, width)

    return images.to_tensor(np.stack([there_and_back(pixels) for pixels in images.to_pixels(hr)]))


@torch.inference_mode()
def reconstruct(autoencoder: ResidualAutoencoder, guide: Tensor, lr: Tensor) -> Tensor:
    """decode(encode(LR); skips of the guide: HR, or HR after the optics), the best that any flow could reach with it."""
    multiple = autoencoder.config.compression
    latent, _ = autoencoder.encode(pad(lr, multiple))
    decoded = autoencoder.decode(latent, autoencoder.skips(pad(guide, multiple)))
    return decoded[..., : guide.shape[-2], : guide.shape[-1]].clamp(-1, 1)


@torch.inference_mode()
def interpolate(degrader: Degrader, captured: Tensor, scale: float, path: str) -> Tensor:
    """Decode, with HR's skips, a path through the latents of captured images.

    Args:
        degrader: whose autoencoder and trained levels are taken.
        captured: "K 3 H W" in [-1, 1], one scene at the degrader's levels, HR first.
        scale: in the degrader's range.
        path: spline or linear.

    Returns:
        "1 3 H W" in [-1, 1].
    """
    autoencoder = degrader.autoencoder
    hr, *lower = pad(captured, autoencoder.config.compression).split(1)
    latent, skips = autoencoder.encode(hr)
    latents = torch.cat([latent, *(autoencoder.encode(lr)[0] for lr in lower)])
    time = degrader.timeline.time(torch.tensor([scale], dtype=torch.float64, device=captured.device))
    latent = _PATHS[path](degrader.timeline.knots).to(captured.device).at(latents[None], time).position
    decoded = autoencoder.decode(latent, skips)
    return decoded[..., : captured.shape[-2], : captured.shape[-1]].clamp(-1, 1)


def fit_sigmas(scenes: SceneImages, levels: Mapping[str, float], crop: int = 0) -> dict[str, float]:
    """The sigma in pixels, for each level but HR's, of the Gaussian that brings HR closest to the captured LR.

    Closest is the highest mean PSNR-Y over the scenes (of their middle 512 pixels at most), between no blur and a sigma
    of the level's scale; golden-section search to 0.005 pixels.
    """
    side = min(crop or FIT_SIDE, FIT_SIDE)
    scene_lumas = [luma(images.to_tensor(central(pixels, side)))[:, None].float() for pixels in scenes.pixels]
    inner = slice(SHAVE, -SHAVE)

    def loss(sigma: float, level: int) -> float:
        departures = (blur(y[:1], sigma) - y[level] for y in scene_lumas)
        return sum(math.log(float(d[..., inner, inner].square().mean()) + 1e-12) for d in departures)

    return {
        label: _lowest(lambda sigma, level=level: loss(sigma, level), SHARPEST, max(scale, 1.0))
        for level, (label, scale) in enumerate(levels.items())
        if label != HR_LABEL
    }


def _lowest(function, low: float, high: float, tolerance: float = 0.005) -> float:
    """Where a function of one minimum in [low, high] has it."""
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
    """The baselines that a table shows beside HR, bicubic and the autoencoder's limit.

    Args:
        degrader: for the latent paths.
        levels: label -> scale of the scenes' levels, HR first.
        sigmas: label -> sigma of the Gaussian blur.
        names: which of gaussian, random, spline and linear. The latent paths need the captured LR of every trained
            level, and are left out where `levels` lacks one.
        seed: of the random pipeline; with the scene's id and the level it decides everything.
    """

    def __init__(
        self,
        degrader: Degrader,
        levels: Mapping[str, float],
        sigmas: Mapping[str, float],
        names: Sequence[str] = BASELINES,
        seed: int = 0,
    ):
        self.degrader, self.levels, self.sigmas, self.seed = degrader, dict(levels), dict(sigmas), seed
        self.lacking = [label for label in degrader.levels if label not in levels]
        self.names = [name for name in names if not (name in _PATHS and self.lacking)]
        self.knots = [] if self.lacking else [list(levels).index(label) for label in degrader.levels]

    def at(self, label: str) -> list[str]:
        """Names at one level: at a trained one the latent paths are the autoencoder's limit, and left out."""
        trained = self.degrader.levels.get(label) == self.levels[label]
        return [name for name in self.names if not (name in _PATHS and trained)]

    def images(self, scene: str, captured: Tensor, label: str) -> dict[str, Tensor]:
        """Name -> "1 3 H W", for one scene "K 3 H W" in [-1, 1] at all levels."""
        return {name: self._image(name, scene, captured, label) for name in self.at(label)}

    def _image(self, name: str, scene: str, captured: Tensor, label: str) -> Tensor:
        hr, scale = captured[:1], self.levels[label]
        if name == "gaussian":
            return blur(hr, self.sigmas[label])
        if name == "random":
            identity = f"{self.seed} {label} {scene}".encode()
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(identity).digest()[:8], "big"))
            return images.to_tensor(random_degradation(images.to_pixels(hr)[0], scale, rng), hr.device)[None]
        return interpolate(self.degrader, captured[self.knots], scale, name)
