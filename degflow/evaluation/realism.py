"""What PSNR does not measure in a generated LR image: its spectrum, its noise, and its residual to HR.

All measures use Y in 16..235 with 4 pixels shaved, as PSNR does, and compare with the captured LR of the same scene:

- `spectrum_distance`: the absolute difference in dB of the mean power (Hann window), averaged over 32 rings of radial
  frequency from 0 to 0.5 cycles per pixel.
- `noise`: in the flattest blocks of the scene, a plane is fitted and subtracted; the standard deviation and the lag-1
  autocorrelation of the rest. In a scene without flat blocks this includes texture, in both images alike.
- `residual_divergence`: KL divergence in nats of the histograms of LR - HR, from captured to generated: the marginal KL
  divergence of camera noise models (Abdelhamed et al., "Noise Flow", ICCV 2019), with one added to each count as in
  Kousha et al., "Modeling sRGB camera noise with normalizing flows", CVPR 2022.
"""

import torch
from torch import Tensor

from degflow.evaluation.metrics import shaved_luma

RINGS = 32
BLOCK = 16  # pixels a side: 4 x 4 sensor pixels at x4
SMALLEST = BLOCK + 8  # smallest side of an image, with the shaved borders
FLAT = 0.05  # share of the blocks
REACH = 64  # largest residual of the histogram, in levels; larger ones count in its first and last bin
# Y's variance from rounding R, G and B to 8 bits; added to the power, so that smaller differences hardly count.
ROUNDING = (65.481**2 + 128.553**2 + 24.966**2) / 255**2 / 12


def radial_spectrum(image: Tensor) -> Tensor:
    """Mean power of Y per ring of radial frequency, "B 3 H W" in [-1, 1] -> "B R" float64.

    For white noise each value is its variance. R is 32, or half the shorter shaved side if that is less. Ring n is
    from n / 2R to (n + 1) / 2R cycles per pixel; frequencies above 0.5 (the corners) are left out.
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
    """Indices of the flattest 16 x 16 blocks of "1 3 H W": the 5%, at least 4, with the least texture.

    Texture is the variance of the HR image after a fitted plane is subtracted. Noise differs between LR and HR, so the
    choice does not favour blocks where LR's noise happens to be low (for HR itself it does).

    Args:
        hr: "1 3 H W" in [-1, 1].
        low, high: mean brightness of the blocks that count, black 0 to white 1; noise is clipped near either end. With
            the defaults the other blocks come last; with others they do not count, and there may be none.
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
        level: "B" float64, standard deviation in levels of Y, median of the blocks.
        correlation: "B" float64, autocorrelation of neighbours, right and below, median of the blocks. White noise has
            -0.01 (because of the plane), noise interpolated to a finer grid nearly 1, no noise NaN.
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
        "B" float64, 0 for equal histograms. One is added to the count of each bin.
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
    """Subtract from each "16 16" block of "... 16 16" its best-fitting plane."""
    line = torch.arange(BLOCK, dtype=blocks.dtype, device=blocks.device) - (BLOCK - 1) / 2
    line = line / line.norm() / BLOCK**0.5  # its product with ones(16) has norm 1
    down = (blocks * line[:, None]).sum((-2, -1), keepdim=True) * line[:, None]
    across = (blocks * line).sum((-2, -1), keepdim=True) * line
    return blocks - blocks.mean((-2, -1), keepdim=True) - down - across
