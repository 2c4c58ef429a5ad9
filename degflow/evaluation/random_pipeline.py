"""A random second-order degradation without a camera model, after Real-ESRGAN (Wang et al., ICCV workshops 2021).

Twice: blur with a random Gaussian (isotropic, or anisotropic and rotated), resize by a random factor with a random
filter, add Gaussian or Poisson noise (colour or gray), compress as JPEG. The second compression comes at random before
or after the last resize. Probabilities and the ranges of noise and quality are Real-ESRGAN's for x4. Image sizes stay
between HR and HR / scale, which the last resize reaches. The blurs' sigmas are Real-ESRGAN's at x4, and proportional to
the scale. Bicubic upsampling to HR's grid makes a registered LR image. Sinc and generalised Gaussian kernels are left
out.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from degflow.images import resize, shrunk_size

FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
SIGMAS = (3.0, 1.5)  # largest sigma of each blur at x4, in pixels of its input
LEAST_SIGMA = 0.2
NOISE = ((1.0, 30.0), (1.0, 25.0))  # standard deviation in levels
PHOTONS = ((0.05, 3.0), (0.05, 2.5))  # Poisson noise, relative to one photon per level
QUALITY = (30, 95)
SECOND_BLUR, GAUSSIAN, GRAY, STRETCHED = 0.8, 0.5, 0.4, 0.5  # probabilities


def random_degradation(hr: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    """An LR image on HR's grid, uint8 "H W 3" -> uint8 "H W 3"."""
    height, width = hr.shape[:2]
    first = rng.uniform(1, scale)
    second = rng.uniform(first, scale)
    pixels = _blurred(hr, SIGMAS[0] * scale / 4, rng)
    pixels = _resized(pixels, shrunk_size(height, width, first), rng)
    pixels = _compressed(_noisy(pixels, 0, rng), rng)
    if rng.random() < SECOND_BLUR:
        pixels = _blurred(pixels, SIGMAS[1] * scale / 4, rng)
    pixels = _resized(pixels, shrunk_size(height, width, second), rng)
    pixels, last = _noisy(pixels, 1, rng), shrunk_size(height, width, scale)
    if rng.random() < 0.5:
        pixels = _compressed(_resized(pixels, last, rng), rng)
    else:
        pixels = _resized(_compressed(pixels, rng), last, rng)
    return resize(pixels, height, width)


def _blurred(pixels: np.ndarray, largest: float, rng: np.random.Generator) -> np.ndarray:
    along, across = rng.uniform(LEAST_SIGMA, max(LEAST_SIGMA, largest), 2)
    if rng.random() >= STRETCHED:
        across = along
    angle = rng.uniform(0, math.pi)
    reach = min(math.ceil(3 * max(along, across)), min(pixels.shape[:2]) - 1)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = np.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    planes = torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1))
    planes = F.pad(planes, (reach,) * 4, mode="reflect")[:, None]
    planes = F.conv2d(planes, torch.from_numpy((kernel / kernel.sum()).astype(np.float32))[None, None])
    return _to_uint8(planes[:, 0].numpy().transpose(1, 2, 0))


def _resized(pixels: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    height, width = size
    return np.array(Image.fromarray(pixels).resize((width, height), FILTERS[rng.integers(len(FILTERS))]))


def _noisy(pixels: np.ndarray, order: int, rng: np.random.Generator) -> np.ndarray:
    gray = rng.random() < GRAY
    if rng.random() < GAUSSIAN:
        shape = (*pixels.shape[:2], 1) if gray else pixels.shape
        added = rng.uniform(*NOISE[order]) * rng.standard_normal(shape)
    else:
        light = pixels.mean(2, keepdims=True) if gray else pixels.astype(float)
        added = rng.uniform(*PHOTONS[order]) * (rng.poisson(light) - light)
    return _to_uint8(pixels + added)


def _compressed(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
    return np.asarray(Image.open(buffer))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
