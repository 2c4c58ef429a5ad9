"""Retouched HR images: with more noise than their camera's, or with less fine detail of low contrast, noise included.

All HR images of a training have the noise of one camera. A degrader that saw no others takes their noise for a sign of
where LR has noise. But photographs that are to be degraded may be rendered, or shrunk, and have hardly any noise; or
they were taken in the dark. So the training also sees a retouched copy of each scene.

What is added to HR or taken from it counts as part of the scene. The camera would have seen it through its optics K, so
each LR image changes by that much, and keeps its own noise:

    HR' = HR + a        LR' = LR + K(HR + a) - K(HR)
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from degflow.capture.filters import blur

GRID = 192  # pixels between the places whose strengths are drawn; they are interpolated between them
NOISY = 0.5  # the share of places that get noise; the others lose detail
NOISE = (0.3, 8.0)  # its rms, from the least to the most, in 8-bit levels
CONTRAST = (1.0, 5.0)  # up to which detail goes, from the least to the most, in 8-bit levels
SIGMAS = (4.0, 1.5, 0.7)  # of the blurs that tell what detail is, in pixels, one after the other
LEVEL = 1 / 127.5  # an 8-bit level, in [-1, 1]


def retouched(hr: Tensor, random: np.random.Generator) -> Tensor:
    """HR with noise in some places and without weak detail in others.

    Args:
        hr: "1 3 H W" in [-1, 1].
        random: decides the places, the strengths and the noise.

    Returns:
        "1 3 H W" in [-1, 1], rounded to 8-bit levels.
    """
    height, width = hr.shape[2:]
    places = tuple(-(-side // GRID) + 1 for side in (height, width))

    def field(values: np.ndarray) -> Tensor:
        grown = F.interpolate(torch.from_numpy(values).float()[None, None], scale_factor=GRID, mode="bilinear")
        return grown[..., :height, :width]

    def strengths(least: float, most: float) -> np.ndarray:
        return LEVEL * np.exp(random.uniform(np.log(least), np.log(most), places))

    noisy = random.random(places) < NOISY
    strength, contrast = field(np.where(noisy, strengths(*NOISE), 0)), field(np.where(noisy, 0, strengths(*CONTRAST)))
    colour = field(random.random(places))
    changed = smoothed(hr, contrast) + strength * noise(colour, random)
    return ((changed.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def smoothed(hr: Tensor, contrast: Tensor | float) -> Tensor:
    """HR without its weak detail: of what a blur takes away, that much contrast goes at each pixel.

    Args:
        hr: "1 3 H W" in [-1, 1].
        contrast: "1 1 H W", or one number, in units of HR.
    """
    for sigma in SIGMAS:
        detail = hr - blur(hr, sigma)
        hr = hr - torch.minimum(detail.abs(), torch.as_tensor(contrast)) * detail.sign()
    return hr


def noise(colour: Tensor, random: np.random.Generator) -> Tensor:
    """Gaussian noise of variance 1 in each channel, "1 3 H W": white, smooth or between the two at different places.

    Args:
        colour: "1 1 H W" in [0, 1]. At 0 the three channels are one, at 1 they are independent.
        random: decides the noise.
    """
    height, width = colour.shape[2:]
    white, other = torch.from_numpy(random.standard_normal((2, 1, 4, height, width), dtype=np.float32))
    smooth = blur(other, 0.6)
    smooth = smooth / smooth.square().mean().sqrt()
    share = (1 + torch.sin(2 * torch.pi * colour)) / 2  # of the smooth noise
    mixed = share.sqrt() * smooth + (1 - share).sqrt() * white
    return colour.sqrt() * mixed[:, 1:] + (1 - colour).sqrt() * mixed[:, :1]
