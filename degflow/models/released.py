"""The authors' released weights: their names and shapes in terms of ours (the networks are the same function).

Two `torch.save` dicts are published: {"encoder": ..., "decoder": ..., "t_params": ...} and {"model": ...}. A network's
size is read off its tensors, so any width and depth of the architecture is taken.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from degflow.models.autoencoder import AutoencoderConfig, ResidualAutoencoder
from degflow.models.velocity import VelocityConfig, VelocityNetwork

State = Mapping[str, Tensor]

_AUTOENCODER_NAMES = (
    (r"\.[ED]B(\d+)\.RB(\d+)\.norm(\d+)\.body\.", r".levels.\1.blocks.\2.norms.\3."),
    (r"\.[ED]B(\d+)\.RB(\d+)\.conv(\d+)\.", r".levels.\1.blocks.\2.convs.\3."),
    (r"\.[ED]B(\d+)\.beta$", r".levels.\1.gates.0"),
    (r"\.[ED]B(\d+)\.gamma$", r".levels.\1.gates.1"),
    (r"\.EB(\d+)\.down\.", r".levels.\1.reduce."),
    (r"\.DB(\d+)\.up\.0\.", r".expands.\1.widen."),
    (r"\.DB(\d+)\.up\.2\.", r".expands.\1.narrow."),
    (r"^encoder\.conv_out\.", "encoder.head."),
    (r"^decoder\.conv_in\.", "decoder.stem."),
    (r"^decoder\.refine\.1\.", "decoder.head."),
)
_BLOCK_PARTS = {
    "GroupNorm_0": "norm1",
    "GroupNorm_1": "norm2",
    "Conv_0": "conv1",
    "Conv_1": "conv2",
    "Conv_2": "skip",
    "Dense_0": "embed",
}
_ATTENTION_PARTS = {"GroupNorm_0": "norm", "NIN_0": "query", "NIN_1": "key", "NIN_2": "value", "NIN_3": "out"}
_UNUSED = ("sigmas",)  # a buffer of the released network that nothing reads


class Fit(NamedTuple):
    """How a released state dict fits a network of ours: renamed tensors, and what does not fit."""

    state: dict[str, Tensor]
    dropped: list[str]
    problems: list[str]


def plain_names(state: State) -> dict[str, Tensor]:
    """Strip the prefixes that `torch.compile` and data parallelism put before names."""
    return {re.sub(r"(?<![^.])(_orig_mod|module)\.", "", name): tensor for name, tensor in state.items()}


def autoencoder_config(state: State) -> AutoencoderConfig:
    """Width and depth of a released autoencoder, from its tensors (names with `encoder.` and `decoder.`)."""
    widths = [state[f"encoder.EB{level}.beta"].shape[1] for level in range(_count(state, r"encoder\.EB(\d+)\.beta"))]
    base = state["encoder.stem.weight"].shape[0]
    return AutoencoderConfig(
        base_width=base,
        multipliers=tuple(width // base for width in widths),
        latent_channels=state["encoder.conv_out.weight"].shape[0],
    )


def fit_autoencoder(state: State, network: ResidualAutoencoder) -> Fit:
    """Rename a released autoencoder's tensors to those of `network`, and list what is missing, surplus or misshapen."""
    finest = len(network.config.multipliers) - 2

    def name(released: str) -> str:
        for pattern, replacement in _AUTOENCODER_NAMES:
            released = re.sub(pattern, replacement, released)
        # conv_cat is numbered by the skip it merges, finest first; ours by the step up, coarsest first.
        return re.sub(r"\.conv_cat(\d+)\.", lambda skip: f".expands.{finest - int(skip[1])}.merge.", released)

    return _compare({name(key): (key, tensor) for key, tensor in state.items()}, [], network)


def velocity_config(state: State) -> VelocityConfig:
    """Width and depth of a released velocity network, from its tensors.

    The down path is `blocks` residual blocks for each level and, between levels, one block that resamples: it has a
    1x1 skip although its width does not change.
    """
    width, latent_channels = state["all_modules.2.weight"].shape[:2]
    attention = next(int(key.split(".")[1]) for key in state if key.endswith(".NIN_0.W"))
    shapes = [
        (*state[f"all_modules.{n}.Conv_0.weight"].shape[1::-1], f"all_modules.{n}.Conv_2.weight" in state)
        for n in range(3, attention - 1)
    ]
    resampling = [n for n, (inputs, outputs, skip) in enumerate(shapes) if skip and inputs == outputs]
    levels = len(resampling) + 1
    ends = [*resampling, len(shapes)]
    return VelocityConfig(
        latent_channels=latent_channels,
        width=width,
        multipliers=tuple(shapes[end - 1][1] // width for end in ends),
        blocks=(len(shapes) - len(resampling)) // levels,
    )


def fit_velocity(state: State, network: VelocityNetwork) -> Fit:
    """Rename a released velocity network's numbered modules to those of `network`, and list what does not fit."""
    modules = ["embedding.first", "embedding.second", "stem"]
    modules += [f"down.{index}" for index in range(len(network.down))]
    modules += [f"middle.{index}" for index in range(3)]
    modules += [f"up.{index}" for index in range(len(network.up))]
    modules += ["head_norm", "head"]

    def rename(released: str, tensor: Tensor) -> tuple[str, Tensor]:
        match = re.fullmatch(r"all_modules\.(\d+)\.(?:(\w+)\.)?(\w+)", released)
        if not match or int(match[1]) >= len(modules):
            return released, tensor
        module, part, leaf = modules[int(match[1])], match[2], match[3]
        if part and part.startswith("NIN"):  # a per-pixel Linear, its weight stored in x out
            leaf, tensor = ("weight", tensor.T) if leaf == "W" else ("bias", tensor)
        parts = _ATTENTION_PARTS if module == "middle.1" else _BLOCK_PARTS
        return ".".join(word for word in (module, parts.get(part, part) if part else "", leaf) if word), tensor

    renamed = {}
    for released, tensor in state.items():
        if released not in _UNUSED:
            name, tensor = rename(released, tensor)
            renamed[name] = (released, tensor)
    return _compare(renamed, [name for name in _UNUSED if name in state], network)


def _compare(renamed: Mapping[str, tuple[str, Tensor]], dropped: list[str], network: nn.Module) -> Fit:
    expected = network.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in renamed]
    for name, (released, tensor) in renamed.items():
        if name not in expected:
            problems.append(f"surplus: {released}")
        elif tensor.shape != expected[name].shape:
            problems.append(f"misshapen: {released} is {list(tensor.shape)}, not {list(expected[name].shape)}")
    return Fit({name: tensor for name, (_, tensor) in renamed.items() if name in expected}, dropped, problems)


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.fullmatch(pattern, name))), default=-1)
