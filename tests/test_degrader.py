import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from degflow import Degrader
from degflow.degrader import pad
from degflow.models import (
    AutoencoderConfig,
    FlowMap,
    ResidualAutoencoder,
    VelocityConfig,
    VelocityNetwork,
    velocity_network,
)
from degflow.models.files import load_checkpoint, save_checkpoint
from degflow.trajectory import Timeline

LEVELS = {"1": 1.0, "2": 2.1, "4": 3.75}


@pytest.fixture(scope="module", params=[{}, {"source": True}, {"flow_map": True}], ids=["published", "source", "map"])
def degrader(request):
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8, gate_init=0.5))
    config = VelocityConfig(width=16, blocks=1, multipliers=(1, 2), **request.param)
    time = "inverse" if config.flow_map else "linear"
    return Degrader(autoencoder, velocity_network(config, Timeline(tuple(LEVELS.values()), time).knots), LEVELS, time)


def pictures(count, height, width, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 100), (64, 64), (65, 63), (33, 17), (31, 128)])
def test_every_size_from_8_up_comes_back_whole(degrader, height, width):
    hr = pictures(2, height, width)
    out = degrader(hr, torch.tensor([1.0, 3.0]))
    assert out.shape == hr.shape
    assert bool(out.isfinite().all())
    assert float(out.abs().max()) <= 1


def test_padding_reflects_and_repeats_where_the_image_is_small():
    row = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 3, 8, 8)
    padded = pad(row, 32)
    assert padded.shape == (1, 3, 32, 32)
    wanted = np.pad(row[0, 0].numpy(), ((0, 24), (0, 24)), mode="reflect")
    np.testing.assert_array_equal(padded[0, 0].numpy(), wanted)


def test_scale_one_is_the_plain_reconstruction(degrader):
    hr = pictures(1, 64, 64)
    with torch.no_grad():
        plain = degrader.autoencoder.decode(*degrader.autoencoder.encode(hr)).clamp(-1, 1)
    torch.testing.assert_close(degrader(hr, torch.tensor([1.0])), plain)
    torch.testing.assert_close(degrader(hr, torch.tensor([[1.0]]))[:, 0], plain)


def test_an_image_does_not_depend_on_its_batch_mates(degrader):
    hr = pictures(3, 40, 48)
    scale = torch.tensor([1.3, 3.75, 2.2])
    together = degrader(hr, scale)
    for n in range(3):
        torch.testing.assert_close(together[n : n + 1], degrader(hr[n : n + 1], scale[n : n + 1]), rtol=0, atol=1e-4)


def test_several_scales_share_one_integration_and_do_not_change_each_other(degrader):
    hr = pictures(2, 40, 48)
    scales = torch.tensor([[1.0, 2.0, 3.5], [3.7, 1.2, 2.0]])
    many = degrader(hr, scales)
    assert many.shape == (2, 3, 3, 40, 48)
    for n in range(3):
        assert torch.equal(many[:, n], degrader(hr, scales[:, n : n + 1])[:, 0])
    # The dense reading of a fine integration agrees with stopping there.
    fine = degrader(hr, scales, steps=16)
    for n in range(3):
        torch.testing.assert_close(fine[:, n], degrader(hr, scales[:, n], steps=16), rtol=0, atol=1e-3)


def test_the_rule_of_times_decides_when_a_scale_is_reached(degrader):
    if isinstance(degrader.velocity, FlowMap):
        with pytest.raises(
            ValueError, match=r"time=linear: the flow map's knots, \[0.0, 0.71.*\], are of another time"
        ):
            Degrader(degrader.autoencoder, degrader.velocity, LEVELS)
        return
    networks, rules = (degrader.autoencoder, degrader.velocity, LEVELS), ("linear", "inverse")
    even, inverse = (Degrader(*networks, rule) for rule in rules)
    hr, scale = pictures(1, 32, 40), torch.tensor([2.5], dtype=torch.float64)
    share = (1 - 1 / 2.5) / (1 - 1 / 3.75)
    torch.testing.assert_close(inverse(hr, scale), even(hr, torch.tensor([1 + 2.75 * share], dtype=torch.float64)))
    assert float((inverse(hr, scale) - even(hr, scale)).abs().max()) > 1e-3


@pytest.mark.parametrize("half", [False, True])
def test_save_and_load_give_the_same_images(degrader, tmp_path, half):
    uri = str(tmp_path / "d.safetensors")
    degrader.save(uri, {"seed": 7}, half=half)
    loaded = Degrader.load(uri)
    hr = pictures(1, 48, 40)
    tolerance = 0.02 if half else 0
    torch.testing.assert_close(
        loaded(hr, torch.tensor([2.5])), degrader(hr, torch.tensor([2.5])), rtol=0, atol=tolerance
    )
    assert loaded.levels == LEVELS
    assert loaded.timeline == degrader.timeline
    assert (loaded.low, loaded.high) == (1.0, 3.75)
    assert loaded.provenance == {"seed": 7}
    assert len(loaded.sha256) == 64
    assert next(loaded.parameters()).dtype == torch.float32


def test_the_file_describes_itself(degrader, tmp_path):
    uri = str(tmp_path / "d.safetensors")
    degrader.save(uri, {})
    with safe_open(uri, "pt") as file:
        description = json.loads(file.metadata()["degflow"])
    assert description["kind"] == "degrader"
    assert description["autoencoder"]["base_width"] == 8
    assert description["velocity"]["width"] == 16
    assert description["levels"] == LEVELS


def test_pil_in_pil_out(degrader):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    out = degrader.degrade(picture, scale=2.7)
    assert out.size == picture.size
    assert out.mode == "RGB"


@pytest.mark.parametrize("scale", [0.99, 3.76])
def test_a_scale_outside_the_trained_range_is_refused(degrader, scale):
    with pytest.raises(ValueError, match=rf"scale={scale}.*: must lie in the trained range \[1.0, 3.75\]"):
        degrader(pictures(1, 16, 16), torch.tensor([scale], dtype=torch.float64))


def test_a_picture_that_is_too_small_is_refused(degrader):
    with pytest.raises(ValueError, match=r"20 x 7 pixels: each side must have at least 8"):
        degrader.degrade(Image.new("RGB", (20, 7)), scale=2.0)


def test_latent_channels_must_agree():
    with pytest.raises(ValueError, match=r"velocity.latent_channels=6: must be the autoencoder's, 4"):
        Degrader(
            ResidualAutoencoder(AutoencoderConfig(base_width=8)),
            VelocityNetwork(VelocityConfig(width=16, blocks=1, latent_channels=6)),
            LEVELS,
        )


def test_rescaling_the_latent_changes_no_image(degrader):
    hr = pictures(1, 32, 32)
    autoencoder = ResidualAutoencoder(degrader.autoencoder.config)
    autoencoder.load_state_dict(degrader.autoencoder.state_dict())
    factor = torch.tensor([0.5, 2.0, 3.0, 0.1])
    autoencoder.rescale_latent(factor)
    with torch.no_grad():
        before, skips = degrader.autoencoder.encode(hr)
        after, _ = autoencoder.encode(hr)
        torch.testing.assert_close(after, before * factor[:, None, None])
        torch.testing.assert_close(
            autoencoder.decode(after, skips), degrader.autoencoder.decode(before, skips), rtol=0, atol=1e-5
        )


def test_a_picture_comes_under_the_image_rule(degrader):
    transparent = Image.new("RGBA", (24, 16), (255, 0, 0, 0))
    white = Image.new("RGB", (24, 16), "white")
    assert degrader.degrade(transparent, scale=2.0).tobytes() == degrader.degrade(white, scale=2.0).tobytes()


def test_the_bounds_themselves_are_accepted_in_either_precision():
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8))
    degrader = Degrader(autoencoder, VelocityNetwork(VelocityConfig(width=16, blocks=1)), {"1": 1.0, "x": 3.9})
    assert float(torch.tensor(3.9)) > 3.9
    hr = pictures(1, 16, 16)
    assert torch.equal(degrader(hr, torch.tensor([3.9])), degrader(hr, torch.tensor([3.9], dtype=torch.float64)))
    assert degrader.degrade(Image.new("RGB", (16, 16)), scale=3.9).size == (16, 16)


@pytest.mark.parametrize(
    "change",
    [{"levels": {}}, {"time": "backwards"}, {"autoencoder": {"base_width": 0}}, {"velocity": {"widht": 8}}],
)
def test_a_damaged_degrader_file_is_named(degrader, tmp_path, change):
    uri = str(tmp_path / "d.safetensors")
    degrader.save(uri, {})
    tensors, description, _ = load_checkpoint(uri)
    save_checkpoint(uri, tensors, {**description, **change})
    with pytest.raises(ValueError, match=r"d\.safetensors: a damaged degrader"):
        Degrader.load(uri)
    save_checkpoint(uri, dict(list(tensors.items())[1:]), description)
    with pytest.raises(ValueError, match=r"d\.safetensors: a damaged degrader"):
        Degrader.load(uri)


def test_compiling_changes_no_image_and_no_name_in_the_file(degrader):
    hr, scale = pictures(1, 40, 48), torch.tensor([2.5])
    wanted = degrader(hr, scale)
    compiled = copy.deepcopy(degrader)
    compiled.compile(backend="eager")  # no C++ compiler needed; the tracing is what is tested
    torch.testing.assert_close(compiled(hr, scale), wanted, rtol=0, atol=1e-5)
    assert compiled.state_dict().keys() == degrader.state_dict().keys()


def test_every_evaluation_sees_where_the_path_began(degrader):
    hr, seen = pictures(2, 64, 64), []
    mapped = isinstance(degrader.velocity, FlowMap)
    network, argument = (degrader.velocity.network, 0) if mapped else (degrader.velocity, 2)
    handle = network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[argument]))
    degrader(hr, torch.tensor([2.0, 3.75]), steps=2)
    handle.remove()
    with torch.no_grad():
        latent, _ = degrader.autoencoder.encode(hr)
    assert len(seen) == (1 if mapped else 2 * 6)
    for source in seen:
        torch.testing.assert_close(source, latent)


def test_compiled_for_all_sizes_new_sizes_compile_nothing_anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = Degrader.load(), []
    compiled.compile(dynamic=True, backend="eager")
    for height, width in ((640, 512), (512, 640), (768, 768), (600, 801)):  # whole, and to be padded
        compiled(pictures(1, height, width), torch.tensor([[2.0]]))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 4


def test_an_unknown_precision_is_named(degrader):
    with pytest.raises(ValueError, match=r"precision=half: must be one of float32, float16, bfloat16"):
        degrader(pictures(1, 32, 32), torch.tensor([2.0]), precision="half")


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the kernel gives no large pages"
)
@pytest.mark.parametrize("asked", [{}, {"THP_MEM_ALLOC_ENABLE": "0"}])
def test_large_tensors_lie_in_large_pages_unless_the_environment_says_otherwise(asked):
    measured = (
        "from degflow import Degrader; import torch, resource\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "torch.ones(64, 2**20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    clean = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", measured], env=clean | asked, capture_output=True, text=True, check=True
    )
    faults, pages = int(done.stdout), 2**28 // 4096
    assert (faults < pages / 4) == (not asked or "[always]" in HUGE_PAGES.read_text())
