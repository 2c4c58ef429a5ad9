import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from degflow.benchmarking.predict import kernels
from degflow.flow import SOLVERS, Draw, PathFlow, Seen, integrate
from degflow.trajectory import NaturalCubicSpline
from tests import problems

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "rk5": 5}
END_TIMES = torch.tensor([1.0, 0.37, 0.8], dtype=torch.float64)


def start():
    return torch.tensor([[1.0, 0.5], [-2.0, 1.0], [0.3, 0.7]], dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("velocity", "solution"), [(problems.decay, problems.decayed), (problems.rotation, problems.rotated)]
)
@pytest.mark.parametrize("dense", [False, True])
def test_measured_order_of_convergence(solver, velocity, solution, dense):
    many = torch.linspace(0, 1, 101, dtype=torch.float64).expand(3, -1)  # cubic interpolation is of order 4
    times = many if dense else END_TIMES[:, None]
    exact = torch.stack([solution(start(), time) for time in times.unbind(1)], 1)

    def error(steps):
        out = integrate(velocity, start(), many if dense else END_TIMES, steps=steps, solver=solver)
        return float((out.view_as(exact) - exact).norm())

    measured = math.log2(error(16) / error(32))
    assert measured == pytest.approx(min(ORDERS[solver], 4 if dense else 5), abs=0.35)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_evaluation_is_at_a_time_of_its_own_sample(solver):
    seen = []

    def velocity(z, time):
        seen.append(time)
        return torch.zeros_like(z)

    integrate(velocity, start(), END_TIMES, steps=2, solver=solver)
    times = torch.stack(seen)
    stages = {
        "euler": [0.0],
        "midpoint": [0.0, 0.5],
        "heun": [0.0, 1.0],
        "rk4": [0.0, 0.5, 0.5, 1.0],
        "rk5": [0.0, 0.25, 0.25, 0.5, 0.75, 1.0],
    }[solver]
    fractions = torch.tensor([(n + stage) / 2 for n in range(2) for stage in stages], dtype=torch.float64)
    torch.testing.assert_close(times, fractions[:, None] * END_TIMES)


def test_dense_output_reads_one_integration_at_many_times():
    calls = 0

    def velocity(z, time):
        nonlocal calls
        calls += 1
        return problems.rotation(z, time)

    times = torch.linspace(0, 1, 30, dtype=torch.float64).expand(3, -1)
    out = integrate(velocity, start(), times, steps=8, solver="rk4")
    assert calls == 8 * 4 + 1
    for n in range(30):
        torch.testing.assert_close(out[:, n], problems.rotated(start(), times[:, n]), rtol=0, atol=2e-3)


def test_dense_output_takes_as_many_operations_for_many_scales_of_a_batch_as_for_one_of_an_image():
    counts = set()
    for samples in (1, 8):
        for times in ([1.0], [0.2, 0.5, 0.9, 1.0], torch.linspace(0, 1, 30).tolist()):
            z0, end_time = torch.empty(samples, 4, 8, 8, device="meta"), torch.tensor([times]).expand(samples, -1)
            way = functools.partial(integrate, lambda z, t: -z, z0, end_time, steps=3, solver="heun")
            counts.add(len(kernels(way, {})))
    assert len(counts) == 1


def test_dense_output_goes_as_far_as_the_last_time_needs():
    seen = []

    def velocity(z, time):
        seen.append(time.tolist())
        return problems.rotation(z, time)

    times = torch.tensor([[0.1, 0.25], [0.0, 0.7], [0.0, 0.0]], dtype=torch.float64)
    out = integrate(velocity, start(), times, steps=4, solver="euler")
    assert seen == [[n / 4] * 3 for n in range(4)]
    assert torch.equal(out, integrate(problems.rotation, start(), times.sort(1).values, steps=4, solver="euler"))
    farther = torch.cat((times, torch.ones(3, 1, dtype=torch.float64)), 1)
    assert torch.equal(out, integrate(problems.rotation, start(), farther, steps=4, solver="euler")[:, :2])


def test_a_dense_result_does_not_depend_on_the_other_times():
    many = torch.tensor([[0.2, 0.9, 0.5]] * 3, dtype=torch.float64)
    together = integrate(problems.rotation, start(), many, steps=3, solver="heun")
    alone = integrate(problems.rotation, start(), many[:, 1:2], steps=3, solver="heun")
    assert torch.equal(together[:, 1], alone[:, 0])


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_time_zero_returns_the_start_exactly(shape):
    out = integrate(problems.rotation, start(), torch.zeros(shape, dtype=torch.float64), steps=2, solver="rk4")
    assert torch.equal(out.view(3, 2), start())


def test_integrating_the_splines_own_velocity_lands_on_every_knot():
    knots = (0.0, 1 / 3, 1.0)
    values = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spline = NaturalCubicSpline(knots)

    def velocity(z, time):
        return spline.at(values.expand(len(z), -1, -1), time).velocity

    for k, knot in enumerate(knots):
        landed = integrate(velocity, values[:, 0], torch.tensor([knot], dtype=torch.float64), steps=30, solver="rk4")
        torch.testing.assert_close(landed, values[:, k], rtol=0, atol=1e-8)
    dense = integrate(velocity, values[:, 0], torch.tensor([knots], dtype=torch.float64), steps=30, solver="rk4")
    torch.testing.assert_close(dense, values, rtol=0, atol=1e-8)


class Rotation(nn.Module):
    """A velocity network whose paths are known."""

    config = SimpleNamespace(latent_channels=2, working_channels=1.0, multiple=1)

    def forward(self, z, time):
        return problems.rotation(z.flatten(1), time).view_as(z)


@pytest.mark.parametrize("many", [False, True])
def test_the_published_flow_carries_hrs_latent_to_every_time_and_keeps_hrs_skips(many):
    hr, asked = torch.zeros(3, 3, 8, 8), []
    seen = Seen(hr, start().view(3, 2, 1, 1), (torch.ones(3, 1),))

    def see(image, needs_skips):
        asked.append((image, needs_skips))
        return seen

    time = torch.tensor([[0.0, 0.4, 1.0], [0.9, 0.2, 0.3], [1.0, 0.5, 0.0]])[:, : 3 if many else 1].double()
    flow = PathFlow(Rotation())
    place = torch.zeros(3, 2, dtype=torch.int64)
    draw = Draw(scale=time, time=time, seed=time.long(), many=many, spread=1.0, steps=8, solver="rk5", place=place)
    carried = list(flow.carry(see, hr, draw))
    assert len(carried) == time.shape[1]
    for n, (latent, found, finish) in enumerate(carried):
        assert found is seen
        assert finish is None
        torch.testing.assert_close(latent.flatten(1), problems.rotated(start(), time[:, n]), rtol=0, atol=2e-3)
    assert asked == [(hr, True)]
    assert flow.guide(hr, time[:, 0]) is hr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "rk45"}, r"solver=rk45: must be one of euler, midpoint, heun, rk4, rk5"),
        ({"steps": 0}, r"steps=0: must be at least 1"),
        ({"end_time": torch.tensor([0.5, 1.2, 0.1])}, r"end_time from 0.1.* to 1.2.*: must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"end_time": END_TIMES, **arguments}
    with pytest.raises(ValueError, match=message):
        integrate(problems.decay, start(), **arguments)
