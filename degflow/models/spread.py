"""Gaussian noise with a spectrum: filtered white noise of `counter`, for latent residuals and for the grain."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.models.counter import gaussian
from degflow.models.precision import exactly


class Spread(nn.Module):
    """A stationary Gaussian field of some channels at some times: filters of white noise, linear between the times.

    Args:
        channels: C.
        times: "K" increasing from 0 to 1; there is no noise at time 0, which is HR itself.
        side: of the filters, odd; 1: neighbours have nothing in common.
        first: number of the first channel's white noise, even; two fields of one seed need numbers of their own.
    """

    times: Tensor
    filters: Tensor

    def __init__(self, channels: int, times: tuple[float, ...], side: int = 1, first: int = 0):
        super().__init__()
        self.first = first
        if len(times) < 2 or times[0] != 0 or not all(a < b for a, b in pairwise(times)):
            raise ValueError(f"times={list(times)}: at least two, the first 0, increasing")
        self.register_buffer("times", torch.tensor(times, dtype=torch.float32))
        self.register_buffer("filters", torch.zeros(len(times), channels, channels, side, side))

    @torch.no_grad()
    def fit(self, spectra: Tensor) -> None:
        """Take the cross-spectra at all times but the first.

        A filter is the spectrum's Hermitian root, which shifts no phase, cut to its middle. Each channel keeps its
        variance.

        Args:
            spectra: complex or real, "K-1 N N C C" for the frequencies of an N x N FFT; white noise of the covariance
                S has the spectrum S everywhere.
        """
        variance = spectra.diagonal(dim1=3, dim2=4).real.mean((1, 2)).clamp(min=0)
        filters = cut_filter(hermitian_root(spectra), self.filters.shape[-1])
        kept = filters.square().sum((2, 3, 4)).clamp(min=1e-30)
        self.filters[1:] = (filters * (variance / kept).sqrt()[:, :, None, None, None]).to(self.filters)

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Filters for unit variance, "B C C side side", and each channel's deviation, "B C 1 1", at the times "B"."""
        filters = self.filters_at(time)
        deviation = filters.square().sum((2, 3, 4)).sqrt().clamp(min=1e-12)
        return filters / deviation[:, :, None, None, None], deviation[:, :, None, None]

    def filters_at(self, time: Tensor) -> Tensor:
        """Filters that give the field its own strength, "B C C side side"."""
        after, weight = between(self.times, time)
        return torch.lerp(self.filters[after - 1], self.filters[after], weight[:, None, None, None, None])

    def sample(self, seed: Tensor, time: Tensor, height: int, width: int, place: Tensor | None = None) -> Tensor:
        """A field of unit variance in each channel, "B C H W"; a number depends on its seed, row and column alone.

        Args:
            seed: int64 "B".
            time: "B".
            height, width: H, W.
            place: int64 "B 2", row and column that each begins at, not negative; None: at 0, 0.
        """
        filters, _ = self.at(time)
        return filtered_noise(seed, filters, height, width, place, self.first)


def between(times: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the first of `times` after each time, and its weight beside the one before; both "B" as `time`."""
    after = torch.searchsorted(times, time.to(times).contiguous(), right=True).clamp(1, len(times) - 1)
    start, end = times[after - 1], times[after]
    return after, ((time.to(start) - start) / (end - start)).clamp(0, 1)


def filtered_noise(
    seed: Tensor, filters: Tensor, height: int, width: int, place: Tensor | None = None, first: int = 0
) -> Tensor:
    """Normal numbers of `gaussian`, filtered: "B C H W" for filters "B C C side side".

    In float32: autocast would round the factors to half precision.
    """
    batch, channels, _, side, _ = filters.shape
    noise = gaussian(seed, channels, height + side - 1, width + side - 1, place=place, first=first)
    with exactly(noise.device.type):
        filtered = F.conv2d(noise.to(filters).flatten(0, 1)[None], filters.flatten(0, 1), groups=batch)
    return filtered[0].unflatten(0, (batch, channels))


def hermitian_root(spectra: Tensor) -> Tensor:
    """R with R R^H = S for cross-spectra S "... C C"; what is not positive, by chance of the estimate, counts as 0."""
    values, vectors = torch.linalg.eigh((spectra + spectra.mH) / 2)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mH


def cut_filter(root: Tensor, side: int) -> Tensor:
    """Frequency responses "... N N C C" -> the filter's middle for conv2d, "... C C side side"; side odd, below N."""
    full = torch.fft.fftshift(torch.fft.ifft2(root, dim=(-4, -3)).real, dim=(-4, -3))
    first, length = root.shape[-3] // 2 - side // 2, side
    return full.narrow(-4, first, length).narrow(-3, first, length).movedim((-4, -3), (-2, -1)).flip(-2, -1)


def cross_spectra(signal: Tensor, side: int) -> Tensor:
    """Welch's estimate: "B C H W" -> complex "N N C C", N = `side`, in windows of Hann that overlap by half."""
    window = torch.hann_window(side, periodic=True, dtype=torch.float64, device=signal.device)
    window = window[:, None] * window
    cut = signal.double().unfold(2, side, max(1, side // 2)).unfold(3, side, max(1, side // 2)) * window
    found = torch.fft.fft2(cut).permute(4, 5, 1, 0, 2, 3).flatten(3)
    return found @ found.mH / (found.shape[-1] * window.square().sum())
