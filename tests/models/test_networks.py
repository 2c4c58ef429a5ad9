import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from degflow.benchmarking.plain import plain_decode
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork, velocity_network


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 1, 2), (1, 1, 2, 4)])
@pytest.mark.parametrize("hr_skips", [True, False])
def test_compression_width_and_depth_are_configuration(multipliers, hr_skips):
    config = AutoencoderConfig(base_width=8, multipliers=multipliers, blocks=1, latent_channels=6, hr_skips=hr_skips)
    network = ResidualAutoencoder(config)
    latent, skips = network.encode(torch.zeros(1, 3, 32, 48))
    assert latent.shape == (1, 6, 32 // config.compression, 48 // config.compression)
    assert [skip.shape[-1] for skip in skips] == [48 // 2**level for level in range(len(multipliers) - 1)]
    assert network.decode(latent, skips).shape == (1, 3, 32, 48)


@pytest.mark.parametrize("hr_skips", [True, False])
@pytest.mark.parametrize(("multipliers", "size"), [((1, 2, 3), (24, 40)), ((1, 2), (10, 22))])
def test_the_decoder_makes_the_images_and_gradients_of_the_one_that_is_drawn(hr_skips, multipliers, size):
    torch.manual_seed(0)
    config = AutoencoderConfig(base_width=8, multipliers=multipliers, hr_skips=hr_skips, gate_init=0.5)
    network = ResidualAutoencoder(config).double()
    latent, skips = network.encode(torch.rand(2, 3, *size, dtype=torch.float64))
    images = network.decode(latent, skips), plain_decode(network.decoder, latent, skips)
    torch.testing.assert_close(*images, rtol=0, atol=1e-12)
    parameters = list(network.parameters())
    ours, plain = (torch.autograd.grad(image.square().sum(), parameters, retain_graph=True) for image in images)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_without_hr_skips_the_decoder_ignores_them():
    network = ResidualAutoencoder(AutoencoderConfig(base_width=8, hr_skips=False))
    latent, skips = network.encode(torch.rand(1, 3, 32, 32))
    other = tuple(skip + 1 for skip in skips)
    assert torch.equal(network.decode(latent, skips), network.decode(latent, other))


def test_linear_terms_add_a_part_that_is_linear_in_the_latent():
    torch.manual_seed(0)
    sizes = {"width": 16, "multipliers": (1, 1), "blocks": 1}
    network = VelocityNetwork(VelocityConfig(**sizes, linear_terms=3)).eval()
    plain = VelocityNetwork(VelocityConfig(**sizes)).eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("linear.")})
    z, t = torch.randn(2, 4, 6, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        assert torch.equal(network(z, t), plain(z, t))  # zero at the start
        torch.nn.init.normal_(network.linear.conv.weight)
        added = network(z, t) - plain(z, t)
        doubled = network(2 * z, t) - plain(2 * z, t)
        other_time = network(z, t.flip(0)) - plain(z, t.flip(0))
    torch.testing.assert_close(doubled, 2 * added, rtol=1e-4, atol=1e-4)
    assert float((other_time - added).abs().max()) > 0.1


def test_the_source_is_seen_by_networks_that_are_built_for_it_alone():
    torch.manual_seed(0)
    z, z0, t = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.tensor([0.2, 0.9])
    sizes = {"width": 16, "multipliers": (1, 1), "blocks": 1}
    blind = VelocityNetwork(VelocityConfig(**sizes)).eval()
    seeing = VelocityNetwork(VelocityConfig(**sizes, source=True, linear_terms=1)).eval()
    with torch.no_grad():
        assert torch.equal(blind(z, t, z0), blind(z, t))
        assert float((seeing(z, t, z0) - seeing(z, t, z)).abs().max()) > 1e-3
        before = seeing(z, t, z0)
        torch.nn.init.normal_(seeing.linear.conv.weight[:, 4:])
        assert float((seeing(z, t, z0) - before).abs().max()) > 0.1  # the linear terms see it too
    with pytest.raises(ValueError, match=r"source: needed, for this network was built with velocity.source=true"):
        seeing(z, t)


def test_a_flow_map_carries_along_scipys_natural_spline_through_its_levels_and_its_velocity_is_that_ones():
    torch.manual_seed(0)
    knots = (0.0, 0.2, 0.45, 1.0)
    config = VelocityConfig(width=16, multipliers=(1, 1), blocks=1, linear_terms=1, flow_map=True)
    flow_map = velocity_network(config, knots).eval().double()
    source, other, time = torch.randn(2, 4, 6, 8).double(), torch.randn(2, 4, 6, 8).double(), torch.rand(2, 3).double()
    with torch.no_grad():
        levels = flow_map.levels(source)
        assert torch.equal(levels[:, 0], source)
        carried = flow_map.carry(source, time)
        for sample in range(2):
            spline = CubicSpline(knots, levels[sample].numpy(), bc_type="natural")
            for n, t in enumerate(time[sample]):
                np.testing.assert_allclose(carried[sample, n].numpy(), spline(t), rtol=0, atol=1e-9)
                velocity = flow_map(other[:1], t[None], source[sample : sample + 1])[0]
                np.testing.assert_allclose(velocity.numpy(), spline(t, 1), rtol=0, atol=1e-9)
        torch.testing.assert_close(flow_map.carry(source, time[:, 0]), carried[:, 0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"source: needed, for this network was built with velocity.flow_map=true"):
        flow_map(other, time[:, 0])


@pytest.mark.parametrize(("settings", "asked"), [({"source": True}, 9), ({"flow_map": True}, 1)])
def test_velocity_and_ends_are_a_call_and_a_carry_and_a_flow_map_is_asked_once(settings, asked):
    torch.manual_seed(0)
    sizes = {"width": 16, "multipliers": (1, 1), "blocks": 1, "dropout": 0.5}
    network = velocity_network(VelocityConfig(**sizes, **settings), (0.0, 0.3, 1.0)).train()
    z, source = torch.randn(3, 4, 6, 8), torch.randn(3, 4, 6, 8)
    time, key, chosen, ends = torch.rand(3), torch.arange(3), torch.tensor([2, 0]), torch.tensor([1.0, 0.3])
    how = {"solver": "rk4", "steps": 2}
    apart = network(z, time, source, key), network.carry(source[chosen], ends, key[chosen], **how)
    calls = []
    unet = network.network if settings.get("flow_map") else network
    unet.register_forward_hook(lambda *_: calls.append(1))
    together = network.velocity_and_ends(z, time, source, key, chosen, ends, **how)
    assert len(calls) == asked
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    weight = unet.stem.weight
    slopes = [torch.autograd.grad(sum(x.square().sum() for x in pair), weight)[0] for pair in (together, apart)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AutoencoderConfig(base_width=0), r"autoencoder.base_width=0: must be at least 1"),
        (lambda: AutoencoderConfig(multipliers=(1,)), r"autoencoder.multipliers=\[1\]: at least two entries"),
        (lambda: VelocityConfig(blocks=0), r"velocity.blocks=0: must be at least 1"),
        (lambda: VelocityConfig(linear_terms=-1), r"velocity.linear_terms=-1: must not be negative"),
        (lambda: VelocityConfig(width=12), r"velocity.width=12: must be a multiple of 8"),
        (lambda: VelocityConfig(multipliers=()), r"velocity.multipliers=\[\]: at least one entry"),
        (lambda: VelocityConfig(flow_map=True, source=True), r"velocity.source=True: must be false with flow_map=true"),
        (lambda: VelocityConfig(dropout=1.0), r"velocity.dropout=1.0: must lie in \[0, 1\)"),
    ],
)
def test_a_bad_size_names_the_field_the_value_and_the_rule(build, message):
    with pytest.raises(ValueError, match=message):
        build()
