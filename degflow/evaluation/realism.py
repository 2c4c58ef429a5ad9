"""What PSNR cannot see in a generated LR image: its spectrum, its noise, and how it departs from HR.

All on Y in 16..235 with 4 pixels shaved, as PSNR. Against the captured LR image of the same scene:

- `spectrum_distance`: mean over 32 rings of radial frequency, from 0 to 0.5 cycles per pixel, of the absolute
  difference in dB of the mean power (Hann window).
- `noise`: in the blocks where the scene is flattest, the level and the lag-1 autocorrelation of what a plane leaves. A
  scene that is nowhere flat shows its texture in it: what counts is that both images agree.
- `residual_divergence`: KL divergence in nats, captured from generated, of the histograms of LR - HR: the marginal KL
  divergence of camera noise models (Abdelhamed et al., "Noise Flow", ICCV 2019), counts smoothed by one as in Kousha
  et al., "Modeling sRGB camera noise with normalizing flows", CVPR 2022.
"""

import torch
from torch import Tensor

from degflow.evaluation.metrics import shaved_luma

RINGS = 32
BLOCK = 16  # a side: 4 x 4 sensor pixels of a x4 level
SMALLEST = BLOCK + 8  # sides of an image, with the shaved borders
FLAT = 0.05  # of the blocks
REACH = 64  # of the residuals' histogram in levels; what lies beyond counts in its first and last bin
# Y's variance from rounding R, G and B to 8 bits: no difference counts below it.
ROUNDING = (65.481**2 + 128.553**2 + 24.966**2) / 255**2 / 12


def radial_spectrum(image: Tensor) -> Tensor:
    """Mean power of Y per ring of radial frequency, "B 3 H W" in [-1, 1] -> "B R" float64.

    White noise has its variance everywhere. R is 32, or half the shorter shaved side where that is less. Ring n reaches
    from n / 2R to (n + 1) / 2R cycles per pixel; frequencies above 0.5 (the corners) do not count.
    """
    y = shaved_luma(image, BLOCK)
    height, width = y.shape[1:]
    row, column = (torch.hann_window(side, periodic=False, dtype=y.dtype, device=y.device) for side in (height, width))
    window = row[:, None] * column
    y = y - ((y * window).sum((1, 2)) / window.sum())[:, None, None]
    power = torch.fft.fft2(y * window).abs().square() / window.square().sum()
    down, across = (torch.fft.fftfreq(side, dtype=y.dtype, device=y.device) for side in (height, width))
    rings = min(RINGS, min(height, width) // 2)
    ring = (torch.hypot(down[:, None], across) * 2 * rings).long()
    inside = ring < rings
    total = y.new_zeros(len(y), rings).index_add_(1, ring[inside], power[:, inside])
    return total / torch.bincount(ring[inside], minlength=rings)


def spectrum_distance(image: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute difference of the radial spectra in dB, "B 3 H W" and "B 3 H W" or "1 3 H W" -> "B" float64."""
    a, b = radial_spectrum(image) + ROUNDING, radial_spectrum(reference) + ROUNDING
    return 10 * (torch.log10(a) - torch.log10(b)).abs().mean(1)


def flat_blocks(hr: Tensor, low: float = 0.05, high: float = 0.95) -> Tensor:
    """Where a scene is flat: indices of the 5% (4 at least) of the 16 x 16 blocks of "1 3 H W" with the least texture.

    Texture is how far the HR image departs from the plane that fits a block best. A captured LR image has other noise
    than HR, so this does not choose the blocks where it happens to be quiet (for HR itself it does).

    Args:
        hr: "1 3 H W" in [-1, 1].
        low, high: mean brightness of the blocks that count, black 0 to white 1; near either end noise is clipped. With
            the defaults other blocks come last instead of not at all.
    """
    blocks = _blocks(hr)[0]
    texture = _off_plane(blocks).square().mean((1, 2))
    brightness = (blocks.mean((1, 2)) - 16) / 219
    outside = (brightness < low) | (brightness > high)
    if (low, high) != (0.05, 0.95):
        inside = (~outside).nonzero()[:, 0]
        return inside[texture[inside].argsort(stable=True)][: max(1, round(FLAT * len(inside)))]
    order = torch.where(outside, texture + texture.max() + 1, texture).argsort(stable=True)
    return order[: max(4, round(FLAT * len(order)))]


def noise(image: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Noise of "B 3 H W" in the blocks that `flat_blocks` chose.

    Returns:
        level: "B" float64, standard deviation in levels of Y, the median of the blocks.
        correlation: "B" float64, autocorrelation of neighbours, right and below, the median of the blocks; white noise
            has -0.01 (the plane's share), noise interpolated to a finer grid comes near 1. NaN without any noise.
    """
    residual = _off_plane(_blocks(image)[:, blocks])
    energy = residual.square().mean((2, 3))
    level = (energy * (BLOCK**2 / (BLOCK**2 - 3))).sqrt().median(1).values
    right = (residual[..., 1:] * residual[..., :-1]).mean((2, 3))
    below = (residual[..., 1:, :] * residual[..., :-1, :]).mean((2, 3))
    return level, ((right + below) / 2 / energy.where(energy > 1e-9, torch.nan)).nanmedian(1).values


def residual_divergence(image: Tensor, captured: Tensor, hr: Tensor) -> Tensor:
    """KL(captured || image) in nats of the histograms of Y's residual to HR, in bins one level wide from -64 to 64.

    Args:
        image: "B 3 H W" in [-1, 1]. captured, hr: "1 3 H W", the same scene.

    Returns:
        "B" float64, 0 for equal histograms. Each bin counts one more than it holds.
    """
    base = shaved_luma(hr, 1)
    p, q = (_histogram(shaved_luma(lr, 1) - base) for lr in (captured, image))
    return (p * (p / q).log()).sum(1)


def _histogram(residual: Tensor) -> Tensor:
    bins = residual.round().clamp(-REACH, REACH).long().flatten(1) + REACH
    counts = torch.stack([torch.bincount(row, minlength=2 * REACH + 1) for row in bins]).double() + 1
    return counts / counts.sum(1, keepdim=True)


def _blocks(image: Tensor) -> Tensor:
    """Y in whole blocks, "B 3 H W" -> "B N 16 16"."""
    return shaved_luma(image, BLOCK).unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK).flatten(1, 2)


def _off_plane(blocks: Tensor) -> Tensor:
    """Each "16 16" block of "... 16 16" less the plane that fits it best."""
    line = torch.arange(BLOCK, dtype=blocks.dtype, device=blocks.device) - (BLOCK - 1) / 2
    line = line / line.norm() / BLOCK**0.5  # its product with ones(16) has norm 1
    down = (blocks * line[:, None]).sum((-2, -1), keepdim=True) * line[:, None]
    across = (blocks * line).sum((-2, -1), keepdim=True) * line
    return blocks - blocks.mean((-2, -1), keepdim=True) - down - across
