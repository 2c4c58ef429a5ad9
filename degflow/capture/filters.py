"""Blur of image tensors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def blur(image: Tensor, sigma: float | Tensor) -> Tensor:
    """Convolve with a Gaussian, mirrored at the borders.

    Args:
        image: "B C H W".
        sigma: standard deviation in pixels, above 0; or one for each image, "B".
    """
    sigmas = torch.as_tensor(sigma, dtype=torch.float64).expand(len(image))
    for axis in (-2, -1):
        reach = min(math.ceil(4 * float(sigmas.max())), image.shape[axis] - 1)
        at = torch.arange(-reach, reach + 1, dtype=torch.float64, device=sigmas.device)
        taps = torch.exp(-0.5 * (at / sigmas[:, None]) ** 2)
        kernel = (taps / taps.sum(1, keepdim=True)).to(image)[:, None, None, :]
        padding = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
        planes = F.pad(image, padding, mode="reflect").transpose(0, 1)  # channels as the batch, images as groups
        kernel = kernel.transpose(-2, -1) if axis == -2 else kernel
        image = F.conv2d(planes, kernel, groups=len(image)).transpose(0, 1)
    return image
