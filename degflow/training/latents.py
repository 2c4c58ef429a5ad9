"""Latents of whole scenes for stage 2: encoded once, before the first step.

The autoencoder is frozen in stage 2. A training that encodes every crop anew spends most of its time there. So each
image of a scene is encoded whole, in its four flips, because the latent of a flipped image is not the flipped latent.
Crops are then cut from the latents, on their grid of r pixels. They see what lies around them, as whole photographs do.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from degflow import images
from degflow.capture.scenes import ResidualCrops, in_turn, kept
from degflow.capture.skeletons import Stack
from degflow.models import ResidualAutoencoder
from degflow.models.precision import computing
from degflow.models.residual import lost_detail
from degflow.tiling import cheapest, finest

WINDOW = 128**2  # latent pixels that are encoded at once
FLIPS = ((False, False), (False, True), (True, False), (True, True))  # upside down, mirrored


def latents_of(
    autoencoder: ResidualAutoencoder,
    stacks: Sequence[Stack],
    cache: str = "",
    quiet: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[np.ndarray]:
    """Latents of all images of every stack, in four flips.

    Args:
        autoencoder: trained; it encodes on its own device, in float32.
        stacks: see `Stack`; their sides are cut to multiples of r.
        cache: local folder for memory-mapped files, which all processes of a machine share; "": memory.
        quiet: no progress bar.
        share: see `capture.scenes.in_turn`.

    Returns:
        For each stack float32 "4M h w C_z+1": all M images of the stack unflipped, then those mirrored, upside down,
        and both. The last channel is the gain of an image after the optics (see `lost_detail`), and 0 of the others.
    """
    weights, found = _digest(autoencoder), {}
    for n in tqdm(in_turn(len(stacks), share), "encoding scenes", disable=quiet):
        if cache:
            pixels = stacks[n].pixels
            digest = hashlib.sha256(f"flips and gain {pixels.shape}".encode() + weights)
            digest.update(np.ascontiguousarray(pixels).data)
            path = Path(cache) / f"{digest.hexdigest()[:24]}-latents.npy"
            found[n] = kept(path, lambda n=n: _encoded(autoencoder, stacks[n]))
        else:
            found[n] = _encoded(autoencoder, stacks[n])
    return [found[n] for n in range(len(stacks))]


@torch.inference_mode()
def _encoded(autoencoder: ResidualAutoencoder, stack: Stack) -> np.ndarray:
    r, device = autoencoder.config.compression, next(autoencoder.parameters()).device
    rows, columns = (side // r for side in stack.pixels.shape[1:3])
    halo = autoencoder.config.halo
    grid = cheapest(rows, columns, halo, WINDOW) or finest(rows, columns, halo)
    levels = len(stack.scales) + 1
    found = []
    for upside_down, mirrored in FLIPS:
        pixels = stack.pixels[:, :: -1 if upside_down else 1, :: -1 if mirrored else 1]
        pixels = pixels[:, : rows * r, : columns * r]
        hr = images.to_tensor(pixels[:1], device)
        for n, each in enumerate(pixels):
            image = images.to_tensor(each[None], device)
            values = image.new_zeros(1, autoencoder.config.latent_channels + 1, rows, columns)
            with computing("float32", device.type):
                for tile in grid.tiles():
                    tile.paste(values[:, :-1], autoencoder.encode(tile.cut(image, r))[0], 1)
                if n >= levels:
                    values[:, -1:] = lost_detail(hr, image, r)
            found.append(np.ascontiguousarray(values[0].permute(1, 2, 0).cpu().numpy()))
    return np.stack(found)


def _digest(autoencoder: ResidualAutoencoder) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in autoencoder.encoder.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.digest()


class LatentCrops(ResidualCrops):
    """Stage 2 for draws: the samples of `ResidualCrops`, with latents "C_z+1 crop crop" in place of images.

    Args:
        stacks: as `latents_of` makes them.
        times, seed: see `ResidualCrops`.
        crop: side in latent pixels.
    """

    def flip(self, crop: np.ndarray, upside_down: bool, mirrored: bool) -> np.ndarray:
        """The part of "4M crop crop C_z+1" that was flipped before it was encoded, cut at the same place."""
        first = len(crop) // len(FLIPS) * FLIPS.index((upside_down, mirrored))
        return crop[first : first + len(crop) // len(FLIPS)]
