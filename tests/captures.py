"""Small scenes, in memory and as a tree, and flows and degraders with random weights."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from degflow import Degrader
from degflow.capture.camera import SimulatedCamera
from degflow.capture.optics import CORNER, Optics
from degflow.capture.scenes import Scene
from degflow.flow import PathFlow
from degflow.models import (
    AutoencoderConfig,
    ResidualAutoencoder,
    ResidualConfig,
    ResidualFlow,
    ResidualNetwork,
    Spread,
    VelocityConfig,
    VelocityNetwork,
)
from degflow.trajectory import Timeline


@dataclass
class Scenes:
    """Like SceneImages, with pixels "K H W 3" already in memory."""

    scenes: list[Scene]
    pixels: list[np.ndarray]

    def __len__(self):
        return len(self.scenes)


def is_mapped(array):
    """Whether a file backs the array, and this process does not hold that file open."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= array.ctypes.data < last:
            file = " ".join(line.split()[5:])
            held = {os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()}
            return file.endswith(".npy") and file not in held
    return False


def scenes_of(**pixels):
    """Scenes from their ids and pixels "K H W 3"."""
    return Scenes([Scene(name, ()) for name in pixels], list(pixels.values()))


def gaussian_optics(scales, sigma=0.4):
    """Optics that blur by a Gaussian of sigma * sqrt(s^2 - s_1^2) pixels, blue by more."""
    optics = Optics(scales)
    frequency = torch.linspace(0, CORNER, optics.rings)
    for level, scale in enumerate(scales):
        variance = sigma**2 * (scale**2 - scales[0] ** 2) * torch.tensor([1.0, 1.0, 1.3])
        optics.log_transfer[level] = -2 * math.pi**2 * variance[:, None] * frequency**2
    return optics


def path_flow(speed=10.0, **sizes):
    """Random weights, large enough that images at neighbouring scales differ."""
    velocity = VelocityNetwork(VelocityConfig(**{"width": 8, "blocks": 1, "multipliers": (1, 1), **sizes}))
    velocity.head.weight.data *= speed
    return PathFlow(velocity)


def residual_flow(levels, compression, **sizes):
    """Random weights, large enough that draws differ in 8 bits."""
    network = ResidualNetwork(ResidualConfig(**{"width": 8, "blocks": 1, **sizes}))
    torch.nn.init.normal_(network.head.weight, std=0.05)
    channels, times = network.config.latent_channels, Timeline(tuple(levels.values())).knots
    root = torch.randn(len(times) - 1, channels, channels, dtype=torch.float64)
    spread, covariance = Spread(channels, times), root @ root.mT + 0.1 * torch.eye(channels)
    spread.fit(covariance[:, None, None])
    flow = ResidualFlow(gaussian_optics(tuple(levels.values())), spread, network, compression)
    torch.nn.init.normal_(flow.grain.field.filters, std=0.1)
    flow.grain.curves[1:] = 0.02
    flow.cutoff.filters[1:] += 0.1 * torch.randn_like(flow.cutoff.filters[1:])
    return flow


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


def small_degrader(levels, *, draws=False):
    """A degrader of one of the two kinds."""
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=4, multipliers=(1, 1), blocks=1, gate_init=0.5))
    return Degrader(autoencoder, residual_flow(levels, 2) if draws else path_flow(), levels)
