"""Small scenes and a small degrader for the tests of evaluation."""

from dataclasses import dataclass

import numpy as np
import torch

from degflow import Degrader
from degflow.capture.scenes import Scene
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork


@dataclass
class Scenes:
    """Like SceneImages, with pixels "K H W 3" already in memory."""

    scenes: list[Scene]
    pixels: list[np.ndarray]

    def __len__(self):
        return len(self.scenes)


def scenes_of(**pixels):
    """Scenes from their ids and pixels "K H W 3"."""
    return Scenes([Scene(name, ()) for name in pixels], list(pixels.values()))


def small_degrader(levels, time="linear"):
    """Random weights, large enough that images at neighbouring scales differ."""
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=4, multipliers=(1, 1), blocks=1, gate_init=0.5))
    velocity = VelocityNetwork(VelocityConfig(width=8, blocks=1, multipliers=(1, 1)))
    velocity.head.weight.data *= 10
    return Degrader(autoencoder, velocity, levels, time)
