"""The authors' two released weight files -> one degrader file."""

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from degflow.capture.scenes import check_levels
from degflow.config import option, required
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models import ResidualAutoencoder, VelocityNetwork, released
from degflow.storage import split_uri

LAYOUTS = {
    "autoencoder": '{"encoder": ..., "decoder": ...}, or names with encoder. and decoder.',
    "flow": '{"model": ...}, or names all_modules.0.weight ...',
}


@dataclass(frozen=True)
class ImportConfig:
    """Keys of import-released."""

    autoencoder: str = required("file or URI of the released autoencoder: encoder and decoder")
    flow: str = required("file or URI of the released velocity network")
    output: str = required("degrader file or URI to write")
    levels: dict[str, float] = option(
        {"1": 1.0, "2": 2.0, "4": 4.0}, "label -> scale of the levels the weights were trained on"
    )

    def __post_init__(self):
        check_levels(self.levels)


def import_released(config: ImportConfig) -> None:
    """Read both files, load them into our networks, and write the degrader."""
    files = {"autoencoder": config.autoencoder, "flow": config.flow}
    data = {key: read(uri, key) for key, uri in files.items()}
    states = {key: tensors(data[key], key, files[key]) for key in files}
    autoencoder = build("autoencoder", states, files, released.autoencoder_config, ResidualAutoencoder)
    velocity = build("flow", states, files, released.velocity_config, VelocityNetwork)
    dropped = fill(autoencoder, released.fit_autoencoder(states["autoencoder"], autoencoder), "autoencoder", files)
    dropped += fill(velocity, released.fit_velocity(states["flow"], velocity), "flow", files)
    provenance = {
        "imported": {key: {"file": uri.rpartition("/")[2], "sha256": digest(data[key])} for key, uri in files.items()},
        "dropped": dropped,
    }
    degrader = Degrader(autoencoder, PathFlow(velocity), config.levels)
    degrader.save(config.output, provenance)
    count = sum(parameter.numel() for parameter in degrader.parameters())
    print(f"{count / 1e6:.1f} M parameters imported; dropped (unused): {', '.join(dropped) or 'nothing'}")
    print(f"degrader: {config.output}")


def read(uri: str, key: str) -> bytes:
    """The bytes of an input file."""
    place, name = split_uri(uri)
    try:
        return place.read(name)
    except FileNotFoundError:
        raise ValueError(f"{key}={uri}: no such file") from None


def tensors(data: bytes, key: str, uri: str) -> dict[str, Tensor]:
    """The tensors of a released file, with the flat names of the published code."""
    try:
        if data[8:9] == b"{":  # after the eight bytes of its header's length
            content: Any = safetensors.torch.load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises UnpicklingError, RuntimeError, EOFError, ... on damage
        if code := re.search(r"unsupported (?:global|class):?(?: GLOBAL)? ([\w.]+)", str(error), re.IGNORECASE):
            raise ValueError(f"{key}={uri}: refused, it holds more than tensors (it calls {code[1]})") from None
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0]
        raise ValueError(f"{key}={uri}: neither a torch.save nor a safetensors file ({reason})") from None
    flat: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        if key == "flow":
            flat = named(content.get("model", content))
        else:
            parts = [part for part in ("encoder", "decoder") if isinstance(content.get(part), Mapping)]
            flat = named(content) if not parts else {}
            for part in parts:
                names = named(content[part])
                flat |= {f"{part}.{name.removeprefix(f'{part}.')}": tensor for name, tensor in names.items()}
    if not flat:
        raise ValueError(f"{key}={uri}: no tensors in the released layout ({LAYOUTS[key]})")
    return flat


def named(state: Any) -> dict[str, Tensor]:
    """The tensors of a mapping, floating-point ones as float32, names without the prefixes of wrappers."""
    if not isinstance(state, Mapping):
        return {}
    found = {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    plain = released.plain_names(found)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in plain.items()}


def build(key: str, states: dict[str, dict[str, Tensor]], files: dict[str, str], measure: Any, network: Any) -> Any:
    """Our network at the size of a released state dict."""
    try:
        return network(measure(states[key])).eval()
    except (KeyError, StopIteration, IndexError, ValueError) as error:
        raise ValueError(
            f"{key}={files[key]}: its tensors do not tell the network's size ({type(error).__name__}: {error}); "
            f"expected {LAYOUTS[key]}"
        ) from None


def fill(network: nn.Module, fit: released.Fit, key: str, files: dict[str, str]) -> list[str]:
    """Load the renamed tensors, all or none; returns the dropped names."""
    if fit.problems:
        lines = "\n  ".join(fit.problems)
        raise ValueError(
            f"{key}={files[key]}: {len(fit.problems)} tensors do not fit, nothing was imported:\n  {lines}"
        )
    network.load_state_dict(fit.state)
    return fit.dropped


def digest(data: bytes) -> str:
    """The sha256 in hex."""
    return hashlib.sha256(data).hexdigest()
