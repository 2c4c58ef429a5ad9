"""Bad and odd files, made in code, each with the outcome under the rule of `degflow.images`.

The first part builds files, with Pillow's writers or byte by byte; `oddities` is the corpus.
"""

import gzip
import io
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

PNG = b"\x89PNG\r\n\x1a\n"
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))  # red, green, blue
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # XYZ at D50
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
D50 = (0.9642, 1.0, 0.8249)


class Oddity(NamedTuple):
    """A file and its outcome: pixels, to within a tolerance, or a pattern of the reason why it is refused."""

    name: str
    data: bytes
    expected: np.ndarray | str
    tolerance: float = 0


# Builders


def noise(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height=24, width=32):
    """A picture that JPEG changes by a few levels only."""
    down, right = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    planes = (40 + 180 * down + 0 * right, 60 + 120 * right + 0 * down, 200 - 90 * down - 60 * right)
    return np.dstack(planes).round().astype(np.uint8)


def file(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(height, width, depth, colour, rows, extra=b"", interlace=0):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return PNG + header + extra + body + chunk(b"IEND", b"")


def tiff(width, height, bits, photometric, data, tags=None, *, big=False, following=0):
    """A little-endian TIFF (or BigTIFF) of one page; `tags` are added, replaced or, if None, left out."""
    start, number, field = (16, "Q", 8) if big else (8, "I", 4)
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: start, 277: 1, 278: height}
    fields |= {279: len(data)} | (tags or {})
    lists = {tag: value if isinstance(value, tuple) else (value,) for tag, value in fields.items() if value is not None}
    at = start + len(data)
    end = at + (16 + 20 * len(lists) if big else 6 + 12 * len(lists))
    entries, beyond = b"", b""
    for tag, values in sorted(lists.items()):
        value = struct.pack(f"<{len(values)}I", *values)
        if len(value) > field:
            beyond, value = beyond + value, struct.pack(f"<{number}", end + len(beyond))
        entries += struct.pack(f"<HH{number}", tag, 4, len(values)) + value.ljust(field, b"\0")
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", at) if big else b"II*\0" + struct.pack("<I", at)
    count = struct.pack("<Q" if big else "<H", len(lists))
    return head + data + count + entries + struct.pack(f"<{number}", following) + beyond


def segment(marker, data):
    """A JPEG marker segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(data)) + data


def with_segments(jpeg, *segments):
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def exif(orientation, kind=3):
    """EXIF with an orientation of a TIFF type (3: short)."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 274, kind, 1, orientation) + bytes(4)


def webp(width, height, *chunks, flags=0):
    """An extended WebP (VP8X) with a canvas of any size."""
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, flags) + sizes + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def profile(primaries, gamma, space=b"RGB ", extra=()):
    """An ICC profile: XYZ of the primaries at D50, one gamma for all (563 / 256 = 2.2)."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(256 * gamma), 0)
    tags = [(b"wtpt", xyz(D50)), *extra]
    tags += zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries), strict=False)
    tags += [(name, curve) for name in ((b"rTRC", b"gTRC", b"bTRC") if primaries else (b"kTRC",))]
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags:
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    link = b"Lab " if space == b"CMYK" else b"XYZ "
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s12x4s", size, b"none", 0x02400000, kind, space, link, b"acsp")
    return head.ljust(68, b"\0") + struct.pack(">3i", *(round(65536 * v) for v in D50)).ljust(60, b"\0") + table + body


def grey_ink_profile():
    """A CMYK profile in which every ink is a grey: L = 100 (1 - (C + M + Y) / 3) (1 - K)."""
    grid = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    lab = bytes(v for c, m, y, k in grid for v in (round(255 * (1 - (c + m + y) / 3) * (1 - k)), 128, 128))
    ramp, unit = bytes(range(256)), struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + 4 * ramp + lab + 3 * ramp
    return profile((), 1, b"CMYK", [(b"A2B0", table)])


def encoded(linear):
    """Linear light in [0, 1] -> sRGB levels 0 .. 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def seen_as(pixels, primaries, gamma=563 / 256):
    """Pixels of a colour space in sRGB, by the definitions of both."""
    return encoded((pixels / 255.0) ** gamma @ np.array(primaries) @ np.linalg.inv(SRGB))


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def over_white(colour, alpha):
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


# The corpus


def oddities() -> list[Oddity]:
    """All oddities; each name is one key."""
    parts = (damaged, foreign, bombs, frames, colours, depths, profiles, orientations, sizes, jpegs, pngs, tiffs, names)
    return [Oddity(*fields) for part in parts for fields in part()]


def damaged() -> Iterator[tuple]:
    """Files that end early, or whose bytes were changed."""
    picture, good = smooth(), file(noise())
    yield "empty.png", b"", "^empty file$"
    yield "one byte.jpg", b"\xff", "^not a JPEG, PNG, WebP or TIFF file"
    yield "zeros.tif", bytes(4096), "^not a JPEG, PNG, WebP or TIFF file"
    yield "signature alone.png", PNG, "^damaged image: "
    yield "signature alone.jpg", b"\xff\xd8\xff", "^damaged image: "
    yield "signature alone.webp", b"RIFF\0\0\0\0WEBP", "^damaged image: no WebP header"
    yield "signature alone.tif", b"II*\0", "^damaged image: "
    whole = {
        "png": good,
        "jpg": file(noise(), "JPEG"),
        "progressive.jpg": file(noise(), "JPEG", progressive=True),
        "webp": file(noise(), "WEBP"),
        "lossless.webp": file(noise(), "WEBP", lossless=True),
        "tif": file(noise(), "TIFF"),
        "deflate.tif": file(noise(), "TIFF", compression="tiff_adobe_deflate"),
        "group4.tif": file(Image.fromarray(noise()[..., 0] > 127), "TIFF", compression="group4"),
    }
    for name, data in whole.items():
        for share in (0.3, 0.6, 0.9):
            yield f"{share:.0%} of it.{name}", data[: int(share * len(data))], "^damaged image: "
    at = good.index(b"IDAT")
    yield "wrong checksum of the header.png", good[:29] + b"\0\0\0\0" + good[33:], "^damaged image: .*checksum.*IHDR"
    yield "changed pixels.png", good[: at + 500] + b"\0\0\0\0" + good[at + 504 :], "^damaged image: .*broken data"
    yield "wrong checksum of whole pixels.png", good[:-16] + b"\0\0\0\0" + good[-12:], noise()
    yield "no end.png", good[:-12], noise()
    yield "no pixels.png", png(24, 32, 8, 2, []), "^damaged image: "
    rows = np.where(np.arange(24)[:, None, None] < 12, noise(), 0)
    yield "a whole stream of half the rows.png", png(24, 32, 8, 2, noise()[:12]), rows
    yield "no image data at all.png", good[: at - 4] + good[-12:], "^damaged image: "
    yield "deflate of nonsense.tif", tiff(32, 24, 8, 1, b"nonsense", {259: 8}), "^damaged image: broken data$"
    yield "LZW of nonsense.tif", tiff(32, 24, 8, 1, b"nonsense" * 9, {259: 5}), "^damaged image: broken data$"
    yield "JPEG of nonsense.tif", tiff(32, 24, 8, 1, b"nonsense" * 9, {259: 7}), "^damaged image: broken data$"
    yield "LERC.tif", tiff(32, 24, 8, 1, b"x", {259: 34887}), "^damaged image: unknown TIFF compression 34887$"
    yield "no width.tif", tiff(32, 24, 8, 1, bytes(768), {256: None}), "^damaged image: .*Missing dimensions"
    yield "strips beyond the end.tif", tiff(32, 24, 8, 1, bytes(768), {273: 2**31}), "^damaged image: .*truncated"
    yield "no palette.tif", tiff(32, 24, 8, 3, bytes(768)), "^damaged image: no TIFF tag 320$"
    yield "no strips.tif", tiff(32, 24, 8, 1, bytes(768), {273: None, 279: None}), "^damaged image: "
    yield "nine samples.tif", tiff(32, 24, 8, 1, bytes(768), {277: 9}), "^damaged image: .*samples per pixel"
    yield "no tables.jpg", _without(file(picture, "JPEG"), 0xDB), "^damaged image: "
    yield "no frame.jpg", b"\xff\xd8" + segment(0xFE, b"comment") + b"\xff\xd9", "^damaged image: "


def _without(jpeg, marker):
    at = jpeg.index(bytes([0xFF, marker]))
    end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[:at] + (_without(jpeg[end:], marker) if bytes([0xFF, marker]) in jpeg[end:] else jpeg[end:])


def foreign() -> Iterator[tuple]:
    """Files of other kinds with an image's name, and images with another format's name."""
    other = "^not a JPEG, PNG, WebP or TIFF file"
    yield "text.jpg", b"this is text, not an image\n", other
    yield "page.png", b"<!DOCTYPE html><html><title>403 Forbidden</title></html>", f"{other} .*DOCTYPE"
    yield "denied.jpg", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', f"{other} .*xml"
    yield "drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="24"/>', other
    yield "paper.jpg", b"%PDF-1.7\n%%EOF", other
    yield "photo.heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(99), f"{other} .*ftypheic"
    yield "photo.jxl.jpg", b"\xff\x0a" + bytes(99), other
    yield "photo.jp2.jpg", file(noise(), "JPEG2000"), other
    yield "photo.bmp.png", file(noise(), "BMP"), other
    yield "moving.gif.png", file(noise(), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 24))]), other
    yield "packed.png", gzip.compress(file(noise()), mtime=0), other
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x.png"), None)
    yield "archive.jpg", archive.getvalue(), other
    yield "sound.webp", b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), other
    yield "a PNG.jpg", file(noise()), noise()
    yield "a PNG.TIFF", file(noise(seed=1)), noise(seed=1)
    yield "a TIFF.png", file(noise(), "TIFF"), noise()
    yield "a WebP.jpeg", file(noise(), "WEBP", lossless=True), noise()
    yield "a JPEG.png", file(smooth(), "JPEG", quality=95), smooth(), 12
    yield "a PNG and a page.png", file(noise()) + b"<html>garbage</html>" * 50, noise()
    yield "a JPEG and a ZIP.jpg", file(smooth(), "JPEG", quality=95) + b"PK\x03\x04" + bytes(500), smooth(), 12
    yield "two JPEGs.jpg", file(smooth(), "JPEG", quality=95) + file(noise(), "JPEG"), smooth(), 12
    yield "a TIFF and a page.tif", file(noise(), "TIFF") + b"<html>" * 50, noise()


def bombs() -> Iterator[tuple]:
    """Small files that declare a large size or cost much."""
    large = "^60000 x 60000 is 3600000000 pixels, more than max_pixels=200000000$"
    yield "60000 x 60000.png", png(60000, 60000, 8, 2, []), large
    yield "60000 x 60000.tif", tiff(60000, 60000, 8, 1, bytes(100)), large
    jpeg = bytearray(file(noise(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    yield "60000 x 60000.jpg", bytes(jpeg), large
    lossless = file(noise(), "WEBP", lossless=True)[12:]
    yield "60000 x 60000.webp", webp(60000, 60000, lossless), large
    yield "16777216 x 200.webp", webp(1 << 24, 200, lossless, flags=2), "^16777216 x 200 is .* more than max_pixels"
    header = b"RIFF\x40\0\0\0WEBPVP8L\x20\0\0\0\x2f" + struct.pack("<I", 0x0FFFFFFF) + bytes(30)
    yield "16384 x 16384.webp", header, "^16384 x 16384 is .* more than max_pixels"
    yield "2^31 x 2^31.png", png(2**31 - 1, 2**31 - 1, 8, 2, []), "more than max_pixels"
    yield "2^32 x 2^32.tif", tiff(2**32 - 1, 2**32 - 1, 8, 1, bytes(100)), "more than max_pixels"
    text = b"k\0\0" + zlib.compress(bytes(3 << 20))
    yield "3 MiB in a zTXt.png", png(24, 32, 8, 2, noise(), chunk(b"zTXt", text)), "^damaged image: .*MAX_TEXT_CHUNK"
    text = b"k\0\1\0\0\0" + zlib.compress(bytes(3 << 20))
    yield "3 MiB in an iTXt.png", png(24, 32, 8, 2, noise(), chunk(b"iTXt", text)), "^damaged image: .*MAX_TEXT_CHUNK"
    text = b"k\0\0" + zlib.compress(bytes(3 << 20))
    yield "3 MiB in an iCCP.png", png(24, 32, 8, 2, noise(), chunk(b"iCCP", text)), "^damaged image: .*MAX_TEXT_CHUNK"
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes((1 << 20) - 9)))
    yield "70 MiB of zTXt.png", png(24, 32, 8, 2, noise(), 70 * text), "^damaged image: Value.*Too much memory"
    progressive = file(smooth(), "JPEG", progressive=True)
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    yield (
        "5010 scans.jpg",
        progressive[:-2] + 5000 * last + b"\xff\xd9",
        "^a JPEG of 5010 scans, more than the accepted 100",
    )
    part = segment(0xE1, b"Exif\0\0" + bytes(20))
    yield (
        "EXIF in 5000 parts.jpg",
        with_segments(progressive, *[part] * 5000),
        "^EXIF in 5000 parts, more than the accepted 64",
    )
    twice = {273: (8, 8) * 1000, 279: (768, 768) * 1000, 278: 23}
    yield "2000 strips on one place.tif", tiff(32, 24, 8, 1, bytes(768), twice), "2000 TIFF strips .* more than once"
    tile = {259: 8, 322: 60000, 323: 60000, 324: 8, 325: 99, 273: None, 278: None, 279: None}
    yield "tiles of 60000 x 60000.tif", tiff(32, 24, 8, 1, zlib.compress(bytes(99)), tile), "^TIFF tiles of 60000 x 600"
    rows = {259: 8, 278: 2**31}
    yield "strips of 2^31 rows.tif", tiff(32, 24, 8, 1, zlib.compress(bytes(99)), rows), "^damaged image: "


def frames() -> Iterator[tuple]:
    """Several images in one file: the first is read."""
    first, others = Image.fromarray(noise()), [Image.fromarray(noise(seed=seed)) for seed in (1, 2)]
    yield "animated.png", file(first, save_all=True, append_images=others), noise()
    hidden = file(first, save_all=True, append_images=others, default_image=True)
    yield "animated with another default image.png", hidden, noise()
    yield "animated.webp", file(first, "WEBP", save_all=True, append_images=others, lossless=True), noise()
    yield "pages.tif", file(first, "TIFF", save_all=True, append_images=others), noise()
    pair = file(Image.fromarray(smooth()), "MPO", save_all=True, append_images=others, quality=95)
    yield "stereo.mpo.jpg", pair, smooth(), 12
    again = tiff(32, 24, 8, 1, noise()[..., 0].tobytes(), following=8 + 768)
    yield "the page after the first is the first.tif", again, grey(noise()[..., 0])


def colours() -> Iterator[tuple]:
    """Colour models without a profile, and transparency."""
    colour, alpha = noise(), noise(seed=1)[..., 0]
    ink = np.dstack([noise(seed=2), noise(seed=3)[..., 0] // 2])
    paper = (255.0 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    yield "CMYK.tif", file(Image.fromarray(ink, "CMYK"), "TIFF"), paper, 1
    flat = np.tile(np.array([30, 90, 160, 40], np.uint8), (24, 32, 1))
    mixed = (255.0 - flat[..., :3]) * (255 - flat[..., 3:]) / 255
    yield "CMYK.jpg", file(Image.fromarray(flat, "CMYK"), "JPEG", quality=100), mixed, 3
    yield "YCCK.jpg", *_ycck()
    yield "grey.jpg", file(Image.fromarray(smooth()[..., 0]), "JPEG", quality=98), grey(smooth()[..., 0]), 4
    yield "RGB stored as such.jpg", file(smooth(), "JPEG", quality=98, keep_rgb=True), smooth(), 6
    yield "YCbCr.tif", file(Image.fromarray(smooth()).convert("YCbCr"), "TIFF"), smooth(), 3
    yield "grey.webp", file(Image.fromarray(colour[..., 0]), "WEBP", lossless=True), grey(colour[..., 0])
    both = Image.fromarray(np.dstack([colour, alpha]))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        yield f"alpha.{kind}", file(both, kind, **options), over_white(colour, alpha), 1
    shade = Image.merge("LA", [Image.fromarray(plane) for plane in (colour[..., 0], alpha)])
    yield "grey and alpha.png", file(shade), over_white(grey(colour[..., 0]), alpha), 1
    yield "nothing but transparency.png", file(Image.new("RGBA", (32, 24))), np.full((24, 32, 3), 255)
    indices = np.arange(768, dtype=np.uint8).reshape(24, 32) % 4
    table = np.array([[250, 10, 20], [0, 200, 30], [5, 6, 7], [90, 80, 255]], np.uint8)
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette(table.tobytes())
    picture.frombytes(indices.tobytes())
    yield "palette.png", file(picture), table[indices]
    yield "palette.tif", file(picture, "TIFF"), table[indices]
    faint = np.array([255, 128, 0, 64], np.uint8)
    expected = over_white(table[indices], faint[indices])
    yield "palette and transparency.png", file(picture, transparency=faint.tobytes()), expected, 1
    key = np.where((colour == colour[3, 4]).all(-1, keepdims=True), 255, colour)
    data = png(24, 32, 8, 2, colour, chunk(b"tRNS", struct.pack(">3H", *colour[3, 4].tolist())))
    yield "one transparent colour.png", data, key
    lab = np.tile(np.array([128, 40, 216], np.uint8), (24, 32, 1))  # a = 40, b = -40 in two's complement
    yield "CIELAB.tif", tiff(32, 24, (8, 8, 8), 8, lab.tobytes(), {277: 3}), _lab(128 / 2.55, 40, -40), 3


def _ycck():
    wanted, key = np.array([180, 100, 60]), 200
    luma = Image.fromarray(np.tile(wanted.astype(np.uint8), (24, 32, 1))).convert("YCbCr")
    planes = np.dstack([255 - np.asarray(luma), np.full((24, 32), 255 - key, np.uint8)])
    data = file(Image.fromarray(planes, "CMYK"), "JPEG", quality=100)
    at = data.index(b"Adobe")
    return data[: at + 11] + b"\x02" + data[at + 12 :], np.tile((255 - wanted) * key / 255, (24, 32, 1)), 3


def _lab(lightness, a, b):
    middle = (lightness + 16) / 116
    ratios = np.array([middle + a / 500, middle, middle - b / 200])
    ratios = np.where(ratios > 6 / 29, ratios**3, (ratios - 4 / 29) * 3 * (6 / 29) ** 2)
    return np.tile(encoded(ratios * D50 @ np.linalg.inv(SRGB)), (24, 32, 1))


def depths() -> Iterator[tuple]:
    """More and fewer than 8 bits."""
    wide = np.random.default_rng(0).integers(0, 65536, (24, 32, 3), np.uint16)
    shade = np.round(wide[..., 0] / 257)
    yield "16-bit grey.png", file(wide[..., 0]), grey(shade)
    yield "16-bit grey.tif", file(wide[..., 0], "TIFF"), grey(shade)
    yield "16-bit colour.png", png(24, 32, 16, 2, wide.astype(">u2")), wide >> 8
    alpha = np.dstack([wide, np.full((24, 32), 65535, np.uint16)])
    yield "16-bit colour and alpha.png", png(24, 32, 16, 6, alpha.astype(">u2")), wide >> 8
    yield "16-bit colour.tif", tiff(32, 24, (16,) * 3, 2, wide.astype("<u2").tobytes(), {277: 3}), wide >> 8
    bits = noise()[..., 0] > 127
    yield "1-bit.png", file(Image.fromarray(bits)), grey(bits * 255)
    yield "1-bit white is zero.tif", tiff(32, 24, 1, 0, np.packbits(~bits, -1).tobytes()), grey(bits * 255)
    nibbles = noise()[..., 0] >> 4
    packed = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    yield "4-bit grey.png", png(24, 32, 4, 0, packed), grey(nibbles * 17)
    for name, data in {
        "float.tif": file(Image.new("F", (32, 24), 0.5), "TIFF"),
        "32-bit.tif": file(Image.new("I", (32, 24), 1000), "TIFF"),
        "12-bit.tif": tiff(32, 24, 12, 1, bytes(1152)),
    }.items():
        yield name, data, "above 8 bits only unsigned 16-bit images are accepted$"
    yield "12-bit.jpg", _precision(file(smooth(), "JPEG"), 12), "^damaged image: .*12-bit"
    yield "3-bit.png", png(24, 32, 3, 0, noise()), "^damaged image: "
    yield "64-bit.tif", tiff(32, 24, 64, 1, bytes(6144), {339: 3}), "^damaged image: .*unknown pixel mode"


def _precision(jpeg, bits):
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 4] + bytes([bits]) + jpeg[at + 5 :]


def profiles() -> Iterator[tuple]:
    """ICC profiles, whole and broken."""
    colour, p3, adobe = noise(), profile(P3, 563 / 256), profile(ADOBE_RGB, 563 / 256)
    yield "Display P3.png", file(colour, icc_profile=p3), seen_as(colour, P3), 2
    yield "Display P3.webp", file(colour, "WEBP", lossless=True, icc_profile=p3), seen_as(colour, P3), 2
    yield "Adobe RGB.tif", file(colour, "TIFF", icc_profile=adobe), seen_as(colour, ADOBE_RGB), 2
    flat = np.tile(np.array([60, 120, 200], np.uint8), (24, 32, 1))
    yield "Adobe RGB.jpg", file(flat, "JPEG", quality=100, icc_profile=adobe), seen_as(flat, ADOBE_RGB), 4
    shade = colour[..., 0]
    dark = profile((), 3.0, b"GRAY")
    yield "dark grey.png", file(shade, icc_profile=dark), grey(encoded((shade / 255) ** 3)), 2
    ink = Image.new("CMYK", (32, 24), (255, 0, 0, 0))
    lightness = np.full((24, 32), 100 * 2 / 3)
    expected = grey(encoded(((lightness + 16) / 116) ** 3))
    yield "CMYK and a profile.tif", file(ink, "TIFF", icc_profile=grey_ink_profile()), expected, 3
    yield "CMYK and a profile.jpg", file(ink, "JPEG", quality=100, icc_profile=grey_ink_profile()), expected, 3
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "sRGB.png", file(colour, icc_profile=srgb), colour, 1
    yield "half a profile.png", file(colour, icc_profile=p3[: len(p3) // 2]), colour
    yield "nonsense as a profile.tif", file(colour, "TIFF", icc_profile=b"nonsense" * 30), colour
    yield "RGB profile of a grey.png", file(shade, icc_profile=p3), grey(shade)
    yield "grey profile of a colour.webp", file(colour, "WEBP", lossless=True, icc_profile=dark), colour
    part = segment(0xE2, b"ICC_PROFILE\0\x01\x02" + adobe)  # the first part of two
    yield "half the parts of a profile.jpg", with_segments(file(flat, "JPEG", quality=100), part), flat, 3
    broken = png(24, 32, 8, 2, colour, chunk(b"iCCP", b"name\0\0not deflated"))
    yield "iCCP that is not deflated.png", broken, colour


def orientations() -> Iterator[tuple]:
    """EXIF."""
    colour = noise()
    turned = {
        1: colour,
        2: colour[:, ::-1],
        3: colour[::-1, ::-1],
        4: colour[::-1],
        5: colour.transpose(1, 0, 2),
        6: colour[::-1].transpose(1, 0, 2),
        7: colour[::-1, ::-1].transpose(1, 0, 2),
        8: colour[:, ::-1].transpose(1, 0, 2),
    }
    for orientation, expected in turned.items():
        yield f"turned {orientation}.png", file(colour, exif=exif(orientation)), expected
    yield "turned 6.webp", file(colour, "WEBP", lossless=True, exif=exif(6)), turned[6]
    yield "turned 6.tif", tiff(32, 24, (8, 8, 8), 2, colour.tobytes(), {277: 3, 274: 6}), turned[6]
    jpeg = file(smooth(), "JPEG", quality=95)
    yield "turned 6.jpg", with_segments(jpeg, segment(0xE1, exif(6))), smooth()[::-1].transpose(1, 0, 2), 12
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)
    yield "turned 3 by XMP.jpg", with_segments(jpeg, xmp), smooth()[::-1, ::-1], 12
    yield "turned 99.png", file(colour, exif=exif(99)), colour
    yield "turned by a text.png", file(colour, exif=exif(0x36, kind=2)), turned[6]  # "6"
    yield "EXIF of nonsense.png", file(colour, exif=b"Exif\0\0nothing at all"), colour
    yield "half an EXIF.webp", file(colour, "WEBP", lossless=True, exif=exif(6)[:20]), colour
    yield "EXIF of nonsense.jpg", with_segments(jpeg, segment(0xE1, b"Exif\0\0" + bytes(range(200)))), smooth(), 12
    many = b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 274, 3, 1, 6)
    cut = smooth()[::-1].transpose(1, 0, 2)  # the entries before the end are used
    yield "65535 EXIF entries.jpg", with_segments(jpeg, segment(0xE1, b"Exif\0\0" + many)), cut, 12
    text = chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nnot hexadecimal\n")
    yield "EXIF of nonsense in a text.png", png(24, 32, 8, 2, colour, text), colour
    tags = {277: 3, 34665: 2**31, 34853: 5}
    yield "EXIF beyond the end.tif", tiff(32, 24, (8, 8, 8), 2, colour.tobytes(), tags), colour


def sizes() -> Iterator[tuple]:
    """Small, thin and long."""
    small = "pixels: each side must have at least 8$"
    yield "1 x 1.png", file(noise(1, 1)), f"^1 x 1 {small}"
    yield "7 x 3.png", file(noise(3, 7)), f"^7 x 3 {small}"
    yield "7 x 8.jpg", file(noise(8, 7), "JPEG"), f"^7 x 8 {small}"
    yield "3000 x 7.webp", file(noise(7, 3000), "WEBP", lossless=True), f"^3000 x 7 {small}"
    yield "0 x 24.png", png(24, 0, 8, 2, []), "^damaged image: the header gives no size"
    yield "0 x 24.tif", tiff(0, 24, 8, 1, b"x"), "^damaged image: the header gives no size"
    yield "8 x 8.png", file(noise(8, 8)), noise(8, 8)
    yield "8 x 8.webp", file(noise(8, 8), "WEBP", lossless=True), noise(8, 8)
    yield "9 x 17.tif", file(noise(17, 9), "TIFF"), noise(17, 9)
    yield "16 x 5000.png", file(smooth(5000, 16)), smooth(5000, 16)
    yield "20000 x 16.png", file(smooth(16, 20000)), smooth(16, 20000)


def jpegs() -> Iterator[tuple]:
    """Rarer kinds of JPEG."""
    jpeg = file(smooth(), "JPEG", quality=95)
    yield "progressive.jpg", file(smooth(), "JPEG", quality=95, progressive=True), smooth(), 12
    yield "restart after each block.jpg", file(smooth(), "JPEG", quality=95, restart_marker_blocks=1), smooth(), 12
    yield "4-2-0.jpg", file(smooth(), "JPEG", quality=95, subsampling=2), smooth(), 12
    yield "lossless.jpg", lossless_jpeg(24, 32), np.full((24, 32, 3), 128)
    yield "hierarchical.jpg", jpeg.replace(b"\xff\xc0", b"\xff\xc5"), "^damaged image: "
    thumbnail = file(noise(8, 8), "JPEG")
    yield "thumbnail.jpg", with_segments(jpeg, segment(0xE0, b"JFXX\0\x10" + thumbnail)), smooth(), 12
    yield "60 comments.jpg", with_segments(jpeg, *[segment(0xFE, bytes(1000))] * 60), smooth(), 12
    yield "120 scans in thumbnails.jpg", with_segments(jpeg, *[segment(0xE3, 2 * b"\xff\xda")] * 60), smooth(), 12
    yield "fill bytes.jpg", jpeg[:2] + b"\xff" * 500 + jpeg[2:], smooth(), 12


def lossless_jpeg(height, width):
    """JPEG's lossless process (ITU-T T.81, annex H): every difference is 0, coded in one bit, so all is middle grey."""
    frame = segment(0xC3, struct.pack(">BHHB3B", 8, height, width, 1, 1, 0x11, 0))
    table = segment(0xC4, bytes([0, 1, *[0] * 15, 0]))
    scan = segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
    return b"\xff\xd8" + frame + table + scan + bytes(height * width // 8) + b"\xff\xd9"


def pngs() -> Iterator[tuple]:
    """Rarer kinds of PNG."""
    colour = noise()
    yield "interlaced.png", *interlaced()
    said = chunk(b"gAMA", struct.pack(">I", 100000)) + chunk(b"cHRM", bytes(32)) + chunk(b"sRGB", b"\0")
    yield "gAMA, cHRM and sRGB.png", png(24, 32, 8, 2, colour, said), colour
    yield "unknown chunks.png", png(24, 32, 8, 2, colour, chunk(b"abCd", bytes(99)) * 50), colour
    yield "comments.png", png(24, 32, 8, 2, colour, chunk(b"tEXt", b"Comment\0" + b"x" * 9999)), colour
    raw = zlib.compress(b"".join(b"\0" + row.tobytes() for row in colour))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, 8, 2, 0, 0, 0))
    pieces = b"".join(chunk(b"IDAT", raw[at : at + 1]) for at in range(len(raw)))
    yield "one byte in each IDAT.png", PNG + header + pieces + chunk(b"IEND", b""), colour
    yield "no palette.png", png(24, 32, 8, 3, colour[..., 0]), "^damaged image: .*palette"
    yield "unknown filter.png", _filtered(9), "^damaged image: "
    frame = chunk(b"acTL", bytes(8)) + chunk(b"acTL", bytes(8))
    yield "animation without frames.png", png(24, 32, 8, 2, colour, frame), colour


def _filtered(kind):
    rows = zlib.compress(b"".join(bytes([kind]) + row.tobytes() for row in noise()))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, 8, 2, 0, 0, 0))
    return PNG + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def interlaced():
    """An Adam7 file and its pixels."""
    colour, rows = noise(), []
    for top, left, down, right in (
        *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
        *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
    ):
        rows += list(colour[top::down, left::right])
    return png(24, 32, 8, 2, rows, interlace=1), colour


def tiffs() -> Iterator[tuple]:
    """Rarer kinds of TIFF."""
    colour = noise()
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma", "zstd"):
        yield f"{compression}.tif", file(colour, "TIFF", compression=compression), colour
    yield "JPEG inside.tif", file(smooth(), "TIFF", compression="jpeg", quality=95), smooth(), 12
    bits = noise()[..., 0] > 127
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield f"{compression}.tif", file(Image.fromarray(bits), "TIFF", compression=compression), grey(bits * 255)
    yield "BigTIFF.tif", tiff(32, 24, (8, 8, 8), 2, colour.tobytes(), {277: 3}, big=True), colour
    yield "big-endian BigTIFF.tif", b"MM\0+\0\x08\0\0" + bytes(99), "^a big-endian BigTIFF"
    order = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"MM")
    yield "big-endian.tif", file(colour, "TIFF", tiffinfo=order), colour
    planes = {277: 3, 284: 2, 273: (8, 776, 1544), 279: (768,) * 3}
    yield "planes.tif", tiff(32, 24, (8, 8, 8), 2, colour.transpose(2, 0, 1).tobytes(), planes), colour
    planes = {277: 4, 284: 2, 338: 0, 273: (8, 776, 1544, 2312), 279: (768,) * 4}
    four = np.dstack([colour, noise(seed=1)[..., :1]]).transpose(2, 0, 1)
    yield "planes and one more.tif", tiff(32, 24, (8,) * 4, 2, four.tobytes(), planes), "^damaged image: Pillow"
    shade = colour[:, :, 0]
    blocks = [shade[top : top + 16, left : left + 16] for top in (0, 16) for left in (0, 16)]
    filled = b"".join(np.pad(block, ((0, 16 - block.shape[0]), (0, 0))).tobytes() for block in blocks)
    at = tuple(8 + 256 * n for n in range(4))
    tags = {273: None, 278: None, 279: None, 322: 16, 323: 16, 324: at, 325: (256,) * 4}
    yield "tiles.tif", tiff(32, 24, 8, 1, filled, tags), grey(shade)
    rows = {278: 1, 273: tuple(8 + 32 * n for n in range(24)), 279: (32,) * 24}
    yield "a strip for each row.tif", tiff(32, 24, 8, 1, shade.tobytes(), rows), grey(shade)
    strips = {278: 1, 273: (8,) * 24, 279: (32,) * 24}
    yield "all strips in one place.tif", tiff(32, 24, 8, 1, shade.tobytes(), strips), grey(np.tile(shade[:1], (24, 1)))


def names() -> Iterator[tuple]:
    """Good images under names that break careless code."""
    composed = unicodedata.normalize("NFC", "é")
    chosen = [
        *("with  spaces .png", " leading space.png", "..png", "..a.png", "a..b.png", ".hidden.png", "-rf.png", "~.png"),
        *("quotes ' and \".png", "percent %2e%2e%2f %.png", "back\\slash.png", "new\nline.png", "tab\t.png"),
        *("sharp#query?star*[a].png", "semi;amp&dollar$(x)`y`.png", "brace{0}{key}.png", "s3:colon.png", "a|b<c>.png"),
        *(f"{composed}.png", f"{unicodedata.normalize('NFD', composed)}.png", "照片 🏔.png", "\u202egnp.exe.png"),
        *("CON.png", "UPPER.PNG", "two.suffixes.jpg.png", "control\x07\x1b[31m.png", "x" * 251 + ".png"),
        *(".../dots.png", "deep/" * 40 + "x.png", "/".join(["y" * 200] * 4) + "/" + "z" * 92 + ".png"),
    ]
    for seed, name in enumerate(chosen, 100):
        yield name, file(noise(8, 9, seed)), noise(8, 9, seed)
