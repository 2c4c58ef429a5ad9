"""The benchmark computes what its tables say; its times are nobody's test."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from degflow import Degrader, images
from degflow.benchmarking.inference import (
    accuracy,
    comparison,
    decibels,
    evaluations,
    exact,
    pixel_by_pixel,
    plain_decode,
    released,
    roofline,
)
from degflow.benchmarking.measure import Timing, alternate, flop
from degflow.benchmarking.optimisations import optimisations
from degflow.benchmarking.pipeline import codecs
from degflow.benchmarking.run import BenchmarkConfig
from degflow.benchmarking.steps import KNOTS, careless_lfm, careless_rae, training
from degflow.config import load
from degflow.models import AutoencoderConfig, FlowMap, ResidualAutoencoder, VelocityConfig, VelocityNetwork
from degflow.objectives import LFMObjective, RAEObjective
from degflow.trajectory import NaturalCubicSpline, Timeline
from tests import ROOT


@pytest.fixture(scope="module")
def degrader():
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8, blocks=1, multipliers=(1, 1, 2), gate_init=0.5))
    velocity = VelocityNetwork(
        VelocityConfig(width=8, blocks=1, multipliers=(1, 1), dropout=0.0, time_factor=5.0, linear_terms=2, source=True)
    )
    torch.nn.init.normal_(velocity.linear.conv.weight, std=0.1)
    return Degrader(autoencoder, velocity, {"1": 1.0, "4": 4.0})


@pytest.fixture(scope="module")
def hr():
    return torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1


def cells(table):
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_the_released_procedure_agrees_with_a_fine_integration(degrader, hr):
    scales = [1.0, 1.7, 4.0]
    fine = degrader(hr, torch.tensor([scales], dtype=torch.float64), steps=32)[0]
    reference = exact(degrader, hr, scales)
    assert min(decibels(fine, reference.images)) > 80
    theirs = released(degrader, hr, scales)
    assert min(decibels(theirs.images, reference.images)) > 55  # it starts at t = 1e-3
    stopped = released(degrader, hr, scales[1:2])
    assert stopped.evaluations < theirs.evaluations < reference.evaluations
    assert decibels(stopped.images, theirs.images[1:2])[0] > 60
    assert released(degrader, hr, [1.0]).evaluations == 0


def test_a_flow_map_is_counted_and_judged_as_one_evaluation(degrader, hr):
    torch.manual_seed(0)
    config = VelocityConfig(width=8, blocks=1, multipliers=(1, 1), dropout=0.0, flow_map=True)
    levels = {"1": 1.0, "2": 2.0, "4": 4.0}
    knots = Timeline(tuple(levels.values()), "inverse").knots
    mapped = Degrader(degrader.autoencoder, FlowMap(config, knots), levels, "inverse")
    rows = cells(accuracy(mapped, [hr], 2))
    assert set(rows) == {"flow map", "flow map, float16", "flow map, bfloat16"}
    assert rows["flow map"]["evaluations"] == "1"
    assert float(rows["flow map"]["dense"].split()[0]) > 90
    table = comparison(mapped, hr, 1, 3, name=", mapped")
    assert table.title == f"Against the released procedure, {hr.shape[-1]} x {hr.shape[-2]}, mapped"
    assert cells(table)["degflow, one scale"]["evaluations"] == cells(table)["degflow, sweep"]["evaluations"] == "1"
    assert float(cells(table)["degflow, sweep"]["agreement dB"]) > 90
    assert "evaluates a flow map as it does any field" in table.about


def test_the_evaluations_of_the_released_procedure_are_those_of_the_network(degrader, hr):
    calls = []
    handle = degrader.velocity.register_forward_hook(lambda *_: calls.append(1))
    counted = released(degrader, hr, [2.0, 4.0]).evaluations
    handle.remove()
    assert counted == len(calls) > 5


def test_decibels_is_the_psnr_over_all_channels():
    reference = torch.zeros(2, 3, 8, 8)
    assert decibels(torch.stack((reference[0] + 0.02, reference[1])), reference) == pytest.approx([40, 200], abs=1e-4)


def test_more_steps_follow_the_solution_more_closely(degrader, hr):
    rows = cells(accuracy(degrader, [hr], 2))
    least = {name: float(row["dense"].split(" / ")[0]) for name, row in rows.items()}
    assert least["euler x 8"] < least["euler x 16"] < least["heun x 6"] < least["rk4 x 4"]
    assert least["rk4 x 1"] < least["rk4 x 4"]
    assert rows["rk4 x 3"]["evaluations"] == "13"
    assert least["rk5 x 3"] > least["rk5 x 3, float16"] > least["rk5 x 3, bfloat16"] > 30


def test_the_comparison_has_every_way_and_its_agreement(degrader, hr):
    table = comparison(degrader, hr, repeats=2, count=3)
    rows = cells(table)
    assert list(rows) == ["released, one scale", "released, sweep", "degflow, one scale", "degflow, sweep"]
    assert rows["released, sweep"]["x sweep"] == "1.0"
    drawn = 1 + 3 * torch.rand(2, generator=torch.Generator().manual_seed(0))
    counts = [released(degrader, hr, [float(scale)]).evaluations for scale in drawn.double()]
    assert rows["released, one scale"]["evaluations"] == f"{sum(counts) / 2:.0f}" + " (mean)" * (len(set(counts)) > 1)
    assert rows["degflow, sweep"]["evaluations"] == "19"
    assert min(float(row["agreement dB"]) for row in rows.values()) > 50
    for line in table.markdown().splitlines()[-4:]:
        assert line.count("|") == len(table.header) + 1


def test_ways_take_turns_and_ratios_are_within_a_repeat():
    seen = []
    timings = alternate({"a": lambda n: seen.append(("a", n)), "b": lambda n: seen.append(("b", n))}, 2)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len(timings["a"].seconds) == 2
    assert Timing([1.0, 2.0, 4.0], 0, None).faster_than(Timing([3.0, 2.0, 8.0], 0, None)) == 2


def test_a_careless_step_has_the_same_loss_and_gradient(degrader):
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (2, 3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    draw = torch.tensor([0.2, 0.8])
    rae = RAEObjective(degrader.autoencoder)
    lfm = LFMObjective(degrader.autoencoder, degrader.velocity, NaturalCubicSpline(KNOTS)).train()
    degrader.autoencoder.requires_grad_(True)
    for careful, careless in (
        (rae(crops, draw).total, careless_rae(rae, crops, draw)),
        (lfm(crops, draw, torch.arange(2)).total, careless_lfm(lfm, crops, draw)),
    ):
        torch.testing.assert_close(careful, careless)
    weight = degrader.velocity.head.weight
    slopes = [
        torch.autograd.grad(loss, weight)[0]
        for loss in (lfm(crops, draw, torch.arange(2)).total, careless_lfm(lfm, crops, draw))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
    degrader.eval()


def test_the_other_tables_are_whole(degrader, hr):
    photographs = [images.to_pixels(hr)[0]]
    tables = [
        roofline(degrader, hr, 1, side=64),
        training(degrader.autoencoder, degrader.velocity, None, 1, crop=16, batch=2),
        codecs(photographs, 1),
        roofline(degrader, hr, 1, side=64, precision="bfloat16"),
    ]
    for table in tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}
    assert "without LPIPS" in tables[1].about
    written = cells(tables[2])
    size = len(images.encode_png(photographs[0], 9)) / photographs[0][..., 0].size
    assert float(written["PNG, Pillow level 9"]["bytes per pixel"]) == pytest.approx(size, abs=0.01)


def test_what_an_optimisation_should_gain_is_counted(degrader, hr):
    rows = cells(optimisations(degrader, hr, 1, count=3, compiled=True, side=256))
    theirs = released(degrader, hr, [2.5]).evaluations
    assert list(rows) == [
        f"evaluations: 13 in place of RK45's {theirs} at 1e-5",
        "one encoding and flow for 3 scales",
        "decoder's 1x1 convolutions multiplied out",
        "decoder's last convolution for 4 pixels at once",
        "torch.compile",
        "pages of 2 MiB for large tensors (256 x 256, one thread)",
    ]
    image = torch.zeros(1, 3, 32, 32)  # what `hr` is padded to
    latent, skips = degrader.autoencoder.encode(image)
    decoder = degrader.autoencoder.decoder
    with pixel_by_pixel(decoder):
        work = [
            flop(lambda n: plain_decode(decoder, latent, skips)),
            flop(lambda n: decoder(latent, decoder.merged(skips))),
        ]
    assert flop(lambda n: decoder(latent, decoder.merged(skips))) > work[1]  # zeros are multiplied, not counted
    assert work[0] > work[1]
    counted = float(rows["decoder's 1x1 convolutions multiplied out"]["predicted"])
    assert work[0] / work[1] < counted < 1.3 * work[0] / work[1]  # merging is done beforehand
    *counts, pages = rows.values()
    assert all(float(row["predicted"]) > 1 for row in counts)
    assert " page faults of " in pages["by"]  # how many fewer is the kernel's settings' business


@pytest.mark.parametrize("scales", [[1.0], [1.7], [4.0], [1.0, 2.0, 4.0]])
def test_counted_evaluations_are_those_of_the_degrader(degrader, hr, scales):
    calls = []
    handle = degrader.velocity.register_forward_hook(lambda *_: calls.append(1))
    degrader(hr, torch.tensor([scales], dtype=torch.float64))
    handle.remove()
    assert evaluations(degrader, scales) == len(calls)


def test_the_comparison_takes_a_precision(degrader, hr):
    exactly, half = (cells(comparison(degrader, hr, 1, 3, precision=kind)) for kind in ("float32", "bfloat16"))
    assert float(half["degflow, sweep"]["agreement dB"]) < float(exactly["degflow, sweep"]["agreement dB"]) - 5
    assert half["released, sweep"]["agreement dB"] == exactly["released, sweep"]["agreement dB"]


def test_the_job_saves_what_it_prints(degrader, tmp_path):
    degrader.save(str(tmp_path / "tiny.safetensors"), {})
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    (tmp_path / "photos/a.png").write_bytes(images.encode_png(pixels))
    words = [f"model={tmp_path}/tiny.safetensors", f"input={tmp_path}/photos", f"output={tmp_path}/out", "quick=true"]
    done = subprocess.run(
        [sys.executable, ROOT / "jobs/benchmark.py", *words, "threads=1"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = (tmp_path / "out/benchmark.md").read_text()
    titles = [line[3:].split(",")[0] for line in saved.splitlines() if line.startswith("## ")]
    assert titles == [
        "Accuracy of the solvers",
        "Against the released procedure",
        "Roofline",
        "Optimisations",
        "A large image in bounded memory",
        "Training steps",
        "Bare loop and Ray job",
        "Scaling with actors (stand-in)",
        "Codecs",
    ]
    assert all(table in done.stdout for table in saved.split("\n\n"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("parts=[speed]", r"parts=\('speed',\): must be some of accuracy, comparison"),
        ("repeats=0", "repeats=0: must be at least 1"),
        ("precision=float8", "precision=float8: must be one of float32, float16, bfloat16"),
        ("device=tpu", "device=tpu: must be auto, cpu or cuda"),
    ],
)
def test_a_bad_key_is_named(word, message):
    with pytest.raises(ValueError, match=message):
        load(BenchmarkConfig, [word])
