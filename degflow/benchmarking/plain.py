"""The released procedure, run on our networks: SciPy's RK45 through host memory, and the decoder as in the paper."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from degflow.degrader import Degrader, pad
from degflow.flow import PathFlow, Velocity
from degflow.models.autoencoder import Decoder, Expand
from degflow.models.precision import computing
from degflow.models.residual import Guide, lost_detail

START = 1e-3  # where the released procedure's integration begins on the published path


class Swept(NamedTuple):
    """LR images "N 3 H W" of one HR image, and how often the flow's network was evaluated."""

    images: Tensor
    evaluations: int


# (velocity, state "1 *S" at the first time, that time, later times) -> the states there, and the evaluations
Solve = Callable[[Velocity, Tensor, float, list[float]], tuple[list[Tensor], int]]


def rk45(tolerance: float) -> Solve:
    """SciPy's RK45 with this rtol and atol."""
    from scipy.integrate import solve_ivp

    def solve(velocity: Velocity, begin: Tensor, first: float, times: list[float]) -> tuple[list[Tensor], int]:
        def field(at: float, flat: np.ndarray) -> np.ndarray:
            state = torch.from_numpy(flat).to(begin).view_as(begin)
            return velocity(state, begin.new_tensor([at])).flatten().cpu().numpy()

        if times[-1] == first:
            return [begin] * len(times), 0
        flat, span = begin.flatten().cpu().numpy(), (first, times[-1])
        solution = solve_ivp(field, span, flat, "RK45", times, rtol=tolerance, atol=tolerance)
        return [torch.from_numpy(state).to(begin).view_as(begin) for state in solution.y.T.copy()], solution.nfev

    return solve


@torch.inference_mode()
def plainly(degrader: Degrader, hr: Tensor, scales: Sequence[float], solve: Solve, start: float = START) -> Swept:
    """Degrade one image with any solver, and decode once per scale.

    A published flow is integrated once, up to the last scale. A residual flow is integrated for every scale, always
    from the Gaussian sample of seed 0.

    Args:
        degrader: whose networks are used.
        hr: "1 3 H W".
        scales: increasing.
        solve: the solver.
        start: the time that the encoder's latent is given, on the published path.
    """
    calls, made = 0, []
    with computing("float32", hr.device.type):
        for latent, skips, finish, count in _latents(degrader, hr, scales, solve, start):
            calls += count
            made.append(finish(plain_decode(degrader.autoencoder.decoder, latent, skips)))
    height, width = hr.shape[-2:]
    return Swept(torch.cat(made)[..., :height, :width].clamp(-1, 1), calls)


def _latents(
    degrader: Degrader, hr: Tensor, scales: Sequence[float], solve: Solve, start: float
) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Callable[[Tensor], Tensor], int]]:
    """Each scale's latent, the skips to decode it with, what finishes the image, and the evaluations that it took."""
    flow, encode, image = degrader.flow, degrader.autoencoder.encode, pad(hr, degrader.multiple)
    times = degrader.timeline.time(torch.tensor(scales, dtype=torch.float64))
    source, skips = encode(image)
    if isinstance(flow, PathFlow):
        states, calls = solve(flow.network, source, start, times.clamp(start, 1).tolist())
        yield from ((state, skips, lambda image: image, 0 if n else calls) for n, state in enumerate(states))
        return
    for scale, time in zip(scales, times.to(source)[:, None], strict=True):
        after = pad(flow.optics(hr, torch.tensor([scale], dtype=torch.float64)), degrader.multiple)
        latent, skips = encode(after)
        guide = Guide(latent, source, lost_detail(image, after, flow.compression), time)
        seed, (_, deviation) = torch.zeros(1, dtype=torch.int64, device=hr.device), flow.spread.at(time)
        begin = flow.spread.sample(seed, time, latent.shape[2], latent.shape[3])
        (y,), calls = solve(lambda y, tau, guide=guide: flow.network(y, tau, guide), begin, 0.0, [1.0])
        grain = flow.grain.gain(image, after, time) * flow.grain.sample(seed, time, image.shape[2], image.shape[3])

        def finish(image: Tensor, grain: Tensor = grain, time: Tensor = time) -> Tensor:
            return flow.cutoff(image + grain, time)

        yield latent + guide.gain * deviation * y, skips, finish, calls


def released(degrader: Degrader, hr: Tensor, scales: Sequence[float]) -> Swept:
    """The released procedure: RK45 at 1e-5."""
    return plainly(degrader, hr, scales, rk45(1e-5))


def exact(degrader: Degrader, hr: Tensor, scales: Sequence[float]) -> Swept:
    """RK45 at 1e-7 in float64 from time 0, the reference of every solver."""
    return plainly(copy.deepcopy(degrader).double(), hr.double(), scales, rk45(1e-7), 0.0)


def plain_decode(decoder: Decoder, latent: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
    """The decoder as in the paper: each 1x1 convolution by itself, each skip concatenated.

    Args:
        decoder: whose weights are used.
        latent, skips: as of `ResidualAutoencoder.decode`.
    """
    x, expands = decoder.stem(latent), cast(Iterable[Expand], decoder.expands)
    for level, expand, skip in zip(decoder.levels[:-1], expands, reversed(skips), strict=True):
        x = expand.narrow(F.pixel_shuffle(expand.widen(level(x)), 2))
        x = expand.merge(torch.cat((x, skip), 1) if expand.hr_skips else x)
    return decoder.head(F.gelu(decoder.levels[-1](x)))
