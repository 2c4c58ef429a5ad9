"""Degrader: HR image + scale -> LR image. The whole method in a few lines (DegFlow, section 2)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from degflow import images
from degflow.config import parse, plain
from degflow.flow import integrate
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork
from degflow.storage import load_checkpoint, save_checkpoint
from degflow.trajectory import time_of_scale

SHIPPED = str(Path(__file__).parent / "weights" / "canon-simulated.safetensors")


class Degrader(nn.Module):
    """Makes LR images of any trained scale from HR images.

    Args:
        autoencoder: E and D.
        velocity: v(z, t) of its latents.
        levels: label -> scale of the levels that it was trained on, increasing, HR first.
    """

    def __init__(self, autoencoder: ResidualAutoencoder, velocity: VelocityNetwork, levels: Mapping[str, float]):
        super().__init__()
        if autoencoder.config.latent_channels != velocity.config.latent_channels:
            raise ValueError(
                f"velocity.latent_channels={velocity.config.latent_channels}: "
                f"must be the autoencoder's, {autoencoder.config.latent_channels}"
            )
        self.autoencoder = autoencoder.eval()
        self.velocity = velocity.eval()
        self.levels = dict(levels)
        self.low, self.high = min(self.levels.values()), max(self.levels.values())
        self.sha256 = ""
        self.provenance: dict[str, Any] = {}

    @property
    def multiple(self) -> int:
        """Sides are padded to a multiple of this inside, and cropped back."""
        return self.autoencoder.config.compression * self.velocity.config.multiple

    @torch.inference_mode()
    def forward(self, hr: Tensor, scale: Tensor, *, steps: int = 2, solver: str = "rk4") -> Tensor:
        """Degrade a batch.

        Args:
            hr: "B 3 H W" in [-1, 1]; any H and W from 8 up.
            scale: "B", a scale for each image; or "B N", N scales of each image from one encoding and one integration.
            steps: solver steps. solver: euler, midpoint, heun or rk4.

        Returns:
            "B 3 H W" or "B N 3 H W" in [-1, 1].

        Raises:
            ValueError: a scale outside the trained range [low, high].
        """
        self.check_scales(float(scale.min()), float(scale.max()))
        height, width = hr.shape[-2:]
        time = time_of_scale(scale.double(), self.low, self.high).clamp(0, 1).float().to(hr.device)
        latent, skips = self.autoencoder.encode(pad(hr, self.multiple))
        latents = integrate(self.velocity, latent, time, steps=steps, solver=solver)
        if time.ndim == 1:
            decoded = self.autoencoder.decode(latents, skips)
        else:
            decoded = torch.stack([self.autoencoder.decode(z, skips) for z in latents.unbind(1)], 1)
        return decoded[..., :height, :width].clamp(-1, 1)

    def check_scales(self, low: float, high: float) -> None:
        """Raise ValueError unless [low, high] lies in the trained range."""
        rounding = 1e-6  # of float32 scales
        if not self.low - rounding <= low <= high <= self.high + rounding:
            raise ValueError(
                f"scale={low if low < self.low else high}: must lie in the trained range [{self.low}, {self.high}]"
            )

    def degrade(self, picture: Image.Image, scale: float, **solver: Any) -> Image.Image:
        """PIL image in, RGB PIL image of the same size out; gray, alpha, 16-bit, ... by the rule of `images`."""
        pixels = images.from_picture(picture)
        device = next(self.parameters()).device
        scales = torch.tensor([scale], dtype=torch.float64)
        lr = self(images.to_tensor(pixels)[None].to(device), scales, **solver)
        return Image.fromarray(images.to_pixels(lr)[0])

    def save(self, uri: str, provenance: Mapping[str, Any], *, half: bool = False) -> None:
        """Write one safetensors file that describes itself.

        Args:
            uri: where.
            provenance: anything JSON can hold: data, seeds, metrics.
            half: store float16 (computed in float32 after loading).
        """
        description = {
            "kind": "degrader",
            "autoencoder": plain(self.autoencoder.config),
            "velocity": plain(self.velocity.config),
            "levels": self.levels,
            "provenance": dict(provenance),
        }
        state = {name: tensor.half() if half else tensor for name, tensor in self.state_dict().items()}
        save_checkpoint(uri, state, description)

    @classmethod
    def load(cls, uri: str | None = None, device: str | torch.device = "cpu") -> "Degrader":
        """Load a file of `save`; without a URI the degrader that ships.

        Raises:
            ValueError: the file is missing, or not a degrader.
        """
        tensors, description, digest = load_checkpoint(uri or SHIPPED, "degrader")
        try:
            degrader = cls(
                ResidualAutoencoder(parse(AutoencoderConfig, description["autoencoder"])),
                VelocityNetwork(parse(VelocityConfig, description["velocity"])),
                description["levels"],
            )
            degrader.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
            degrader.provenance = description["provenance"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{uri or SHIPPED}: a damaged degrader ({type(error).__name__}: {reason})") from None
        degrader.sha256 = digest
        return degrader.to(device).eval()


def pad(image: Tensor, multiple: int) -> Tensor:
    """Extend "B 3 H W" to the right and below to multiples, by reflection (repeated where the image is small)."""
    for axis in (-2, -1):
        size = image.shape[axis]
        total = -(-size // multiple) * multiple
        if total > size:
            period = max(1, 2 * size - 2)
            index = torch.arange(total, device=image.device) % period
            image = image.index_select(axis, torch.where(index < size, index, period - index))
    return image
