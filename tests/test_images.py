import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from degflow import images
from degflow.images import ImageError, decode
from tests.oddities import chunk, file, noise, over_white, png, tiff

FORMATS = {
    "jpeg": ("JPEG", {"quality": 95}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
}
LOSSLESS = pytest.mark.parametrize("name", ["png", "lossless webp", "tiff", "lzw tiff"])


def assert_close(pixels, expected, tolerance):
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(float) - expected).max() <= tolerance


@LOSSLESS
def test_lossless_formats_give_the_pixels_that_were_stored(name):
    kind, options = FORMATS[name]
    pixels = noise()
    decoded = decode(file(pixels, kind, **options))
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@LOSSLESS
def test_exif_orientation_is_applied_once(name, orientation):
    kind, options = FORMATS[name]
    pixels = noise()
    upright = {  # what a viewer shows, from the EXIF standard's "row 0 is ..., column 0 is ..."
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    np.testing.assert_array_equal(decode(file(pixels, kind, exif=exif, **options)), upright)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_unreadable_exif_is_ignored(kind):
    pixels = noise()
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(file(pixels, kind, exif=b"Exif\0\0nothing at all", **options)), pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_is_repeated(kind):
    gray = noise()[..., 0]
    np.testing.assert_array_equal(decode(file(gray, kind)), np.repeat(gray[..., None], 3, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_one_bit_is_black_and_white(kind):
    bits = noise()[..., 0] > 127
    expected = np.repeat(bits[..., None] * np.uint8(255), 3, -1)
    np.testing.assert_array_equal(decode(file(Image.fromarray(bits), kind)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("gray", [False, True])
def test_alpha_is_composited_over_white(kind, gray):
    colour, alpha = noise(), noise(seed=1)[..., 0]
    colour = np.repeat(colour[..., :1], 3, -1) if gray else colour
    picture = Image.fromarray(np.dstack([colour, alpha]))
    assert_close(decode(file(picture.convert("LA") if gray else picture, kind)), over_white(colour, alpha), 1)


def palette_image():
    indices = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 5
    colours = np.array([[250, 10, 20], [0, 200, 30], [5, 6, 7], [90, 80, 255], [255, 255, 0]], np.uint8)
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette(colours.tobytes())
    picture.putdata(indices.ravel().tolist())
    return picture, colours[indices], indices


def test_a_palette_becomes_rgb():
    picture, colours, _ = palette_image()
    np.testing.assert_array_equal(decode(file(picture)), colours)


@pytest.mark.parametrize("alphas", [2, b"\xff\x80\x00\x40"])
def test_transparent_palette_entries_are_composited_over_white(alphas):
    picture, colours, indices = palette_image()
    table = np.full(5, 255)
    if isinstance(alphas, int):
        table[alphas] = 0
    else:
        table[: len(alphas)] = list(alphas)
    assert_close(decode(file(picture, transparency=alphas)), over_white(colours, table[indices]), 1)


def test_a_transparent_colour_is_composited_over_white():
    pixels = noise()
    pixels[3, 4] = pixels[9, 9] = (10, 20, 30)
    expected = pixels.copy()
    expected[3, 4] = expected[9, 9] = 255
    np.testing.assert_array_equal(decode(file(pixels, transparency=(10, 20, 30))), expected)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_the_plain_complement(kind):
    ink = np.array([[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255], [0, 0, 0, 0], [128, 0, 0, 128]])
    pixels = np.repeat(np.repeat(ink.astype(np.uint8)[:, None], 16, 1), 16, 0)
    rgb = (255 - pixels[..., :3].astype(float)) * (255 - pixels[..., 3:].astype(float)) / 255
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = file(Image.fromarray(pixels, "CMYK"), kind, **options)
    assert_close(decode(data), rgb, 6 if kind == "JPEG" else 1)


def test_an_adobe_cmyk_jpeg_is_stored_inverted():
    data = file(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert decode(data).min() >= 254  # no ink is white
    wrong = data.replace(b"Adobe", b"Xdobe")  # Pillow takes every CMYK JPEG for Adobe's
    np.testing.assert_array_equal(decode(wrong), decode(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bit_gray_is_rounded(kind):
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(wide / 257).astype(np.uint8)
    picture = Image.frombytes("I;16B", (256, 256), wide.astype(">u2").tobytes()) if "big" in kind else wide
    decoded = decode(file(picture, kind.split()[-1]))
    np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, -1))


def test_16_bit_gray_keeps_its_transparent_colour():
    wide = np.arange(128, dtype=np.uint16).reshape(8, 16) * 500
    decoded = decode(png(8, 16, 16, 0, wide.astype(">u2"), chunk(b"tRNS", struct.pack(">H", 1500))))
    expected = np.round(wide / 257)
    expected[0, 3] = 255
    np.testing.assert_array_equal(decoded[..., 0], expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_gray_of_few_bits_is_composited_over_white(bits):
    levels = np.arange(64).reshape(8, 8) % 2**bits
    packed = np.packbits((levels[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8).reshape(8, -1), 1)
    expected = levels * 255 // (2**bits - 1)
    np.testing.assert_array_equal(decode(png(8, 8, bits, 0, packed))[..., 0], expected)
    clear = 1 if bits > 1 else 0
    decoded = decode(png(8, 8, bits, 0, packed, chunk(b"tRNS", struct.pack(">H", clear))))
    np.testing.assert_array_equal(decoded[..., 0], np.where(levels == clear, 255, expected))


def test_a_transparent_colour_is_the_same_in_an_opened_picture():
    wide = np.tile(np.array([1000, 2000, 3000], ">u2"), (8, 8, 1))
    packed = np.full((8, 4), 0x2B, np.uint8)
    files = (
        png(8, 8, 16, 2, wide, chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 3000))),
        png(8, 8, 4, 0, packed, chunk(b"tRNS", struct.pack(">H", 2))),
    )
    for data in files:
        np.testing.assert_array_equal(images.from_picture(Image.open(io.BytesIO(data))), decode(data))
        assert (decode(data)[0, 0] == 255).all()


def test_16_bit_colours_keep_their_transparent_one():
    wide = np.full((8, 8, 3), 0x1234, ">u2")
    wide[:, 4:] = 0x3400  # its upper 8 bits are the lower ones of the transparent colour
    decoded = decode(png(8, 8, 16, 2, wide, chunk(b"tRNS", struct.pack(">3H", *[0x1234] * 3))))
    np.testing.assert_array_equal(decoded[:, :4], np.full((8, 4, 3), 255))
    np.testing.assert_array_equal(decoded[:, 4:], np.full((8, 4, 3), 0x34))


def test_16_bit_colour_and_16_bit_alpha_are_read_as_the_upper_8_bits():
    wide = np.random.default_rng(0).integers(0, 65536, (16, 16, 3), np.uint16)
    np.testing.assert_array_equal(decode(png(16, 16, 16, 2, wide.astype(">u2"))), wide >> 8)
    gray_alpha = np.dstack([wide[..., 0], np.full((16, 16), 65535, np.uint16)])
    np.testing.assert_array_equal(decode(png(16, 16, 16, 4, gray_alpha.astype(">u2")))[..., 1], wide[..., 0] >> 8)


def test_a_16_bit_tiff_whose_white_is_zero_is_inverted():
    wide = np.arange(256, dtype="<u2").reshape(16, 16) * 257
    np.testing.assert_array_equal(decode(tiff(16, 16, 16, 0, wide.tobytes()))[..., 0], 255 - wide // 257)
    np.testing.assert_array_equal(decode(tiff(16, 16, 16, 1, wide.tobytes()))[..., 0], wide // 257)


def test_a_picture_in_memory_is_refused_without_bits_that_nobody_gave():
    with pytest.raises(ImageError, match=r"^pixel mode F: above 8 bits only unsigned 16-bit"):
        images.from_picture(Image.fromarray(np.full((16, 16), 0.5, np.float32)))


def test_gray_with_premultiplied_alpha_is_that_with_plain_alpha():
    plain = Image.fromarray(noise(16, 16)).convert("LA")
    plain.putalpha(200)
    np.testing.assert_array_equal(
        images.from_picture(plain.convert("La")), images.from_picture(plain.convert("La").convert("LA"))
    )


@pytest.mark.parametrize(
    "data",
    [
        file(Image.new("F", (16, 16), 0.5), "TIFF"),
        file(Image.new("I", (16, 16), 1000), "TIFF"),
        tiff(16, 16, 12, 1, b"\xff" * 384),
    ],
    ids=["float", "32 bits", "12 bits"],
)
def test_depths_without_an_agreed_white_are_refused(data):
    with pytest.raises(ImageError, match="only unsigned 16-bit"):
        decode(data)


def swapped_profile():
    """An sRGB profile whose red and blue primaries changed places."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {}
    for n in range(struct.unpack_from(">I", profile, 128)[0]):
        name, offset, size = struct.unpack_from(">4sII", profile, 132 + 12 * n)
        entries[name] = slice(offset, offset + size)
    red, blue = bytes(profile[entries[b"rXYZ"]]), bytes(profile[entries[b"bXYZ"]])
    profile[entries[b"rXYZ"]], profile[entries[b"bXYZ"]] = blue, red
    return bytes(profile)


@pytest.mark.parametrize("name", ["png", "lossless webp", "tiff"])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_profile_is_converted_to_srgb(name, alpha):
    kind, options = FORMATS[name]
    pixels, opacity = noise(), noise(seed=1)[..., 0] | 1
    picture = Image.fromarray(np.dstack([pixels, opacity]) if alpha else pixels)
    swapped = pixels[..., ::-1].astype(float)
    expected = over_white(swapped, opacity) if alpha else swapped
    assert_close(decode(file(picture, kind, icc_profile=swapped_profile(), **options)), expected, 2)


def test_a_profile_converts_palettes_too():
    picture, colours, _ = palette_image()
    assert_close(decode(file(picture, icc_profile=swapped_profile())), colours[..., ::-1].astype(float), 2)


def test_an_srgb_profile_changes_nothing():
    pixels = noise()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_close(decode(file(pixels, icc_profile=profile)), pixels.astype(float), 1)


@pytest.mark.parametrize("profile", [b"nonsense" * 30, swapped_profile()[:300]])
def test_an_unreadable_profile_is_ignored(profile):
    pixels = noise()
    np.testing.assert_array_equal(decode(file(pixels, icc_profile=profile)), pixels)


def test_a_profile_of_another_kind_of_colour_is_ignored():
    gray = noise()[..., 0]
    np.testing.assert_array_equal(decode(file(gray, icc_profile=swapped_profile()))[..., 0], gray)


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "PNG"])
def test_the_first_of_several_frames_is_read(kind):
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(data), noise(seed=0))


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (7, 3), (1, 1)])
def test_images_below_8_pixels_are_refused(size):
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels: each side must have at least 8"):
        decode(file(Image.new("RGB", size)))
    assert decode(file(Image.new("RGB", (8, 8)))).shape == (8, 8, 3)


def test_max_pixels_is_the_largest_size_accepted():
    data = file(noise(24, 32))
    assert decode(data, max_pixels=24 * 32).shape == (24, 32, 3)
    with pytest.raises(ImageError, match="32 x 24 is 768 pixels, more than max_pixels=767"):
        decode(data, max_pixels=767)


@pytest.mark.parametrize("shape", ["PNG", "TIFF", "JPEG"])
def test_a_bomb_is_refused_from_its_header(shape):
    if shape == "PNG":
        data = png(60000, 60000, 8, 2, [])
    elif shape == "TIFF":
        data = tiff(60000, 60000, 8, 1, b"\0" * 100)
    else:
        data = bytearray(file(noise(), "JPEG"))
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
        data = bytes(data)
    with pytest.raises(ImageError, match="60000 x 60000 is 3600000000 pixels, more than max_pixels=200000000"):
        decode(data)


def test_pillow_keeps_its_own_limit_and_ours_is_above_it():
    assert Image.MAX_IMAGE_PIXELS is not None
    side = int((2.5 * Image.MAX_IMAGE_PIXELS) ** 0.5)  # Image.open refuses twice the limit
    white = Image.new("1", (side, side), 1)
    data = file(white, "TIFF", compression="group4")
    with pytest.raises(ImageError, match="more than max_pixels"):
        decode(data)
    with pytest.raises(ImageError, match="damaged"):  # accepted by size, so its (truncated) data is looked at
        decode(data[:-1000] if len(data) > 2000 else data[:-10], max_pixels=side * side)


@pytest.mark.parametrize(
    "data", [b"", b"<!DOCTYPE html><html></html>", b"hello", file(noise(), "GIF"), b"\xff", bytes(99)]
)
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP or TIFF file" if data else "empty file"):
        decode(data)


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_is_refused(name):
    kind, options = FORMATS[name]
    data = file(noise(), kind, **options)
    for length in (13, 30, 100, len(data) // 2, len(data) - 40):
        with pytest.raises(ImageError, match="damaged image: "):
            decode(data[:length])


def test_pillow_says_nothing_about_damaged_metadata():
    ifd = b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0\x06\0"
    jpeg = file(noise(), "JPEG")
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(ifd)) + b"Exif\0\0" + ifd + jpeg[2:]
    broken = tiff(16, 16, 8, 1, bytes(256)).replace(
        struct.pack("<HHII", 277, 4, 1, 1), struct.pack("<HHII", 277, 4, 1, 9)
    )
    script = (
        "import sys; from degflow import images\n"
        f"images.decode({jpeg!r})\n"
        "try:\n"
        f"    images.decode({broken!r})\n"
        "except images.ImageError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_tensors_and_pixels_convert_exactly_for_every_level():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)[None]
    tensor = images.to_tensor(levels)
    assert tensor.shape == (3, 1, 256)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    np.testing.assert_array_equal(images.to_pixels(tensor), levels)
    np.testing.assert_array_equal(images.to_pixels(tensor.half()), levels)


def test_tensors_and_pixels_keep_batch_dimensions_and_channel_order():
    pixels = np.stack([noise(9, 10, 0), noise(9, 10, 1)])[None]
    tensor = images.to_tensor(pixels)
    assert tensor.shape == (1, 2, 3, 9, 10)
    assert tensor[0, 1, 2, 3, 4] == pixels[0, 1, 3, 4, 2] / np.float32(127.5) - 1
    np.testing.assert_array_equal(images.to_pixels(tensor), pixels)


def test_to_pixels_clamps_and_rounds_to_nearest():
    image = torch.tensor([-2.0, -1.0, 2.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0]).reshape(1, 1, 6).repeat(3, 1, 1)
    assert images.to_pixels(image)[0, :, 0].tolist() == [0, 0, 255, 0, 1, 255]


def test_levels_are_the_pixels_and_stay_on_their_device():
    image = torch.rand(2, 3, 4, 5) * 2 - 1
    levels = images.to_levels(image)
    assert (levels.dtype, levels.is_contiguous()) == (torch.uint8, True)
    np.testing.assert_array_equal(levels.numpy(), images.to_pixels(image))
    assert images.to_levels(image.to("meta")).device.type == "meta"


@pytest.mark.filterwarnings("error")
def test_to_tensor_takes_read_only_and_reversed_pixels():
    pixels = noise()
    pixels.setflags(write=False)
    expected = images.to_tensor(pixels.copy())
    assert torch.equal(images.to_tensor(pixels), expected)
    assert torch.equal(images.to_tensor(pixels[:, ::-1]), expected.flip(-1))


@pytest.mark.parametrize("level", [0, 3, 9])
def test_png_is_lossless(level):
    pixels = noise()
    data = images.encode_png(pixels, level)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data), formats=["PNG"])), pixels)
    np.testing.assert_array_equal(decode(images.encode_png(pixels[:, ::-1])), pixels[:, ::-1])


@pytest.mark.parametrize("size", [(48, 64), (11, 7), (24, 32), (9, 80)])
def test_resize_is_pillows_bicubic(size):
    resized = images.resize(noise(), *size)
    expected = Image.fromarray(noise()).resize(size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized, np.asarray(expected))
    assert resized.flags.writeable


def test_shrunk_size_rounds_each_side_and_keeps_a_pixel():
    assert images.shrunk_size(1000, 600, 3) == (333, 200)
    assert images.shrunk_size(101, 99, 2.7) == (37, 37)
    assert images.shrunk_size(64, 48, 1.0) == (64, 48)
    assert images.shrunk_size(8, 100, 40) == (1, 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_memory_that_decoding_takes_is_told_by_the_header(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (70, 50)).save(buffer, kind)
    data = buffer.getvalue()
    assert images.decoding_memory(data) == 20 * 70 * 50 + 2 * len(data)
    assert images.decoding_memory(data, max_pixels=100) == 2 * len(data)  # it is refused by its header
    assert images.decoding_memory(b"no image") == 16
