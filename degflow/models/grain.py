"""The grain: what decoded draws lack of captured noise, since a latent pixel cannot hold all that varies inside it.

It is Gaussian noise in image pixels,

    grain = gain * field

    gain^2  a curve of the detail that the optics took around a pixel, which is rms(HR - S) over 9 x 9 pixels
    field   stationary noise of three channels, with frequencies above one cycle in a latent pixel
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.models.spread import Spread, between, cross_spectra, filtered_noise

SIDE = 9  # of the filters, and of the square in which lost detail is measured, in image pixels
KNOTS = tuple(level / 127.5 for level in (0.5, 1, 2, 4, 8, 16, 32))  # of the curve: 8-bit levels, in [-1, 1]
FIRST = 2**16  # of the field's white noise: beyond the channels of any latent
SHARE = 0.5  # of the lacking power that is filled up: the rest is structure, as dots of demosaicing along edges
SMOOTH = 1e-2  # how much a curve's neighbours hold together, as a share of its pixels


class Grain(nn.Module):
    """The grain at some times; its curve and its filters are linear between them.

    Args:
        times: "K" increasing from 0 to 1; there is no grain at time 0.
    """

    curves: Tensor
    knots: Tensor

    def __init__(self, times: tuple[float, ...]):
        super().__init__()
        self.field = Spread(3, times, SIDE, FIRST)
        self.register_buffer("curves", torch.zeros(len(times), len(KNOTS)))  # gain^2 at the knots
        self.register_buffer("knots", torch.tensor((0.0, *KNOTS)), persistent=False)  # on the device, for no waiting

    @torch.no_grad()
    def fit(self, lack: "list[Lack]") -> None:
        """Take what was measured at all times but the first."""
        curves = torch.stack([each.curve() for each in lack])
        self.curves[1:] = SHARE * curves.to(self.curves)
        self.field.fit(torch.stack([each.spectrum(curve) for each, curve in zip(lack, curves, strict=True)]))

    def gain(self, hr: Tensor, skeleton: Tensor, time: Tensor) -> Tensor:
        """How strong the grain is at each pixel, "B 1 H W", for HR and its image S after the optics, "B 3 H W"."""
        after, weight = between(self.field.times, time)
        curve = F.pad(torch.lerp(self.curves[after - 1], self.curves[after], weight[:, None]), (1, 0))  # 0 at 0
        lost = lost_around(hr, skeleton)
        knots = self.knots
        above = torch.searchsorted(knots, lost, right=True).clamp(1, len(KNOTS))
        share = ((lost - knots[above - 1]) / (knots[above] - knots[above - 1])).clamp(0, 1)
        low, high = (curve.gather(1, n.flatten(1)).view_as(lost) for n in (above - 1, above))
        return torch.lerp(low, high, share).sqrt()

    def sample(self, seed: Tensor, time: Tensor, height: int, width: int, place: Tensor | None = None) -> Tensor:
        """The field, "B 3 H W"; arguments as of `Spread.sample`."""
        return filtered_noise(seed, self.field.filters_at(time), height, width, place, self.field.first)


def lost_around(hr: Tensor, skeleton: Tensor) -> Tensor:
    """The rms of HR - S in the square around each pixel, inside the image: "B 3 H W" -> "B 1 H W"."""
    square = (hr - skeleton).square().mean(1, keepdim=True)
    return F.avg_pool2d(square, SIDE, 1, SIDE // 2, count_include_pad=False).sqrt()


def _hats(lost: Tensor) -> Tensor:
    """The weights of the knots, "B K H W", that interpolate linearly from 0 at 0; constant beyond the last knot."""
    knots = lost.new_tensor((0.0, *KNOTS))[:, None, None]
    rising = (lost - knots[:-1]) / (knots[1:] - knots[:-1])
    falling = 1 - F.pad(rising[:, 1:], (0, 0, 0, 0, 0, 1))
    return torch.minimum(rising, falling).clamp(0, 1)


class Lack:
    """Measures at one time what draws lack: of captured images c, the means m and the draws d of the same HR images.

    Args:
        side: of the windows that spectra are estimated in, in pixels.
        compression: image pixels along a latent pixel.
    """

    def __init__(self, side: int, compression: int):
        frequency = torch.fft.fftfreq(side, dtype=torch.float64)
        radius = (frequency[:, None].square() + frequency.square()).sqrt() * compression
        # From nothing at one cycle in a latent pixel to all at one and a half.
        self.passed = (2 * radius - 2).clamp(0, 1)[:, :, None, None]
        self.side, self.pixels = side, 0
        self.spectra = torch.zeros(side, side, 3, 3, dtype=torch.complex128)
        self.product = torch.zeros(len(KNOTS), len(KNOTS), dtype=torch.float64)  # of the hats with one another
        self.power = torch.zeros(len(KNOTS), dtype=torch.float64)  # of the hats with (c - m)^2 - (d - m)^2
        self.sums = torch.zeros(len(KNOTS), dtype=torch.float64)  # of the hats
        self.batches = 0

    def add(self, hr: Tensor, skeleton: Tensor, captured: Tensor, mean: Tensor, draw: Tensor) -> None:
        """One more batch of images, each "B 3 H W" in [-1, 1]."""
        lost = lost_around(hr, skeleton)
        hats = _hats(lost).movedim(1, 0).flatten(1).double().cpu()
        lacked = ((captured - mean).square() - (draw - mean).square()).mean(1).flatten().double().cpu()
        weight = 1 / (lost.flatten().double().cpu() + KNOTS[0]).square()
        self.product += hats * weight @ hats.T
        self.power += hats * weight @ lacked
        self.sums += hats.sum(1)
        self.pixels += lacked.numel()
        self.spectra += (cross_spectra(captured - mean, self.side) - cross_spectra(draw - mean, self.side)).cpu()
        self.batches += 1

    def curve(self) -> Tensor:
        """gain^2 at the knots, not negative.

        Least squares, weighted because the missing power varies with the detail. A penalty keeps the ratios gain^2 /
        detail of neighbouring knots close, so a knot without data follows its neighbours.
        """
        knots = torch.tensor(KNOTS, dtype=torch.float64)
        steps = torch.eye(len(KNOTS), dtype=torch.float64).diff(dim=0)
        product = knots[:, None] * self.product * knots + SMOOTH * self.pixels * steps.T @ steps
        ratios = torch.linalg.lstsq(product, (knots * self.power)[:, None], driver="gelsd").solution[:, 0]
        return (ratios * knots).clamp(min=0)

    def spectrum(self, curve: Tensor) -> Tensor:
        """The field's cross-spectrum: what is lacked above one cycle in a latent pixel, over the mean of gain^2."""
        power = max(float(self.sums @ curve) / max(self.pixels, 1), 1e-30)
        return self.spectra * self.passed / (self.batches * power)
