"""The two networks: a residual autoencoder and the velocity of its latents."""

from degflow.models.autoencoder import AutoencoderConfig, ResidualAutoencoder
from degflow.models.flow_map import FlowMap, velocity_network
from degflow.models.velocity import VelocityConfig, VelocityNetwork

__all__ = [
    "AutoencoderConfig",
    "FlowMap",
    "ResidualAutoencoder",
    "VelocityConfig",
    "VelocityNetwork",
    "velocity_network",
]
