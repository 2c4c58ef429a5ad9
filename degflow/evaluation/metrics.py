"""PSNR and SSIM under the published protocol: Y of BT.601 in 16..235, 4 pixels shaved, data range 255, float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

SHAVE = 4


def luma(image: Tensor) -> Tensor:
    """Y of ITU-R BT.601: "B 3 H W" in [-1, 1] -> "B H W" float64 in 16..235."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=image.device)
    return 16 + torch.einsum("c,bchw->bhw", weights, (image.double() + 1) / 2)


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, "B 3 H W" twice -> "B" float64; inf for equal images."""
    a, b = _shaved(image, reference, 1)
    return 10 * torch.log10(255**2 / (a - b).square().mean((1, 2)))


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, uniform 7 x 7 window), "B 3 H W" twice -> "B" float64."""
    a, b = (part[:, None] for part in _shaved(image, reference, 7))
    mean_a, mean_b = F.avg_pool2d(a, 7, 1), F.avg_pool2d(b, 7, 1)
    unbiased = 49 / 48
    var_a = unbiased * (F.avg_pool2d(a * a, 7, 1) - mean_a**2)
    var_b = unbiased * (F.avg_pool2d(b * b, 7, 1) - mean_b**2)
    cov = unbiased * (F.avg_pool2d(a * b, 7, 1) - mean_a * mean_b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean((1, 2, 3))


def shaved_luma(image: Tensor, smallest: int) -> Tensor:
    """Y without its border, "B 3 H W" -> "B H-8 W-8".

    Raises:
        ValueError: a side has fewer than `smallest` pixels left.
    """
    if min(image.shape[-2:]) < 2 * SHAVE + smallest:
        raise ValueError(
            f"image {tuple(image.shape)}: sides must be at least {2 * SHAVE + smallest} "
            f"({SHAVE} pixels are shaved from each border)"
        )
    return luma(image)[:, SHAVE:-SHAVE, SHAVE:-SHAVE]


def _shaved(image: Tensor, reference: Tensor, smallest: int) -> tuple[Tensor, Tensor]:
    if image.shape != reference.shape:
        raise ValueError(f"image {tuple(image.shape)} and reference {tuple(reference.shape)}: must have one shape")
    return shaved_luma(image, smallest), shaved_luma(reference, smallest)
