"""Degrader: HR image + scale -> LR image (DegFlow, section 2). `_forward` is the whole method in a few lines.

Images that would need more working memory than `memory` allows are encoded and decoded tile by tile, exactly as they
would be at once: see `tiling`. What lies between works on the whole latent.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental import _config as symbols

from degflow import images
from degflow.capture.optics import Optics
from degflow.config import parse, plain
from degflow.flow import Carried, Draw, PathFlow, Seen, check_solver
from degflow.models import (
    AutoencoderConfig,
    ResidualAutoencoder,
    ResidualConfig,
    ResidualFlow,
    ResidualNetwork,
    Spread,
    VelocityConfig,
    VelocityNetwork,
    hub,
)
from degflow.models.files import checkpoint, load_checkpoint
from degflow.models.inputs import Picture, check_batch, check_range, levels_of, pixels_of, scales_of, seeds_of
from degflow.models.precision import computing
from degflow.storage import split_uri
from degflow.tiling import Costs, Plan
from degflow.trajectory import Timeline

MEMORY = 4.0  # GB


class Degrader(nn.Module):
    """Makes LR images of any trained scale from HR images.

    Args:
        autoencoder: E and D.
        flow: carries latents from HR to LR: `PathFlow`, as published, or `ResidualFlow`.
        levels: label -> scale of the levels that it was trained on, increasing, HR first.
    """

    def __init__(self, autoencoder: ResidualAutoencoder, flow: PathFlow | ResidualFlow, levels: Mapping[str, float]):
        super().__init__()
        if autoencoder.config.latent_channels != flow.latent_channels:
            own = autoencoder.config.latent_channels
            raise ValueError(f"latent_channels={flow.latent_channels}: must be the autoencoder's, {own}")
        self.autoencoder = autoencoder
        self.flow = flow
        self._compiled: _Ways | None = None
        self.eval()
        self.levels = dict(levels)
        self.timeline = Timeline(tuple(self.levels.values()))
        self.sha256 = ""
        self.provenance: dict[str, Any] = {}
        self._saw_range = False  # of images on a GPU

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
        return self.flow.has_solver

    @property
    def draws(self) -> bool:
        """Whether LR images are drawn, so that another seed gives another one. The published flow draws nothing."""
        return self.flow.draws

    @property
    def multiple(self) -> int:
        """Sides are padded to a multiple of this inside, and cropped back."""
        return self.autoencoder.config.compression * self.flow.multiple

    @torch.inference_mode()
    def forward(
        self,
        hr: Tensor,
        scale: Tensor | float,
        *,
        seed: int | Tensor = 0,
        spread: float = 1.0,
        place: Tensor | None = None,
        steps: int = 0,
        solver: str = "",
        memory: float = MEMORY,
        precision: str = "float32",
        checks_range: bool = True,
    ) -> Tensor:
        """Degrade a batch.

        The range of `hr` is checked in every call if it is on a CPU. Reading a GPU's values makes the CPU wait for all
        work before, so there only the first call is checked.

        Args:
            hr: float32 "B 3 H W" in [-1, 1]; any H and W from 8 up.
            scale: "B", a scale for each image; or "B N", N scales of each image; or a number, for all images. Its
                values are read. On the CPU this never waits for a GPU. The same holds for seed and place.
            seed: decides what is drawn. int64 of the shape of `scale`, in [0, 2^63), or a number, the first image's;
                each further scale or image has the next number. The published flow draws nothing.
            spread: 1 gives draws from what a camera does, 0 their mean, between them less noise.
            place: int64 "B 2", row and column at which each image was cut from a larger one, multiples of `multiple`.
                The noise is then the larger image's there; None: each image is whole.
            steps: solver steps; 0: the flow's own number. solver: euler, midpoint, heun, rk4 or rk5; "": its own.
            memory: GB (1e9 bytes) to work in, beside the weights and the images in and out. A batch
                that does not fit is split, and an image that does not fit is tiled; the result is the same to rounding.
            precision: float32, tf32, bfloat16 or float16, of the networks' matrix products and convolutions; the
                latent, its steps and the last convolution stay in float32 (see `models.precision`).
            checks_range: False for images whose range is known: it is not looked at.

        Returns:
            "B 3 H W" or "B N 3 H W" in [-1, 1], without gradient.

        Raises:
            ValueError: images of another type, shape, device or range, a scale outside the trained range [low, high], a
                spread outside [0, 1], seeds or places that do not fit, too little memory for any tile, or an unknown
                solver or precision.

        Warns:
            UserWarning: no value is below 0, as in images in [0, 1].
        """
        check_batch(hr, next(self.parameters()))
        if checks_range:
            self._check_range(hr)
        how = {"seed": seed, "spread": spread, "place": place, "steps": steps, "solver": solver, "memory": memory}
        return self._forward(hr, scales_of(scale, len(hr)), **how, precision=precision)

    def train(self, mode: bool = True) -> "Degrader":
        """Stay in eval mode, also inside a network that is trained: a degrader is applied, not trained."""
        return super().train(False)

    def _check_range(self, hr: Tensor) -> None:
        """Raise ValueError unless the batch lies in [-1, 1]; on a GPU only once."""
        if not hr.is_meta and (hr.device.type == "cpu" or not self._saw_range):
            check_range(*map(float, hr.aminmax()))
            self._saw_range = hr.device.type != "cpu"

    def _forward(
        self,
        hr: Tensor,
        scale: Tensor,
        *,
        seed: int | Tensor = 0,
        spread: float = 1.0,
        place: Tensor | None = None,
        steps: int = 0,
        solver: str = "",
        memory: float = MEMORY,
        precision: str = "float32",
    ) -> Tensor:
        """`forward` of checked images."""
        if not 0 <= spread <= 1:
            raise ValueError(f"spread={spread}: must lie in [0, 1]")
        if (solver or steps) and not self.has_solver:
            raise ValueError(f"solver={solver}, steps={steps}: this degrader has no solver; leave them out")
        check_solver(solver or self.flow.solver[0], steps or self.flow.solver[1])
        scale, seeds = scale.cpu(), seeds_of(seed, scale).cpu()
        self.check_scales(float(scale.min()), float(scale.max()))
        places = self._latent_places(place, len(hr)).cpu()
        scales = scale.double().clamp(self.low, self.high)
        time = self.timeline.time(scales).clamp(0, 1).float()
        shape, columns = scale.shape, (len(hr), -1)
        default_solver, default_steps = self.flow.solver
        how = (scale.ndim > 1, spread, steps or default_steps, solver or default_solver)
        asked = [x.reshape(columns) for x in (scales, time, seeds)]
        with torch.inference_mode(False):  # so that a training can use it
            lr = hr.new_empty((*shape, *hr.shape[1:]))
        made = lr.view(*asked[0].shape, *hr.shape[1:])
        plan = self.plan(hr.shape[-2], hr.shape[-1], memory)
        # Else a compilation that begins with a square image is for squares alone.
        sizes = cast(Any, symbols).patch(use_duck_shape=False) if self._compiled else contextlib.nullcontext()
        with computing(precision, hr.device.type), sizes:
            for first in range(0, len(hr), plan.batch):
                at = slice(first, first + plan.batch)
                draw = Draw(asked[0][at], asked[1][at], asked[2][at], *how, place=places[at])
                self._degrade(hr[at], draw, made[at], plan)
        return lr

    def _degrade(self, hr: Tensor, draw: Draw, lr: Tensor, plan: Plan) -> None:
        """Degrade what fits the memory at once, into `lr` "B N 3 H W"."""

        def see(image: Tensor, needs_skips: bool) -> Seen:
            return self._encode(image, plan, needs_skips)

        carried = self.flow.carry(see, hr, draw)
        for n in range(draw.scale.shape[1]):
            self._decode(next(carried), lr[:, n], plan)  # no variable holds it, and its skips, while the next is made

    def _decode(self, carried: Carried, lr: Tensor, plan: Plan) -> None:
        """Decode what was carried to one scale, tile by tile, into `lr` "B 3 H W"."""
        ways, r, (latent, seen, finish) = self._ways, self.autoencoder.config.compression, carried
        for tile in plan.grid.tiles():
            if seen.skips:
                skips = tuple(tile.cut(skip, r >> level) for level, skip in enumerate(seen.skips))
            else:
                skips = ways.merge(ways.skips(tile.cut(seen.image, r)))
            image = ways.decode(tile.cut(latent, 1), skips)
            if finish:
                image = finish(image, tile.rows.start * r, tile.columns.start * r)
            tile.paste(lr, image.clamp_(-1, 1), r)

    def _encode(self, image: Tensor, plan: Plan, needs_skips: bool) -> Seen:
        """Pad and encode an image, tile by tile; skips are merged, and there are none unless needed and kept."""
        # Always channels last: for another layout, networks would be compiled again.
        padded = pad(image, self.multiple).contiguous(memory_format=torch.channels_last)
        if padded is image and not image.is_inference():
            # Padding makes tensors of inference mode; for others, networks would be compiled again.
            padded = image.clone()
        config, ways, (height, width) = self.autoencoder.config, self._ways, padded.shape[-2:]
        r, keep, grid = config.compression, plan.keep and needs_skips, plan.grid
        if grid.whole:
            latent, skips = ways.encode(padded)
            return Seen(padded, latent, ways.merge(skips) if keep else ())
        latent = padded.new_empty((len(padded), config.latent_channels, grid.height, grid.width))
        kept: tuple[Tensor, ...] = ()
        for tile in grid.tiles():
            inner, skips = ways.encode(tile.cut(padded, r))
            tile.paste(latent, inner, 1)
            if keep:
                merged = ways.merge(skips)
                kept = kept or tuple(  # of the products' type, which may be a narrow one
                    part.new_empty((len(padded), height >> level, width >> level, part.shape[1])).permute(0, 3, 1, 2)
                    for level, part in enumerate(merged)
                )
                for level, (whole, part) in enumerate(zip(kept, merged, strict=True)):
                    tile.paste(whole, part, r >> level)
        return Seen(padded, latent, kept)

    def _latent_places(self, place: Tensor | None, count: int) -> Tensor:
        """Places in pixels, or none -> in latent pixels."""
        if place is None:
            return torch.zeros(count, 2, dtype=torch.int64)
        if not isinstance(place, Tensor):
            raise ValueError(f"place: {type(place).__name__}: must be an int64 tensor [{count}, 2]")
        if place.dtype != torch.int64 or place.shape != (count, 2):
            raise ValueError(f"place: {place.dtype} {list(place.shape)}: must be int64 [{count}, 2], one of each image")
        if bool((place < 0).any()) or bool((place % self.multiple).any()):
            raise ValueError(f"place={place.tolist()}: must be multiples of {self.multiple}, and not negative")
        return place // self.autoencoder.config.compression

    def plan(self, height: int, width: int, memory: float = MEMORY) -> Plan:
        """How images of this size are worked on within `memory` GB.

        Raises:
            ValueError: not even one image in small tiles fits; the message says what it needs.
        """
        config, flow = self.autoencoder.config, self.flow
        rows, columns = (-(-side // self.multiple) * flow.multiple for side in (height, width))
        number = next(self.parameters()).element_size()
        area = number * config.compression**2  # bytes per latent pixel, for each number per image pixel
        costs = Costs(
            held=(3 * flow.images + flow.finish_channels) * area + 12 * flow.images * number * config.latent_channels,
            whole=max(number * flow.working_channels, flow.optics_channels * area),
            skips=area * config.skip_channels,
            work=area * config.working_channels,
            largest=max(width << 2 * (len(config.widths) - 1 - n) for n, width in enumerate(config.widths)),
        )
        try:
            return Plan.fit(rows, columns, config.halo + -(-flow.reach // config.compression), costs, memory)
        except ValueError as error:
            raise ValueError(f"{error} for {width} x {height} pixels") from None

    def compile(self, *args: Any, **options: Any) -> None:
        """torch.compile the networks (not what cuts and joins tiles); takes torch.compile's arguments.

        A compilation takes minutes on a busy CPU. With dynamic=True, single images and batches need one each, for
        all sizes. (On CPUs small and large images need one each, because PyTorch convolves them differently.) With
        dynamic=False every size needs one. A copy of a compiled degrader is not compiled.

        Raises:
            ValueError: a mode with CUDA graphs. A graph's next run overwrites what the last one returned, and latents
                and skips are needed for longer.
        """
        if (mode := options.get("mode")) in ("reduce-overhead", "max-autotune"):
            raise ValueError(f"mode={mode}: its CUDA graphs overwrite latents; take max-autotune-no-cudagraphs")
        self._compiled = None
        ways: list[Any] = [torch.compile(way, *args, **options) for way in self._ways]
        self._compiled = _Ways(*ways)
        self.flow.network.compile(*args, **options)

    @property
    def _ways(self) -> "_Ways":
        encoder, decoder = self.autoencoder.encoder, self.autoencoder.decoder
        return self._compiled or _Ways(encoder, encoder.skips, decoder.merged, decoder)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None}  # else a copy would call the original's networks

    def check_scales(self, low: float, high: float) -> None:
        """Raise ValueError unless [low, high] lies in the trained range."""
        rounding = 1e-6  # of float32 scales
        if not self.low - rounding <= low <= high <= self.high + rounding:
            raise ValueError(
                f"scale={low if low < self.low else high}: must lie in the trained range [{self.low}, {self.high}]"
            )

    @overload
    def degrade(self, picture: Picture, scale: float, **options: Any) -> Image.Image: ...

    @overload
    def degrade(self, picture: Picture, scale: Sequence[float] | np.ndarray, **options: Any) -> list[Image.Image]: ...

    @torch.inference_mode()
    def degrade(
        self,
        picture: Picture,
        scale: float | Sequence[float] | np.ndarray,
        *,
        seed: int = 0,
        spread: float = 1.0,
        gray: str = "camera",
        **options: Any,
    ) -> Image.Image | list[Image.Image]:
        """A picture in, an RGB PIL image of the same size out; alpha, 16-bit, ... by the rule of `images`.

        A PIL image's EXIF orientation and colour profile are applied, too: LR is upright and in sRGB, where the image
        that was given may not be.

        Args:
            picture: HR: a PIL image; a uint8 array "H W 3", "H W 4" or "H W"; or the path or URI of a file.
            scale: in [low, high]; or several scales, which share the work on HR.
            seed: another one gives another draw. The noise of one seed is nearly the same in all pictures, so give each
                its own. The n-th of several scales has seed + n, from 0: its image is `degrade(picture, scale[n],
                seed=seed + n)`. With N scales for each picture, seed=i * N for picture i repeats none.
            spread: 1 for draws, 0 for their mean.
            gray: what a gray picture's LR image has: "camera", a colour camera's slight colour; "keep", none.
            options: those of a call: steps, solver, memory, precision.

        Returns:
            An image; a list of them for several scales.

        Raises:
            ValueError: a picture, scale or other argument that breaks a rule; the message says which. Or the result is
                not finite.
            OSError: a file that cannot be read.
        """
        if gray not in images.GRAY:
            raise ValueError(f"gray={gray}: must be one of {', '.join(images.GRAY)}")
        scales = torch.from_numpy(np.array(scale, np.float64))
        if scales.ndim > 1 or not scales.numel():
            raise ValueError(f"scale={scale}: must be a number or a list of numbers")
        pixels = pixels_of(picture)
        hr = images.to_tensor(pixels, next(self.parameters()).device)[None]
        check_batch(hr, next(self.parameters()))
        # As "1 N" also for one scale: the published flow's steps differ between "B" and "B N".
        lrs = self._forward(hr, scales.view(1, -1), seed=seed, spread=spread, **options)[0]
        stays_gray = gray == "keep" and images.is_gray(pixels)
        made = []
        for lr in lrs:  # one by one: rounding takes 24 bytes for each pixel
            levels = levels_of(lr)
            made.append(Image.fromarray(images.to_gray(levels) if stays_gray else levels))
        return made if scales.ndim else made[0]

    def save(self, uri: str, provenance: Mapping[str, Any], *, half: bool = False) -> None:
        """Write one safetensors file that describes itself.

        Args:
            uri: where.
            provenance: anything JSON can hold: data, seeds, metrics.
            half: store the networks in float16 (computed in float32 after loading).
        """
        place, name = split_uri(uri)
        place.write(name, self._file(provenance, half))

    def push_to_hub(self, repo_id: str, *, private: bool = False, half: bool = False) -> str:
        """Upload a file of `save`, with its provenance, to the Hugging Face Hub; needs huggingface_hub and HF_TOKEN.

        The repository is made if needed. If it has no README.md yet, it gets a model card for you to complete.

        Args:
            repo_id: USER/NAME.
            private: the repository must be private; one that is made is.
            half: as in `save`.

        Returns:
            The file's URI, for `load`.

        Raises:
            ImportError: without huggingface_hub.
            ValueError: the Hub refuses, does not answer, or has a public repository where a private one is wanted.
        """
        data, uri = self._file(self.provenance, half), f"hf://{repo_id}/{hub.FILE}"
        text = hub.card(repo_id, uri, self.levels, self.draws, hashlib.sha256(data).hexdigest(), self.provenance)
        hub.upload(repo_id, data, text, private)
        return uri

    def _file(self, provenance: Mapping[str, Any], half: bool) -> bytes:
        description = {
            "kind": "degrader",
            "autoencoder": plain(self.autoencoder.config),
            "levels": self.levels,
            "provenance": dict(provenance),
            **self.flow.describe(),
        }
        weights = {name for name, _ in self.named_parameters() if half}  # buffers are small, and stay exact
        state = {name: tensor.half() if name in weights else tensor for name, tensor in self.state_dict().items()}
        return checkpoint(state, description)

    @classmethod
    def load(cls, uri: str | os.PathLike[str] = "shipped", device: str | torch.device = "cpu") -> "Degrader":
        """Load a file of `save`; "shipped" is the degrader that comes with degflow.

        Raises:
            ValueError: the file is missing, or not a degrader; the one that ships is cut off or changed.
        """
        uri = os.fspath(uri)
        tensors, description, digest = load_checkpoint(uri, "degrader")
        try:
            if wrong := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
                raise ValueError(f"not finite: {', '.join(wrong[:3])}")
            with _undisturbed():
                autoencoder = ResidualAutoencoder(parse(AutoencoderConfig, description["autoencoder"]))
                degrader = cls(autoencoder, _flow(description, autoencoder.config), description["levels"])
            degrader.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
            degrader.provenance = description["provenance"]
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise ValueError(f"{uri}: a damaged degrader ({type(error).__name__}: {reason})") from None
        degrader.sha256 = digest
        return degrader.to(device).eval()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Modules are made in float32, whatever PyTorch's default, and its random numbers stay where they are."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


class _Ways(NamedTuple):
    """The ways into the autoencoder, compiled or not."""

    encode: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]  # image -> latent, skips
    skips: Callable[[Tensor], tuple[Tensor, ...]]  # image -> skips
    merge: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]  # skips -> merged skips
    decode: Callable[[Tensor, tuple[Tensor, ...]], Tensor]  # latent, merged skips -> image


def _flow(description: Mapping[str, Any], config: AutoencoderConfig) -> PathFlow | ResidualFlow:
    """The flow that a file describes, with untrained weights."""
    if "velocity" in description:
        return PathFlow(VelocityNetwork(parse(VelocityConfig, description["velocity"])))
    network = ResidualNetwork(parse(ResidualConfig, description["residual"]))
    spread = Spread(config.latent_channels, tuple(description["times"]))
    return ResidualFlow(Optics(**description["optics"]), spread, network, config.compression)


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
