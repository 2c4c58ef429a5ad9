"""Large images in bounded memory: the tiles, and that a tiled result equals an untiled one."""

import os
import subprocess
import sys

import pytest
import torch

from degflow import Degrader
from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.models.precision import PRECISIONS, computing
from degflow.tiling import OVERHEAD, Costs, Grid, Plan, cheapest, finest, spans
from tests import ROOT
from tests.captures import path_flow, residual_flow

KINDS = ("path", "residual")


@pytest.mark.parametrize(
    ("size", "count", "halo"),
    [
        (1, 1, 9),
        (7, 1, 9),
        (20, 2, 9),
        (21, 3, 9),
        (64, 7, 9),
        (97, 3, 9),
        (500, 7, 9),
        (7, 3, 1),
        (20, 7, 1),
        (64, 2, 1),
    ],
)
def test_inner_parts_cover_a_side_once_and_keep_a_halo_from_every_cut(size, count, halo):
    found = spans(size, count, halo)
    assert [place for span in found for place in range(span.first, span.last)] == list(range(size))
    assert len({span.stop - span.start for span in found}) == 1
    assert len(found) <= count
    for span in found:
        assert 0 <= span.start <= span.first < span.last <= span.stop <= size
        assert span.start == 0 or span.first - span.start >= halo
        assert span.stop == size or span.stop - span.last >= halo


@pytest.mark.parametrize(("height", "width"), [(40, 40), (376, 500), (30, 900), (65, 33)])
@pytest.mark.parametrize("room", [900, 1300, 5000, 36000, 1e9])
def test_the_cheapest_grid_fits_its_window(height, width, room):
    grid = cheapest(height, width, 10, room)
    if grid is None:
        assert finest(height, width, 10).window > room
        return
    assert grid.window <= room
    tiles = list(grid.tiles())
    assert {(t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in tiles} == {grid.window}
    others = [Grid(height, width, rows, columns, 10) for rows in range(1, 9) for columns in range(1, 9)]
    fitting = [g for g in others if g.window <= room and height > 10 * (g.rows + 2) and width > 10 * (g.columns + 2)]
    assert all(grid.work <= other.work for other in fitting)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"blocks": 1},
        {"multipliers": (1, 2)},
        {"multipliers": (1, 1, 1, 1, 1), "blocks": 1},
        {"multipliers": (1, 2, 2)},
    ],
)
def test_the_halo_is_the_receptive_field_and_no_more(sizes):
    config = AutoencoderConfig(base_width=8, gate_init=0.5, **sizes)
    torch.manual_seed(0)
    network, r, halo = ResidualAutoencoder(config).double().eval(), config.compression, config.halo
    side = 5 * halo
    image = torch.rand(1, 3, 2 * r, side * r, dtype=torch.float64) * 2 - 1
    reach = []
    with torch.inference_mode():
        latent, skips = network.encode(image)
        decoded = network.decode(latent, skips)
        for cut in (slice(halo + 1, side), slice(0, side - halo - 1)):
            part, own = network.encode(image[..., cut.start * r : cut.stop * r])
            image_part = network.decode(latent[..., cut], own)
            changes = (
                (part - latent[..., cut], 1),
                (image_part - decoded[..., cut.start * r : cut.stop * r], r),
            )
            for change, factor in changes:
                columns = (change.abs().amax((0, 1, 2)) > 1e-13).nonzero()[:, 0]
                from_cut = columns + 1 if cut.start else change.shape[-1] - columns
                reach.append(-(-int(from_cut.max()) // factor))
    assert max(reach) == halo


COSTS = Costs(held=100.0, whole=3000.0, skips=2000.0, work=8000.0)  # bytes per latent pixel


def memory_for(bytes_per_pixel, pixels):
    """GB that leave so many bytes for each latent pixel."""
    return (bytes_per_pixel * pixels + OVERHEAD) / 1e9


def test_as_many_images_as_fit_are_worked_on_at_once():
    together = 100 + 2000 + 8000  # work exceeds what is done on the whole image
    for batch in (1, 2, 5):
        assert Plan.fit(60, 80, 10, COSTS, memory_for(together * (batch + 0.1), 4800)) == (batch, Grid(60, 80), True)
    heavy = COSTS._replace(whole=9000.0)
    assert Plan.fit(60, 80, 10, heavy, memory_for(20_500, 4800)).batch == 1  # each 11_100
    assert Plan.fit(60, 80, 10, COSTS, float("inf")).batch == 2**31


@pytest.mark.parametrize("share", [0.55, 0.7, 0.95])
def test_a_plan_in_tiles_stays_within_its_memory(share):
    height, width = 300, 400
    memory = memory_for(10_100 * share, height * width)
    batch, grid, keep = Plan.fit(height, width, 10, COSTS, memory)
    assert (batch, grid.whole) == (1, False)
    window = grid.window / (height * width)
    peaks = {True: 100 + 2000 + max(3000, 8000 * window), False: 100 + max(3000, 10_000 * window)}
    assert memory_for(peaks[keep], height * width) <= memory
    # Encoding again costs a third more work: tiles that keep the skips are chosen unless they are much smaller.
    kept = cheapest(height, width, 10, (10_100 * share - 2100) / 8000 * height * width)
    again = cheapest(height, width, 10, (10_100 * share - 100) / 10_000 * height * width)
    assert keep == (2 * kept.work <= 3 * again.work)


def test_what_is_done_on_the_whole_image_bounds_tiling_from_below():
    with pytest.raises(ValueError, match=r"memory=.*: needs at least \d\.\d\d GB") as caught:
        Plan.fit(300, 400, 10, COSTS, memory_for(3000, 300 * 400))
    least = float(str(caught.value).split()[4])
    assert least == pytest.approx(memory_for(3100, 300 * 400), abs=0.01)
    assert Plan.fit(300, 400, 10, COSTS, least).keep is False


def make(kind="path", hr_skips=True, **sizes):
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8, gate_init=0.5, hr_skips=hr_skips, **sizes))
    config, levels = autoencoder.config, {"1": 1.0, "4": 4.0}
    if kind == "path":
        flow = path_flow(latent_channels=config.latent_channels, dropout=0.0)
        torch.nn.init.normal_(flow.network.head.weight, std=0.3)
    else:
        flow = residual_flow(levels, config.compression, latent_channels=config.latent_channels)
    return Degrader(autoencoder, flow, levels)


def image(count, height, width):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def budgets(degrader, height, width):
    """Skips kept or not -> the largest memory in GB at which this size is tiled that way."""
    found = {}
    for step in range(450, 149, -1):
        try:
            plan = degrader.plan(height, width, step / 1000)
        except ValueError:
            continue
        if not plan.grid.whole:
            found.setdefault(plan.keep, step / 1000)
    return found


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [
        (768, 768, {}),
        (701, 835, {"kind": "residual", "blocks": 1}),
        (333, 1203, {"blocks": 1, "hr_skips": False}),
        (768, 520, {"multipliers": (1, 2, 2), "latent_channels": 6, "blocks": 1}),
        (516, 700, {"kind": "residual", "multipliers": (1, 2, 2), "latent_channels": 6, "blocks": 1}),
    ],
)
def test_tiled_is_untiled(height, width, sizes):
    degrader, hr = make(**sizes), image(1, height, width)
    scale = torch.tensor([[1.0, 3.0]])
    whole = degrader(hr, scale, seed=8, memory=float("inf"))
    found = budgets(degrader, height, width)
    assert set(found) == {True, False}
    for keep, memory in found.items():
        grid = degrader.plan(height, width, memory).grid
        assert grid.rows * grid.columns > 1
        # What lies so far away weighs too little to be seen below.
        config = degrader.autoencoder.config
        assert grid.halo * config.compression >= config.halo * config.compression + degrader.flow.reach
        tiled = degrader(hr, scale, seed=8, memory=memory)
        torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-4, msg=lambda text, k=keep: f"keep={k}: {text}")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_skips_that_are_kept_have_the_products_type_in_tiles_too(precision):
    degrader, hr = make("residual"), image(1, 320, 384)
    whole, tiled = (degrader.plan(320, 384, memory) for memory in (4.0, budgets(degrader, 320, 384)[True]))
    with torch.no_grad(), computing(precision, "cpu"):
        kept = [degrader._encode(hr, plan, needs_skips=True).skips for plan in (whole, tiled)]
    assert {skip.dtype for skips in kept for skip in skips} == {PRECISIONS[precision]}
    tolerance = {"float32": 1e-4, "bfloat16": 0.05}[precision]
    torch.testing.assert_close(*kept, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_for_each_image_is_tiled_too(kind):
    degrader, hr, scale = make(kind), image(2, 320, 384), torch.tensor([1.7, 3.0])
    memory = budgets(degrader, 320, 384)[False]
    whole = degrader(hr, scale, memory=float("inf"))
    torch.testing.assert_close(degrader(hr, scale, memory=memory), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_does_not_fit_is_split(kind):
    degrader, hr, scale = make(kind), image(3, 128, 192), torch.tensor([1.5, 3.0, 4.0])
    memory = next(m / 1000 for m in range(165, 300) if degrader.plan(128, 192, m / 1000).batch == 2)
    place = torch.tensor([[0, 0], [32, 64], [0, 32]])
    made = degrader(hr, scale, place=place, memory=memory)
    torch.testing.assert_close(made, degrader(hr, scale, place=place), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_do_not_depend_on_how_many_scales_are_asked_for(kind):
    degrader, hr = make(kind), image(1, 320, 384)
    memory = budgets(degrader, 320, 384)[False]
    many = degrader(hr, torch.tensor([[2.0, 3.0, 4.0]]), seed=4, memory=memory)
    assert torch.equal(many[:, 1:2], degrader(hr, torch.tensor([[3.0]]), seed=5, memory=memory))


@pytest.mark.parametrize("kind", KINDS)
def test_with_too_little_memory_the_error_says_how_much_is_needed(kind):
    degrader = make(kind)
    with pytest.raises(ValueError, match=r"memory=0.1: needs at least (\d\.\d+) GB for 4000 x 3000 pixels") as caught:
        degrader.plan(3000, 4000, 0.1)
    least = float(str(caught.value).split()[4])
    assert degrader.plan(3000, 4000, least).grid.rows > 1
    with pytest.raises(ValueError, match="needs at least"):
        degrader.plan(3000, 4000, least - 0.02)


PEAK = """
import sys, torch
from pathlib import Path
from degflow import Degrader
torch.set_num_threads(1)
degrader = Degrader.load(sys.argv[1])
hr = torch.zeros(1, 3, 1280, 1280)
degrader(hr[..., :64, :64], torch.tensor([2.0]))
def peak():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])
for case in sys.argv[2:]:
    memory, *scales = map(float, case.split())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak()
    degrader(hr, torch.tensor([scales]), steps=1, solver="euler", memory=memory)
    print((peak() - before - len(scales) * 12 * hr[0, 0].numel()) / 1e9)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_asked_for_is_not_exceeded(kind, tmp_path):
    degrader = make(kind)
    degrader.save(str(tmp_path / "model"), {})
    budget = [memory / 100 for memory in range(16, 99)]
    whole = next(memory for memory in budget if fits(degrader, memory) and fits(degrader, memory).grid.whole)
    tiled = 0.55 * whole
    in_tiles, at_once = measured(str(tmp_path / "model"), f"{tiled} 2.0", f"{whole} 2.0")
    assert in_tiles < tiled
    assert 0.4 * whole < at_once < whole  # a budget holds 0.15 GB that a running process has taken before
    assert at_once > 2 * in_tiles


def test_no_tensor_has_more_numbers_than_cuda_s_functions_take():
    costs = Costs(0, 0, 0, 1, largest=1024)
    most = (2**31 - 1) // 1024
    assert Plan.fit(1000, 1000, 4, costs, 1e9) == Plan(most // 10**6, Grid(1000, 1000), True)
    grid = Plan.fit(2000, 2000, 4, costs, 1e9).grid
    assert not grid.whole
    assert grid.window <= most
    degrader = make("residual")
    widths, r = degrader.autoencoder.config.widths, degrader.autoencoder.config.compression
    largest = max(width * (r >> level) ** 2 for level, width in enumerate(widths))
    for side in (4096, 60_000):
        plan = degrader.plan(side, side, 1e6)
        assert plan.batch * plan.grid.window * largest < 2**31


def test_more_draws_of_an_image_in_tiles_take_no_more_memory(tmp_path):
    degrader = make("residual")
    degrader.save(str(tmp_path / "model"), {})
    plans = {memory / 100: fits(degrader, memory / 100) for memory in range(16, 99)}
    kept = max(memory for memory, plan in plans.items() if plan and plan.keep and not plan.grid.whole)
    one, three = measured(str(tmp_path / "model"), f"{kept} 2.0", f"{kept} 2.0 3.0 3.5")
    assert three < 1.05 * one


def measured(model, *cases):
    """GB that a process takes to degrade an image, for each case of a memory and scales.

    All memory is given back as soon as it is freed: what glibc keeps of it is chance, 0.06 to 0.18 GB here.
    """
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, model, *cases]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | given_back, capture_output=True, text=True, check=True)
    return map(float, done.stdout.split())


def fits(degrader, memory):
    """The plan for 1280 x 1280 pixels, or None."""
    try:
        return degrader.plan(1280, 1280, memory)
    except ValueError:
        return None
