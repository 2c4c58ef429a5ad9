"""How an HR image's latent becomes that of an LR image: fixed-step integration, and the two flows that use it.

`PathFlow` is the published one: time is the degradation, the path begins at the HR latent. `ResidualFlow` begins at the
latent of what the optics leave of HR, and draws what a captured image adds to that. A degrader asks either of them for
latents in the same way (`Flow`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor, nn

Velocity = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["euler", "midpoint", "heun", "rk4", "rk5"]
SOLVERS: tuple[str, ...] = get_args(Solver)
SOLVER: Solver = "rk5"
STEPS = 3  # of SOLVER: 18 evaluations; `degflow benchmark` (accuracy) compares them with the exact solution

# Explicit Runge-Kutta methods: rows of the stages after the first, then weights. A stage's time is its row's sum.
_METHODS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": ((), (1.0,)),
    "midpoint": (((0.5,),), (0.0, 1.0)),
    "heun": (((1.0,),), (0.5, 0.5)),
    "rk4": (((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "rk5": (  # Butcher's of six stages with Boole's weights (Butcher 1964, On Runge-Kutta processes of high order)
        (
            (1 / 4,),
            (1 / 8, 1 / 8),
            (0.0, -1 / 2, 1.0),
            (3 / 16, 0.0, 0.0, 9 / 16),
            (-3 / 7, 2 / 7, 12 / 7, -12 / 7, 8 / 7),
        ),
        (7 / 90, 0.0, 32 / 90, 12 / 90, 32 / 90, 7 / 90),
    ),
}


def check_solver(solver: str, steps: int) -> None:
    """Raise ValueError for an unknown solver, or fewer steps than one."""
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver}: must be one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")


def integrate(velocity: Velocity, z0: Tensor, end_time: Tensor, *, steps: int = STEPS, solver: str = SOLVER) -> Tensor:
    """Carry each latent from time 0 to its end time(s).

    Args:
        velocity: (z "B *S", time "B") -> dz/dt "B *S".
        z0: "B *S" at time 0.
        end_time: "B": each sample takes `steps` steps of end_time / steps. "B N": one integration on a fixed grid of
            `steps` steps over [0, 1], up to the last time. Cubic Hermite interpolation gives the N times, so a result
            does not depend on the other times. Their values are read: on the CPU this never waits for a GPU.
        steps: number of steps, >= 1.
        solver: euler, midpoint, heun, rk4 or rk5 (orders 1, 2, 2, 4, 5; read off between steps at most 4).

    Returns:
        "B *S" or "B N *S".

    Raises:
        ValueError: unknown solver, steps < 1, or an end time outside [0, 1].
    """
    check_solver(solver, steps)
    end_time = end_time.to("cpu", torch.float32 if z0.dtype.itemsize < 4 else z0.dtype)
    if not bool(((end_time >= 0) & (end_time <= 1)).all()):
        raise ValueError(f"end_time from {float(end_time.min())} to {float(end_time.max())}: must lie in [0, 1]")
    if end_time.ndim == 1:
        return _to_end(velocity, z0, end_time, steps, solver)
    return _dense(velocity, z0, end_time, steps, solver)


def _to_end(velocity: Velocity, z0: Tensor, end_time: Tensor, steps: int, solver: str) -> Tensor:
    z, h = z0, _beside(end_time, z0) / steps
    for n in range(steps):
        z, _ = _step(velocity, z, n * h, h, solver)
    return z


def _dense(velocity: Velocity, z0: Tensor, end_time: Tensor, steps: int, solver: str) -> Tensor:
    flat = end_time.flatten()
    interval = (flat * steps).ceil().long() - 1  # interval n is (n / steps, (n + 1) / steps]; -1 is time 0
    order = interval.argsort(stable=True)
    counts = torch.bincount(interval + 1, minlength=1).tolist()
    samples = _beside(order // end_time.shape[1], z0).split(counts)
    places = _beside(flat[order] * steps, z0).split(counts)  # in steps
    h = z0.new_full((len(z0),), 1 / steps, dtype=end_time.dtype)
    read, z, slope = [z0.index_select(0, samples[0])], z0, None
    for n, (sample, place) in enumerate(zip(samples[1:], places[1:], strict=True)):
        ahead, slope = _step(velocity, z, n * h, h, solver, slope)
        slope_ahead = velocity(ahead, (n + 1) * h)
        u = (place - n).to(z0.dtype).view((-1,) + (1,) * (z0.ndim - 1))
        begin, v0, end, v1 = (x.index_select(0, sample) for x in (z, slope, ahead, slope_ahead))
        read.append(_hermite(begin, v0, end, v1, u, 1 / steps))
        z, slope = ahead, slope_ahead
    return torch.cat(read).index_select(0, _beside(order.argsort(), z0)).unflatten(0, end_time.shape)


def _beside(host: Tensor, z: Tensor) -> Tensor:
    """A tensor of the CPU on z's device."""
    return host.to(z.device, non_blocking=True)


def _hermite(z0: Tensor, v0: Tensor, z1: Tensor, v1: Tensor, u: Tensor, h: float) -> Tensor:
    """Cubic Hermite interpolation at the fraction u of a step of length h; exact at its ends."""
    w = 1 - u
    return w * w * (1 + 2 * u) * z0 + u * u * (1 + 2 * w) * z1 + h * u * w * (w * v0 - u * v1)


def _step(
    velocity: Velocity, z: Tensor, time: Tensor, h: Tensor, solver: str, k1: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step; returns z(time + h) and the slope at its start, computed unless it is known."""
    rows, weights = _METHODS[solver]
    dt = h.view((-1,) + (1,) * (z.ndim - 1)).to(z.dtype)
    slopes = [velocity(z, time) if k1 is None else k1]
    for row in rows:
        slopes.append(velocity(_moved(z, dt, row, slopes), time + sum(row) * h))
    return _moved(z, dt, weights, slopes), slopes[0]


def _moved(z: Tensor, dt: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return z + dt * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


class Seen(NamedTuple):
    """An encoded image: itself, padded to whole latent pixels, its latent and its skips (none: too large to keep)."""

    image: Tensor  # "B 3 H W"
    latent: Tensor  # "B C_z h w"
    skips: tuple[Tensor, ...]


See = Callable[[Tensor, bool], Seen]  # (image "B 3 H W", whether the decoder will need its skips) -> Seen


Finish = Callable[[Tensor, int, int], Tensor]  # (a decoded window "B 3 H W", its top, its left in pixels) -> the same


class Carried(NamedTuple):
    """What one LR image of each HR image is decoded from."""

    latent: Tensor  # "B C_z h w"
    seen: Seen  # the encoded image whose skips the decoder gets
    finish: Finish | None  # what is done with the decoded image, window by window


class Draw(NamedTuple):
    """What is asked for: N LR images of each of B HR images. Its tensors lie on the CPU, wherever the images lie."""

    scale: Tensor  # "B N"
    time: Tensor  # "B N", of the scales, in [0, 1]
    seed: Tensor  # int64 "B N", decides what is drawn
    many: bool  # True: N scales of each image (N may be 1); False: one scale for each image
    spread: float  # 1: draws; 0: their mean
    steps: int
    solver: str
    place: Tensor  # int64 "B 2", row and column of each latent in that of the whole image


class Flow(Protocol):
    """What carries latents from HR to LR images; a degrader knows no more of it than this."""

    network: nn.Module
    latent_channels: int  # C_z
    working_channels: float  # numbers alive at the peak of an evaluation of the network, per latent pixel
    multiple: int  # the latent's height and width must be multiples of this
    has_solver: bool  # whether it integrates at all
    draws: bool  # whether LR images are drawn: the seed and the spread matter
    solver: tuple[str, int]  # the solver and its number of steps unless others are asked for
    images: int  # images and latents that are held at once, for each HR image
    reach: int  # pixels around a pixel that `Carried.finish` sees
    finish_channels: int  # numbers per image pixel that are held for it
    optics_channels: float  # numbers per image pixel at the peak of the optics, which see the whole image

    def guide(self, hr: Tensor, scale: Tensor) -> Tensor:
        """The image whose skips the decoder gets, "B 3 H W", for the scales "B"."""
        ...

    def carry(self, see: See, hr: Tensor, draw: Draw) -> Iterator[Carried]:
        """What the N LR images are decoded from, in turn.

        Args:
            see: encodes an image.
            hr: "B 3 H W" in [-1, 1].
            draw: what is asked for.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What a file holds of it beside its weights, as plain values."""
        ...


class PathFlow(nn.Module):
    """The published flow (DegFlow, section 2.2): dz/dt = v(z, t) from the HR latent, decoded with HR's skips.

    It is a function of HR: seeds and spread do not matter.

    Args:
        network: v, called with "B C_z h w" and "B".
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.has_solver, self.draws = network, True, False
        config = cast(Any, network).config
        self.latent_channels: int = config.latent_channels
        self.working_channels: float = config.working_channels
        self.multiple: int = config.multiple
        self.solver, self.images, self.optics_channels = (SOLVER, STEPS), 1, 0.0
        self.reach, self.finish_channels = 0, 0

    def guide(self, hr: Tensor, scale: Tensor) -> Tensor:
        """HR itself."""
        return hr

    def carry(self, see: See, hr: Tensor, draw: Draw) -> Iterator[Carried]:
        """See `Flow`; one integration gives all N times, and does not depend on N."""
        seen = see(hr, True)
        time = draw.time if draw.many else draw.time[:, 0]

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            return self.network(z, t).to(z.dtype)

        latents = integrate(velocity, seen.latent, time, steps=draw.steps, solver=draw.solver)
        for latent in latents.unbind(1) if draw.many else (latents,):
            yield Carried(latent.contiguous(), seen, None)

    def describe(self) -> dict[str, Any]:
        """See `Flow`."""
        return {"velocity": asdict(cast(Any, self.network).config)}
