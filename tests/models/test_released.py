import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from degflow import Degrader
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork, released
from tests import ROOT
from tests.jobs import run_job
from tests.traps import Trap

REFERENCE = ROOT / "tests/models/released"
SKIPS = ("skip0", "skip1", "skip2")


def import_released(autoencoder, flow, output):
    """Exit status and what the job said."""
    return run_job("import_released", f"autoencoder={autoencoder}", f"flow={flow}", f"output={output}")


def imported(autoencoder, flow, output):
    code, said = import_released(autoencoder, flow, output)
    assert code == 0, said
    return Degrader.load(str(output))


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def released_names(autoencoder, velocity):
    """Our state dicts under the released names: the inverse of the importer."""
    names = {}
    for kind, letter in (("encoder", "E"), ("decoder", "D")):
        part = getattr(autoencoder, kind)
        levels = len(part.levels)
        for name, tensor in part.state_dict().items():
            word = name.split(".")
            if word[0] == "levels":
                block = f"{letter}B{word[1]}"
                if word[2] == "gates":
                    new = f"{block}.{('beta', 'gamma')[int(word[3])]}"
                elif word[2] == "reduce":
                    new = f"{block}.down.{word[3]}"
                elif word[4] == "norms":
                    new = f"{block}.RB{word[3]}.norm{word[5]}.body.{word[6]}"
                else:
                    new = f"{block}.RB{word[3]}.conv{word[5]}.{word[6]}"
            elif word[0] == "expands":
                step = int(word[1])
                new = {
                    "widen": f"DB{step}.up.0.{word[3]}",
                    "narrow": f"DB{step}.up.2.{word[3]}",
                    "merge": f"conv_cat{levels - 2 - step}.{word[3]}",
                }[word[2]]
            elif kind == "encoder":
                new = {"stem": "stem", "head": "conv_out"}[word[0]] + f".{word[1]}"
            else:
                new = {"stem": "conv_in", "head": "refine.1"}[word[0]] + f".{word[1]}"
            names[f"{kind}.{new}"] = tensor.contiguous()
    order = ["embedding.first", "embedding.second", "stem"]
    order += [f"down.{n}" for n in range(len(velocity.down))] + [f"middle.{n}" for n in range(3)]
    order += [f"up.{n}" for n in range(len(velocity.up))] + ["head_norm", "head"]
    block = {"norm1": "GroupNorm_0", "norm2": "GroupNorm_1", "conv1": "Conv_0", "conv2": "Conv_1", "skip": "Conv_2"}
    block |= {"embed": "Dense_0", "norm": "GroupNorm_0"}
    linear = {"query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"}
    flow = {"sigmas": torch.linspace(1, 2, 1000, dtype=torch.float64)}
    for name, tensor in velocity.state_dict().items():
        module = next(prefix for prefix in order if name.startswith(prefix + "."))
        rest = name.removeprefix(module + ".").split(".")
        number = f"all_modules.{order.index(module)}"
        if rest[0] in linear:
            leaf, tensor = ("W", tensor.T) if rest[1] == "weight" else ("b", tensor)
            flow[f"{number}.{linear[rest[0]]}.{leaf}"] = tensor.contiguous()
        elif len(rest) == 2:
            flow[f"{number}.{block[rest[0]]}.{rest[1]}"] = tensor
        else:
            flow[f"{number}.{rest[0]}"] = tensor
    return names, flow


def split(names):
    parts = {"encoder": {}, "decoder": {}, "t_params": {"LR2": torch.tensor(-0.693), "LR3": torch.tensor(0.693)}}
    for name, tensor in names.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


@pytest.fixture
def small():
    torch.manual_seed(3)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=16, gate_init=0.3, latent_channels=6))
    velocity = VelocityNetwork(VelocityConfig(latent_channels=6, width=24, multipliers=(1, 2, 3), blocks=2))
    return autoencoder, velocity


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    files = (REFERENCE / "autoencoder.safetensors", REFERENCE / "velocity.safetensors")
    return imported(*files, tmp_path_factory.mktemp("reference") / "degrader.safetensors")


@pytest.mark.parametrize("case", ["0", "1"])
def test_the_reference_files_reproduce_every_reference_tensor(reference, case):
    """Rounding makes up to 1.1e-6; a norm's epsilon of 1e-5 in place of 1e-6 makes 1.5e-4."""
    io = {name.partition(".")[2]: x for name, x in load_file(REFERENCE / "io.safetensors").items() if name[0] == case}
    with torch.no_grad():
        latent, skips = reference.autoencoder.encode(io["image"])
        decoded = reference.autoencoder.decode(io["moved_latent"], skips)
        velocity = reference.flow.network(io["latent"], io["t"])
    found = {"latent": latent, "velocity": velocity}
    large = {**dict(zip(SKIPS, skips, strict=True)), "decoded": decoded}
    found |= {name: tensor.flatten()[::7] for name, tensor in large.items()}  # what the file keeps of them
    errors = {name: relative_error(tensor, io[name]) for name, tensor in found.items()}
    assert max(errors.values()) < 1e-5, errors
    assert reference.levels == {"1": 1.0, "2": 2.0, "4": 4.0}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_another_width_and_depth_round_trips_through_the_released_naming(tmp_path, small, prefix):
    names, flow = released_names(*small)
    parts = split(names)
    parts |= {part: {prefix + name: tensor for name, tensor in parts[part].items()} for part in ("encoder", "decoder")}
    torch.save(parts, tmp_path / "AE.pth")
    torch.save({"model": {prefix + name: tensor for name, tensor in flow.items()}}, tmp_path / "FLOW.pth")
    degrader = imported(tmp_path / "AE.pth", tmp_path / "FLOW.pth", tmp_path / "degrader.safetensors")
    assert degrader.autoencoder.config.base_width == 16
    assert degrader.flow.network.config.multipliers == (1, 2, 3)
    for network, original in zip((degrader.autoencoder, degrader.flow.network), small, strict=True):
        for name, tensor in original.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor), name


def test_flat_names_and_safetensors_are_taken(tmp_path, small):
    names, flow = released_names(*small)
    wrapped = {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in names.items()}
    save_file(wrapped, tmp_path / "AE.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in flow.items()}, tmp_path / "FLOW.safetensors")
    output = tmp_path / "degrader.safetensors"
    degrader = imported(tmp_path / "AE.safetensors", tmp_path / "FLOW.safetensors", output)
    with safe_open(str(output), "pt") as file:
        provenance = json.loads(file.metadata()["degflow"])["provenance"]
    assert set(provenance["imported"]) == {"autoencoder", "flow"}
    assert all(len(source["sha256"]) == 64 for source in provenance["imported"].values())
    assert provenance["dropped"] == ["sigmas"]
    assert {tensor.dtype for tensor in degrader.state_dict().values()} == {torch.float32}


def test_every_key_that_does_not_fit_is_listed_in_one_error(tmp_path, small):
    names, flow = released_names(*small)
    del names["encoder.EB1.RB0.conv0.weight"]
    names["decoder.extra.weight"] = torch.zeros(3)
    names["decoder.refine.1.weight"] = torch.zeros(3, 5, 3, 3)
    torch.save(split(names), tmp_path / "AE.pth")
    torch.save({"model": flow}, tmp_path / "FLOW.pth")
    code, said = import_released(tmp_path / "AE.pth", tmp_path / "FLOW.pth", tmp_path / "out.safetensors")
    assert code == 2
    assert f"autoencoder={tmp_path}/AE.pth: 3 tensors do not fit" in said
    assert "missing: encoder.levels.1.blocks.0.convs.0.weight" in said
    assert "surplus: decoder.extra.weight" in said
    assert "misshapen: decoder.refine.1.weight is [3, 5, 3, 3], not [3, 16, 3, 3]" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, small):
    _, flow = released_names(*small)
    torch.save({"encoder": {}, "decoder": {}, "more": Trap(os.mkdir, str(tmp_path / "ran"))}, tmp_path / "AE.pth")
    torch.save({"model": flow}, tmp_path / "FLOW.pth")
    code, said = import_released(tmp_path / "AE.pth", tmp_path / "FLOW.pth", tmp_path / "out.safetensors")
    assert code == 2
    assert f"autoencoder={tmp_path}/AE.pth: refused, it holds more than tensors" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"<html>not found</html>", "neither a torch.save nor a safetensors file"),
        ({"state": 3}, "no tensors in the released layout"),
        ({"encoder": {"a.weight": torch.zeros(2)}}, "do not tell the network's size"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "AE.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "AE.pth")
    torch.save({"model": {"all_modules.2.weight": torch.zeros(8, 4, 3, 3)}}, tmp_path / "FLOW.pth")
    code, said = import_released(tmp_path / "AE.pth", tmp_path / "FLOW.pth", tmp_path / "out.safetensors")
    assert code == 2
    assert f"autoencoder={tmp_path}/AE.pth: " in said
    assert message in said


def full_size_keys():
    shapes, part = {"autoencoder": {}, "velocity": {}}, ""
    for line in (REFERENCE / "full_size_keys.tsv").read_text().splitlines():
        if line.startswith("#"):
            part = line.split()[1]
        else:
            name, shape, _ = line.split("\t")
            shapes[part][name] = json.loads(shape)
    return shapes


def test_the_full_size_keys_map_one_to_one():
    shapes = full_size_keys()
    states = {
        part: {name: torch.empty(shape, device="meta") for name, shape in keys.items()} for part, keys in shapes.items()
    }
    with torch.device("meta"):
        autoencoder = ResidualAutoencoder(released.autoencoder_config(states["autoencoder"]))
        velocity = VelocityNetwork(released.velocity_config(states["velocity"]))
    assert autoencoder.config == AutoencoderConfig()
    assert velocity.config == VelocityConfig()
    for part, fit, network in (
        ("autoencoder", released.fit_autoencoder(states["autoencoder"], autoencoder), autoencoder),
        ("velocity", released.fit_velocity(states["velocity"], velocity), velocity),
    ):
        assert fit.problems == []
        assert set(fit.state) == set(network.state_dict())
        assert len(fit.state) + len(fit.dropped) == len(shapes[part])
    assert fit.dropped == ["sigmas"]


FULL_SIZE = """
import sys, numpy as np
from PIL import Image
from degflow import Degrader
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8))
degrader = Degrader.load(sys.argv[1])
out = degrader.degrade(picture, scale=2.7, steps=1)
_, grid, _ = degrader.plan(3000, 4000)
print(*out.size, grid.rows * grid.columns)
"""


def test_a_full_size_import_degrades_an_image_and_a_large_one_in_tiles(tmp_path):
    generator = torch.Generator().manual_seed(0)
    states = {
        part: {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in keys.items()}
        for part, keys in full_size_keys().items()
    }
    torch.save(split(states["autoencoder"]), tmp_path / "AE.pth")
    torch.save({"model": states["velocity"]}, tmp_path / "FLOW.pth")
    output = tmp_path / "degrader.safetensors"
    assert import_released(tmp_path / "AE.pth", tmp_path / "FLOW.pth", output)[0] == 0
    done = subprocess.run([sys.executable, "-c", FULL_SIZE, str(output)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    width, height, tiles = map(int, done.stdout.split())
    assert (width, height) == (101, 75)
    assert tiles > 1  # of 12 megapixels, in the usual memory
