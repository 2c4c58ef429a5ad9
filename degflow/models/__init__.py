"""The networks: a residual autoencoder, the velocity of its latents, and what a captured image adds to the optics."""

from degflow.models.autoencoder import AutoencoderConfig, ResidualAutoencoder
from degflow.models.residual import ResidualConfig, ResidualFlow, ResidualNetwork
from degflow.models.spread import Spread
from degflow.models.velocity import VelocityConfig, VelocityNetwork

__all__ = [
    "AutoencoderConfig",
    "ResidualAutoencoder",
    "ResidualConfig",
    "ResidualFlow",
    "ResidualNetwork",
    "Spread",
    "VelocityConfig",
    "VelocityNetwork",
]
