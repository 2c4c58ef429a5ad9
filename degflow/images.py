"""Image bytes <-> uint8 pixels <-> float tensors, and the written rule for what is accepted.

The rule, applied by `decode` in this order:

1. JPEG, PNG, WebP and TIFF by their first bytes, whatever the file's name says; of several frames or pages the first.
2. At most `max_pixels` pixels (read from the header, before anything is decompressed) and at least 8 x 8.
3. The EXIF orientation is applied; unreadable EXIF is ignored.
4. 16-bit gray becomes 8-bit by round(x / 257). Of 16 bits in colour or beside an alpha channel Pillow reads the upper
   8, floor(x / 256). Other depths beyond 8 bits, signed and floating-point ones have no agreed white and are refused.
5. An embedded ICC profile is converted to sRGB (perceptual intent); one that is unreadable or of another kind of colour
   than the image is ignored. Without a profile the values are taken as sRGB, and CMYK as Pillow's plain complement
   (in a JPEG inverted, as Adobe stores it).
6. Transparency (an alpha channel, a transparent colour or palette entry) is composited over white.
7. Gray and palette become RGB.

The same rule is used wherever degflow reads an image: training, synthesis and the readers of a finished dataset.
"""

import io
import logging
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
SMALLEST_SIDE = 8
MAX_PIXELS = 200_000_000
_ORIENTATION = 274  # EXIF tag; 1 is upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

# What Pillow has to say about damaged metadata concerns nobody who reads pixels; a filter set here, not around each
# call, because entering and leaving one is not thread-safe.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


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
    reader = _reader(data[:12])
    try:
        # The format's own class: Image.open would hold its global limit against an image that max_pixels allows.
        with reader(io.BytesIO(data)) as image:
            return from_picture(image, max_pixels=max_pixels)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, ... on damage
        raise ImageError(f"damaged image: {type(error).__name__}: {error}") from error


def from_picture(picture: Image.Image, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bring an opened PIL image under the module's rule; as `decode`, from step 2 on."""
    check_size(picture.height, picture.width, max_pixels)
    return np.array(_to_srgb(picture))


def _reader(start: bytes) -> type[ImageFile]:
    """Pillow's class for a file that starts with these 12 bytes."""
    if start.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if start.startswith(b"RIFF") and start.endswith(b"WEBP"):
        return WebPImageFile
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return TiffImageFile
    raise ImageError(f"not a JPEG, PNG, WebP or TIFF file (it starts with {start!r})")


def check_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError unless the size lies within the rule."""
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} is {height * width} pixels, more than max_pixels={max_pixels}")
    if min(height, width) < SMALLEST_SIDE:
        raise ImageError(f"{width} x {height} pixels: each side must have at least {SMALLEST_SIDE}")


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    upright = _upright(image)
    if upright.mode.startswith(("I", "F")):
        upright = _to_8_bits(upright, image)
    colour, alpha = _split_alpha(upright)
    if profile:
        colour = _apply_profile(colour, profile)
    colour = colour.convert("RGB")
    return Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha) if alpha else colour


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises whatever the damage leads to
        return image
    return image if method is None else image.transpose(method)


def _to_8_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    tags = file.tag_v2 if isinstance(file, TiffImageFile) else {}
    bits = tags.get(_TIFF_BITS, (16,))[0]
    if not image.mode.startswith("I;16") or bits != 16:
        raise ImageError(f"pixel mode {image.mode}, {bits} bits: above 8 bits only unsigned 16-bit images are accepted")
    wide = np.asarray(image).astype(np.uint32)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        wide = 65535 - wide
    gray = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        gray.putalpha(Image.fromarray(np.where(wide == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours as gray, RGB or CMYK, and the alpha channel where there is one."""
    model = {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if not image.has_transparency_data:
        return image.convert(model), None
    image = image.convert("RGBA")
    return image.convert(model), image.getchannel("A")


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted or image


def encode_png(pixels: np.ndarray, compress_level: int = 3) -> bytes:
    """Encode uint8 "H W 3" as PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Uint8 "*B H W 3" -> float32 "*B 3 H W" in [-1, 1]."""
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).movedim(-1, -3).float() / 127.5 - 1


def to_pixels(image: Tensor) -> np.ndarray:
    """Float "*B 3 H W" in [-1, 1] -> uint8 "*B H W 3", clamped and rounded to nearest."""
    levels = ((image.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 "H W 3" by bicubic interpolation (a = -0.5), antialiased when it shrinks."""
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def shrunk_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size of an image shrunk by `scale`: each side divided, rounded to nearest, at least 1."""
    return max(1, round(height / scale)), max(1, round(width / scale))
