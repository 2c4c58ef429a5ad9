"""The two networks: a residual autoencoder and the velocity of its latents."""

from degflow.models.autoencoder import AutoencoderConfig, ResidualAutoencoder
from degflow.models.velocity import VelocityConfig, VelocityNetwork

__all__ = ["AutoencoderConfig", "ResidualAutoencoder", "VelocityConfig", "VelocityNetwork"]
