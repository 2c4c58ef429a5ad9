"""The names of the authors' released tensors, in terms of ours (the architecture is the same function)."""

import re

from torch import Tensor

from degflow.models.velocity import VelocityNetwork


def autoencoder_name(released: str) -> str:
    """Released autoencoder key (with its `encoder.` or `decoder.` prefix) -> key of `ResidualAutoencoder`.

    Example: encoder.EB1.RB0.norm0.body.weight -> encoder.levels.1.blocks.0.norms.0.weight
    """
    rules = (
        (r"\.[ED]B(\d)\.RB(\d)\.norm(\d)\.body\.", r".levels.\1.blocks.\2.norms.\3."),
        (r"\.[ED]B(\d)\.RB(\d)\.conv(\d)\.", r".levels.\1.blocks.\2.convs.\3."),
        (r"\.[ED]B(\d)\.beta$", r".levels.\1.gates.0"),
        (r"\.[ED]B(\d)\.gamma$", r".levels.\1.gates.1"),
        (r"\.EB(\d)\.down\.", r".levels.\1.reduce."),
        (r"\.DB(\d)\.up\.0\.", r".expands.\1.widen."),
        (r"\.DB(\d)\.up\.2\.", r".expands.\1.narrow."),
        (r"\.conv_cat(\d)\.", lambda skip: f".expands.{2 - int(skip[1])}.merge."),  # numbered by skip, finest first
        (r"^encoder\.conv_out\.", "encoder.head."),
        (r"^decoder\.conv_in\.", "decoder.stem."),
        (r"^decoder\.refine\.1\.", "decoder.head."),
    )
    for pattern, replacement in rules:
        released = re.sub(pattern, replacement, released)
    return released


def velocity_state(released: dict[str, Tensor], network: VelocityNetwork) -> dict[str, Tensor]:
    """Rename the released velocity network's numbered modules to those of `network`, which has the same size.

    The unused buffer `sigmas` is dropped; the per-pixel linears of attention are stored in x out and are transposed.
    """
    modules = ["embedding.first", "embedding.second", "stem"]
    modules += [f"down.{index}" for index in range(len(network.down))]
    modules += [f"middle.{index}" for index in range(3)]
    modules += [f"up.{index}" for index in range(len(network.up))]
    modules += ["head_norm", "head"]
    parts = {
        "GroupNorm_0": "norm1", "GroupNorm_1": "norm2", "Conv_0": "conv1", "Conv_1": "conv2", "Conv_2": "skip",
        "Dense_0": "embed", "NIN_0": "query", "NIN_1": "key", "NIN_2": "value", "NIN_3": "out",
    }  # fmt: skip
    state = {}
    for name, tensor in released.items():
        if name == "sigmas":
            continue
        _, number, *part, leaf = name.split(".")
        inner = [parts[word] for word in part]
        if part and part[0].startswith("NIN"):
            leaf, tensor = {"W": ("weight", tensor.T), "b": ("bias", tensor)}[leaf]
        elif part == ["GroupNorm_0"] and modules[int(number)] == "middle.1":
            inner = ["norm"]
        state[".".join((modules[int(number)], *inner, leaf))] = tensor
    return state
