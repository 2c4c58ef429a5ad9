import pytest
import torch

from degflow.benchmarking.plain import plain_decode
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork


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


def test_a_velocity_networks_sample_does_not_depend_on_its_batch_mates():
    torch.manual_seed(0)
    network = VelocityNetwork(VelocityConfig(width=16, multipliers=(1, 2), blocks=1)).eval()
    z, t = torch.randn(3, 4, 6, 8), torch.tensor([0.2, 0.9, 0.5])
    with torch.no_grad():
        torch.testing.assert_close(network(z[1:2], t[1:2]), network(z, t)[1:2], rtol=0, atol=1e-5)
        assert float((network(z, t) - network(z, t.flip(0)))[0].abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AutoencoderConfig(base_width=0), r"autoencoder.base_width=0: must be at least 1"),
        (lambda: AutoencoderConfig(multipliers=(1,)), r"autoencoder.multipliers=\[1\]: at least two entries"),
        (lambda: VelocityConfig(blocks=0), r"velocity.blocks=0: must be at least 1"),
        (lambda: VelocityConfig(latent_channels=0), r"velocity.latent_channels=0: must be at least 1"),
        (lambda: VelocityConfig(width=12), r"velocity.width=12: must be a multiple of 8"),
        (lambda: VelocityConfig(multipliers=()), r"velocity.multipliers=\[\]: at least one entry"),
        (
            lambda: VelocityConfig(multipliers=(1, 0)),
            r"velocity.multipliers=\[1, 0\]: .*each at least 1",
        ),
        (lambda: VelocityConfig(dropout=1.0), r"velocity.dropout=1.0: must lie in \[0, 1\)"),
    ],
)
def test_a_bad_size_names_the_field_the_value_and_the_rule(build, message):
    with pytest.raises(ValueError, match=message):
        build()
