"""What a degrader takes: pictures, batches, scales and seeds. An error names the broken rule and the remedy."""

import math
import operator
import os
import warnings
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from degflow import images
from degflow.storage import split_uri

Picture: TypeAlias = Image.Image | np.ndarray | str | os.PathLike[str]
_SLACK = 1e-3  # by which values may leave [-1, 1]: an eighth of a level of 8 bits
_CALLER = 7  # frames from the warning to the line that calls the degrader


def pixels_of(picture: Picture) -> np.ndarray:
    """A picture under the rule of `images`, uint8 "H W 3"."""
    if isinstance(picture, Image.Image):
        return images.from_picture(picture)
    if isinstance(picture, (str, os.PathLike)):
        place, name = split_uri(os.fspath(picture))
        try:
            return images.decode(place.read(name))
        except images.ImageError as error:
            raise images.ImageError(f"picture={os.fspath(picture)}: {error}") from None
    if not isinstance(picture, np.ndarray):
        rule = "must be a PIL image, a uint8 array or a path (tensors: degrader(hr, scale))"
        raise ValueError(f"picture: {type(picture).__name__}: {rule}")
    if picture.dtype != np.uint8 or picture.shape[2:] not in ((), (3,), (4,)) or picture.ndim < 2:
        advice = ""
        if picture.ndim == 3 and picture.shape[0] == 3 and picture.shape[2] not in (3, 4):
            advice = "; picture.transpose(1, 2, 0) has the channels last"
        elif picture.dtype.kind == "f":
            advice = "; of values in [0, 1] (picture * 255).round().astype('uint8')"
        raise ValueError(f'picture: {picture.dtype} {picture.shape}: must be uint8 "H W 3", "H W 4" or "H W"{advice}')
    return images.from_picture(Image.fromarray(picture))


def scales_of(scale: Tensor | float, count: int) -> Tensor:
    """The scales of `count` images, "B" or "B N"."""
    if not isinstance(scale, Tensor):
        if np.ndim(scale):
            raise ValueError(f'scale={scale}: must be a number, or a tensor "B" or "B N"')
        scale = torch.tensor(scale, dtype=torch.float64)
    if not scale.ndim:
        return scale.expand(count)
    if scale.ndim > 2 or len(scale) != count or not scale.numel():
        rule = f'must be a number, or of shape "B" or "B N" with B={count}, as hr'
        raise ValueError(f"scale: shape {tuple(scale.shape)}: {rule}")
    return scale


def check_batch(hr: Any, weights: Tensor) -> None:
    """Raise ValueError unless `hr` is a batch "B 3 H W" of images, of the type and on the device of the weights.

    No value is read, so a GPU's work goes on.
    """
    if not isinstance(hr, Tensor):
        takes = "degrader.degrade takes pictures, arrays and paths"
        raise ValueError(f'hr: {type(hr).__name__}: must be a tensor "B 3 H W" ({takes})')
    said, kind = f"hr: {hr.dtype} {tuple(hr.shape)}: must be", str(weights.dtype).removeprefix("torch.")
    if hr.dtype != weights.dtype:
        mend = "hr / 127.5 - 1" if hr.dtype == torch.uint8 else f"hr.to(torch.{kind})"
        half = " (precision= computes in half precision)" if hr.dtype in (torch.float16, torch.bfloat16) else ""
        raise ValueError(f"{said} {kind} in [-1, 1]: {mend}{half}")
    if hr.ndim != 4 or hr.shape[1] != 3:
        raise ValueError(f'{said} "B 3 H W"{_mended_shape(hr)}')
    if not len(hr) or min(hr.shape[-2:]) < images.SMALLEST_SIDE:
        raise ValueError(f'{said} "B 3 H W" with B at least 1, H and W at least {images.SMALLEST_SIDE}')
    if hr.device != weights.device:
        there = weights.device
        raise ValueError(f"hr: on {hr.device}: must be where the degrader is, on {there}: hr.to('{there}')")


def _mended_shape(hr: Tensor) -> str:
    if hr.ndim in (3, 4) and hr.shape[-1] == 3:
        return ": hr.movedim(-1, -3) has the channels first" + (", and [None] adds the batch" if hr.ndim == 3 else "")
    if hr.ndim == 3 and hr.shape[0] == 3:
        return ": hr[None] is a batch of one image"
    if hr.ndim == 4 and hr.shape[1] == 1:
        return ": hr.expand(-1, 3, -1, -1) has equal channels"
    return ""


def check_range(low: float, high: float) -> None:
    """Raise ValueError unless [low, high], the range of a batch, lies in [-1, 1]; warn if it lies in [0, 1]."""
    said = f"hr: values from {low:g} to {high:g}"
    if not (low >= -1 - _SLACK and high <= 1 + _SLACK):
        mend = "hr.clamp(-1, 1) cuts them off"
        if low >= 0 and high > 2:
            mend = "hr / 127.5 - 1 for values of 0 to 255"
        elif math.isnan(low):
            mend = "NaN is no colour"
        raise ValueError(f"{said}: must lie in [-1, 1] ({mend})")
    if low >= 0:
        mend = "as of images in [0, 1]; the degrader expects [-1, 1]: hr * 2 - 1"
        warnings.warn(f"{said}, {mend}", stacklevel=_CALLER)


def levels_of(lr: Tensor) -> np.ndarray:
    """An LR image "*B 3 H W" in [-1, 1] -> uint8 "*B H W 3".

    Raises:
        ValueError: it is not finite: by the weights, or as float16 overflows.
    """
    if not bool(lr.isfinite().all()):
        raise ValueError("the LR image is not finite: weights that are not, or precision=float16, which overflows")
    return images.to_pixels(lr)


def seeds_of(seed: int | Tensor, scale: Tensor) -> Tensor:
    """A seed for each scale."""
    if not isinstance(seed, Tensor):
        try:
            seed = operator.index(seed)
        except TypeError:
            raise ValueError(f"seed={seed}: must be a whole number, or an int64 tensor") from None
        if not 0 <= seed <= 2**63 - scale.numel():
            raise ValueError(f"seed={seed}: must lie in [0, 2^63), and so must those of further scales and images")
        return (torch.arange(scale.numel()) + seed).view(scale.shape)
    if seed.dtype != torch.int64 or seed.shape != scale.shape:
        raise ValueError(f"seed: {seed.dtype} {list(seed.shape)}: must be int64 {list(scale.shape)}, as scale is")
    if int(seed.min()) < 0:
        raise ValueError(f"seed={int(seed.min())}: must lie in [0, 2^63)")
    return seed
