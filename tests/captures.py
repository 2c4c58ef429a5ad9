"""Small scenes, in memory and as a tree, and a small degrader."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from degflow import Degrader
from degflow.capture.camera import SimulatedCamera
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


def save_scenes(folder, photos, labels, first=1):
    """Photographs as a RealSR-like tree of one split: captured at 1 and at each label's scale."""
    camera = SimulatedCamera.named("canon")
    for label in labels:
        (folder / label).mkdir(parents=True)
        for n, photo in enumerate(photos, first):
            for name, scale in (("HR", 1.0), (f"LR{label}", float(label))):
                pixels = camera.capture(photo, scale, seed=n)
                Image.fromarray(pixels).save(folder / f"{label}/Canon_{n:03d}_{name}.png")
    return folder
