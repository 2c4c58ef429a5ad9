"""Flows with known answers."""

import torch


def decay(z, time):
    """dz/dt = -2 t z, so z(t) = z(0) exp(-t^2)."""
    return -2 * time.view(-1, 1).to(z.dtype) * z


def decayed(z0, time):
    return z0 * torch.exp(-(time.to(z0.dtype) ** 2))[:, None]


def rotation(z, time):
    """A nonlinear, coupled field: z = (x, y) turns with a speed that grows with time, and x^2 + y^2 stays."""
    speed = (1 + 3 * time.to(z.dtype))[:, None]
    return speed * torch.stack((-z[:, 1], z[:, 0]), 1)


def rotated(z0, time):
    angle = time.to(z0.dtype) + 1.5 * time.to(z0.dtype) ** 2
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos * z0[:, 0] - sin * z0[:, 1], sin * z0[:, 0] + cos * z0[:, 1]), 1)
