"""A simulated camera: any photograph becomes a registered RealSR-like capture at any focal ratio.

The steps of a capture at `scale` s (pixels are the photograph's unless said otherwise):

1. sRGB to linear light.
2. Optics: blur by a defocus disc and a Gaussian that grow with s; lateral colour magnifies red and blue about the
   centre. The lens keeps its f-number at every focal length, so its blur on the sensor is the same at every s.
3. Sampling by integration over cells of s x s pixels, on an RGGB Bayer mosaic under the body's colour cast.
4. Poisson-Gaussian noise.
5. White balance, then linear demosaicing (Malvar, He and Cutler, 2004), which expects balanced channels.
6. sRGB coding with a contrast curve, then an unsharp mask on luma.
7. JPEG at the sensor's resolution.
8. Bicubic resampling to the photograph's pixel grid.

The green channel is not shifted at any scale, so captures of one photograph are registered. The HR image is the same
camera's capture at s = 1. The result stands in for RealSR (Cai et al., 2019) and is always called simulated.
"""

import io
import math
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

SCALE_RANGE = (1.0, 8.0)
MIN_SIDE = 8
MARGIN = 8  # sensor pixels around the frame: hides border effects, keeps the Bayer phase and the JPEG block grid
BAYER = (((0, 0),), ((0, 1), (1, 0)), ((1, 1),))  # RGGB: the (row, column) sites of red, of green, of blue
LUMA = (0.299, 0.587, 0.114)

Taps = tuple[np.ndarray, np.ndarray]  # source index "N T" and weight "N T" of every output pixel along one axis


@dataclass(frozen=True)
class SimulatedCamera:
    """A camera body with its lens; `named` returns one of CAMERAS."""

    name: str
    disc_radius: float  # sensor pixels, defocus
    blur_sigma: float  # sensor pixels, the Gaussian that stands for aberrations, diffraction and low-pass filter
    red_shift: float  # sensor pixels outwards at the corner, relative to green
    blue_shift: float  # sensor pixels outwards at the corner, relative to green
    red_gain: float  # white-balance gain relative to green; the mosaic has red / red_gain
    blue_gain: float  # white-balance gain relative to green; the mosaic has blue / blue_gain
    white_electrons: float  # electrons of a green photosite at white
    read_noise: float  # electrons, standard deviation
    contrast: float  # share of the S-curve in the tone curve, in [0, 1]
    sharpen_sigma: float  # sensor pixels
    sharpen_amount: float  # factor of the added detail
    jpeg_quality: int  # Pillow's scale, 1 to 100
    jpeg_subsampling: Literal["4:4:4", "4:2:0"]  # chroma layout of the JPEG

    @classmethod
    def named(cls, name: str) -> "SimulatedCamera":
        """Returns the body called `name`.

        Raises:
            ValueError: `name` is none of `CAMERAS`.
        """
        if name not in CAMERAS:
            raise ValueError(f"camera={name!r}: must be one of {', '.join(map(repr, CAMERAS))}")
        return CAMERAS[name]

    def capture(self, photo: np.ndarray, scale: float, seed: int = 0) -> np.ndarray:
        """Capture a photograph.

        The result depends on the arguments and the camera alone. Every photograph, scale, seed and camera has its own
        noise, as separate exposures have.

        Args:
            photo: "H W 3" uint8, sRGB; H and W at least 8.
            scale: ratio s of focal lengths, in [1, 8]; 1 is the HR capture.
            seed: of the noise, not negative.

        Returns:
            "H W 3" uint8, sRGB, on the photograph's own pixel grid.

        Raises:
            ValueError: an argument has the wrong type or is out of range.
        """
        _check(photo, scale, seed)
        exposure = zlib.crc32(self.name.encode(), zlib.crc32(np.ascontiguousarray(photo).data))
        rng = np.random.default_rng([seed, exposure, int(np.float64(scale).view(np.uint64))])
        mosaic = self._expose(self._integrate(photo, scale), rng)
        return _return_to_grid(self._compress(self._develop(mosaic)), photo.shape[:2], scale)

    @property
    def gains(self) -> tuple[float, float, float]:
        """White-balance gains of red, green and blue."""
        return self.red_gain, 1.0, self.blue_gain

    def _integrate(self, photo: np.ndarray, scale: float) -> np.ndarray:
        """Optics and sampling: "H W 3" uint8 -> noiseless mosaic "h w" float32, green white at 1."""
        height, width = (math.ceil(side / scale) + 2 * MARGIN for side in photo.shape[:2])
        mosaic = np.empty((height, width), np.float32)
        shifts = (self.red_shift, 0.0, self.blue_shift)
        to_linear = _decode_srgb(np.arange(256) / 255).astype(np.float32)
        for channel, sites in enumerate(BAYER):
            light = self._blur(to_linear[photo[..., channel]], scale)
            magnification = 1 + shifts[channel] * scale / (math.hypot(*light.shape) / 2)
            for row, column in sites:
                rows = _cells(height, row, scale, light.shape[0], magnification)
                columns = _cells(width, column, scale, light.shape[1], magnification)
                mosaic[row::2, column::2] = _resample(light, rows, columns) / self.gains[channel]
        return mosaic

    def _blur(self, light: np.ndarray, scale: float) -> np.ndarray:
        """Defocus disc, then Gaussian, on one plane "H W" of linear light."""
        disc, gaussian = _disc(self.disc_radius * scale), _gaussian(self.blur_sigma * scale)
        return _convolve(_convolve(_convolve(light, disc), gaussian[None]), gaussian[:, None])

    def _expose(self, mosaic: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Adds photon and read noise: variance mosaic / white_electrons + (read_noise / white_electrons)^2."""
        electrons = rng.poisson(mosaic * self.white_electrons).astype(np.float32)
        electrons += self.read_noise * rng.standard_normal(mosaic.shape, np.float32)
        return electrons / np.float32(self.white_electrons)

    def _develop(self, mosaic: np.ndarray) -> np.ndarray:
        """White balance, demosaicing, tone curve, sharpening: mosaic "h w" -> "h w 3" uint8, sRGB."""
        balanced = mosaic.copy()
        for gain, sites in zip(self.gains, BAYER, strict=True):
            for row, column in sites:
                balanced[row::2, column::2] *= gain
        rgb = _tone(_demosaic(balanced), self.contrast)
        luma = rgb @ np.array(LUMA, np.float32)
        gaussian = _gaussian(self.sharpen_sigma)
        detail = luma - _convolve(_convolve(luma, gaussian[None]), gaussian[:, None])
        rgb += self.sharpen_amount * detail[..., None]
        return _to_uint8(rgb * 255)

    def _compress(self, rgb: np.ndarray) -> np.ndarray:
        """One round trip through JPEG, in memory."""
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, "JPEG", quality=self.jpeg_quality, subsampling=self.jpeg_subsampling)
        return np.asarray(Image.open(buffer))


# Blur and the pixel's width give canon and nikon an MTF50 of 0.25 and 0.28 cycles per pixel before sharpening, like a
# camera with an optical low-pass filter and one without. soft is nikon with a poor lens. The noise is that of base ISO:
# registered pairs are shot from a tripod, with long exposures.
CAMERAS = {
    "canon": SimulatedCamera(
        name="canon",
        disc_radius=0.8,
        blur_sigma=0.55,
        red_shift=0.20,
        blue_shift=-0.12,
        red_gain=2.0,
        blue_gain=1.55,
        white_electrons=50000,
        read_noise=3.0,
        contrast=0.15,
        sharpen_sigma=0.8,
        sharpen_amount=0.4,
        jpeg_quality=96,
        jpeg_subsampling="4:4:4",
    ),
    "nikon": SimulatedCamera(
        name="nikon",
        disc_radius=0.7,
        blur_sigma=0.5,
        red_shift=-0.10,
        blue_shift=0.22,
        red_gain=1.8,
        blue_gain=1.35,
        white_electrons=65000,
        read_noise=2.0,
        contrast=0.08,
        sharpen_sigma=1.1,
        sharpen_amount=0.3,
        jpeg_quality=93,
        jpeg_subsampling="4:2:0",
    ),
}
CAMERAS["soft"] = replace(
    CAMERAS["nikon"], name="soft", disc_radius=1.3, blur_sigma=0.9, sharpen_sigma=1.2, sharpen_amount=0.2
)


def _check(photo: np.ndarray, scale: float, seed: int) -> None:
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or min(photo.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"photo={photo.dtype} {photo.shape}: must be uint8 of shape (H, W, 3) with H and W at least {MIN_SIDE}"
        )
    if not SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]:
        raise ValueError(f"scale={scale}: must be in [{SCALE_RANGE[0]:g}, {SCALE_RANGE[1]:g}]")
    if seed < 0:
        raise ValueError(f"seed={seed}: must not be negative")


def _decode_srgb(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _encode_srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _tone(rgb: np.ndarray, contrast: float) -> np.ndarray:
    """Clips linear light to [0, 1] and codes it: sRGB, then x + contrast * (smoothstep(x) - x). Tabulated."""
    steps = 65535
    value = _encode_srgb(np.arange(steps + 1) / steps)
    table = (value + contrast * (value * value * (3 - 2 * value) - value)).astype(np.float32)
    return table[(np.clip(rgb, 0, 1) * steps + 0.5).astype(np.uint16)]


def _to_uint8(value: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(value), 0, 255).astype(np.uint8)


def _gaussian(sigma: float) -> np.ndarray:
    """Taps of a normalised Gaussian, odd in number."""
    reach = math.ceil(4 * sigma)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return taps / taps.sum()


def _disc(radius: float) -> np.ndarray:
    """A uniform disc as the share of every pixel that it covers; smooth in the radius."""
    reach = math.ceil(radius - 0.5)
    pixel = np.arange(-reach, reach + 1)
    line = np.linspace(-reach - 0.5, reach + 0.5, 64 * len(pixel), endpoint=False) + 1 / 128
    half_chord = np.sqrt(np.maximum(radius**2 - line**2, 0))[:, None]
    covered = np.minimum(pixel + 0.5, half_chord) - np.maximum(pixel - 0.5, -half_chord)
    kernel = np.maximum(covered, 0).reshape(len(pixel), 64, len(pixel)).sum(1)
    return kernel / kernel.sum()


def _convolve(plane: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves "H W" with a symmetric odd kernel, mirroring at the borders."""
    height, width = plane.shape
    padded = np.pad(plane, [(side // 2, side // 2) for side in kernel.shape], mode="symmetric")
    out = np.zeros_like(plane)
    for top in range(0, height, 64):  # bands that fit the CPU's cache
        band = out[top : top + 64]
        for (row, column), weight in np.ndenumerate(kernel.astype(np.float32)):
            if weight:
                band += weight * padded[top + row : top + row + len(band), column : column + width]
    return out


def _cells(count: int, phase: int, scale: float, length: int, magnification: float) -> Taps:
    """Taps that average an axis of `length` pixels over every second of `count` cells, from `phase` on.

    Cell i covers [(i - MARGIN) * scale, (i - MARGIN + 1) * scale). Magnifying the image about its centre is the same
    as shrinking the cells toward it. The axis is mirrored at its ends.
    """
    centre = length / 2
    left = (np.arange(phase, count, 2) - MARGIN) * scale
    left, right = (centre + (edge - centre) / magnification for edge in (left, left + scale))
    pixel = np.floor(left).astype(int)[:, None] + np.arange(math.ceil((right - left).max()) + 1)
    covered = np.minimum(pixel + 1, right[:, None]) - np.maximum(pixel, left[:, None])
    mirrored = pixel % (2 * length)
    return np.minimum(mirrored, 2 * length - 1 - mirrored), np.maximum(covered, 0) / (right - left)[:, None]


def _bicubic(length: int, scale: float) -> Taps:
    """Taps of Keys' cubic (a = -0.5) at the centres of `length` pixels, in the coordinates of `_cells`."""
    position = (np.arange(length) + 0.5) / scale - 0.5 + MARGIN
    index = np.floor(position).astype(int)[:, None] + np.arange(-1, 3)
    x = np.abs(position[:, None] - index)
    return index, np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)


def _resample(plane: np.ndarray, rows: Taps, columns: Taps) -> np.ndarray:
    """Applies separable taps: "H W" -> "len(rows) len(columns)"."""
    for axis, (index, weight) in ((1, columns), (0, rows)):
        out = np.float32(0)
        for source, share in zip(index.T, weight.T.astype(np.float32), strict=True):
            if share.any():
                out = out + plane.take(source, axis) * (share if axis else share[:, None])
        plane = np.asarray(out)
    return plane


def _return_to_grid(rgb: np.ndarray, size: tuple[int, ...], scale: float) -> np.ndarray:
    """Sensor image "h w 3" uint8 -> "H W 3" uint8 on the photograph's grid."""
    rows, columns = (_bicubic(length, scale) for length in size)
    planes = [_to_uint8(_resample(rgb[..., channel].astype(np.float32), rows, columns)) for channel in range(3)]
    return np.stack(planes, axis=-1)


CROSS = np.array([[0, 0, -1, 0, 0], [0, 0, 2, 0, 0], [-1, 2, 4, 2, -1], [0, 0, 2, 0, 0], [0, 0, -1, 0, 0]]) / 8
ALONG = np.array([[0, 0, 0.5, 0, 0], [0, -1, 0, -1, 0], [-1, 4, 5, 4, -1], [0, -1, 0, -1, 0], [0, 0, 0.5, 0, 0]]) / 8
DIAGONAL = np.array([[0, 0, -3, 0, 0], [0, 4, 0, 4, 0], [-3, 0, 12, 0, -3], [0, 4, 0, 4, 0], [0, 0, -3, 0, 0]]) / 16
MISSING = (  # row and column of a site, a channel that it did not measure, the kernel that estimates it
    (0, 0, 1, CROSS),
    (0, 0, 2, DIAGONAL),
    (0, 1, 0, ALONG),
    (0, 1, 2, ALONG.T),
    (1, 0, 0, ALONG.T),
    (1, 0, 2, ALONG),
    (1, 1, 0, DIAGONAL),
    (1, 1, 1, CROSS),
)


def _demosaic(mosaic: np.ndarray) -> np.ndarray:
    """Gradient-corrected linear interpolation of an RGGB mosaic, "h w" -> "h w 3" (Malvar, He and Cutler, 2004)."""
    height, width = mosaic.shape
    padded = np.pad(mosaic, 2, mode="reflect")
    rgb = np.repeat(mosaic[..., None], 3, axis=-1)
    for row, column, channel, kernel in MISSING:
        out = np.float32(0)
        for (i, j), weight in np.ndenumerate(kernel.astype(np.float32)):
            if weight:
                out = out + weight * padded[row + i : height + i : 2, column + j : width + j : 2]
        rgb[row::2, column::2, channel] = out
    return rgb
