"""Draws of captured latents: their Gaussian, their gain, and the flow, with networks whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

from degflow.models import ResidualConfig, ResidualFlow, ResidualNetwork, Spread
from degflow.models.counter import gaussian
from degflow.models.residual import FLOOR, Guide, lost_detail

TIMES = (0.0, 0.25, 1.0)
SEEDS = torch.tensor([5, 2**40])


def covariances(count=2, channels=4):
    """Random, and far from diagonal; "count C C"."""
    root = torch.randn(count, channels, channels, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(channels, dtype=torch.float64)


def fitted(channels=4):
    spread = Spread(channels, TIMES)
    spread.fit(covariances(2, channels)[:, None, None])
    return spread


def factors(spread, time):
    """F with F F^T the covariance of the channels, "B C C", for a spread without correlation of neighbours."""
    filters, deviation = spread.at(time)
    return filters[..., 0, 0], deviation


def random_guide(height=12, width=16, time=(0.4, 1.0), channels=4):
    generator = torch.Generator().manual_seed(0)
    optics, source = torch.randn(2, len(time), channels, height, width, generator=generator)
    gain = 0.1 + torch.rand(len(time), 1, height, width, generator=generator)
    return Guide(optics, source, gain, torch.tensor(time))


class Optics(nn.Module):
    """Stands for the optics where no image is degraded."""

    working_channels = 1.0


class Asked(nn.Module):
    """A velocity field from a function, that keeps what it was asked."""

    def __init__(self, field, channels=4, blocks=1):
        super().__init__()
        self.field, self.calls = field, []
        self.config = ResidualConfig(latent_channels=channels, blocks=blocks)

    def forward(self, y, tau, guide):
        self.calls.append((y, tau, guide))
        return self.field(y, tau)


def flow_of(network, spread=None):
    return ResidualFlow(Optics(), spread or fitted(), network, compression=8)


def gaussian_field(begin, mean, covariance):
    """The velocity E[y_1 - y_0 | y] of straight paths from N(0, begin) to independent N(mean, covariance)."""

    def field(y, tau):
        t = tau[:, None, None].double()
        middle = (1 - t) ** 2 * begin + t**2 * covariance
        gain = (t * covariance - (1 - t) * begin) @ torch.linalg.inv(middle)
        from_mean = y.double() - t[..., None] * mean[:, None, None]
        return (mean[:, None, None] + torch.einsum("bij,bjhw->bihw", gain, from_mean)).to(y)

    return field


# The gain


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 4)])
@pytest.mark.parametrize("compression", [8, 2])
def test_lost_detail_is_that_of_a_latent_pixels_own_image_pixels(height, width, compression):
    r = compression
    hr, skeleton = torch.rand(2, 2, 3, height * r, width * r, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = lost_detail(hr, skeleton, r)
    assert found.shape == (2, 1, height, width)
    square = ((hr - skeleton).double().numpy() ** 2).mean(1)
    blocks = square.reshape(2, height, r, width, r).mean((2, 4))
    np.testing.assert_allclose(found[:, 0].numpy(), np.sqrt(np.sqrt(blocks) + FLOOR), rtol=1e-5)


def test_the_gain_grows_with_the_root_of_the_detail_and_keeps_a_floor():
    hr = torch.rand(1, 3, 32, 32) * 0.5
    assert torch.equal(lost_detail(hr, hr, 8), torch.full((1, 1, 4, 4), FLOOR**0.5))
    once, four_times = (lost_detail(factor * hr, torch.zeros_like(hr), 8) ** 2 - FLOOR for factor in (1, 4))
    torch.testing.assert_close(four_times, 4 * once)


# The flow, with a network that knows the answer


def test_draws_have_the_captured_mean_and_covariance():
    guide = random_guide(128, 128)
    factor, deviation = factors(fitted(), guide.time)
    mean = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    captured = covariances(1)[0] / covariances(1)[0].diagonal().mean()
    field = gaussian_field(factor.double() @ factor.double().mT, mean, captured)
    z = flow_of(Asked(field)).latent(guide, SEEDS, 1.0, steps=16, solver="rk4")
    y = ((z - guide.optics) / (guide.gain * deviation)).double().flatten(2)
    count = y.shape[2]
    for n in range(2):
        error = 4.5 * (captured.diagonal() / count).sqrt()
        assert bool(((y[n].mean(1) - mean).abs() < error).all())
        found, variance = torch.cov(y[n]), captured.diagonal()
        error = 4.5 * ((captured**2 + variance[:, None] * variance) / count).sqrt()
        assert bool(((found - captured).abs() < error).all())


def test_a_flow_between_variances_stretches_each_draw_by_the_ratio_of_deviations():
    spread = Spread(2, (0.0, 1.0))
    spread.fit(torch.eye(2, dtype=torch.float64)[None, None, None])
    guide = random_guide(time=(1.0, 1.0), channels=2)
    begin, mean, captured = (
        torch.eye(2).double(),
        torch.tensor([1.0, -2.0]).double(),
        torch.tensor([[4.0, 0], [0, 0.25]]),
    )
    network = Asked(gaussian_field(begin, mean, captured.double()), channels=2)
    z = flow_of(network, spread).latent(guide, SEEDS, 1.0, steps=40, solver="rk5")
    y = (z - guide.optics) / (guide.gain * spread.at(guide.time)[1])
    wanted = mean.view(1, 2, 1, 1) + torch.tensor([2.0, 0.5]).view(1, 2, 1, 1) * gaussian(SEEDS, 2, 12, 16)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-3)


def test_spread_0_is_one_evaluation_at_the_middle_of_the_gaussian():
    network, guide = Asked(lambda y, tau: y + 0.3 + tau[:, None, None, None]), random_guide()
    flow = flow_of(network)
    z = flow.latent(guide, SEEDS, 0.0, steps=4, solver="heun")
    ((y, tau, seen),) = network.calls
    assert not y.any()
    assert not tau.any()
    assert seen is guide
    torch.testing.assert_close(z, guide.optics + guide.gain * flow.spread.at(guide.time)[1] * 0.3)
    assert torch.equal(z, flow.latent(guide, SEEDS + 1, 0.0, 4, "heun"))


def test_between_mean_and_draw_a_latent_lies_in_proportion():
    network, guide = Asked(lambda y, tau: torch.cos(3 * y) - tau[:, None, None, None]), random_guide()
    flow = flow_of(network)
    mean, quarter, draw = (flow.latent(guide, SEEDS, spread, 4, "heun") for spread in (0.0, 0.25, 1.0))
    assert float((draw - mean).abs().max()) > 0.1
    torch.testing.assert_close(quarter, torch.lerp(mean, draw, 0.25))


def test_a_draw_with_the_flows_own_solver_is_eight_evaluations():
    network = Asked(lambda y, tau: torch.zeros_like(y))
    flow = flow_of(network)
    solver, steps = flow.solver
    flow.latent(random_guide(), SEEDS, 1.0, steps, solver)
    assert (solver, steps) == ("rk4", 2)
    taus = [call[1].tolist() for call in network.calls]
    assert taus == [[tau] * 2 for tau in (0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0)]


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_without_blocks_the_gaussian_itself_is_drawn(spread):
    network, guide = Asked(None, blocks=0), random_guide()
    flow = flow_of(network)
    _, deviation = flow.spread.at(guide.time)
    y = torch.einsum("bij,bjhw->bihw", factors(flow.spread, guide.time)[0], gaussian(SEEDS, *guide.optics.shape[1:]))
    drawn = flow.latent(guide, SEEDS, spread, 4, "heun")
    torch.testing.assert_close(drawn, guide.optics + guide.gain * deviation * spread * y)
    assert network.calls == []


def test_at_time_0_nothing_is_added_whatever_the_network_says():
    guide = random_guide(time=(0.0, 0.0))
    z = flow_of(Asked(lambda y, tau: y + 5)).latent(guide, SEEDS, 1.0, 4, "heun")
    torch.testing.assert_close(z, guide.optics, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_rounds_the_networks_answers_alone(precision):
    network, guide = Asked(lambda y, tau: (0.5 * y + 0.1).to(precision)), random_guide()
    flow = flow_of(network)
    wanted = flow_of(Asked(lambda y, tau: 0.5 * y + 0.1))
    for spread in (0.0, 0.5, 1.0):
        with torch.autocast("cpu", precision):
            z = flow.latent(guide, SEEDS, spread, 4, "heun")
        assert z.dtype == torch.float32
        exact = wanted.latent(guide, SEEDS, spread, 4, "heun")
        torch.testing.assert_close(z, exact, rtol=0, atol=0.02)
    assert all(y.dtype == torch.float32 for y, _, _ in network.calls)
    without_blocks = [flow_of(Asked(None, blocks=0)).latent(guide, SEEDS, 1.0, 4, "heun")]
    with torch.autocast("cpu", precision):
        without_blocks.append(flow_of(Asked(None, blocks=0)).latent(guide, SEEDS, 1.0, 4, "heun"))
    assert torch.equal(*without_blocks)


# The network


def network_of(**sizes):
    torch.manual_seed(0)
    network = ResidualNetwork(ResidualConfig(**{"width": 16, "blocks": 2, "expansion": 2, **sizes}))
    for parameter in network.parameters():
        if not parameter.any():  # the head and the modulation begin at zero
            nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def test_an_untrained_network_draws_the_gaussian():
    guide = random_guide()
    y, tau = torch.randn(2, 4, 12, 16), torch.tensor([0.1, 0.9])
    with torch.no_grad():
        assert not ResidualNetwork(ResidualConfig(width=16, blocks=2))(y, tau, guide).any()


def test_everything_that_is_known_is_seen():
    network, guide = network_of(), random_guide()
    y, tau = torch.randn(2, 4, 12, 16), torch.tensor([0.1, 0.9])
    velocity = network(y, tau, guide)
    assert velocity.shape == y.shape
    changed = [guide._replace(**{name: 0.9 * value}) for name, value in guide._asdict().items()]
    others = [network(y, tau, other) for other in changed] + [
        network(0.9 * y, tau, guide),
        network(y, 0.9 * tau, guide),
    ]
    assert all(float((other - velocity).abs().max()) > 1e-3 for other in others)


def test_a_sample_does_not_depend_on_its_batch_mates():
    network, guide = network_of(), random_guide()
    y, tau = torch.randn(2, 4, 12, 16), torch.tensor([0.1, 0.9])
    alone = network(y[1:], tau[1:], Guide(*(value[1:] for value in guide)))
    torch.testing.assert_close(alone, network(y, tau, guide)[1:])


def test_a_place_depends_on_its_surroundings_and_not_on_the_images_size():
    network, guide, y = network_of(blocks=2), random_guide(40, 44), torch.randn(2, 4, 40, 44)
    tau, reach = torch.tensor([0.1, 0.9]), 1 + 2 * 2 + 1  # stem, two blocks, head
    whole = network(y, tau, guide)
    cut = Guide(*(value[..., 8:36, 4:30] for value in guide[:3]), guide.time)
    part = network(y[..., 8:36, 4:30], tau, cut)
    inner = (..., slice(reach, -reach), slice(reach, -reach))
    torch.testing.assert_close(part[inner], whole[..., 8:36, 4:30][inner], rtol=0, atol=1e-5)
    assert float((part - whole[..., 8:36, 4:30]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"latent_channels": 0}, r"residual.latent_channels=0: must be at least 1"),
        ({"width": 7}, r"residual.width=7: must be at least 8"),
        ({"width": 9}, r"residual.width=9: must be even"),
        ({"blocks": -1}, r"residual.blocks=-1: must be at least 0"),
        ({"expansion": 0}, r"residual.expansion=0: must be at least 1"),
    ],
)
def test_a_bad_size_names_the_field_the_value_and_the_rule(sizes, message):
    with pytest.raises(ValueError, match=message):
        ResidualConfig(**sizes)
