"""The optics between HR and LR: a radial transfer function per colour channel, fitted in linear light.

1. Blur happens in linear light, before the sensor. With `lin` and `enc` the two directions of the sRGB curve,
   skeleton_s = enc(H_s * lin(HR)), where H_s(f) depends on the frequency's distance from zero alone.
2. `Optics.fit` finds H_k of each captured level k in closed form: H_k(f) = Re sum(L_k conj I) / sum |I|^2, with L_k and
   I the spectra of lin(LR_k) and lin(HR) over windows of the training scenes (Hann, means removed). This is the
   linear filter of least squared error.
3. From HR to the first LR level log H is linear in s^2, as for a lens of constant f-number. Between two LR levels lens
   and sensor do the same at every s, in units of the sensor's pixel: there log H is mixed at equal s f, linearly in
   1 / s^2. Both are exact for a Gaussian. (On the simulated canon the second rule is 0.2 dB better at x3. Below the
   first LR level it is 0.4 dB worse, because LR was resampled from a coarser grid, and HR was not.)
4. Reducing a scene by r stretches its frequencies: LR and HR are then related by H_{s r}(f / r), s being counted on the
   reduced grid. (For a Gaussian s^2 - 1 / r^2 takes the place of s^2 - 1.)

Windows are registered first: LR's sub-pixel shift is estimated and its linear phase removed, and windows that do not
show the same picture are left out. Exposure is not optics: each scene's H is divided by its limit at f = 0, so that
H(0) = 1 and a skeleton keeps HR's mean colour. A channel with little light of its own takes the curve of all channels:
demosaicing brings it the others' detail, which is not its own detail blurred.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from degflow.capture.scenes import SceneImages

CORNER = math.sqrt(0.5)  # cycles per pixel, the highest frequency of a pixel grid
FLOOR = 1e-3  # the least H that a fit may find: below, it is noise, and its sign means nothing
MARGIN = 64  # mirrored pixels around an image; a filter's reach is less
SMALLEST_SIDE = 8
WINDOW = 128  # pixels
SMALLEST_WINDOW = 32  # pixels
WINDOWS_PER_SCENE = 24
WINDOWS = 2048  # of all scenes together
LOW_BAND = 0.02  # cycles per pixel, where H's limit at 0 is read
SHIFT_BAND = 0.15  # cycles per pixel, where the phase of a shift is read; up to 3 pixels it does not wrap there
LARGEST_SHIFT = 2.0  # pixels
BESIDE = 0.5  # pixels; from this shift on, LR beside HR is worth a warning
LEAST_COHERENCE = 0.5  # of LR and HR in that band, for a window to count
HALF_OWN = 0.1  # energy of a channel, divided by the strongest one's, where its curve is half its own, half that of all
_TOGETHER = 1 << 18  # pixels of an image up to which its channels are filtered at once, to start fewer kernels


class Optics(nn.Module):
    """Transfer functions of the captured levels. Without a fit, all ones.

    `log_transfer` "K 3 R" is log H of K levels, red, green and blue, at R rings of frequency evenly spaced from 0 to
    the corner, sqrt(0.5) cycles per pixel; level 0 is HR, all zeros. It is a buffer: `state_dict` holds it.

    Args:
        scales: scales of the levels, HR's first, nominal or optical.
        rings: number of rings.

    Raises:
        ValueError: fewer than two scales, scales that are not above 0 and increasing, or fewer than two rings.
    """

    log_transfer: Tensor
    levels: Tensor
    working_channels = 10.0  # float planes of an image's size that `forward` needs beside images in and out

    def __init__(self, scales: Sequence[float], rings: int = 64):
        super().__init__()
        self.scales = tuple(float(scale) for scale in scales)
        if len(self.scales) < 2 or not all(a < b < math.inf for a, b in pairwise((0.0, *self.scales))):
            raise ValueError(f"scales={self.scales}: must be at least two, above 0, finite and increasing, HR's first")
        if rings < 2:
            raise ValueError(f"rings={rings}: must be at least 2")
        self.rings = rings
        self.register_buffer("log_transfer", torch.zeros(len(self.scales), 3, rings))
        self.register_buffer("levels", torch.tensor(self.scales, dtype=torch.float64), persistent=False)

    @classmethod
    def fit(cls, scenes: SceneImages, rings: int = 64) -> "Optics":
        """Fit the transfer functions of every level of `scenes`, at the scales of its configuration.

        Takes at most 24 windows of 128 x 128 pixels of a scene, at fixed places, and some 0.2 s for each scene.

        Raises:
            ValueError: a scene below 32 pixels a side, or no window where a level shows HR's picture.

        Warns:
            UserWarning: half of a level's windows or more do not count, or lie half a pixel or more beside HR's.
        """
        optics = cls(tuple(scenes.config.levels.values()), rings)
        most = max(1, min(WINDOWS_PER_SCENE, WINDOWS // len(scenes)))
        cross, energy, squared, shifts = 0.0, 0.0, 0.0, []
        for scene, pixels in zip(scenes.scenes, scenes.pixels, strict=True):
            if min(pixels.shape[1:3]) < SMALLEST_WINDOW:
                size = f"{pixels.shape[2]} x {pixels.shape[1]}"
                raise ValueError(f"scene={scene.name}: {size} pixels; sides must be at least {SMALLEST_WINDOW}")
            *sums, shift = _ring_sums(pixels, most, rings)
            cross, energy, squared = (total + part for total, part in zip((cross, energy, squared), sums, strict=True))
            shifts.append(shift)
        empty = (torch.as_tensor(energy)[1:, :, 1:].sum((1, 2)) == 0).nonzero().flatten().tolist()
        if empty:
            label = list(scenes.config.levels)[empty[0] + 1]
            raise ValueError(
                f"level={label}: no window shows HR's picture, shifted by at most {LARGEST_SHIFT:g} pixels (or all are "
                "too dark, too noisy or flat)"
            )
        _warn(list(scenes.config.levels), torch.cat(shifts))
        optics.log_transfer.copy_(_on_nodes(*_pooled(*map(torch.as_tensor, (cross, energy, squared)))))
        return optics

    def transfer(self, frequency: Tensor, scale: Tensor, reduction: float | Tensor = 1.0) -> Tensor:
        """H at any frequencies.

        Args:
            frequency: cycles per pixel from 0 to the corner, any shape "...".
            scale: "B".
            reduction: as in `forward`.

        Returns:
            "B 3 ..." of `frequency`'s type.
        """
        curves = self._curves(scale, reduction).to(frequency)
        place = _place(frequency.square().flatten(), self.rings)
        return _look_up(curves, *place).exp_().unflatten(-1, frequency.shape)

    def describe(self) -> dict[str, object]:
        """The arguments that make this module again; its tables are in `state_dict`."""
        return {"scales": list(self.scales), "rings": self.rings}

    @torch.no_grad()
    def forward(self, hr: Tensor, scale: Tensor, reduction: float | Tensor = 1.0) -> Tensor:
        """HR seen through the lens at each image's scale: sharp detail goes, no noise comes.

        Images are done one after the other, so an image's result does not depend on its batch. Light below 0 or
        above 1 is clipped. Beside images in and out this takes 7 to 10 float planes of the size of one image
        (4000 x 3000 pixels: 0.4 GB in float32).

        Args:
            hr: "B 3 H W" in [-1, 1], float32 or float64 (narrower types are computed in float32); H and W at least 8.
            scale: "B", from the first level's / reduction, where nothing happens, to the last level's / reduction.
                Checked where it lies on the CPU; on an accelerator, where looking would wait for the device, it is
                taken as it is.
            reduction: r, by which HR was reduced after its capture, at least 1: a number, or "B". A captured level
                of scale s is at s / r there.

        Returns:
            "B 3 H W" in [-1, 1], on HR's device and of its type.

        Raises:
            ValueError: an argument is outside its shape or range.
        """
        _check_images(hr, scale, reduction)
        self._check_range(scale, reduction)
        precise = torch.promote_types(hr.dtype, torch.float32)
        curves = self._curves(scale, reduction).to(hr.device, precise)
        lr, (height, width) = torch.empty_like(hr), hr.shape[-2:]
        lengths = _fast_length(height + 2 * MARGIN), _fast_length(width + 2 * MARGIN)
        place = _place(_squares(*lengths, curves).flatten(), self.rings)
        channels = 3 if height * width <= _TOGETHER else 1
        for n in range(len(hr)):
            for part, curve, out in zip(*(x.split(channels) for x in (hr[n], curves[n], lr[n])), strict=True):
                transfer = _look_up(curve, *place).exp_()
                light = _filter(to_linear(part.to(precise) / 2 + 0.5), transfer, *lengths)
                out.copy_(to_srgb(light).mul_(2).sub_(1))
        return lr

    def _curves(self, scale: Tensor, reduction: float | Tensor) -> Tensor:
        """Log H at the rings' frequencies, "B 3 R", of the tables' type."""
        levels, rings = self.levels, torch.arange(self.rings, device=self.levels.device)
        reduced = reduction.to(levels) if isinstance(reduction, Tensor) else reduction
        at = scale.to(levels, non_blocking=True) * reduced  # on the grid that HR was captured on
        upper = torch.bucketize(at, levels).clamp(1, len(levels) - 1)
        low, high = levels[upper - 1], levels[upper]
        from_hr = upper == 1
        share = torch.where(from_hr, (at**2 - low**2) / (high**2 - low**2), (low**-2 - at**-2) / (low**-2 - high**-2))
        squares = (rings.to(levels) * CORNER / (self.rings - 1)) ** 2
        at_low, at_high = (torch.where(from_hr, 1, at / level) / reduced for level in (low, high))
        of_low, of_high = (
            _look_up(
                self.log_transfer.index_select(0, index),
                *_place((stretch[:, None, None] ** 2 * squares).to(self.log_transfer), self.rings),
            )
            for index, stretch in ((upper - 1, at_low), (upper, at_high))
        )
        share = share.to(self.log_transfer)[:, None, None]
        return (1 - share) * of_low + share * of_high

    def _check_range(self, scale: Tensor, reduction: float | Tensor) -> None:
        reductions = torch.as_tensor(reduction, dtype=torch.float64)
        if reductions.device.type == "cpu" and not ((reductions >= 1) & (reductions < math.inf)).all():
            raise ValueError(f"reduction={reductions.tolist()}: must be finite and at least 1")
        if scale.device.type != "cpu" or reductions.device.type != "cpu":
            return
        low, high = self.scales[0] / reductions.expand_as(scale), self.scales[-1] / reductions.expand_as(scale)
        rounding = 1e-6  # of float32 scales
        wrong = ~((scale.double() >= low - rounding) & (scale.double() <= high + rounding))
        if wrong.any():
            n = int(wrong.nonzero()[0])
            raise ValueError(f"scale={float(scale[n]):g}: must lie in [{float(low[n]):g}, {float(high[n]):g}]")


def to_linear(value: Tensor) -> Tensor:
    """SRGB value -> linear light (IEC 61966-2-1), both in [0, 1]; clipped."""
    value = value.clamp(0, 1)
    power = value.add(0.055).log_().mul_(2.4).exp_().mul_(1.055**-2.4)  # ((value + 0.055) / 1.055)^2.4, faster
    return torch.where(value <= 0.04045, value / 12.92, power)


def to_srgb(light: Tensor) -> Tensor:
    """Linear light -> sRGB value (IEC 61966-2-1), both in [0, 1]; clipped."""
    light = light.clamp(0, 1)
    power = light.log().mul_(1 / 2.4).exp_().mul_(1.055).sub_(0.055)  # 1.055 light^(1 / 2.4) - 0.055
    return torch.where(light <= 0.0031308, light * 12.92, power)


def _check_images(hr: Tensor, scale: Tensor, reduction: float | Tensor) -> None:
    if hr.ndim != 4 or hr.shape[1] != 3 or min(hr.shape[-2:]) < SMALLEST_SIDE or not hr.is_floating_point():
        rule = f"must be floating-point of shape (B, 3, H, W) with H and W at least {SMALLEST_SIDE}"
        raise ValueError(f"hr={hr.dtype} {tuple(hr.shape)}: {rule}")
    if scale.shape != hr.shape[:1]:
        raise ValueError(f"scale: shape {tuple(scale.shape)}: must be ({len(hr)},), one for each image")
    if isinstance(reduction, Tensor) and reduction.ndim and reduction.shape != scale.shape:
        raise ValueError(f"reduction: shape {tuple(reduction.shape)}: must be one number or ({len(hr)},)")


def _filter(light: Tensor, transfer: Tensor, rows: int, columns: int) -> Tensor:
    """Filter "C H W", mirrored beyond its borders.

    Args:
        light: "C H W".
        transfer: H at `_squares`, "C F".
        rows, columns: lengths of the transforms, even.
    """
    (height, width), half = light.shape[-2:], rows // 2
    spectrum = torch.fft.rfft(_mirrored(light, columns, -1))
    spectrum = torch.fft.fft(_mirrored(spectrum, rows, -2), dim=-2)
    transfer = transfer.unflatten(-1, (half + 1, -1))
    spectrum[..., : half + 1, :] *= transfer
    spectrum[..., half + 1 :, :] *= transfer[..., 1:half, :].flip(-2)  # rows of negative frequencies
    spectrum = torch.fft.ifft(spectrum, dim=-2)[..., MARGIN : MARGIN + height, :]
    return torch.fft.irfft(spectrum, columns)[..., MARGIN : MARGIN + width]


def _mirrored(x: Tensor, length: int, axis: int) -> Tensor:
    """Continue an axis by mirroring: MARGIN places before its start, `length` in all."""
    side, stop, pieces = x.shape[axis], length - MARGIN, []
    for n in range(-MARGIN // side, -(-stop // side)):
        first, last = max(0, -MARGIN - n * side), min(side, stop - n * side)
        piece = x.narrow(axis, first if n % 2 == 0 else side - last, last - first)
        pieces.append(piece if n % 2 == 0 else piece.flip(axis))
    return torch.cat(pieces, axis)


def _squares(rows: int, columns: int, like: Tensor) -> Tensor:
    """Squared frequencies of a transform of these even lengths, none of them negative: "rows/2+1 columns/2+1"."""
    down, right = (
        torch.arange(length // 2 + 1, dtype=like.dtype, device=like.device) / length for length in (rows, columns)
    )
    return down.square()[:, None] + right.square()


def _fast_length(least: int) -> int:
    """The smallest even length from `least` on without a prime factor above 5."""
    length = least + least % 2
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 2


def _place(square: Tensor, rings: int) -> tuple[Tensor, Tensor]:
    """Of squared frequencies "... F": the ring below each, and the square's share of the way to the next ring."""
    square = (square / (CORNER / (rings - 1)) ** 2).clamp(max=(rings - 1) ** 2)  # in rings
    ring = square.sqrt().floor_().clamp_(max=rings - 2)
    return ring.long(), (square - ring.square()) / (2 * ring + 1)


def _look_up(curves: Tensor, ring: Tensor, share: Tensor) -> Tensor:
    """Curves "... R" at places "... F" of `_place`, linear in the squared frequency between rings; "... F"."""
    ring = ring.expand(*curves.shape[:-1], -1)
    return torch.lerp(torch.gather(curves, -1, ring), torch.gather(curves, -1, ring + 1), share)


def _warn(labels: Sequence[str], shifts: Tensor) -> None:
    """Warn of levels whose windows seldom count, or lie beside HR's; shifts "N K" in pixels, NaN: does not count."""
    for label, shift in zip(labels[1:], shifts.T[1:], strict=True):
        counts = ~shift.isnan()
        if (share := float(counts.double().mean())) <= 0.5:
            why = "the others are dark, noisy or flat, or show another picture"
            warnings.warn(f"level {label}: {share:.0%} of the windows count for the optics: {why}", stacklevel=3)
        if counts.any() and (median := float(shift[counts].median())) >= BESIDE:
            why = "the optics leave this out, the noise of draws does not: register the images"
            warnings.warn(f"level {label}: LR lies {median:.1f} pixels beside HR (median): {why}", stacklevel=3)


def _ring_sums(pixels: np.ndarray, most: int, rings: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the windows of a scene "K H W 3": Re L conj I, |I|^2, and |I|^2 f^2, each "K 3 R" float64.

    Also the windows' shifts in pixels, "N K", NaN where a window does not count.
    """
    spectra = _spectra(pixels, most)
    height = spectra.shape[-2]
    width = min(WINDOW, pixels.shape[2])
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    square = (rows.square() + columns.square()).double()
    hr = spectra[:, :1]
    cross = spectra * hr.conj()
    count, shift, phase = _register(cross, spectra, rows, columns)
    cross = torch.einsum("nk,nkchw->kchw", count, (cross * phase[:, :, None]).real.double())
    energy = torch.einsum("nk,nchw->kchw", count, hr[:, 0].abs().square().double())
    cross /= _gain(cross, energy, square, max(LOW_BAND, 3 / min(height, width)))[..., None, None]
    ring = (square.sqrt() / (CORNER / (rings - 1))).round().long().flatten()
    sums = (
        torch.zeros(*part.shape[:2], rings, dtype=torch.float64).index_add_(-1, ring, part.flatten(-2))
        for part in (cross, energy, energy * square)
    )
    return *sums, torch.where(count > 0, shift, torch.nan)  # type: ignore[return-value]


def _spectra(pixels: np.ndarray, most: int) -> Tensor:
    """Spectra of linear light in Hann windows without their means, "N K 3 h w//2+1"."""
    sides = [min(WINDOW, side) for side in pixels.shape[1:3]]
    starts = [
        np.linspace(0, whole - side, round((whole - side) / (side / 2)) + 1).astype(int)
        for whole, side in zip(pixels.shape[1:3], sides, strict=True)
    ]
    places = [(top, left) for top in starts[0] for left in starts[1]]
    # Not evenly spaced: with as many rows as windows, these would all lie in one column.
    chosen = np.sort(np.random.default_rng(0).permutation(len(places))[:most])
    height, width = sides
    windows = np.stack(
        [pixels[:, top : top + height, left : left + width] for top, left in (places[n] for n in chosen)]
    )
    table = to_linear(torch.arange(256) / 255)
    light = table[torch.from_numpy(windows).int()].movedim(-1, 2)
    light = light - light.mean((-2, -1), keepdim=True)
    return torch.fft.rfft2(light * torch.hann_window(height)[:, None] * torch.hann_window(width))


def _register(cross: Tensor, spectra: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What undoes the shift of every level of every window.

    Args:
        cross: L conj I, "N K 3 h w". spectra: "N K 3 h w", HR first. rows, columns: frequencies.

    Returns:
        Whether the window counts, "N K" float64 of 0 and 1; its shift in pixels, "N K"; and the factors "N K h w".
    """
    squared = rows.square() + columns.square()
    band = (squared > 0) & (squared <= SHIFT_BAND**2)
    frequency = torch.stack(torch.broadcast_tensors(rows, columns))[:, band]  # "2 F"
    common = cross.sum(2)[..., band]
    shift = torch.zeros(*common.shape[:2], 2)
    for _ in range(4):
        aligned = common * _phase(shift, frequency)
        weight = aligned.abs()
        normal = torch.einsum("nkf,if,jf->nkij", weight, frequency, frequency) + 1e-12 * torch.eye(2)
        toward = torch.einsum("nkf,if->nki", weight * aligned.angle(), frequency)
        shift = shift - torch.linalg.solve(normal, toward) / (2 * math.pi)
    energy = spectra[..., band].abs().square().sum((2, 3))
    agreement = (common * _phase(shift, frequency)).real.sum(-1)
    coherent = agreement > LEAST_COHERENCE * (energy * energy[:, :1]).sqrt()
    length = torch.linalg.vector_norm(shift, dim=-1)
    counts = coherent & (length <= LARGEST_SHIFT)
    everywhere = torch.stack(torch.broadcast_tensors(rows, columns)).flatten(1)
    return counts.double(), length, _phase(shift, everywhere).unflatten(-1, squared.shape)


def _phase(shift: Tensor, frequency: Tensor) -> Tensor:
    """exp(2 pi i f . d): brings an image that lies `shift` "... 2" pixels down and right back; "... F"."""
    turns = torch.einsum("...i,if->...f", shift, frequency) * (2 * math.pi)
    return torch.polar(torch.ones_like(turns), turns)


def _gain(cross: Tensor, energy: Tensor, square: Tensor, band: float) -> Tensor:
    """H's limit at f = 0, "K 3": where a line in f^2 through cross / energy, weighted by energy, meets zero."""
    low = (square > 0) & (square <= band**2)
    u, weight, product = square[low], energy[..., low], cross[..., low]
    total, first, second = (((u**power) * weight).sum(-1) for power in (0, 1, 2))
    value, slope = product.sum(-1), (u * product).sum(-1)
    determinant = total * second - first**2
    gain = (second * value - first * slope) / determinant
    return torch.where((determinant > 0) & (gain > 0), gain, torch.ones_like(gain))


def _pooled(cross: Tensor, energy: Tensor, squared: Tensor) -> list[Tensor]:
    """The rings' sums "K 3 R" of each channel, over its energy. A weak channel gets a share of all channels' sums.

    Under a warm light (a tenth of the blue), blue's detail in LR is green's, from demosaicing. Alone, blue's H was 1.7
    at x4 and 0.05 cycles per pixel, where 0.8 is right.
    """
    own = energy[..., 1:].sum(-1, keepdim=True)
    strength = (own / own.amax(1, keepdim=True).clamp(min=1e-30)) ** 2
    share = strength / (strength + HALF_OWN**2)
    own, whole = own.clamp(min=1e-30), own.sum(1, keepdim=True).clamp(min=1e-30)
    return [share * x / own + (1 - share) * x.sum(1, keepdim=True) / whole for x in (cross, energy, squared)]


def _on_nodes(cross: Tensor, energy: Tensor, squared: Tensor) -> Tensor:
    """Log H "K 3 R" at the rings' own frequencies, from the rings' sums; where a ring is empty, from its neighbours.

    A ring's ratio belongs to its energy's mean f^2, which lies below its middle; between those log H is linear in f^2.
    """
    levels, channels, rings = cross.shape
    nodes = (np.arange(rings) * CORNER / (rings - 1)) ** 2
    table = np.zeros((levels, channels, rings))
    for level in range(1, levels):
        for channel in range(channels):
            found = energy[level, channel].numpy() > 0
            found[0] = False
            e = energy[level, channel].numpy()[found]
            ratio = np.maximum(cross[level, channel].numpy()[found] / e, FLOOR)
            at = squared[level, channel].numpy()[found] / e
            table[level, channel] = np.interp(nodes, [0.0, *at], [0.0, *np.log(ratio)])
    return torch.from_numpy(table)
