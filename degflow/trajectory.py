"""Scale <-> time, and the paths through the latents of the trained scales (DegFlow, section 2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Number = TypeVar("Number", float, Tensor)


class SplinePoint(NamedTuple):
    """A path and its first three time derivatives at one time per sample, each "B *S"."""

    position: Tensor
    velocity: Tensor
    acceleration: Tensor
    jerk: Tensor


@dataclass(frozen=True)
class Timeline:
    """Scale <-> time: t = (s - s_1) / (s_m - s_1).

    Attributes:
        scales: of the levels, HR first, increasing: s_1, ..., s_m.

    Raises:
        ValueError: fewer than two scales, or not increasing.
    """

    scales: tuple[float, ...]

    def __post_init__(self):
        if len(self.scales) < 2 or self.scales[0] <= 0 or not all(a < b for a, b in pairwise(self.scales)):
            raise ValueError(f"scales={list(self.scales)}: at least two, above 0 and increasing")

    @property
    def low(self) -> float:
        """s_1."""
        return self.scales[0]

    @property
    def high(self) -> float:
        """s_m."""
        return self.scales[-1]

    @property
    def knots(self) -> tuple[float, ...]:
        """Times of the levels, e.g. (1, 2, 4) -> (0, 1/3, 1)."""
        return tuple(self.time(scale) for scale in self.scales)

    def time(self, scale: Number) -> Number:
        """In [0, 1] for scales in [low, high]."""
        return (scale - self.low) / (self.high - self.low)

    def scale(self, time: Number) -> Number:
        """The inverse of `time`."""
        return self.low + time * (self.high - self.low)


class NaturalCubicSpline(nn.Module):
    """The C2 piecewise cubic through K knot values whose second derivative vanishes at both ends.

    The second derivatives at the knots are a K x K matrix times the knot values. The matrix depends on the knots alone,
    so it is solved once, in float64.

    Args:
        knots: "K" increasing times from 0 to 1, K >= 2. With two knots the spline is the straight line.

    Raises:
        ValueError: fewer than two knots, not increasing, or not from 0 to 1.
    """

    knots: Tensor
    curvature: Tensor

    def __init__(self, knots: Sequence[float]):
        super().__init__()
        self.register_buffer("knots", _checked_knots(knots), persistent=False)
        self.register_buffer("curvature", self._curvature(self.knots), persistent=False)

    @staticmethod
    def _curvature(knots: Tensor) -> Tensor:
        # Continuity of mu' at each inner knot k, with h_k = t_{k+1} - t_k and m_k = mu''(t_k):
        #   h_{k-1} m_{k-1} + 2 (h_{k-1} + h_k) m_k + h_k m_{k+1}
        #     = 6 ((z_{k+1} - z_k) / h_k - (z_k - z_{k-1}) / h_{k-1})
        # and m_0 = m_{K-1} = 0: A m = R z, so the matrix is A^-1 R.
        count, h = len(knots), knots.diff()
        left = torch.eye(count, dtype=torch.float64)
        right = torch.zeros(count, count, dtype=torch.float64)
        for k in range(1, count - 1):
            left[k, k - 1 : k + 2] = torch.stack((h[k - 1], 2 * (h[k - 1] + h[k]), h[k]))
            right[k, k - 1 : k + 2] = 6 * torch.stack((1 / h[k - 1], -1 / h[k - 1] - 1 / h[k], 1 / h[k]))
        return torch.linalg.solve(left, right)

    def at(self, values: Tensor, time: Tensor) -> SplinePoint:
        """Evaluate the spline and its derivatives.

        Args:
            values: "B K *S" knot values of each sample.
            time: "B" in [0, 1].

        Returns:
            Four tensors "B *S" in the dtype of `values`; at a knot the jerk is that of the interval to its right (at
            t = 1, to its left).
        """
        before, after, width, elapsed = _interval(self.knots, values, time)
        # Without a matrix product, which GPUs may round.
        rows = self.curvature.to(values.dtype)[torch.stack((before, after))]  # "2 B K"
        m0, m1 = (rows.view(rows.shape + (1,) * (values.ndim - 2)) * values).sum(2)
        samples = torch.arange(len(time), device=values.device)
        z0, z1 = values[samples, before], values[samples, after]
        # On [t_k, t_{k+1}], with u = t - t_k:  mu = z_k + b u + m_k u^2 / 2 + j u^3 / 6
        jerk = (m1 - m0) / width
        slope = (z1 - z0) / width - width * (2 * m0 + m1) / 6
        acceleration = m0 + jerk * elapsed
        velocity = slope + elapsed * (m0 + jerk * elapsed / 2)
        position = z0 + elapsed * (slope + elapsed * (m0 / 2 + jerk * elapsed / 6))
        return SplinePoint(position, velocity, acceleration, jerk)


class PiecewiseLinear(nn.Module):
    """Straight lines between the knot values: the paper's ablation of the spline, with the same interface."""

    knots: Tensor

    def __init__(self, knots: Sequence[float]):
        super().__init__()
        self.register_buffer("knots", _checked_knots(knots), persistent=False)

    def at(self, values: Tensor, time: Tensor) -> SplinePoint:
        """As `NaturalCubicSpline.at`; acceleration and jerk are zero."""
        before, after, width, elapsed = _interval(self.knots, values, time)
        samples = torch.arange(len(time), device=values.device)
        z0, z1 = values[samples, before], values[samples, after]
        velocity = (z1 - z0) / width
        zero = torch.zeros_like(velocity)
        return SplinePoint(z0 + velocity * elapsed, velocity, zero, zero)


def next_knot(knots: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first knot after each time (the last knot at t = 1) and the gap to it, both "B"."""
    after = torch.searchsorted(knots, time.to(knots.dtype), right=True).clamp(1, len(knots) - 1)
    return after, (knots[after] - time).to(time.dtype)


def taylor_step(point: SplinePoint, velocity: Tensor, gap: Tensor) -> Tensor:
    """z_hat = mu + v gap + mu'' gap^2 / 2 + mu''' gap^3 / 6 (DegFlow, "Taylor-guided perceptual supervision").

    Args:
        point: the path at time t.
        velocity: "B *S", the network's prediction, in place of mu'.
        gap: "B", time to the next knot.

    Returns:
        "B *S", the predicted latent at the next knot; exact when `velocity` is mu'.
    """
    gap = _expand(gap, velocity)
    return point.position + gap * (velocity + gap * (point.acceleration / 2 + gap * point.jerk / 6))


def _checked_knots(knots: Sequence[float]) -> Tensor:
    times = torch.as_tensor(knots, dtype=torch.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"knots={list(knots)}: at least two times are needed")
    if times[0] != 0 or times[-1] != 1 or not bool((times.diff() > 0).all()):
        raise ValueError(f"knots={times.tolist()}: must increase from 0 to 1")
    return times


def _interval(knots: Tensor, values: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices "B" of the knots around each time, and their distance and the time since the first, "B 1 ..."."""
    if values.shape[1] != len(knots):
        raise ValueError(f"values have {values.shape[1]} knot values per sample: the path has {len(knots)} knots")
    after, _ = next_knot(knots, time)
    start = knots[after - 1]
    width = (knots[after] - start).to(values.dtype)
    elapsed = (time.to(knots.dtype) - start).to(values.dtype)
    shape = (-1,) + (1,) * (values.ndim - 2)
    return after - 1, after, width.view(shape), elapsed.view(shape)


def _expand(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.to(like.dtype).view((-1,) + (1,) * (like.ndim - 1))
