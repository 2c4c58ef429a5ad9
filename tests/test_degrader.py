import copy
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from degflow import Degrader, images
from degflow.degrader import pad
from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.models.files import load_checkpoint, save_checkpoint
from degflow.models.residual import Guide, lost_detail
from tests.captures import path_flow, residual_flow, small_degrader

LEVELS = {"1": 1.0, "2": 2.1, "4": 3.75}


def degrader_of(kind):
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8, gate_init=0.5))
    if kind == "path":
        return Degrader(autoencoder, path_flow(1.0, width=16, multipliers=(1, 2)), LEVELS)
    return Degrader(autoencoder, residual_flow(LEVELS, 8), LEVELS)


@pytest.fixture(scope="module", params=["path", "residual"])
def degrader(request):
    return degrader_of(request.param)


@pytest.fixture(scope="module")
def drawing():
    return degrader_of("residual")


def pictures(count, height, width, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Images and scales


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


def test_the_lowest_scale_is_the_plain_reconstruction(degrader):
    hr = pictures(1, 64, 64)
    with torch.no_grad():
        plain = degrader.autoencoder.decode(*degrader.autoencoder.encode(hr)).clamp(-1, 1)
    for seed in (0, 5):
        torch.testing.assert_close(degrader(hr, torch.tensor([1.0]), seed=seed), plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(degrader(hr, torch.tensor([[1.0]]), seed=seed)[:, 0], plain, rtol=0, atol=1e-5)


def test_several_scales_share_one_integration_and_do_not_change_each_other():
    degrader, hr = degrader_of("path"), pictures(2, 40, 48)
    scales = torch.tensor([[1.0, 2.0, 3.5], [3.7, 1.2, 2.0]])
    many = degrader(hr, scales)
    assert many.shape == (2, 3, 3, 40, 48)
    for n in range(3):
        assert torch.equal(many[:, n], degrader(hr, scales[:, n : n + 1])[:, 0])
    # The dense reading of a fine integration agrees with stopping there.
    fine = degrader(hr, scales, steps=16)
    for n in range(3):
        torch.testing.assert_close(fine[:, n], degrader(hr, scales[:, n], steps=16), rtol=0, atol=1e-3)


def test_the_published_flow_draws_nothing():
    degrader, hr, scale = degrader_of("path"), pictures(1, 32, 40), torch.tensor([2.5])
    wanted = degrader(hr, scale)
    assert torch.equal(degrader(hr, scale, seed=7), wanted)
    assert torch.equal(degrader(hr, scale, spread=0.0), wanted)


@pytest.mark.parametrize("scale", [0.99, 3.76, float("nan")])
def test_a_scale_outside_the_trained_range_is_refused(degrader, scale):
    with pytest.raises(ValueError, match=rf"scale={scale}.*: must lie in the trained range \[1.0, 3.75\]"):
        degrader(pictures(1, 16, 16), torch.tensor([scale], dtype=torch.float64))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor([2.0]), r'scale: shape \(1,\): must be a number, or of shape "B" or "B N" with B=2, as hr'),
        (torch.full((2, 1, 1), 2.0), r"scale: shape \(2, 1, 1\): must be a number"),
        (torch.ones(2, 0), r"scale: shape \(2, 0\): must be a number"),
        ([2.0, 3.0], r'scale=\[2.0, 3.0\]: must be a number, or a tensor "B" or "B N"'),
        (5.0, r"scale=5.0: must lie in the trained range \[1.0, 3.75\]"),
    ],
)
def test_a_scale_for_each_image_is_needed(degrader, scale, message):
    with pytest.raises(ValueError, match=message):
        degrader(pictures(2, 16, 16), scale)


@pytest.mark.parametrize("scale", [2.7, 3, torch.tensor(2.7)])
def test_one_number_is_the_scale_of_all_images(degrader, scale):
    hr = pictures(2, 16, 24)
    wanted = degrader(hr, torch.tensor([float(scale)] * 2, dtype=torch.float64), seed=4)
    torch.testing.assert_close(degrader(hr, scale, seed=4), wanted, rtol=0, atol=1e-5)


# What is no batch of images in [-1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda hr: (hr + 1) * 127.5,
            r"hr: values from 0\.\d+ to 25\d\.\d+: .* \(hr / 127.5 - 1 for values of 0",
        ),
        (lambda hr: hr * 1.5, r"hr: values from -1\.[45]\d* to 1\.[45]\d*: must lie in \[-1, 1\] \(hr.clamp\(-1, 1\)"),
        (lambda hr: hr.where(hr < 0.9, torch.nan), r"hr: values from nan to nan: .* \(NaN is no colour\)"),
        (lambda hr: hr.byte(), r"hr: torch.uint8 \(2, 3, 16, 24\): must be float32 in \[-1, 1\]: hr / 127.5 - 1$"),
        (lambda hr: hr.half(), r"hr: torch.float16 .*: must be float32 .*: hr.to\(torch.float32\) \(precision="),
        (lambda hr: hr.bfloat16(), r"hr: torch.bfloat16 .* \(precision= computes in half precision\)$"),
        (lambda hr: hr.double(), r"hr: torch.float64 .*: hr.to\(torch.float32\)$"),
        (lambda hr: hr.movedim(1, -1), r'hr: torch.float32 \(2, 16, 24, 3\): must be "B 3 H W": hr.movedim\(-1, -3\)'),
        (lambda hr: hr[0].movedim(0, -1), r"hr: torch.float32 \(16, 24, 3\): .* and \[None\] adds the batch$"),
        (lambda hr: hr[0], r"hr: torch.float32 \(3, 16, 24\): .*: hr\[None\] is a batch of one image$"),
        (
            lambda hr: hr[:, :1],
            r"hr: torch.float32 \(2, 1, 16, 24\): .*: hr.expand\(-1, 3, -1, -1\) has equal",
        ),
        (lambda hr: hr[:, [0, 1, 2, 2]], r'hr: torch.float32 \(2, 4, 16, 24\): must be "B 3 H W"$'),
        (lambda hr: hr[..., :7, :], r"hr: .* with B at least 1, H and W at least 8$"),
        (lambda hr: hr[:0], r"hr: .* with B at least 1, H and W at least 8$"),
        (lambda hr: hr.to("meta"), r"hr: on meta: must be where the degrader is, on cpu: hr.to\('cpu'\)$"),
        (lambda hr: hr.numpy(), r"hr: ndarray: must be a tensor .*degrader.degrade takes pictures, arrays and paths"),
    ],
)
def test_what_is_no_batch_of_images_is_named_and_how_to_mend_it(drawing, change, message):
    with pytest.raises(ValueError, match=message):
        drawing(change(pictures(2, 16, 24)), 2.0)


def test_values_as_of_images_in_0_to_1_are_warned_of_where_the_call_stands(drawing):
    hr = pictures(2, 16, 24)
    with pytest.warns(
        UserWarning, match=r"hr: values from [\d.e-]+ to 0\.9\d*, as .*expects \[-1, 1\]: hr \* 2 - 1$"
    ) as said:
        drawing((hr + 1) / 2, 2.0)
    assert [record.filename for record in said] == [__file__]
    rounded = hr.clone()
    rounded[0, 0, 0, :2] = torch.tensor([-1.0005, 1.0005])  # what rounding leaves
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing(rounded, 2.0)
        drawing.degrade(Image.new("RGB", (16, 16), "white"), 2.0)  # bright, and known to be right


def test_the_bounds_themselves_are_accepted_in_either_precision():
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8))
    levels = {"1": 1.0, "x": 3.9}
    for flow in (path_flow(), residual_flow(levels, 8)):
        degrader = Degrader(autoencoder, flow, levels)
        assert float(torch.tensor(3.9)) > 3.9
        hr = pictures(1, 16, 16)
        assert torch.equal(degrader(hr, torch.tensor([3.9])), degrader(hr, torch.tensor([3.9], dtype=torch.float64)))
        assert degrader.degrade(Image.new("RGB", (16, 16)), scale=3.9).size == (16, 16)


def test_an_unknown_precision_is_named(degrader):
    with pytest.raises(ValueError, match=r"precision=half: must be one of float32, tf32, bfloat16, float16"):
        degrader(pictures(1, 32, 32), torch.tensor([2.0]), precision="half")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_near(degrader, precision):
    hr, scale = pictures(2, 40, 48), torch.tensor([2.0, 3.5])
    difference = degrader(hr, scale, precision=precision) - degrader(hr, scale)
    assert 0 < float(difference.square().mean().sqrt()) < (0.01 if precision == "bfloat16" else 0.002)


def test_latent_channels_must_agree():
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8))
    for flow in (path_flow(latent_channels=6), residual_flow(LEVELS, 8, latent_channels=6)):
        with pytest.raises(ValueError, match=r"latent_channels=6: must be the autoencoder's, 4"):
            Degrader(autoencoder, flow, LEVELS)


# Draws


def scales_and_seeds():
    return torch.tensor([1.3, 3.75, 2.2], dtype=torch.float64), torch.tensor([11, 2**50, 12])


def test_an_image_does_not_depend_on_its_batch_mates_nor_on_their_order(degrader):
    hr, (scale, seeds) = pictures(3, 40, 48), scales_and_seeds()
    together = degrader(hr, scale, seed=seeds)
    for n in range(3):
        alone = degrader(hr[n : n + 1], scale[n : n + 1], seed=seeds[n : n + 1])
        torch.testing.assert_close(together[n : n + 1], alone, rtol=0, atol=1e-5)
    order = torch.tensor([2, 0, 1])
    turned = degrader(hr[order], scale[order], seed=seeds[order])
    torch.testing.assert_close(turned, together[order], rtol=0, atol=1e-5)


def test_a_crop_s_noise_is_that_of_its_place_in_the_whole_image():
    degrader, hr, (_, seeds) = small_degrader(LEVELS, draws=True), pictures(3, 120, 136), scales_and_seeds()
    scale = torch.tensor([3.0, 3.75, 3.4])  # weak optics reach far: at the highest frequency they end abruptly
    whole = degrader(hr, scale, seed=seeds)[..., 64:, 88:]
    for place, same in ((torch.tensor([[16, 40]]).expand(3, 2), True), (None, False)):
        made = degrader(hr[..., 16:, 40:], scale, seed=seeds, place=place)[..., 48:, 48:]
        assert torch.allclose(made, whole, rtol=0, atol=1e-5) == same
    corner = torch.zeros(3, 2, dtype=torch.int64)
    assert torch.equal(degrader(hr, scale, seed=seeds, place=corner), degrader(hr, scale, seed=seeds))


def test_a_draw_does_not_depend_on_its_column(drawing):
    hr, scales = pictures(2, 40, 48), torch.tensor([[1.4, 2.0, 3.5], [3.7, 1.2, 2.0]])
    seeds = torch.arange(6).view(2, 3) + 5
    many = drawing(hr, scales, seed=seeds)
    assert many.shape == (2, 3, 3, 40, 48)
    for n in range(3):
        torch.testing.assert_close(many[:, n], drawing(hr, scales[:, n], seed=seeds[:, n]), rtol=0, atol=1e-5)


def test_other_seeds_give_other_draws_around_one_mean(drawing):
    hr, scale = pictures(1, 64, 64), torch.tensor([3.0])
    draws = [drawing(hr, scale, seed=seed) for seed in (0, 1, 2**40)]
    for n, draw in enumerate(draws):
        assert torch.equal(drawing(hr, scale, seed=n if n < 2 else 2**40), draw)
        assert float((draw - draws[n - 1]).abs().mean()) > 0.01
    means = [drawing(hr, scale, seed=seed, spread=0.0) for seed in (0, 1)]
    assert torch.equal(*means)


def test_a_seed_counts_on_from_the_first_image_scale_by_scale(drawing):
    hr = pictures(2, 24, 24)
    counted = drawing(hr, torch.tensor([2.0, 3.0]), seed=40)
    assert torch.equal(counted, drawing(hr, torch.tensor([2.0, 3.0]), seed=torch.tensor([40, 41])))
    scales = torch.tensor([[2.0, 3.0, 1.5], [3.5, 2.0, 2.0]])
    wanted = drawing(hr, scales, seed=torch.tensor([[40, 41, 42], [43, 44, 45]]))
    assert torch.equal(drawing(hr, scales, seed=40), wanted)


def test_a_draw_is_the_flows_latent_decoded_with_the_skips_of_the_image_after_the_optics_with_grain_and_cutoff(drawing):
    hr, scale, seeds = pictures(2, 40, 48), torch.tensor([2.0, 3.5], dtype=torch.float64), torch.tensor([3, 4])
    autoencoder, flow = drawing.autoencoder, drawing.flow
    with torch.inference_mode():
        image, after = pad(hr, 8), pad(flow.optics(hr, scale), 8)
        (source, _), (optics, skips) = autoencoder.encode(image), autoencoder.encode(after)
        guide = Guide(optics, source, lost_detail(image, after, 8), drawing.timeline.time(scale).float())
        grain = flow.grain.gain(image, after, guide.time) * flow.grain.sample(seeds, guide.time, 40, 48)
        assert float(grain.abs().mean()) > 1e-3
        for spread in (0.0, 0.3, 1.0):
            latent = flow.latent(guide, seeds, spread, 2, "rk4")
            wanted = flow.cutoff(autoencoder.decode(latent, skips) + spread * grain, guide.time).clamp(-1, 1)
            torch.testing.assert_close(drawing(hr, scale, seed=seeds, spread=spread), wanted, rtol=0, atol=1e-5)
        other = flow.latent(guide, seeds, 1.0, 3, "heun")
        wanted = flow.cutoff(autoencoder.decode(other, skips) + grain, guide.time).clamp(-1, 1)
        found = drawing(hr, scale, seed=seeds, steps=3, solver="heun")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_picture_is_drawn_by_its_seed_and_spread(drawing):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    draws = {name: drawing.degrade(picture, 3.0, **name_to) for name, name_to in {
        "default": {}, "same": {"seed": 0, "spread": 1.0}, "other": {"seed": 1}, "mean": {"spread": 0.0},
    }.items()}  # fmt: skip
    assert draws["default"].tobytes() == draws["same"].tobytes()
    assert len({draw.tobytes() for draw in draws.values()}) == 3


def test_without_a_network_there_is_no_solver_to_choose(degrader):
    assert degrader.has_solver
    assert not Degrader(degrader.autoencoder, residual_flow(LEVELS, 8, blocks=0), LEVELS).has_solver


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spread": -0.1}, r"spread=-0.1: must lie in \[0, 1\]"),
        ({"spread": 1.5}, r"spread=1.5: must lie in \[0, 1\]"),
        ({"spread": float("nan")}, r"spread=nan: must lie in \[0, 1\]"),
        ({"seed": -1}, r"seed=-1: must lie in \[0, 2\^63\)"),
        ({"seed": 2**63 - 1}, rf"seed={2**63 - 1}: must lie in \[0, 2\^63\)"),
        ({"seed": torch.tensor([1, -2])}, r"seed=-2: must lie in \[0, 2\^63\)"),
        ({"seed": torch.tensor([1, 2, 3])}, r"seed: torch.int64 \[3\]: must be int64 \[2\], as scale is"),
        ({"seed": torch.tensor([1.0, 2.0])}, r"seed: torch.float32 \[2\]: must be int64 \[2\], as scale is"),
        ({"seed": torch.tensor([1, 2], dtype=torch.int32)}, r"seed: torch.int32 \[2\]: must be int64 \[2\]"),
        ({"place": torch.tensor([0, 16])}, r"place: torch.int64 \[2\]: must be int64 \[2, 2\], one of each image"),
        ({"place": torch.zeros(2, 2)}, r"place: torch.float32 \[2, 2\]: must be int64 \[2, 2\]"),
        ({"place": torch.tensor([[0, 0], [16, 4]])}, r"place=\[\[0, 0\], \[16, 4\]\]: must be multiples of (8|16)"),
        ({"place": torch.tensor([[0, 0], [-16, 0]])}, r"place=.*-16.*: must be multiples of .*, and not negative"),
        ({"steps": -1}, r"steps=-1: must be at least 1"),
        ({"solver": "rk45"}, r"solver=rk45: must be one of euler"),
        ({"solver": "rk45", "spread": 0}, r"solver=rk45: must be one of euler"),
        ({"steps": -1, "spread": 0}, r"steps=-1: must be at least 1"),
        ({"seed": 3.0}, r"seed=3.0: must be a whole number, or an int64 tensor"),
        ({"seed": None}, r"seed=None: must be a whole number"),
        ({"place": [[0, 0], [16, 0]]}, r"place: list: must be an int64 tensor \[2, 2\]"),
        ({"memory": float("nan")}, r"memory=nan: must be a number of GB"),
    ],
)
def test_bad_arguments_are_named_with_value_and_rule(degrader, arguments, message):
    with pytest.raises(ValueError, match=message):
        degrader(pictures(2, 16, 16), torch.tensor([2.0, 3.0]), **arguments)


@pytest.mark.parametrize("word", [{"solver": "foo"}, {"solver": "heun"}, {"steps": 3}])
def test_a_degrader_without_a_solver_refuses_one(degrader, word):
    plain = Degrader(degrader.autoencoder, residual_flow(LEVELS, 8, blocks=0), LEVELS)
    with pytest.raises(ValueError, match=r"^solver=.*, steps=.: this degrader has no solver; leave them out"):
        plain(pictures(1, 16, 16), 2.0, **word)


def test_numpy_s_whole_numbers_are_seeds(drawing):
    hr = pictures(1, 16, 16)
    assert torch.equal(drawing(hr, 2.0, seed=np.int64(5)), drawing(hr, 2.0, seed=5))


def test_a_known_range_is_not_looked_at(drawing):
    bright = pictures(1, 16, 16).abs()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        known = drawing(bright, 2.0, checks_range=False)
        assert not warned
        assert torch.equal(drawing(bright, 2.0), known)
    assert "as of images in [0, 1]" in str(warned[0].message)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused(drawing, mode):
    with pytest.raises(ValueError, match=f"mode={mode}: its CUDA graphs overwrite latents"):
        copy.deepcopy(drawing).compile(mode=mode)


def test_a_result_that_is_not_finite_is_no_picture(drawing):
    broken = copy.deepcopy(drawing)
    with torch.no_grad():
        broken.autoencoder.decoder.head.bias[1] = torch.nan
    with pytest.raises(ValueError, match="the LR image is not finite: weights that are not, or precision=float16"):
        broken.degrade(np.full((16, 16, 3), 200, np.uint8), 2.0)


def test_networks_of_another_type_name_the_type_that_they_need(drawing):
    with pytest.raises(ValueError, match=r"hr: torch.float32 .*: must be float64"):
        copy.deepcopy(drawing).double().degrade(np.full((16, 16, 3), 200, np.uint8), 2.0)


# Files


@pytest.mark.parametrize("half", [False, True])
def test_save_and_load_give_the_same_images(degrader, tmp_path, half):
    uri = str(tmp_path / "d.safetensors")
    degrader.save(uri, {"seed": 7}, half=half)
    loaded = Degrader.load(uri)
    hr, scales = pictures(1, 48, 40), torch.tensor([[2.5, 3.75]])
    for spread in (0.0, 1.0):
        made = (one(hr, scales, seed=3, spread=spread) for one in (loaded, degrader))
        torch.testing.assert_close(*made, rtol=0, atol=0.02 if half else 0)
    assert loaded.levels == LEVELS
    assert type(loaded.flow) is type(degrader.flow)
    assert (loaded.low, loaded.high) == (1.0, 3.75)
    assert loaded.provenance == {"seed": 7}
    assert len(loaded.sha256) == 64
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


def test_half_precision_is_for_the_networks_alone(drawing, tmp_path):
    uri = str(tmp_path / "d.safetensors")
    drawing.save(uri, {}, half=True)
    parameters = dict(drawing.named_parameters())
    stored = load_file(uri)
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float16} == parameters.keys()
    assert sorted(stored.keys() - parameters.keys()) == [
        "flow.cutoff.filters", "flow.cutoff.times",
        "flow.grain.curves", "flow.grain.field.filters", "flow.grain.field.times",
        "flow.optics.log_transfer",
        "flow.spread.filters", "flow.spread.times",
    ]  # fmt: skip
    for name, buffer in Degrader.load(uri).named_buffers():
        assert torch.equal(buffer, drawing.get_buffer(name)), name


@pytest.mark.parametrize("kind", ["path", "residual"])
def test_the_file_describes_itself(kind, tmp_path):
    uri = str(tmp_path / "d.safetensors")
    degrader_of(kind).save(uri, {})
    with safe_open(uri, "pt") as file:
        description = json.loads(file.metadata()["degflow"])
    assert description["kind"] == "degrader"
    assert description["autoencoder"]["base_width"] == 8
    assert description["levels"] == LEVELS
    if kind == "path":
        assert description["velocity"]["width"] == 16
        assert description.keys() == {"kind", "autoencoder", "levels", "provenance", "velocity"}
    else:
        assert description["residual"]["blocks"] == 1
        assert description["optics"] == {"scales": [1.0, 2.1, 3.75], "rings": 64}
        assert description["times"] == pytest.approx([0, 0.4, 1])
        assert description.keys() == {"kind", "autoencoder", "levels", "provenance", "residual", "optics", "times"}


DAMAGES = {
    "path": [
        {"levels": {}},
        {"levels": {"1": 2.0, "2": 1.0}},
        {"autoencoder": {"base_width": 0}},
        {"velocity": {"widht": 8}},
        {"velocity": {"source": True}},
        {"provenance": None},
    ],
    "residual": [
        {"levels": {}},
        {"residual": {"width": 7}},
        {"residual": None},
        {"optics": {"scales": [1.0]}},
        {"optics": {}},
        {"times": [0.0, 0.4]},
        {"times": "none"},
    ],
}


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind in DAMAGES for change in DAMAGES[kind]], ids=str)
def test_a_damaged_degrader_file_is_named(kind, change, tmp_path):
    uri = str(tmp_path / "d.safetensors")
    degrader_of(kind).save(uri, {})
    tensors, description, _ = load_checkpoint(uri)
    changed = {key: value for key, value in {**description, **change}.items() if value is not None}
    save_checkpoint(uri, tensors, changed)
    with pytest.raises(ValueError, match=r"d\.safetensors: a damaged degrader \(\w+: ."):
        Degrader.load(uri)


def test_a_degrader_file_that_lacks_or_adds_a_tensor_is_named(degrader, tmp_path):
    uri = str(tmp_path / "d.safetensors")
    degrader.save(uri, {})
    tensors, description, _ = load_checkpoint(uri)
    for name in (min(tensors), max(tensors)):
        save_checkpoint(uri, {key: tensor for key, tensor in tensors.items() if key != name}, description)
        with pytest.raises(ValueError, match=rf"d\.safetensors: a damaged degrader .*{name}"):
            Degrader.load(uri)
    save_checkpoint(uri, {**tensors, "flow.network.more": torch.zeros(1)}, description)
    with pytest.raises(ValueError, match=r"d\.safetensors: a damaged degrader .*flow.network.more"):
        Degrader.load(uri)


def test_weights_that_are_not_finite_are_named(degrader, tmp_path):
    uri = str(tmp_path / "d.safetensors")
    degrader.save(uri, {})
    tensors, description, _ = load_checkpoint(uri)
    tensors["autoencoder.decoder.head.bias"][0] = torch.inf
    save_checkpoint(uri, tensors, description)
    with pytest.raises(ValueError, match=r"a damaged degrader \(ValueError: not finite: autoencoder.decoder.head.bias"):
        Degrader.load(uri)


def test_files_that_are_no_degraders_are_named(degrader, tmp_path):
    uri = str(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=r"d\.safetensors: no such file"):
        Degrader.load(uri)
    Path(uri).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"d\.safetensors: not a degflow checkpoint"):
        Degrader.load(uri)
    degrader.save(uri, {})
    Path(uri).write_bytes(Path(uri).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"d\.safetensors: not a degflow checkpoint"):
        Degrader.load(uri)
    save_checkpoint(uri, degrader.autoencoder.state_dict(), {"kind": "autoencoder"})
    with pytest.raises(ValueError, match=r"d\.safetensors: of kind 'autoencoder', where 'degrader' is needed"):
        Degrader.load(uri)


# Pictures


def test_pil_in_pil_out(degrader):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    out = degrader.degrade(picture, scale=2.7)
    assert out.size == picture.size
    assert out.mode == "RGB"


def test_arrays_and_files_are_pictures(drawing, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    wanted = drawing.degrade(Image.fromarray(pixels), 2.7, seed=3)
    file = tmp_path / "a#b.png"
    Image.fromarray(pixels).save(file)
    for picture in (pixels, pixels[::-1][::-1], file, str(file), f"file://{file}"):
        assert drawing.degrade(picture, 2.7, seed=3).tobytes() == wanted.tobytes()
    gray, alpha = pixels[..., 0], np.dstack([pixels, np.full((24, 40), 255, np.uint8)])
    assert drawing.degrade(gray, 2.7).tobytes() == drawing.degrade(np.stack([gray] * 3, -1), 2.7).tobytes()
    assert drawing.degrade(alpha, 2.7, seed=3).tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((16, 16, 3)), r"picture: float64 \(16, 16, 3\): must be uint8 .*\(picture \* 255\).round"),
        (np.zeros((3, 16, 16), np.uint8), r"picture: uint8 \(3, 16, 16\): .*picture.transpose\(1, 2, 0\)"),
        (np.zeros((1, 16, 16, 3), np.uint8), r'must be uint8 "H W 3", "H W 4" or "H W"$'),
        (np.zeros((16, 16), np.uint16), r"picture: uint16 \(16, 16\): must be uint8"),
        (torch.zeros(3, 16, 16), r"picture: Tensor: must be .* \(tensors: degrader\(hr, scale\)\)"),
        ("BROKEN", r"picture=.*broken.png: not a JPEG, PNG"),
    ],
)
def test_what_is_no_picture_is_named(drawing, tmp_path, picture, message):
    (tmp_path / "broken.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=message):
        drawing.degrade(f"{tmp_path}/broken.png" if isinstance(picture, str) else picture, 2.0)


def test_a_missing_picture_is_named(drawing, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        drawing.degrade(tmp_path / "none.png", 2.0)


@pytest.mark.usefixtures("one_thread")
def test_several_scales_give_the_pictures_of_single_calls_with_seeds_counted_on(degrader):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    several = degrader.degrade(picture, [2, 3.5, 2], seed=5)
    singles = [degrader.degrade(picture, scale, seed=5 + n) for n, scale in enumerate((2, 3.5, 2))]
    assert [one.tobytes() for one in several] == [one.tobytes() for one in singles]
    assert [one.tobytes() for one in degrader.degrade(picture, np.array([2.0]), seed=5)] == [several[0].tobytes()]


@pytest.mark.parametrize("scale", [[], [[2.0, 3.0]]])
def test_scales_that_are_no_list_of_numbers_are_named(drawing, scale):
    with pytest.raises(ValueError, match=r"scale=\[.*: must be a number or a list of numbers"):
        drawing.degrade(Image.new("RGB", (16, 16)), scale)


def test_a_gray_picture_stays_gray_on_request(drawing):
    shades = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
    camera, kept = (np.asarray(drawing.degrade(shades, 3.0, gray=gray)) for gray in ("camera", "keep"))
    assert not images.is_gray(camera)
    assert kept.shape == (24, 40, 3)
    assert all(np.array_equal(kept[..., n], np.asarray(Image.fromarray(camera).convert("L"))) for n in range(3))
    colour = np.stack([shades, shades, shades ^ 1], -1)
    coloured = (drawing.degrade(colour, 3.0, gray=gray).tobytes() for gray in ("camera", "keep"))
    assert next(coloured) == next(coloured)
    with pytest.raises(ValueError, match="gray=none: must be one of camera, keep"):
        drawing.degrade(shades, 3.0, gray="none")


def test_a_picture_that_is_too_small_is_refused(degrader):
    with pytest.raises(ValueError, match=r"20 x 7 pixels: each side must have at least 8"):
        degrader.degrade(Image.new("RGB", (20, 7)), scale=2.0)


def test_a_picture_comes_under_the_image_rule(degrader):
    transparent = Image.new("RGBA", (24, 16), (255, 0, 0, 0))
    white = Image.new("RGB", (24, 16), "white")
    assert degrader.degrade(transparent, scale=2.0).tobytes() == degrader.degrade(white, scale=2.0).tobytes()


def test_rescaling_the_latent_changes_no_image():
    hr, original = pictures(1, 32, 32), degrader_of("path").autoencoder
    autoencoder = ResidualAutoencoder(original.config)
    autoencoder.load_state_dict(original.state_dict())
    factor = torch.tensor([0.5, 2.0, 3.0, 0.1])
    autoencoder.rescale_latent(factor)
    with torch.no_grad():
        before, skips = original.encode(hr)
        after, _ = autoencoder.encode(hr)
        torch.testing.assert_close(after, before * factor[:, None, None])
        torch.testing.assert_close(autoencoder.decode(after, skips), original.decode(before, skips), rtol=0, atol=1e-5)


# Compilation


def test_compiling_changes_no_image_and_no_name_in_the_file(degrader):
    hr, scale = pictures(1, 40, 48), torch.tensor([2.5])
    wanted = degrader(hr, scale)
    compiled = copy.deepcopy(degrader)
    compiled.compile(backend="eager", fullgraph=True)  # no C++ compiler needed; the tracing is what is tested
    torch.testing.assert_close(compiled(hr, scale), wanted, rtol=0, atol=1e-5)
    assert compiled.state_dict().keys() == degrader.state_dict().keys()


def compiled_copy(degrader, calls):
    """A copy that is compiled for all sizes, and the list that each compiled graph joins."""
    torch._dynamo.reset()
    compiled, graphs = copy.deepcopy(degrader), []

    def backend(graph, example):
        graphs.append(graph)
        return lambda *inputs: calls.append(graph) or graph.forward(*inputs)

    compiled.compile(dynamic=True, backend=backend, fullgraph=True)
    return compiled, graphs


def test_compiled_for_all_sizes_new_sizes_compile_nothing_anew(degrader):
    compiled, graphs = compiled_copy(degrader, [])
    seen = []
    # Large enough that torch's convolutions take their threaded way at every level. Some are to be padded.
    sides = (416, 432, 448, 425, 435)
    for height, width in zip(2 * sides, sides + sides[1:] + sides[:1], strict=True):
        with ThreadPoolExecutor(1) as thread:  # as in an actor: torch keeps settings for each thread
            thread.submit(compiled, pictures(1, height, width), torch.tensor([[2.0]])).result()
        seen.append(len(graphs))
    assert seen == seen[:1] * 10


def test_compiled_every_pass_is_a_compiled_graphs_in_tiles_too():
    calls = []
    compiled, graphs = compiled_copy(degrader_of("path"), calls)
    plan = compiled.plan(432, 416, 0.172)
    assert (len(list(plan.grid.tiles())), plan.keep) == (4, False)
    compiled(pictures(1, 432, 416), torch.tensor([[2.0]]), memory=0.172, steps=1, solver="euler")
    # For each tile: encode; then make the skips again, merge and decode. And two evaluations of the velocity.
    assert len(calls) == 4 * (1 + 3) + 2
    before = len(graphs)
    compiled(pictures(1, 425, 437), torch.tensor([[3.0]]), memory=0.172, steps=1, solver="euler")
    assert len(graphs) == before
    assert copy.deepcopy(compiled)._compiled is None  # it would call the networks of the one that it was copied from


# Devices


@pytest.mark.parametrize("kind", ["path", "residual"])
@pytest.mark.parametrize("how", ["whole", "in tiles", "encoded twice"])
def test_a_degrader_never_waits_for_its_device(kind, how):
    # Tensors without numbers: what reads one raises, and so does what mixes them with the CPU's.
    degrader, hr = degrader_of(kind).to("meta"), torch.empty(2, 3, 512, 500, device="meta")
    memory = {"whole": 4.0, "in tiles": 0.2, "encoded twice": {"path": 0.177, "residual": 0.185}[kind]}[how]
    grid, keep = degrader.plan(512, 500, memory)[1:]
    assert (grid.whole, keep) == (how == "whole", how != "encoded twice")
    for scales in (torch.tensor([2.0, 3.75]), torch.tensor([[1.0, 2.2, 3.0], [2.0, 1.5, 3.75]])):
        for spread in (0.0, 0.5):
            lr = degrader(hr, scales, seed=3, spread=spread, memory=memory)
            assert (lr.device.type, lr.shape) == ("meta", (*scales.shape, 3, 512, 500))


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


def test_its_images_can_be_trained_on_and_written_to(degrader):
    hr, layer = pictures(2, 16, 24), torch.nn.Conv2d(3, 3, 1)
    lr = degrader(hr, 1.5)
    layer(lr).mean().backward()
    assert layer.weight.grad.abs().sum() > 0
    lr += 0
    several = degrader(hr.requires_grad_(), torch.full((2, 2), 1.5))
    assert not several.requires_grad
    layer(several[:, 1]).mean().backward()


def test_it_stays_in_eval_mode_inside_a_network_that_is_trained(degrader):
    network, hr = torch.nn.ModuleList([degrader, torch.nn.Dropout()]), pictures(1, 16, 24)
    expected = degrader(hr, 1.5)
    network.train()
    assert network[1].training
    assert not any(module.training for module in degrader.modules())
    assert torch.equal(degrader(hr, 1.5), expected)


def test_loading_it_disturbs_nothing_and_is_not_disturbed(degrader, tmp_path):
    file, hr = tmp_path / "degrader.safetensors", pictures(1, 16, 24)
    degrader.save(file, {})
    expected, state = Degrader.load(str(file))(hr, 1.5, seed=5), torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        loaded = Degrader.load(file)
        assert torch.get_default_dtype() == torch.float64
        torch.testing.assert_close(loaded(hr, 1.5, seed=5), expected, rtol=0, atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_largest_seed_is_one(drawing):
    hr, last = pictures(2, 16, 24), 2**63 - 1
    one = drawing(hr[1:], 1.5, seed=last)
    torch.testing.assert_close(drawing(hr, 1.5, seed=last - 1)[1:], one, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"seed=9223372036854775807: must lie in \[0, 2\^63\), and so must"):
        drawing(hr, 1.5, seed=last)
