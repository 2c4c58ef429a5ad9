"""The SR networks of the published tables, their objective, and their files.

Fixed-scale networks take an LR image of HR's size: pixel-unshuffle by 4, the published body with 48 input channels, its
own upsampling by 4. SwinIR, HAT and RCAN come from spandrel. LIIF takes the LR image shrunk by the scale, and computes
the colours of HR's pixels. Images are "B 3 H W" in [-1, 1].
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow import images
from degflow.config import option, parse, plain
from degflow.degrader import pad
from degflow.models.files import load_checkpoint, save_checkpoint
from degflow.objectives import Losses, to_float
from degflow.perceptual import mend_torchvision
from degflow.restoration.liif import LIIF, LIIFConfig, pixel_centres
from degflow.restoration.mambair import MambaIR, MambaIRConfig, upsampler

UNSHUFFLE = 4
_CHANNELS = 3 * UNSHUFFLE**2
_QUERIES = 1 << 15  # pixels that LIIF computes at once


def _check_transformer(name: str, config: Any) -> None:
    if not config.depths or min(config.depths) < 1:
        raise ValueError(f"{name}.depths={list(config.depths)}: at least one entry, each at least 1")
    if config.heads < 1 or config.width < 1 or config.width % config.heads:
        raise ValueError(f"{name}.width={config.width}: must be a multiple of {name}.heads={config.heads}")
    if config.window < 2 or config.window % 2:
        raise ValueError(f"{name}.window={config.window}: must be even, and at least 2")
    if not 0 <= config.drop_path < 1:
        raise ValueError(f"{name}.drop_path={config.drop_path}: must lie in [0, 1)")


@dataclass(frozen=True)
class SwinIRConfig:
    """Size of a SwinIR body (Liang et al. 2021); the defaults are the paper's."""

    width: int = option(180, "channels")
    depths: tuple[int, ...] = option((6, 6, 6, 6, 6, 6), "transformer layers of each group")
    heads: int = option(6, "attention heads")
    window: int = option(8, "side of an attention window, in units of 4 pixels")
    drop_path: float = option(0.1, "stochastic depth of the last layer, while training")

    def __post_init__(self):
        _check_transformer("swinir", self)


@dataclass(frozen=True)
class HATConfig:
    """Size of a HAT body (Chen et al. 2023); the defaults are the paper's."""

    width: int = option(180, "channels")
    depths: tuple[int, ...] = option((6, 6, 6, 6, 6, 6), "transformer layers of each group")
    heads: int = option(6, "attention heads")
    window: int = option(16, "side of an attention window, in units of 4 pixels")
    compress: int = option(3, "convolution branches have width / compress channels inside")
    squeeze: int = option(30, "channel attention has width / squeeze channels inside")
    drop_path: float = option(0.1, "stochastic depth of the last layer, while training")

    def __post_init__(self):
        _check_transformer("hat", self)
        if self.window % 4:  # so that the windows that overlap, 1.5 times as large, do so by as much on both sides
            raise ValueError(f"hat.window={self.window}: must be a multiple of 4")
        if not 1 <= max(self.compress, self.squeeze) <= self.width:
            raise ValueError(f"hat.compress={self.compress}, hat.squeeze={self.squeeze}: must lie in [1, hat.width]")


@dataclass(frozen=True)
class RCANConfig:
    """Size of an RCAN body (Zhang et al. 2018); the defaults are the paper's."""

    width: int = option(64, "channels")
    groups: int = option(10, "residual groups")
    blocks: int = option(20, "channel attention blocks of each group")
    squeeze: int = option(16, "channel attention has width / squeeze channels inside")

    def __post_init__(self):
        for name in ("width", "groups", "blocks", "squeeze"):
            if getattr(self, name) < 1:
                raise ValueError(f"rcan.{name}={getattr(self, name)}: must be at least 1")
        if self.width < self.squeeze:
            raise ValueError(f"rcan.width={self.width}: must be at least rcan.squeeze={self.squeeze}")


@dataclass(frozen=True)
class NetworkConfig:
    """Which network, and its size."""

    name: Literal["swinir", "hat", "mambair", "rcan", "liif"] = option(
        "swinir", "swinir, hat, mambair, rcan or liif", common=True
    )
    residual: bool = option(
        False,
        "add the LR image to the network's output, and initialise its last layer to zero: helps short trainings; the "
        "published networks do not have it",
    )
    upsampling: Literal["two", "one"] = option(
        "two", "pixel-shuffles at the end: two (factor 2 each, as published), or one (factor 4, as in light SwinIR)"
    )
    swinir: SwinIRConfig = option(SwinIRConfig(), when="swinir", common=True)
    hat: HATConfig = option(HATConfig(), when="hat", common=True)
    mambair: MambaIRConfig = option(MambaIRConfig(), when="mambair", common=True)
    rcan: RCANConfig = option(RCANConfig(), when="rcan", common=True)
    liif: LIIFConfig = option(LIIFConfig(), when="liif", common=True)

    @property
    def multiple(self) -> int:
        """Inside, a fixed-scale network pads the sides of its images to a multiple of this."""
        window = {"swinir": self.swinir.window, "hat": self.hat.window}.get(self.name, 1)
        return UNSHUFFLE * window


class FixedScale(nn.Module):
    """A fixed-scale network on images of HR's size.

    Args:
        config: which network, and its size.

    Raises:
        ImportError: SwinIR, HAT and RCAN need spandrel.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.body, masks = _body(config), dict[Any, Tensor]()
        for module in self.body.modules():
            if hasattr(module, "calculate_mask"):
                cast(Any, module).calculate_mask = _Masks(module, masks)
        if config.residual:
            _start_at_zero(self.body)

    def forward(self, lr: Tensor) -> Tensor:
        """LR of HR's size -> HR; any H and W."""
        padded = F.pixel_unshuffle(pad(lr, self.config.multiple), UNSHUFFLE)
        restored = 2 * self.body(padded / 2)[..., : lr.shape[-2], : lr.shape[-1]]  # bodies are made for a range of 1
        return restored + lr if self.config.residual else restored

    @torch.inference_mode()
    def restore(self, lr: Tensor, scale: float) -> Tensor:
        """LR of HR's size -> HR in [-1, 1]; the scale is ignored."""
        return self(lr).clamp(-1, 1)


class _Masks:
    """The attention masks of a module of spandrel, kept on its device.

    spandrel makes them on the CPU in every pass of an image that has not the size it was built for. For SwinIR of its
    paper's size these are 36, of two kinds, which take 12 ms of a CPU, and the device waits for each.

    Args:
        module: that has `calculate_mask`.
        kept: the masks of all modules of the network.
    """

    MOST = 4  # masks; those of one photograph of 12 megapixels take some 400 MB

    def __init__(self, module: nn.Module, kept: dict[Any, Tensor]):
        self.module, self.make, self.kept = module, cast(Any, type(module)).calculate_mask, kept
        self.kind = [getattr(module, name, None) for name in ("window_size", "shift_size")]

    def __call__(self, size: tuple[int, int], **options: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self.make(self.module, size, **options)
        device = next(self.module.parameters()).device
        key = (*size, device, *self.kind, *options.values())
        if key not in self.kept:
            while len(self.kept) >= self.MOST:
                del self.kept[next(iter(self.kept))]
            with torch.inference_mode(False):  # a training may use it later
                self.kept[key] = self.make(self.module, size, **options).to(device)
        return self.kept[key]


class ArbitraryScale(nn.Module):
    """LIIF, on LR images that are shrunk by their scale.

    Args:
        config: its size.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.body = LIIF(config.liif)
        if config.residual:
            _start_at_zero(self.body)

    def forward(self, lr: Tensor, coordinates: Tensor, cell: Tensor) -> Tensor:
        """Colours "B 3 Q" of a shrunk image at coordinates "B Q 2", for pixels of size `cell` "B 2" (see `liif`)."""
        return self._ask(lr, self.body.encode(lr), coordinates, cell)

    def _ask(self, lr: Tensor, features: Tensor, coordinates: Tensor, cell: Tensor) -> Tensor:
        answer = self.body.ask(features, coordinates, cell).transpose(1, 2)
        if not self.config.residual:
            return answer
        grid = coordinates.flip(-1)[:, None].to(lr.dtype)  # grid_sample wants (column, row)
        return answer + F.grid_sample(lr, grid, "bilinear", "border", align_corners=False)[:, :, 0]

    @torch.inference_mode()
    def restore(self, lr: Tensor, scale: float) -> Tensor:
        """LR of HR's size, degraded by `scale` -> HR in [-1, 1]."""
        height, width = lr.shape[-2:]
        small = images.shrunk_size(height, width, scale)
        shrunk = np.stack([images.resize(pixels, *small) for pixels in images.to_pixels(lr)])
        image = images.to_tensor(shrunk, lr.device)
        features = self.body.encode(image)
        coordinates = pixel_centres(height, width).to(lr.device).expand(len(lr), -1, -1)
        cell = coordinates.new_tensor([2 / height, 2 / width]).expand(len(lr), -1)
        parts = [self._ask(image, features, part, cell) for part in coordinates.split(_QUERIES, 1)]
        return torch.cat(parts, -1).unflatten(-1, (height, width)).clamp(-1, 1)


class RestorationObjective(nn.Module):
    """L1 between the network's image, or LIIF's colours, and HR.

    Args:
        network: made by `build`.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, lr: Tensor, hr: Tensor, **where: Tensor) -> Losses:
        """Losses of a batch of `PairCrops`.

        Args:
            lr: uint8 "B 3 h w".
            hr: uint8 "B 3 H W", or "B 3 Q" for LIIF.
            where: for LIIF, coordinates "B Q 2" and cell "B 2".
        """
        loss = F.l1_loss(self.network(to_float(lr), **where).float(), to_float(hr))
        return Losses(loss, {"l1": loss.detach()})


def build(config: NetworkConfig) -> FixedScale | ArbitraryScale:
    """The network, with initial weights."""
    return ArbitraryScale(config) if config.name == "liif" else FixedScale(config)


def save(network: FixedScale | ArbitraryScale, uri: str, provenance: dict[str, Any]) -> None:
    """Write the network and its configuration as one safetensors file."""
    description = {"kind": "restoration", "network": plain(network.config), "provenance": provenance}
    save_checkpoint(uri, network.state_dict(), description)


def load(uri: str, device: str | torch.device = "cpu") -> FixedScale | ArbitraryScale:
    """Read a file of `save`, in eval mode.

    Raises:
        ValueError: the file is missing, or has no such network.
    """
    tensors, description, _ = load_checkpoint(uri, "restoration")
    try:
        network = build(parse(NetworkConfig, description["network"]))
        network.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{uri}: a damaged network ({(str(error).splitlines() or [''])[0]})") from None
    return network.to(device).eval()


def _body(config: NetworkConfig) -> nn.Module:
    """48 input channels -> 3 output channels, sides four times as long."""
    one = config.upsampling == "one"
    if config.name == "mambair":
        return MambaIR(config.mambair, _CHANNELS, 3, one_step=one)
    published = _spandrel(config.name)
    if config.name == "rcan":
        size = config.rcan
        sizes = {"n_feats": size.width, "n_resgroups": size.groups, "n_resblocks": size.blocks}
        body = published(scale=UNSHUFFLE, n_colors=_CHANNELS, norm=False, reduction=size.squeeze, **sizes)
        body.tail = upsampler(size.width, 3, one)
        return body
    size = config.swinir if config.name == "swinir" else config.hat
    sizes: dict[str, Any] = {"embed_dim": size.width, "depths": size.depths, "window_size": size.window}
    sizes |= {"num_heads": [size.heads] * len(size.depths), "mlp_ratio": 2.0}
    if isinstance(size, HATConfig):
        sizes |= {"compress_ratio": size.compress, "squeeze_factor": size.squeeze, "overlap_ratio": 0.5}
    sizes |= {"drop_path_rate": size.drop_path, "upsampler": "pixelshuffle"}
    # The size that it is built for decides the largest window, and the size of the masks that it stores.
    body = published(in_chans=_CHANNELS, upscale=UNSHUFFLE, img_size=2 * size.window, **sizes)
    body.upsample, body.conv_last = upsampler(body.conv_last.in_channels, 3, one), nn.Identity()
    return body


def _start_at_zero(body: nn.Module) -> None:
    """Set two layers to zero: the last one, so that training starts from the LR image, and the deep features' last one.

    Deep features end in a LayerNorm, so they have unit spread, ten times that of the shallow ones. In short trainings
    their initial noise would hide what there is to learn.
    """
    layers = [module for module in body.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in (layers[-1], getattr(body, "conv_after_body", None)):
        for parameter in layer.parameters() if layer else ():
            nn.init.zeros_(parameter)


def _spandrel(name: str) -> Any:
    mend_torchvision()
    try:
        from spandrel.architectures import HAT, RCAN, SwinIR
    except ImportError as error:
        raise ImportError(
            f"network.name={name}: needs spandrel: pip install 'degflow[sr]' ({error}); mambair and liif do without"
        ) from None
    return {"swinir": cast(Any, SwinIR).SwinIR, "hat": cast(Any, HAT).HAT, "rcan": cast(Any, RCAN).RCAN}[name]
