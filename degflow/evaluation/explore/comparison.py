"""A window of a photograph, and the four pictures that the page shows of it."""

import base64
import io
import math
import re
import secrets
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from degflow import images
from degflow.capture.filters import blur
from degflow.degrader import Degrader
from degflow.evaluation.baselines import bicubic, fit_sigma
from degflow.evaluation.metrics import luma, psnr
from degflow.evaluation.realism import ROUNDING, SMALLEST, radial_spectrum

SMALLEST_WINDOW = 64  # pixels a side
MARGIN = 32  # pixels around a window that are worked on with it, so that no border is seen in it
KEPT = 3  # photographs; an older one must be opened again
OVERVIEW = 640  # pixels along the longer side


class Box(NamedTuple):
    """A window of a photograph, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, image: Tensor) -> Tensor:
        """The window's part of "... H W", a view."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


class Ask(NamedTuple):
    """What the page asks for: a window around (x, y) of a photograph, and what is drawn of it."""

    photograph: str
    x: float
    y: float
    scale: float
    seed: int
    spread: float


@dataclass(frozen=True)
class Photograph:
    """An opened photograph: its identity, the stem of its file's name, and uint8 "H W 3"."""

    identity: str
    stem: str
    pixels: np.ndarray

    def describe(self) -> dict[str, Any]:
        """What the page needs to know, with a small picture of the whole."""
        height, width = self.pixels.shape[:2]
        shrink = max(1.0, max(height, width) / OVERVIEW)
        small = images.resize(self.pixels, *images.shrunk_size(height, width, shrink))
        return {
            "identity": self.identity,
            "name": self.stem,
            "width": width,
            "height": height,
            "overview": _data_uri(small),
        }


class Picture(NamedTuple):
    """One of the four, "1 3 H W" in [-1, 1], 8-bit levels, with its caption."""

    name: str
    title: str
    caption: str
    image: Tensor


class Explorer:
    """What the page asks for, one question at a time.

    Args:
        degrader: of either kind.
        window: side in pixels of the part of a photograph that is worked on.
        max_pixels: the largest accepted photograph, height x width.
    """

    def __init__(self, degrader: Degrader, window: int, max_pixels: int = images.MAX_PIXELS):
        self.degrader, self.max_pixels = degrader, max_pixels
        self.window = -(-window // degrader.multiple) * degrader.multiple
        self._photographs: dict[str, Photograph] = {}
        self._lock = threading.Lock()

    def about(self) -> dict[str, Any]:
        """The model, the limits, and the photograph that was opened last, or null."""
        last = next(reversed(self._photographs.values()), None)
        return {
            "low": self.degrader.low,
            "high": self.degrader.high,
            "draws": self.degrader.draws,
            "model": self.degrader.sha256[:12],
            "window": self.window,
            "most_bytes": images.most_bytes(self.max_pixels),
            "photograph": last and last.describe(),
        }

    def open(self, data: bytes, name: str) -> dict[str, Any]:
        """Decode an image file and keep it.

        Args:
            data: of the file.
            name: of the file, for the names of downloads.

        Raises:
            ImageError: the rule of `degflow.images` does not accept it.
        """
        with self._lock:
            stem = re.sub(r"[^\w-]+", "_", PurePath(name.replace("\\", "/")).stem)[:60].strip("_") or "photograph"
            photograph = Photograph(secrets.token_urlsafe(12), stem, images.decode(data, max_pixels=self.max_pixels))
            while len(self._photographs) >= KEPT:
                del self._photographs[next(iter(self._photographs))]
            self._photographs[photograph.identity] = photograph
            return photograph.describe()

    def compare(self, ask: Ask) -> dict[str, Any]:
        """The four pictures as the page takes them, with PSNR against HR (of Y, in dB) and spectra (of Y, in dB).

        Raises:
            ValueError: a photograph that is not kept any more, or a scale, seed or spread outside its range.
        """
        started = time.monotonic()
        photograph, box, pictures = self._make(ask)
        hr = pictures[0].image
        return {
            "window": box._asdict(),
            "whole": (box.height, box.width) == photograph.pixels.shape[:2],
            "margin": MARGIN,
            "pictures": [
                {
                    "name": picture.name,
                    "title": picture.title,
                    "caption": picture.caption,
                    "png": _data_uri(images.to_pixels(picture.image)[0]),
                    "psnr": _psnr(picture.image, hr),
                    "spectrum": _spectrum(picture.image),
                }
                for picture in pictures
            ],
            "seconds": round(time.monotonic() - started, 2),
        }

    def pair(self, ask: Ask) -> tuple[str, bytes]:
        """HR and generated LR of the window as PNGs in a zip file: its name, and its bytes.

        Raises:
            ValueError: as `compare`.
        """
        photograph, box, pictures = self._make(ask)
        part = "" if (box.height, box.width) == photograph.pixels.shape[:2] else f"_at{box.left}-{box.top}"
        stem = f"{photograph.stem}{part}_x{ask.scale:g}"
        if self.degrader.draws:
            stem += f"_seed{ask.seed}" + (f"_spread{ask.spread:g}" if ask.spread < 1 else "")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for picture, label in zip(pictures, ("HR", "LR"), strict=False):
                file.writestr(f"{stem}_{label}.png", images.encode_png(images.to_pixels(picture.image)[0]))
        return f"{stem}.zip", buffer.getvalue()

    def _make(self, ask: Ask) -> tuple[Photograph, Box, list[Picture]]:
        with self._lock:
            photograph = self._photographs.get(ask.photograph)
            if not photograph:
                raise ValueError(f"the server keeps {KEPT} photographs, and this one no more: open it again")
            height, width = photograph.pixels.shape[:2]
            box = _window(width, height, ask, self.window)
            step = self.degrader.multiple
            left, top = (max(0, start - MARGIN) // step * step for start in (box.left, box.top))
            right, bottom = (
                -(-(start + length + MARGIN) // step) * step
                for start, length in ((box.left, box.width), (box.top, box.height))
            )
            hr = images.to_tensor(photograph.pixels[top:bottom, left:right])[None]
            inner, place = Box(box.left - left, box.top - top, box.width, box.height), (top, left)
            return photograph, box, [p._replace(image=inner.cut(p.image)) for p in self._pictures(hr, ask, place)]

    def _pictures(self, hr: Tensor, ask: Ask, place: tuple[int, int]) -> list[Picture]:
        device = next(self.degrader.parameters()).device
        how = {"seed": ask.seed, "spread": ask.spread, "place": torch.tensor([place]), "checks_range": False}
        # As "1 N", like `degrade` and synthesize: the published flow's steps differ between "B" and "B N".
        lr = _levels(self.degrader(hr.to(device), _one(ask.scale)[None], **how)[0])
        if not self.degrader.draws:
            kind = "This model draws nothing: every seed gives this picture."
        elif ask.spread == 0:
            kind = "The mean of what the model would draw, so with little noise."
        else:
            kind = f"What the model draws with seed {ask.seed}, as a camera might have taken it."
        return [
            Picture("hr", "HR", "The photograph, unchanged.", hr),
            Picture("lr", f"Generated LR, ×{ask.scale:g}", f"{kind} It keeps HR's size.", lr),
            Picture(
                "bicubic",
                f"Bicubic, ×{ask.scale:g}",
                f"HR shrunk by {ask.scale:g} and enlarged again, as usual where no camera is modelled.",
                bicubic(hr, ask.scale),
            ),
            self._plain(hr, lr, ask.scale),
        ]

    def _plain(self, hr: Tensor, lr: Tensor, scale: float) -> Picture:
        """The blur without anything else: the model's own optics, or a Gaussian that is made like LR."""
        if self.degrader.draws:
            image = self.degrader.flow.guide(hr.to(next(self.degrader.parameters()).device), _one(scale))
            caption = "HR through the model's lens for this scale: blur without noise. The draw starts from it."
            return Picture("plain", f"Optics alone, ×{scale:g}", caption, _levels(image))
        sigma = fit_sigma([(luma(hr)[:, None].float(), luma(lr)[:, None].float())], 4 * max(1.0, scale))
        caption = f"HR blurred by the Gaussian that is most like the generated LR here: sigma {sigma:.2f} pixels."
        return Picture("plain", "Gaussian blur", caption, _levels(blur(hr, sigma)))


def _window(width: int, height: int, ask: Ask, side: int) -> Box:
    """The window around the point that is asked for, inside the image."""
    (left, across), (top, down) = _span(width, ask.x, side), _span(height, ask.y, side)
    return Box(left, top, across, down)


def _span(size: int, centre: float, window: int) -> tuple[int, int]:
    """Start and length of the window along a side: around the centre, inside the image."""
    length = min(window, size)
    return round(min(max(centre - length / 2, 0), size - length)), length


def _one(scale: float) -> Tensor:
    return torch.tensor([scale], dtype=torch.float64)


def _levels(image: Tensor) -> Tensor:
    """Rounded to 8-bit levels, as it is shown and stored."""
    return images.to_tensor(images.to_pixels(image))


def _psnr(image: Tensor, hr: Tensor) -> float | None:
    if min(hr.shape[-2:]) < SMALLEST or torch.equal(image, hr):
        return None
    value = float(psnr(image, hr))  # infinite, if only the borders differ, which it leaves out
    return round(value, 2) if math.isfinite(value) else None


def _spectrum(image: Tensor) -> list[float] | None:
    """Power per ring in dB; null where the window is too small."""
    if min(image.shape[-2:]) < SMALLEST:
        return None
    return [round(value, 2) for value in (10 * torch.log10(radial_spectrum(image)[0] + ROUNDING)).tolist()]


def _data_uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(images.encode_png(pixels, compress_level=1)).decode()
