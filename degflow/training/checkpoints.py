"""Training checkpoints: `checkpoints/step-N.pt`, each written whole or not at all."""

import io
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from degflow.models.files import load_checkpoint
from degflow.storage import Place, split_uri

# Keys that change how a training runs, and not what comes out.
MACHINE = (
    r"fit\.(workers|log_every|validate_every|save_every|keep|resume|compile|accumulate|timeout|profile)"
    r"|(scenes\.)?cache|memory"
)
# Keys that may differ between a run and its continuation.
_FREE = re.compile(
    rf"{MACHINE}|output|validation(_\w+)?|half|test(_\w+|\..+)?"
    r"|scenes\.data|train\..+|rae"  # scenes, pairs and stage 1 may have moved: what they hold is compared
)

_ORDERED = re.compile(r"train|(scenes\.)?levels")  # dicts whose names and order decide which sample is which


class Checkpoints:
    """The checkpoints of one output.

    Args:
        place: the output.
        keep: how many of the newest are kept.
    """

    def __init__(self, place: Place, keep: int):
        self.place, self.keep = place, keep

    def names(self) -> list[str]:
        """Their names, oldest first."""
        keys = [source.key for source in self.place.files("checkpoints")]
        return [key for key in keys if re.fullmatch(r"checkpoints/step-\d+\.pt", key)]

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, then delete the oldest beyond `keep`.

        Raises:
            OSError: it cannot be written, e.g. on a full disk. Nothing of it is left, and the older ones stay.
        """
        name, buffer = f"checkpoints/step-{step:08d}.pt", io.BytesIO()
        torch.save(state, buffer)
        try:
            self.place.write(name, buffer.getvalue())
        except OSError as error:
            size = f"{len(buffer.getvalue()) / 2**20:.1f} MiB"
            raise OSError(f"{self.place.uri_of(name)}: cannot be written ({size}): {error}") from error
        for old in self.names()[: -self.keep]:
            self.place.delete(old)

    def clear(self) -> int:
        """Delete all; returns how many there were."""
        names = self.names()
        for name in names:
            self.place.delete(name)
        return len(names)

    def read(self, name: str, settings: dict[str, Any], frozen: str = "", data: str = "") -> dict[str, Any]:
        """Read a checkpoint of the same run.

        Args:
            name: one of `names`.
            settings: the run's configuration, as plain values. Keys that do not change the result may differ.
            frozen: fingerprint of the weights that are not trained; "": any. data: of the scenes; the same.

        Raises:
            ValueError: it is unreadable, or was made with another configuration, other scenes, pairs or frozen weights.
        """
        uri, state = self.place.uri_of(name), read_checkpoint(self.place, name)
        advice = "use the same configuration, another output, or fit.resume=never"
        if differing := sorted(_differences(state["settings"], settings)):
            raise ValueError(f"{uri}: was made with another {', '.join(differing)}; {advice}")
        if frozen and state["frozen"] != frozen:
            raise ValueError(f"{uri}: was made with other frozen weights; {advice}")
        if data and state.get("data", data) != data:
            raise ValueError(f"{uri}: was made with other scenes or pairs, or another stage 1; {advice}")
        return state


def read_checkpoint(place: Place, name: str) -> dict[str, Any]:
    """Read what `Checkpoints.write` wrote; nothing in the file can run code."""
    try:
        state = torch.load(io.BytesIO(place.read(name)), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{place.uri_of(name)}: no such file") from None
    except OSError:
        raise
    except Exception as error:  # torch.load raises UnpicklingError, RuntimeError, EOFError, KeyError, ... on damage
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{place.uri_of(name)}: not a readable training checkpoint ({reason})") from None
    wanted = {"step", "network", "ema", "optimizer", "scaler", "unlogged", "settings", "frozen"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise ValueError(f"{place.uri_of(name)}: not a training checkpoint (those are called checkpoints/step-N.pt)")
    return state


def stored_weights(uri: str) -> dict[str, Tensor]:
    """The averaged weights of a training checkpoint (.pt), or the tensors of a file that may hold several networks."""
    return read_checkpoint(*split_uri(uri))["ema"] if uri.endswith(".pt") else load_checkpoint(uri)[0]


def part_for(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of this network in a file that may hold several modules, each under its own prefix."""
    names = network.state_dict().keys()
    parts = {name.partition(".")[0] for name in names}
    prefixes = {name[: end + 1] for name in tensors for end, letter in enumerate(name) if letter == "."}
    best = max(["", *sorted(prefixes)], key=lambda prefix: sum(prefix + name in tensors for name in names))
    found = {name.removeprefix(best): tensor for name, tensor in tensors.items() if name.startswith(best)}
    return {name: tensor.float() for name, tensor in found.items() if name.partition(".")[0] in parts}


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in old.keys() | new.keys():
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{name}.")
            if _ORDERED.fullmatch(name) and list(a) != list(b):
                what = "order" if a.keys() == b.keys() else "names"
                yield f"{what} of {name} ({', '.join(a)} then, {', '.join(b)} now)"
        elif a != b and not _FREE.fullmatch(name):
            yield f"{name} ({a} then, {b} now)"
