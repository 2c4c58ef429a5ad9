"""A flow that one evaluation solves: the latents of all levels from HR's alone, and the spline through them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from degflow.models.velocity import VelocityConfig, VelocityNetwork
from degflow.trajectory import NaturalCubicSpline


class FlowMap(nn.Module):
    """dz/dt = the velocity at t of the natural cubic spline through the levels' latents as seen from the source.

    The best field that knows its source (see `VelocityNetwork`) has the mean of the captured paths for a path. A spline
    is linear in its knot values, so that this mean is the spline through the mean latents of the levels, and those are
    a function of the source alone. A network that gives them needs no solver: `carry` is exact at every time, with
    one evaluation for however many. It is trained as any velocity network is.

    Args:
        config: widths and depths of the U-Net; `time_factor` does not matter.
        knots: "K" times of the levels, from 0 to 1.
    """

    def __init__(self, config: VelocityConfig, knots: tuple[float, ...]):
        super().__init__()
        self.config = config
        self.spline = NaturalCubicSpline(knots)
        inner = replace(config, flow_map=False)
        self.network = VelocityNetwork(inner, outputs=(len(knots) - 1) * config.latent_channels)

    def levels(self, source: Tensor, key: Tensor | None = None) -> Tensor:
        """The HR latent "B C_z H W" and the latents of the levels after it: "B K C_z H W"."""
        moved = self.network(source, source.new_zeros(len(source), dtype=torch.float32), key=key)
        moved = moved.to(source.dtype).unflatten(1, (-1, self.config.latent_channels))
        return torch.cat((source[:, None], source[:, None] + moved), 1)

    def carry(self, source: Tensor, time: Tensor, key: Tensor | None = None, **solver: object) -> Tensor:
        """The latents "B C_z H W" or "B N C_z H W" at the times "B" or "B N"; see `VelocityNetwork.carry`.

        `solver` (its steps and name) does not matter.
        """
        values = self.levels(source, key)
        if time.ndim == 1:
            return self.spline.at(values, time).position
        return torch.stack([self.spline.at(values, times).position for times in time.unbind(1)], 1)

    def velocity_and_ends(
        self,
        latent: Tensor,
        time: Tensor,
        source: Tensor,
        key: Tensor | None,
        chosen: Tensor,
        ends: Tensor,
        **solver: object,
    ) -> tuple[Tensor, Tensor]:
        """A call, and `carry` of the samples with the indices `chosen` to their times `ends`, by one evaluation."""
        values = self.levels(source, key)
        return self.spline.at(values, time).velocity, self.spline.at(values[chosen], ends).position

    def forward(self, latent: Tensor, time: Tensor, source: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """Velocity "B C_z H W" at the times "B"; the latent is not looked at. See `VelocityNetwork`.

        Raises:
            ValueError: no source.
        """
        if source is None:
            raise ValueError("source: needed, for this network was built with velocity.flow_map=true")
        return self.spline.at(self.levels(source, key), time).velocity

    def compile(self, *args: object, **options: object) -> None:
        """torch.compile the U-Net."""
        self.network.compile(*args, **options)


def velocity_network(config: VelocityConfig, knots: tuple[float, ...]) -> VelocityNetwork | FlowMap:
    """The network that a configuration asks for."""
    return FlowMap(config, knots) if config.flow_map else VelocityNetwork(config)
