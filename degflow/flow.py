"""Fixed-step integration of dz/dt = v(z, t), with an end time per image and dense output for several."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["euler", "midpoint", "heun", "rk4"]
SOLVERS: tuple[str, ...] = get_args(Solver)


def integrate(velocity: Velocity, z0: Tensor, end_time: Tensor, *, steps: int = 2, solver: str = "rk4") -> Tensor:
    """Carry each latent from time 0 to its end time(s).

    Args:
        velocity: (z "B *S", time "B") -> dz/dt "B *S".
        z0: "B *S" at time 0.
        end_time: "B": each sample takes `steps` steps of end_time / steps. "B N": one integration over [0, 1] on a
            fixed grid of `steps` steps, read off at the N times by cubic Hermite interpolation, so that the result at
            one time does not depend on which others are asked for.
        steps: number of steps, >= 1.
        solver: euler, midpoint, heun or rk4 (orders 1, 2, 2, 4).

    Returns:
        "B *S" or "B N *S".

    Raises:
        ValueError: unknown solver, steps < 1, or an end time outside [0, 1].
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver}: must be one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    if end_time.numel() and not bool(((end_time >= 0) & (end_time <= 1)).all()):
        raise ValueError(f"end_time from {float(end_time.min())} to {float(end_time.max())}: must lie in [0, 1]")
    if end_time.ndim == 1:
        return _to_end(velocity, z0, end_time, steps, solver)
    return _dense(velocity, z0, end_time, steps, solver)


def _to_end(velocity: Velocity, z0: Tensor, end_time: Tensor, steps: int, solver: str) -> Tensor:
    z, h = z0, end_time.to(torch.float32 if z0.dtype.itemsize < 4 else z0.dtype) / steps
    for n in range(steps):
        z, _ = _step(velocity, z, n * h, h, solver)
    return z


def _dense(velocity: Velocity, z0: Tensor, end_time: Tensor, steps: int, solver: str) -> Tensor:
    times = end_time.to(torch.float32 if z0.dtype.itemsize < 4 else z0.dtype)
    h = torch.full((len(z0),), 1 / steps, dtype=times.dtype, device=z0.device)
    nodes, slopes = [z0], []
    for n in range(steps):
        z, slope = _step(velocity, nodes[-1], n * h, h, solver)
        nodes.append(z)
        slopes.append(slope)
    slopes.append(velocity(nodes[-1], torch.ones_like(h)))
    index = (times * steps).long().clamp(max=steps - 1)
    out = [
        torch.stack([_hermite(nodes, slopes, int(k), times[b, n], 1 / steps, b) for n, k in enumerate(row)])
        for b, row in enumerate(index.tolist())
    ]
    return torch.stack(out)


def _hermite(nodes: list[Tensor], slopes: list[Tensor], k: int, time: Tensor, h: float, sample: int) -> Tensor:
    """Cubic Hermite interpolation between grid nodes k and k + 1; exact at the nodes."""
    u = time / h - k
    z0, z1, v0, v1 = (x[sample] for x in (nodes[k], nodes[k + 1], slopes[k], slopes[k + 1]))
    w = 1 - u
    blend = w * w * (1 + 2 * u) * z0 + u * u * (1 + 2 * w) * z1 + h * u * w * (w * v0 - u * v1)
    return blend.to(z0.dtype)


def _step(velocity: Velocity, z: Tensor, time: Tensor, h: Tensor, solver: str) -> tuple[Tensor, Tensor]:
    """One step; returns z(time + h) and the slope at its start."""
    dt = h.view((-1,) + (1,) * (z.ndim - 1)).to(z.dtype)
    k1 = velocity(z, time)
    if solver == "euler":
        return z + dt * k1, k1
    if solver == "midpoint":
        return z + dt * velocity(z + dt / 2 * k1, time + h / 2), k1
    if solver == "heun":
        return z + dt / 2 * (k1 + velocity(z + dt * k1, time + h)), k1
    k2 = velocity(z + dt / 2 * k1, time + h / 2)
    k3 = velocity(z + dt / 2 * k2, time + h / 2)
    k4 = velocity(z + dt * k3, time + h)
    return z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4), k1
