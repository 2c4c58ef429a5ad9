"""Degrader: HR image + scale -> LR image. The whole method in a few lines (DegFlow, section 2).

Images that would need more working memory than `memory` allows are encoded and decoded tile by tile, exactly as they
would be at once: see `tiling`. The velocity network always sees the whole latent.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from degflow import images
from degflow.config import parse, plain
from degflow.flow import SOLVER, STEPS
from degflow.models import (
    AutoencoderConfig,
    FlowMap,
    ResidualAutoencoder,
    VelocityConfig,
    VelocityNetwork,
    velocity_network,
)
from degflow.models.files import load_checkpoint, save_checkpoint
from degflow.tiling import Grid, cheapest, finest
from degflow.trajectory import Rule, Timeline

MEMORY = 4.0  # GB
OVERHEAD = 150e6  # bytes: what libraries and the allocator take whatever the size
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHIPPED = str(Path(__file__).parent / "models" / "weights" / "canon-simulated.safetensors")


class Degrader(nn.Module):
    """Makes LR images of any trained scale from HR images.

    Args:
        autoencoder: E and D.
        velocity: v(z, t) of its latents.
        levels: label -> scale of the levels that it was trained on, increasing, HR first.
        time: how scales lie in time, see `Timeline`.
    """

    def __init__(
        self,
        autoencoder: ResidualAutoencoder,
        velocity: VelocityNetwork | FlowMap,
        levels: Mapping[str, float],
        time: Rule = "linear",
    ):
        super().__init__()
        if autoencoder.config.latent_channels != velocity.config.latent_channels:
            raise ValueError(
                f"velocity.latent_channels={velocity.config.latent_channels}: "
                f"must be the autoencoder's, {autoencoder.config.latent_channels}"
            )
        self.autoencoder = autoencoder.eval()
        self.velocity = velocity.eval()
        self.levels = dict(levels)
        self.timeline = Timeline(tuple(self.levels.values()), time)
        if isinstance(velocity, FlowMap) and tuple(velocity.spline.knots.tolist()) != self.timeline.knots:
            raise ValueError(
                f"time={time}: the flow map's knots, {velocity.spline.knots.tolist()}, are of another time"
            )
        self.sha256 = ""
        self.provenance: dict[str, Any] = {}

    @property
    def low(self) -> float:
        """The smallest trained scale, HR's."""
        return self.timeline.low

    @property
    def high(self) -> float:
        """The largest trained scale."""
        return self.timeline.high

    @property
    def has_solver(self) -> bool:
        """Whether it integrates a flow, so that `steps` and `solver` change its images."""
        return not isinstance(self.velocity, FlowMap)

    @property
    def multiple(self) -> int:
        """Sides are padded to a multiple of this inside, and cropped back."""
        return self.autoencoder.config.compression * self.velocity.config.multiple

    @torch.inference_mode()
    def forward(
        self,
        hr: Tensor,
        scale: Tensor,
        *,
        steps: int = STEPS,
        solver: str = SOLVER,
        memory: float = MEMORY,
        precision: str = "float32",
    ) -> Tensor:
        """Degrade a batch.

        Args:
            hr: "B 3 H W" in [-1, 1]; any H and W from 8 up.
            scale: "B", a scale for each image; or "B N", N scales of each image from one encoding and one integration.
            steps: solver steps. solver: euler, midpoint, heun, rk4 or rk5.
            memory: GB (1e9 bytes) to work in, beside the weights and the images in and out. What does not fit is done
                image by image, and what still does not tile by tile; the result is the same to rounding.
            precision: float32, float16 or bfloat16, of the networks' matrix products and convolutions (autocast); the
                latent, its steps and the last convolution stay in float32.

        Returns:
            "B 3 H W" or "B N 3 H W" in [-1, 1].

        Raises:
            ValueError: a scale outside the trained range [low, high], too little memory for any tile, or an unknown
                precision.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision}: must be one of {', '.join(PRECISIONS)}")
        if len(scale) != len(hr):
            raise ValueError(f"scale: {len(scale)} for a batch of {len(hr)} images")
        self.check_scales(float(scale.min()), float(scale.max()))
        time = self.timeline.time(scale.double()).clamp(0, 1).float().to(hr.device)
        lr = hr.new_empty((*scale.shape, *hr.shape[1:]))
        together, grid, keep = self.fit(hr.shape[-2], hr.shape[-1], memory)
        for part in torch.arange(len(hr)).split(together):
            at = slice(int(part[0]), int(part[-1]) + 1)
            with torch.autocast(hr.device.type, PRECISIONS[precision], enabled=precision != "float32"):
                self._degrade(hr[at], time[at], lr[at], grid, keep, steps=steps, solver=solver)
        return lr

    def _degrade(self, hr: Tensor, time: Tensor, lr: Tensor, grid: Grid, keep: bool, **solver: Any) -> None:
        """Degrade what fits the memory at once, into `lr`; `keep`: hold the skips from encoding to decoding."""
        image, autoencoder, r = pad(hr, self.multiple), self.autoencoder, self.autoencoder.config.compression
        if image is hr and not hr.is_inference():
            image = hr.clone()  # compiled networks tell inference mode's tensors, as padding makes them, from others
        latent, kept = self._encode(image, grid, keep)
        latent = latent.to(image.dtype)
        latents = self.velocity.carry(latent, time, **solver)
        latents, lr = (x[:, None] if time.ndim == 1 else x for x in (latents, lr))
        for tile in grid.tiles():
            if kept:
                merged = tuple(tile.cut(part, r >> level) for level, part in enumerate(kept))
            else:
                merged = autoencoder.decoder.merged(autoencoder.skips(tile.cut(image, r)))
            for n in range(latents.shape[1]):
                decoded = autoencoder.decoder(tile.cut(latents[:, n], 1), merged)
                tile.paste(lr[:, n], decoded.clamp_(-1, 1), r)

    def _encode(self, image: Tensor, grid: Grid, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The latent tile by tile, and with `keep` the merged skips (else none)."""
        config, decoder, (height, width) = self.autoencoder.config, self.autoencoder.decoder, image.shape[-2:]
        if grid.whole:
            latent, skips = self.autoencoder.encode(image)
            return latent, decoder.merged(skips)
        latent = image.new_empty((len(image), config.latent_channels, grid.height, grid.width))
        kept = tuple(
            image.new_empty((len(image), height >> level, width >> level, channels)).permute(0, 3, 1, 2)
            for level, channels in enumerate(config.widths[:-1])
            if keep
        )
        for tile in grid.tiles():
            inner, skips = self.autoencoder.encode(tile.cut(image, config.compression))
            tile.paste(latent, inner, 1)
            if keep:
                for level, (whole, part) in enumerate(zip(kept, decoder.merged(skips), strict=True)):
                    tile.paste(whole, part, config.compression >> level)
        return latent, kept

    def fit(self, height: int, width: int, memory: float = MEMORY) -> tuple[int, Grid, bool]:
        """What fits `memory` GB: how many images of this size at once, how each is cut, whether its skips are kept.

        Raises:
            ValueError: not even one image in small tiles does; the message says what it needs.
        """
        autoencoder, velocity = self.autoencoder.config, self.velocity.config
        rows, columns = (-(-side // self.multiple) * velocity.multiple for side in (height, width))
        number = next(self.parameters()).element_size()
        area = number * autoencoder.compression**2  # bytes per latent pixel, for each number per image pixel
        held = rows * columns * (3 * area + 12 * number * autoencoder.latent_channels)  # image; latents and six slopes
        flow = rows * columns * number * velocity.working_channels
        skips = rows * columns * area * autoencoder.skip_channels
        work = rows * columns * area * autoencoder.working_channels
        room = memory * 1e9 - OVERHEAD
        if (together := min(room / (held + skips + max(flow, work)), 2**31)) >= 1:
            return int(together), Grid(rows, columns), True
        # Otherwise: hold all skips and decode in small windows, or encode again beside decoding in larger ones.
        ways, halo = [], autoencoder.halo
        for keep, fixed, each in ((True, held + skips, work), (False, held, skips + work)):
            grid = cheapest(rows, columns, halo, (room - fixed) / each * rows * columns)
            if grid and fixed + flow <= room:
                ways.append(((2 if keep else 3) * grid.work, grid, keep))
        if not ways:
            smallest = finest(rows, columns, halo).window / (rows * columns)
            least = OVERHEAD + held + min(skips + max(flow, work * smallest), max(flow, (skips + work) * smallest))
            raise ValueError(f"memory={memory:g}: {width} x {height} pixels need at least {least / 1e9 + 0.005:.2f} GB")
        _, grid, keep = min(ways, key=lambda way: way[0])
        return 1, grid, keep

    def compile(self, *args: Any, **options: Any) -> None:
        """torch.compile the three networks (not what cuts and joins tiles); takes torch.compile's arguments.

        With dynamic=True one compilation, which takes minutes on a busy CPU, does for images of all sizes; with
        dynamic=False each size costs one.
        """
        for network in (self.autoencoder.encoder, self.autoencoder.decoder, self.velocity):
            network.compile(*args, **options)

    def check_scales(self, low: float, high: float) -> None:
        """Raise ValueError unless [low, high] lies in the trained range."""
        rounding = 1e-6  # of float32 scales
        if not self.low - rounding <= low <= high <= self.high + rounding:
            raise ValueError(
                f"scale={low if low < self.low else high}: must lie in the trained range [{self.low}, {self.high}]"
            )

    def degrade(self, picture: Image.Image, scale: float, **options: Any) -> Image.Image:
        """PIL image in, RGB PIL image of the same size out; gray, alpha, 16-bit, ... by the rule of `images`.

        `options` are those of a call: steps, solver, memory, precision.
        """
        pixels = images.from_picture(picture)
        device = next(self.parameters()).device
        scales = torch.tensor([scale], dtype=torch.float64)
        lr = self(images.to_tensor(pixels, device)[None], scales, **options)
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
            "time": self.timeline.rule,
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
            timeline = Timeline(tuple(description["levels"].values()), description["time"])
            degrader = cls(
                ResidualAutoencoder(parse(AutoencoderConfig, description["autoencoder"])),
                velocity_network(parse(VelocityConfig, description["velocity"]), timeline.knots),
                description["levels"],
                description["time"],
            )
            degrader.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
            degrader.provenance = description["provenance"]
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
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
