"""The cutoff: a filter that takes from decoded images what a capture at their scale cannot hold.

A camera samples an LR image with a pitch of `scale` HR pixels, and a smooth interpolation brings it to HR's grid. So
almost nothing is left at frequencies near 1 / scale cycles per HR pixel and beyond. The optics' image has remains of HR
there, and a decoder adds some of its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.models.precision import exactly
from degflow.models.spread import between, cross_spectra

SIDE = 11  # of the filters, in image pixels
BEGIN, END = 0.6, 0.8  # cycles in an LR pixel between which the filter comes into effect; half a cycle is Nyquist's
ROUNDING = (1 / 127.5) ** 2 / 12  # variance that rounding to 8 bits adds, in [-1, 1]


class Cutoff(nn.Module):
    """The filter at some times, linear between them; it leaves an image as it is at time 0, and before a fit.

    Args:
        times: "K" increasing from 0 to 1.
    """

    reach = SIDE // 2  # pixels around a pixel that it sees
    times: Tensor
    filters: Tensor

    def __init__(self, times: tuple[float, ...]):
        super().__init__()
        self.register_buffer("times", torch.tensor(times, dtype=torch.float32))
        self.register_buffer("filters", torch.zeros(len(times), SIDE, SIDE))
        self.filters[:, SIDE // 2, SIDE // 2] = 1

    @torch.no_grad()
    def fit(self, scales: Sequence[float], excess: "Sequence[Excess]") -> None:
        """Take what was measured at some scales.

        A camera's pitch scales its frequencies. So another scale's filter follows from the next larger measured one.

        Args:
            scales: of all times but the first, increasing.
            excess: at increasing scales, up to the last of `scales`.
        """
        for number, scale in enumerate(scales, 1):
            larger = next(each for each in excess if each.scale > scale - 1e-4)
            self.filters[number] = larger.filter(scale).to(self.filters)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        """Filter "B 3 H W" at the times "B"; the border's pixels are repeated beyond it. In float32."""
        after, weight = between(self.times, time)
        filters = torch.lerp(self.filters[after - 1], self.filters[after], weight[:, None, None])
        batch, channels = image.shape[:2]
        with exactly(image.device.type):
            padded = F.pad(image.to(filters), (self.reach,) * 4, mode="replicate").flatten(0, 1)[None]
            kernels = filters.repeat_interleave(channels, 0)[:, None]
            return F.conv2d(padded, kernels, groups=len(kernels))[0].unflatten(0, (batch, channels))


class Excess:
    """Measures at one scale what draws have beyond captured images of the same HR images.

    Args:
        scale: of both.
        side: of the windows that spectra are estimated in, in pixels, even.
    """

    def __init__(self, scale: float, side: int):
        self.scale, self.side, self.batches = scale, side, 0
        self.captured = self.drawn = torch.zeros(side, side, dtype=torch.float64)

    def add(self, captured: Tensor, drawn: Tensor) -> None:
        """One more batch of images, each "B 3 H W" in [-1, 1]; captured ones are rounded to 8 bits, draws are not."""
        self.captured = self.captured + _power(captured, self.side) - ROUNDING
        self.drawn = self.drawn + _power(drawn, self.side)
        self.batches += 1

    def target(self, scale: float) -> Tensor:
        """The response that gives draws the captured power where they have more.

        Args:
            scale: the measured one or a smaller one.

        Returns:
            "side side" in [0, 1], at an FFT's frequencies.
        """
        frequency = torch.fft.fftfreq(self.side, dtype=torch.float64)
        radius = (frequency[:, None].square() + frequency.square()).sqrt() * self.scale
        effect = ((radius - BEGIN) / (END - BEGIN)).clamp(0, 1)
        own = torch.lerp(torch.ones_like(effect), (self.captured / self.drawn).clamp(0, 1).sqrt(), effect)
        place = frequency.abs() * self.side * min(1.0, scale / self.scale)
        away = (place[:, None] - torch.arange(self.side // 2 + 1)).abs()
        linear = (1 - away).clamp(min=0)  # "side side/2+1", weights of the frequencies on both sides
        return linear @ own[: self.side // 2 + 1, : self.side // 2 + 1] @ linear.T

    def filter(self, scale: float) -> Tensor:
        """The symmetric filter "SIDE SIDE" nearest to the target at a scale, by the error's power in a draw.

        Least squares, weighted with the power of the draws that were measured. Their power is 60 dB higher at low
        frequencies, where the gain must be 1 within 0.001. The weight is at least the power of 8-bit rounding.
        """
        turns = torch.arange(SIDE // 2 + 1) * torch.fft.fftfreq(self.side, dtype=torch.float64)[:, None]
        waves = torch.cos(2 * torch.pi * turns)
        basis = torch.einsum("xa,yb->xyab", waves, waves).reshape(self.side**2, -1)
        weight = (self.drawn / (self.batches * ROUNDING)).clamp(min=1).sqrt().reshape(-1, 1)
        solved = torch.linalg.lstsq(basis * weight, self.target(scale).reshape(-1, 1) * weight, driver="gelsd").solution
        quarter = solved.reshape(SIDE // 2 + 1, SIDE // 2 + 1)
        quarter[1:] /= 2
        quarter[:, 1:] /= 2
        mirrored = torch.arange(-(SIDE // 2), SIDE // 2 + 1).abs()
        whole = quarter[mirrored][:, mirrored]
        return whole / whole.sum()  # a flat image stays as it is


def _power(images: Tensor, side: int) -> Tensor:
    """Mean power of the channels, the same for frequencies that differ in sign or in axis: "side side"."""
    power = cross_spectra(images, side).diagonal(dim1=2, dim2=3).real.mean(2).cpu()
    for axis in (0, 1):
        power = (power + power.flip(axis).roll(1, axis)) / 2
    return (power + power.T) / 2
