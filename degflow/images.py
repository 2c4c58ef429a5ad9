"""Image bytes <-> uint8 pixels <-> float tensors, and the rule for which images are accepted.

`decode` applies the rule in this order:

1. JPEG, PNG, WebP and TIFF are recognised by their first bytes, not by the file's name. Of several frames or pages the
   first is read (an animated PNG's default image; an animated WebP's first frame on a transparent canvas). Bytes after
   the image are ignored.
2. An image has at most `max_pixels` pixels (by its header, before any data is decompressed), and at least 8 x 8. A file
   has at most 16 bytes for each of `max_pixels`, or 256 MiB.
3. Data that ends early or cannot be decompressed is refused. So is a file that costs far more to read than its pixels:
   a JPEG of more than 100 scans, a PNG with more than 1 MiB in one compressed text or 64 MiB in all texts, a TIFF whose
   strips overlap. Some damage cannot be detected and stays in the pixels: errors inside JPEG and fax data, and rows
   missing at the end of a PNG, which become black.
4. The orientation in EXIF is applied, or XMP's if EXIF has none; unreadable EXIF is ignored.
5. 16-bit gray becomes 8-bit by round(x / 257). Of 16 bits in colour or with an alpha channel, Pillow reads the upper 8:
   floor(x / 256). Other depths above 8 bits, signed and floating-point pixels have no agreed white, and are refused.
6. An embedded ICC profile is converted to sRGB (perceptual intent). It is ignored if it is unreadable, or for another
   kind of colour than the image's. Without a profile, values are read as sRGB (PNG's gAMA and cHRM are ignored), CIELAB
   with white D50, and CMYK as Pillow's plain complement (inverted in a JPEG, as Adobe stores it).
7. Transparency (an alpha channel, a transparent colour or palette entry) is composited over white. Of 16-bit colours,
   all with the upper bytes of the transparent one count as it.
8. Gray and palette images become RGB.

Memory: at most 20 bytes for each pixel in the header plus 2 for each byte of the file, so 4 GB for the largest image of
the default `max_pixels`. Time is linear in both.

degflow uses this rule wherever it reads an image: in training, in synthesis and in the readers of a finished dataset.
"""

import contextlib
import ctypes
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

if TYPE_CHECKING:  # torch takes seconds to import, and decoding and encoding do not need it
    import torch
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
SMALLEST_SIDE = 8
CODECS = ("png", "webp")  # of what `encode` makes
MAX_PIXELS = 200_000_000
GRAY = ("camera", "keep")  # what an LR image of a gray photograph has: a colour camera's slight colour, or none
_PNG = b"\x89PNG\r\n\x1a\n"
_WEBP_SIDE = 16383  # pixels of a WebP's longest side, by its format
_MAX_SCANS = 100  # as libtiff
_MAX_EXIF_PARTS = 64  # of 64 KiB; Pillow joins them in quadratic time
_MAX_PLANES = 6  # samples per pixel, as Pillow; a TIFF may store each as a plane
_ANY_FILE = 1 << 28  # bytes that any file may have, even if max_pixels is small
_BAND = 1 << 20  # pixels converted to sRGB at a time
_ORIENTATION = 274  # EXIF tag; 1 is upright
_UPRIGHT = {  # steps through rows and columns, and whether to transpose then
    2: (1, -1, False),
    3: (-1, -1, False),
    4: (-1, 1, False),
    5: (1, 1, True),
    6: (-1, 1, True),
    7: (-1, -1, True),
    8: (1, -1, True),
}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT, _WHITE_IS_ZERO = 258, 262, 322, 323, 0
_TIFF_NEEDED = (256, 257, 273, 320, 324)  # tags that Pillow cannot do without
_PILLOW = r"PIL\."  # the modules whose warnings are hidden
_CODES = {-1: "more data than pixels", -2: "broken data", -8: "a compression that Pillow lacks", -9: "absurd sizes"}


class ImageError(ValueError):
    """The rule does not accept the bytes; the message says why."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file under the module's rule.

    Args:
        data: a whole JPEG, PNG, WebP or TIFF file.
        max_pixels: the largest accepted height x width.

    Returns:
        uint8 array "H W 3", sRGB.

    Raises:
        ImageError: not an accepted image; damaged; too large or too small.
        RuntimeError: Pillow is set to accept truncated images, which would be used without notice.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: cut-off files would be read as whole ones")
    if not data:
        raise ImageError("empty file")
    check_bytes(len(data), max_pixels)
    reader = _reader(data[:12])
    _silence()
    try:
        with reader(data, max_pixels) as image:
            return from_picture(image, max_pixels=max_pixels)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, ... on damage
        raise ImageError(f"damaged image: {_in_words(error)}") from error


def decoding_memory(data: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Bytes of memory that `decode` takes at most, by the file's header; no pixel is decompressed."""
    height, width = size_of(data, max_pixels=max_pixels)
    pixels = height * width
    return bytes_to_decode(pixels if pixels <= max_pixels else 0, len(data))


def size_of(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width as stored, by the header of a file, whose beginning may do; (0, 0): `decode` will say why."""
    _silence()
    try:
        with _reader(data[:12])(data, max_pixels) as image:
            return image.height, image.width
    except Exception:  # Pillow's readers raise many kinds of errors
        return 0, 0


def bytes_to_decode(pixels: int, size: int) -> int:
    """The module's bound on the memory that decoding takes, for so many pixels in a file of `size` bytes."""
    return 20 * pixels + 2 * size


def from_picture(picture: Image.Image, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Apply the module's rule to an opened PIL image, from step 2 on; see `decode`."""
    check_size(picture.height, picture.width, max_pixels)
    tags = picture.tag_v2 if isinstance(picture, TiffImageFile) else {}
    if isinstance(picture, PngImageFile):
        _mend_transparency(picture)
    picture.load()
    if picture.mode in ("P", "PA") and not picture.getpalette():
        raise ImageError("damaged image: indices into a missing palette")
    orientation = _orientation(picture)
    width, height = picture.size
    pixels, rows = np.empty((height, width, 3), np.uint8), max(1, _BAND // width)
    to_srgb = _Conversion(picture.info.get("icc_profile"), tags)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        # Like a crop, which Pillow's global size limit would refuse.
        band = picture.resize((width, bottom - top), Image.Resampling.NEAREST, (0, top, width, bottom))
        pixels[top:bottom] = to_srgb(band)
    down, right, swapped = _UPRIGHT.get(orientation, (1, 1, False))
    pixels = pixels[::down, ::right]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if swapped else pixels)


def check_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError if the rule does not accept the size."""
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} is {height * width} pixels, more than max_pixels={max_pixels}")
    if min(height, width) < SMALLEST_SIDE:
        raise ImageError(f"{width} x {height} pixels: each side must have at least {SMALLEST_SIDE}")


def check_bytes(size: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError if the rule does not accept a file of so many bytes; such a file need not be read."""
    if size > (most := most_bytes(max_pixels)):
        raise ImageError(f"{size} bytes, more than the {most} that max_pixels={max_pixels} allows")


def most_bytes(max_pixels: int = MAX_PIXELS) -> int:
    """The size of the largest file that the rule accepts."""
    return max(_ANY_FILE, 16 * max_pixels)


def _reader(start: bytes) -> Callable[[bytes, int], ImageFile.ImageFile]:
    """The function that opens a file with these first 12 bytes; Image.open would apply Pillow's global size limit."""
    if start.startswith(b"\xff\xd8\xff"):
        return _open_jpeg
    if is_png(start):
        return _open_png
    if start.startswith(b"RIFF") and start.endswith(b"WEBP"):
        return _open_webp
    if start.startswith(b"MM\0+"):
        raise ImageError("a big-endian BigTIFF, which Pillow does not read")
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0")):
        return _open_tiff
    raise ImageError(f"not a JPEG, PNG, WebP or TIFF file (it starts with {start!r})")


def _open_png(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    return PngImageFile(io.BytesIO(data))


def _mend_transparency(image: PngImageFile) -> None:
    """Bring a transparent colour (tRNS) to 8 bits, as Pillow does with the pixels; before they are loaded."""
    mode, clear = image.tile[0][3] if image.tile else "", image.info.get("transparency")
    if isinstance(clear, tuple) and mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif isinstance(clear, int) and image.mode == "L" and mode in ("L;2", "L;4"):
        image.info["transparency"] = clear * 255 // (2 ** int(mode[-1]) - 1)


def _open_jpeg(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    if data.count(b"\xff\xda") > _MAX_SCANS or data.count(b"Exif\0\0") > _MAX_EXIF_PARTS:
        scans, parts = _scans_and_exif_parts(data)
        if scans > _MAX_SCANS:
            raise ImageError(f"a JPEG of {scans} scans, more than the accepted {_MAX_SCANS}")
        if parts > _MAX_EXIF_PARTS:
            raise ImageError(f"EXIF in {parts} parts, more than the accepted {_MAX_EXIF_PARTS}")
    return JpegImageFile(io.BytesIO(data))


def _scans_and_exif_parts(data: bytes) -> tuple[int, int]:
    """Numbers of scans and EXIF parts of a JPEG's main image, without those of thumbnails and of bytes after it."""
    marker = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)
    at, scans, parts = 2, 0, 0
    while (found := marker.search(data, at)) and found[1] != b"\xd9":
        at = found.end()
        scans += found[1] == b"\xda"
        parts += found[1] == b"\xe1" and data[at + 2 : at + 8] == b"Exif\0\0"
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return scans, parts


class _UnsizedBytes(io.BytesIO):
    """Gives Pillow's WebP reader a header without the size, so that it does not apply its global size limit."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(16, -1 if size is None else size))


def _open_webp(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    kind, header = data[12:16], data[20:30]  # Pillow allocates the canvas before it gives the size
    if len(header) == 10 and kind == b"VP8X":
        width, height = (1 + int.from_bytes(header[at : at + 3], "little") for at in (4, 7))
    elif len(header) == 10 and kind == b"VP8L":
        bits = int.from_bytes(header[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif len(header) == 10 and kind == b"VP8 ":
        width, height = (int.from_bytes(header[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    else:
        raise ImageError("damaged image: no WebP header")
    check_size(height, width, max_pixels)
    return WebPImageFile(_UnsizedBytes(data))


class _Tiff(TiffImageFile):
    def load_prepare(self) -> None:
        if self._im is None:  # otherwise Pillow applies its global size limit
            self.im = Image.core.new(self.mode, self._tile_size)
        super().load_prepare()


def _open_tiff(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    image = _Tiff(io.BytesIO(data))
    check_size(image.height, image.width, max_pixels)
    tile = image.tag_v2.get(_TIFF_TILE_HEIGHT, 0), image.tag_v2.get(_TIFF_TILE_WIDTH, 0)
    if all(isinstance(side, int) for side in tile) and tile[0] * tile[1] > max_pixels:
        raise ImageError(f"TIFF tiles of {tile[1]} x {tile[0]} pixels, more than max_pixels={max_pixels}")
    boxes = [piece.extents for piece in image.tile if piece.extents]
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    if covered > _MAX_PLANES * image.width * image.height:
        raise ImageError(f"damaged image: {len(boxes)} TIFF strips or tiles cover the image more than once")
    return image


def _silence() -> None:
    """Keep Pillow's and libtiff's messages about damage off stderr; real failures are raised.

    Python's warning filters apply to the whole process (a temporary filter is not thread-safe). So after the first
    decoded image, Pillow's UserWarnings are hidden everywhere. The filter is set again if other filters came later: one
    that turns warnings into errors would change which images are accepted.
    """
    if not warnings.filters or getattr(warnings.filters[0][3], "pattern", None) != _PILLOW:
        warnings.filterwarnings("ignore", category=UserWarning, module=_PILLOW)
    _silence_libraries()


@functools.cache
def _silence_libraries() -> None:
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with contextlib.suppress(AttributeError, OSError):  # libtiff stays loud if the system hides its symbols
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if code := re.fullmatch(r"decoder error (-\d+)", text):
        return _CODES.get(int(code[1]), text)
    if isinstance(error, SyntaxError) and text.isdigit():  # a KeyError of Pillow's TIFF reader
        return f"no TIFF tag {text}" if int(text) in _TIFF_NEEDED else f"unknown TIFF compression {text}"
    if text == "not identified by this driver":
        return "the header gives no size or no kind of pixels"
    words = f"{type(error).__name__}: {text}".rstrip(": ")
    said = isinstance(error, OSError | ValueError) or (isinstance(error, SyntaxError) and not error.__cause__)
    return words if said else f"Pillow cannot read it ({words})"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises many kinds of errors
        return 1


class _Conversion:
    """Loaded pixels of a file, a band of rows at a time -> sRGB over white."""

    def __init__(self, profile: bytes | None, tags: Mapping[int, Any]):
        self.profile, self.tags = profile, tags
        self.transform: ImageCms.ImageCmsTransform | None = None

    def __call__(self, band: Image.Image) -> np.ndarray:
        if band.mode.startswith(("I", "F")):
            band = _to_8_bits(band, self.tags)
        colour, alpha = _split_alpha(band)
        colour = self._apply_profile(colour).convert("RGB")
        if alpha:
            over = Image.new("RGB", colour.size, "white")
            over.paste(colour, mask=alpha)
            colour = over
        return np.asarray(colour)

    def _apply_profile(self, colour: Image.Image) -> Image.Image:
        if not self.profile:
            return colour
        try:
            if not self.transform:
                source = ImageCms.ImageCmsProfile(io.BytesIO(self.profile))
                srgb = ImageCms.createProfile("sRGB")
                self.transform = ImageCms.buildTransform(source, srgb, colour.mode, "RGB")
            return ImageCms.applyTransform(colour, self.transform) or colour
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            self.profile = None
            return colour


def _to_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    bits = tags.get(_TIFF_BITS, (0,))[0]
    if not image.mode.startswith("I;16") or bits not in (0, 16):
        mode = f"pixel mode {image.mode}" + f", {bits} bits" * bool(bits)
        raise ImageError(f"{mode}: above 8 bits only unsigned 16-bit images are accepted")
    wide = np.asarray(image).astype(np.uint32)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        wide = 65535 - wide
    gray = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        gray.putalpha(Image.fromarray(np.where(wide == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours as gray, RGB or CMYK, and the alpha channel if there is one."""
    if image.mode == "La":  # Pillow converts it to this one only
        image = image.convert("LA")
    model = {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if not image.has_transparency_data:
        return image.convert(model), None
    image = image.convert("RGBA")
    return image.convert(model), image.getchannel("A")


def encode_png(pixels: np.ndarray, compress_level: int = 3) -> bytes:
    """Encode uint8 "H W 3" as PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def encode(pixels: np.ndarray, codec: str) -> tuple[bytes, str]:
    """Encode uint8 "H W 3" without loss.

    Args:
        pixels: the image.
        codec: one of CODECS. A WebP file holds at most 16383 pixels a side: a larger image becomes a PNG.

    Returns:
        The file's bytes, and what they are: "png" or "webp".
    """
    if codec == "png" or max(pixels.shape[:2]) > _WEBP_SIDE:
        return encode_png(pixels), "png"
    buffer = io.BytesIO()
    # Of lossless WebP, quality and method are the effort: these are the quickest (docs/speed.md).
    Image.fromarray(pixels).save(buffer, "WebP", lossless=True, quality=0, method=0)
    return buffer.getvalue(), "webp"


def is_png(data: bytes) -> bool:
    """Whether this is a PNG file, by its first bytes."""
    return data.startswith(_PNG)


def decode_encoded(data: bytes) -> np.ndarray:
    """Decode what `encode` made, of any size; returns uint8 "H W 3". Damage raises many kinds of errors."""
    with PngImageFile(io.BytesIO(data)) if is_png(data) else WebPImageFile(_UnsizedBytes(data)) as image:
        return np.asarray(image)


def to_tensor(pixels: np.ndarray, device: "str | torch.device" = "cpu") -> "Tensor":
    """Uint8 "*B H W 3" -> float32 "*B 3 H W" in [-1, 1] on a device; bytes are sent to it, not floats."""
    import torch

    if torch.device(device).type == "cuda":
        pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        np.copyto(pinned.numpy(), pixels)
        image = pinned.to(device, non_blocking=True)
    else:
        image = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    return image.movedim(-1, -3).float() / 127.5 - 1


def to_levels(image: "Tensor") -> "Tensor":
    """Float "*B 3 H W" in [-1, 1] -> uint8 "*B H W 3" on the same device, clamped and rounded to nearest."""
    import torch

    levels = ((image.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(-3, -1).contiguous()


def to_pixels(image: "Tensor") -> np.ndarray:
    """`to_levels`, as an array in the CPU's memory."""
    return to_levels(image).cpu().numpy()


def is_gray(pixels: np.ndarray) -> bool:
    """Whether the three channels of uint8 "H W 3" are equal everywhere."""
    return all(np.array_equal(pixels[..., 0], pixels[..., channel]) for channel in (1, 2))


def to_gray(pixels: np.ndarray) -> np.ndarray:
    """The luma (BT.601) of uint8 "H W 3" in all three channels."""
    return np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 "H W 3" by bicubic interpolation (a = -0.5), antialiased if it shrinks."""
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def shrunk_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """The size of an image shrunk by `scale`: each side divided, rounded to nearest, at least 1."""
    return max(1, round(height / scale)), max(1, round(width / scale))
