import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from degflow.benchmarking.predict import kernels
from degflow.trajectory import (
    NaturalCubicSpline,
    PiecewiseLinear,
    Timeline,
    next_knot,
    taylor_step,
)

KNOTS = [
    (0.0, 1.0),
    (0.0, 1 / 3, 1.0),
    (0.0, 0.11, 0.9, 1.0),
    (0.0, 0.2, 0.25, 0.7, 1.0),
    (0.0, 0.05, 0.3, 0.31, 0.8, 1.0),
]


def values_and_times(knots, count=41):
    generator = torch.Generator().manual_seed(len(knots))
    values = torch.randn(1, len(knots), 2, 3, dtype=torch.float64, generator=generator)
    inner = torch.linspace(0, 1, count, dtype=torch.float64)
    times = torch.cat((inner, torch.tensor(knots, dtype=torch.float64)))
    return values.expand(len(times), -1, -1, -1), times


@pytest.mark.parametrize("knots", KNOTS, ids=len)
def test_spline_and_its_derivatives_equal_scipys_natural_spline(knots):
    values, times = values_and_times(knots)
    point = NaturalCubicSpline(knots).at(values, times)
    if len(knots) == 2:  # SciPy wants three points for natural ends; between two the spline is the straight line
        slope = (values[0, 1] - values[0, 0]).numpy()
        expected = [values[0, 0].numpy() + times.numpy()[:, None, None] * slope, slope, 0, 0]
    else:
        reference = CubicSpline(np.array(knots), values[0].numpy(), bc_type="natural")
        expected = [reference(times.numpy(), order) for order in range(4)]
    for actual, wanted in zip(point, expected, strict=True):
        np.testing.assert_allclose(actual.numpy(), np.broadcast_to(wanted, actual.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("knots", KNOTS, ids=len)
def test_taylor_step_with_the_true_velocity_lands_on_the_next_knot(knots):
    values, times = values_and_times(knots)
    point = NaturalCubicSpline(knots).at(values, times)
    after, gap = next_knot(torch.tensor(knots, dtype=torch.float64), times)
    landed = taylor_step(point, point.velocity, gap)
    torch.testing.assert_close(landed, values[torch.arange(len(times)), after], rtol=0, atol=1e-12)
    assert bool((after[times < 1] > 0).all())
    assert bool((gap[times < 1] > 0).all())
    assert bool((gap[times == 1] == 0).all())


def test_taylor_step_moves_by_the_predicted_velocity():
    values, times = values_and_times(KNOTS[1])
    point = NaturalCubicSpline(KNOTS[1]).at(values, times)
    _, gap = next_knot(torch.tensor(KNOTS[1], dtype=torch.float64), times)
    error = torch.ones_like(point.velocity)
    shifted = taylor_step(point, point.velocity + error, gap) - taylor_step(point, point.velocity, gap)
    torch.testing.assert_close(shifted, gap[:, None, None] * error)


def test_second_derivative_vanishes_at_both_ends():
    values, _ = values_and_times(KNOTS[3], count=2)
    point = NaturalCubicSpline(KNOTS[3]).at(values[:2], torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(point.acceleration, torch.zeros_like(point.acceleration), rtol=0, atol=1e-12)


def test_linear_path_is_straight_between_knots():
    values, times = values_and_times(KNOTS[1])
    point = PiecewiseLinear(KNOTS[1]).at(values, times)
    for channel in range(3):
        wanted = np.interp(times.numpy(), KNOTS[1], values[0, :, 0, channel].numpy())
        np.testing.assert_allclose(point.position[:, 0, channel].numpy(), wanted, atol=1e-12)
    assert not point.acceleration.any()
    assert not point.jerk.any()


def test_a_sample_does_not_depend_on_its_batch_mates():
    values = torch.randn(5, 3, 4)
    times = torch.rand(5)
    spline = NaturalCubicSpline(KNOTS[1])
    together = spline.at(values, times)
    alone = spline.at(values[3:4], times[3:4])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[3:4], b)


@pytest.mark.parametrize("path", [NaturalCubicSpline, PiecewiseLinear])
def test_a_path_is_read_at_many_scales_of_many_samples_in_as_many_operations_as_at_one(path):
    track = path(KNOTS[2]).to("meta")
    values = torch.empty(8, 4, 3, 6, 6, device="meta")

    def kernels_of(samples, scales):
        each, time = values[:samples].repeat_interleave(scales, 0), torch.empty(samples * scales, device="meta")
        return len(kernels(lambda: track.at(each, time), {}))

    counts = {(samples, scales): kernels_of(samples, scales) for samples in (1, 8) for scales in (1, 30)}
    assert 0 < counts[1, 1] < 80
    assert set(counts.values()) == {counts[1, 1]}


def test_times_run_evenly_with_the_scale():
    timeline = Timeline((1.0, 2.0, 4.0))
    assert (timeline.low, timeline.high, timeline.knots) == (1.0, 4.0, (0.0, 1 / 3, 1.0))
    scale = torch.tensor([1.0, 4 / 3, 2.0, 2.5, 4.0], dtype=torch.float64)
    wanted = torch.tensor([0, 1 / 9, 1 / 3, 1 / 2, 1], dtype=torch.float64)
    torch.testing.assert_close(timeline.time(scale), wanted)
    torch.testing.assert_close(timeline.scale(timeline.time(scale)), scale)
    assert Timeline((1.2, 2.1, 3.75)).knots == pytest.approx((0, 0.9 / 2.55, 1))


@pytest.mark.parametrize("scales", [(), (1.0,), (1.0, 4.0, 2.0), (1.0, 1.0), (0.0, 4.0), (1.0, float("nan"))])
def test_bad_timelines_are_named(scales):
    with pytest.raises(ValueError, match=r"scales=\[.*\]: at least two, above 0 and increasing"):
        Timeline(scales)


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        ((0.0,), r"knots=\[0.0\]: at least two"),
        ((0.0, 0.5, 0.5, 1.0), r"must increase from 0 to 1"),
        ((0.1, 1.0), r"knots=\[0.1, 1.0\]: must increase from 0 to 1"),
        ((0.0, 2.0), r"must increase from 0 to 1"),
    ],
)
@pytest.mark.parametrize("path", [NaturalCubicSpline, PiecewiseLinear])
def test_bad_knots_are_named(path, knots, message):
    with pytest.raises(ValueError, match=message):
        path(knots)


def test_a_wrong_number_of_knot_values_is_named():
    with pytest.raises(ValueError, match=r"values have 2 knot values per sample: the path has 3 knots"):
        NaturalCubicSpline(KNOTS[1]).at(torch.zeros(1, 2, 4), torch.zeros(1))
