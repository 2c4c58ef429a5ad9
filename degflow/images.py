"""Image bytes <-> uint8 pixels <-> float tensors, and the written rule for what is accepted.

The rule, applied by `decode` in this order:

1. JPEG, PNG, WebP and TIFF, whatever the file's name says; of several frames or pages the first.
2. At most `max_pixels` pixels (read from the header, before anything is decompressed) and at least 8 x 8.
3. The EXIF orientation is applied.
4. 16-bit gray becomes 8-bit by round(x / 257); 16-bit RGB is read by Pillow as the upper 8 bits. Floating-point images
   and integers beyond 16 bits have no agreed white and are refused.
5. An embedded ICC profile is converted to sRGB (perceptual intent); an unreadable one is ignored. Without a profile
   the values are taken as sRGB, and CMYK as Pillow's plain complement.
6. Transparency (an alpha channel or a transparent palette entry) is composited over white.
7. Gray and palette become RGB.

The same rule is used wherever degflow reads an image: training, synthesis and the readers of a finished dataset.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
SMALLEST_SIDE = 8
MAX_PIXELS = 200_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")

# degflow checks the header's size itself, with a limit that the user sets.
Image.MAX_IMAGE_PIXELS = None


class ImageError(ValueError):
    """The bytes are no image that the rule accepts; the message says why."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file under the module's rule.

    Args:
        data: a whole JPEG, PNG, WebP or TIFF file.
        max_pixels: the largest accepted height x width.

    Returns:
        uint8 array "H W 3", sRGB.

    Raises:
        ImageError: not an accepted image; damaged; too large or too small.
    """
    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            check_size(image.height, image.width, max_pixels)
            return np.array(_to_srgb(image))
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not a JPEG, PNG, WebP or TIFF file (it starts with {data[:12]!r})") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, ... on damage
        raise ImageError(f"damaged image: {type(error).__name__}: {error}") from error


def check_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError unless the size lies within the rule."""
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} is {height * width} pixels, more than max_pixels={max_pixels}")
    if min(height, width) < SMALLEST_SIDE:
        raise ImageError(f"{width} x {height} pixels: each side must have at least {SMALLEST_SIDE}")


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG" and np.asarray(image).max() > 65535):
        raise ImageError(f"pixel mode {image.mode}: floating-point and 32-bit images are not accepted")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode == "LA" or image.mode == "La":
        image = image.convert("RGBA")
    elif image.mode in ("P", "PA", "1", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if profile:
        image = _apply_profile(image, profile)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    target = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=target)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted or image


def encode_png(pixels: np.ndarray, compress_level: int = 3) -> bytes:
    """Encode uint8 "H W 3" as PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Uint8 "*B H W 3" -> float32 "*B 3 H W" in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3).float() / 127.5 - 1


def to_pixels(image: Tensor) -> np.ndarray:
    """Float "*B 3 H W" in [-1, 1] -> uint8 "*B H W 3", clamped and rounded to nearest."""
    levels = ((image.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 "H W 3" by bicubic interpolation (a = -0.5), antialiased when it shrinks."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def shrunk_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size of an image shrunk by `scale`: each side divided, rounded to nearest, at least 1."""
    return max(1, round(height / scale)), max(1, round(width / scale))
