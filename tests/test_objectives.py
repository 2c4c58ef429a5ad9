import pytest
import torch
from torch import nn

from degflow.capture.filters import blur
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork
from degflow.objectives import SIGMAS, LFMObjective, RAEObjective, to_float
from degflow.trajectory import NaturalCubicSpline, PiecewiseLinear

KNOTS = (0.0, 1 / 3, 1.0)
NUMBERS = torch.arange(4)


def crops(count=4, side=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 3, side, side), generator=generator, dtype=torch.uint8)


def autoencoder(**settings):
    torch.manual_seed(0)
    return ResidualAutoencoder(AutoencoderConfig(base_width=8, multipliers=(1, 2, 2), gate_init=0.5, **settings))


class Oracle(nn.Module):
    """Knows each sample's path, and returns its velocity, moved by an offset; wants to be told where it began."""

    def __init__(self, path, values, offset=0.0):
        super().__init__()
        self.path, self.values, self.offset = path, values, offset

    def forward(self, latent, time, source, key):
        torch.testing.assert_close(source, self.values[:, 0])
        return self.path.at(self.values, time).velocity + self.offset

    carry = VelocityNetwork.carry
    velocity_and_ends = VelocityNetwork.velocity_and_ends


class Recorder(nn.Module):
    """A stand-in for LPIPS that keeps what it was asked to compare."""

    def forward(self, image, reference):
        self.image, self.reference = image, reference
        return (image - reference).square().mean((1, 2, 3))


def latents_of(network, images):
    image = to_float(images)
    return torch.stack([network.encode(image[:, level])[0] for level in range(images.shape[1])], 1).detach()


def oracle_objective(path_type=NaturalCubicSpline, offset=0.0, **settings):
    network, images = autoencoder(), crops()
    path = path_type(KNOTS)
    oracle = Oracle(path, latents_of(network, images), offset)
    return LFMObjective(network, oracle, path, **settings), images


def test_rae_loss_is_the_l1_of_the_drawn_level_decoded_with_hr_skips():
    network, images = autoencoder(), crops(3)
    draw = torch.tensor([0.0, 0.4, 0.99])  # levels 0, 1, 2
    losses = RAEObjective(network)(images=images, draw=draw)
    image = to_float(images)
    errors = []
    for sample, level in enumerate((0, 1, 2)):
        _, skips = network.encode(image[sample : sample + 1, 0])
        latent, _ = network.encode(image[sample : sample + 1, level])
        errors.append((network.decode(latent, skips) - image[sample : sample + 1, level]).abs().mean())
    torch.testing.assert_close(losses.total, torch.stack(errors).mean())
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_share_of_the_rae_samples_decodes_blurred_hr():
    network, images = autoencoder(), crops(4)
    draw = torch.tensor([0.0, 0.2499, 0.25, 0.999])  # of 0.25: the sharpest blur and the widest, HR, the last level
    losses = RAEObjective(network, blurred=0.25)(images=images, draw=draw)
    image = to_float(images)
    blurs = (blur(image[:1, 0], SIGMAS[0]), blur(image[1:2, 0], SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * 0.9996))
    errors = []
    for sample, target in enumerate((*blurs, image[2:3, 0], image[3:4, 2])):
        _, skips = network.encode(image[sample : sample + 1, 0])
        errors.append((network.decode(network.encode(target)[0], skips) - target).abs().mean())
    torch.testing.assert_close(losses.total, torch.stack(errors).mean(), rtol=1e-4, atol=0)


def test_a_frozen_encoder_leaves_the_latents_alone():
    network = autoencoder()
    RAEObjective(network, freeze_encoder=True)(images=crops(), draw=torch.rand(4)).total.backward()
    assert all(parameter.grad is None for parameter in network.encoder.parameters())
    assert all(parameter.grad is not None for parameter in network.decoder.parameters())


def test_an_oracle_velocity_has_zero_flow_loss_on_either_path():
    for path_type in (NaturalCubicSpline, PiecewiseLinear):
        objective, images = oracle_objective(path_type)
        losses = objective(images=images, draw=torch.tensor([0.0, 0.2, 0.5, 0.999]), number=NUMBERS)
        assert float(losses.total) < 1e-10


def test_flow_loss_is_the_mean_squared_velocity_error():
    objective, images = oracle_objective(offset=0.5)
    losses = objective(images=images, draw=torch.rand(4), number=NUMBERS)
    torch.testing.assert_close(losses.total, torch.tensor(0.25), rtol=1e-4, atol=0)


def test_perceptual_term_compares_the_next_levels_image_with_its_own_decoding_under_the_true_velocity():
    perceptual = Recorder()
    objective, images = oracle_objective(perceptual=perceptual, weight=0.1)
    draw = torch.tensor([0.0, 0.2, 0.4, 0.9])
    losses = objective(images=images, draw=draw, number=NUMBERS)
    image, next_level = to_float(images), torch.tensor([1, 1, 2, 2])
    target = image[torch.arange(4), next_level]
    assert torch.equal(perceptual.reference, target)
    _, skips = objective.autoencoder.encode(image[:, 0])
    wanted = objective.autoencoder.decode(objective.autoencoder.encode(target)[0], skips)
    torch.testing.assert_close(perceptual.image, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(losses.total, 0.1 * losses.parts["lpips"] + losses.parts["cfm"])


def test_an_integrated_landing_is_where_the_networks_own_path_from_hr_ends():
    perceptual = Recorder()
    objective, images = oracle_objective(offset=0.5, perceptual=perceptual, landing="integrated")
    objective(images=images, draw=torch.tensor([0.0, 0.2, 0.4, 0.9]), number=NUMBERS)
    level = torch.tensor([1, 1, 2, 2])
    assert torch.equal(perceptual.reference, to_float(images)[torch.arange(4), level])
    _, skips = objective.autoencoder.encode(to_float(images)[:, 0])
    drifted = objective.network.values[torch.arange(4), level] + 0.5 * torch.tensor(KNOTS)[level].view(4, 1, 1, 1)
    wanted = objective.autoencoder.decode(drifted, skips)  # but for a solver step across the knot, where jerk jumps
    torch.testing.assert_close(perceptual.image, wanted, rtol=0, atol=5e-3)


def test_landing_samples_spread_over_the_step_and_weight_zero_leaves_a_term_out():
    perceptual = Recorder()
    weights = {"weight": 0.3, "pixel_weight": 2.0}
    objective, images = oracle_objective(perceptual=perceptual, offset=0.5, **weights, landing_samples=2, batch=4)
    draw = torch.tensor([0.0, 0.2, 0.4, 0.9])
    for numbers, chosen in ((NUMBERS, [0, 2]), (NUMBERS + 401, [1, 3])):
        losses = objective(images=images, draw=draw, number=numbers)
        target = to_float(images)[torch.arange(4), torch.tensor([1, 1, 2, 2])][chosen]
        assert torch.equal(perceptual.reference, target)
        mean = (perceptual.image - target).square().mean()
        torch.testing.assert_close(losses.parts["lpips"], mean, rtol=1e-6, atol=0)
        difference = (perceptual.image - target).abs().mean()
        torch.testing.assert_close(losses.parts["l1"], difference, rtol=1e-6, atol=0)
        torch.testing.assert_close(losses.total, 0.25 + 0.3 * mean + 2 * difference, rtol=1e-4, atol=0)
    for left, keys in (("cfm", {}), ("cfm lpips", {"weight": 0.1}), ("cfm l1", {"pixel_weight": 1.0})):
        objective, images = oracle_objective(perceptual=perceptual, **{"weight": 0.0, **keys})
        assert list(objective(images=images, draw=torch.rand(4), number=NUMBERS).parts) == left.split()
    with pytest.raises(ValueError, match="landing_samples=5: must not exceed batch=4"):
        oracle_objective(perceptual=perceptual, landing_samples=5, batch=4)


@pytest.mark.parametrize("landing", ["taylor", "integrated"])
@pytest.mark.parametrize("samples", [0, 1, 3, 6])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_parts_of_a_batch_have_its_loss_and_its_gradient_on_average(landing, samples, size):
    images, draw, number = crops(6), torch.rand(6, generator=torch.Generator().manual_seed(1)), torch.arange(12, 18)
    torch.manual_seed(0)
    velocity = VelocityNetwork(VelocityConfig(width=16, multipliers=(1, 1), blocks=1, dropout=0.3))
    path = NaturalCubicSpline(KNOTS)
    objective = LFMObjective(autoencoder(), velocity, path, Recorder(), 0.5, 0.7, landing, samples, 6, 3).train()

    def losses(parts):
        velocity.zero_grad()
        results = [objective(images=images[part], draw=draw[part], number=number[part]) for part in parts]
        (sum(result.total for result in results) / len(results)).backward()
        grads = torch.cat([parameter.grad.flatten() for parameter in velocity.parameters()])
        return {name: sum(result.parts[name] for result in results) / len(results) for name in results[0].parts}, grads

    whole, grads = losses([torch.arange(6)])
    assert list(whole) == ["cfm", "lpips", "l1"]
    parts, their_grads = losses(torch.arange(6).split(size))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)
    assert float((their_grads - grads).norm() / grads.norm()) < 1e-5
    objective.seed = 4
    assert abs(float(losses([torch.arange(6)])[0]["cfm"] / whole["cfm"]) - 1) > 1e-3  # another seed, other masks


def test_only_the_velocity_network_is_trained_and_the_frozen_parts_stay_in_eval_mode():
    network, images = autoencoder(), crops(side=16)
    velocity = VelocityNetwork(VelocityConfig(width=16, multipliers=(1, 1), blocks=1))
    objective = LFMObjective(network, velocity, NaturalCubicSpline(KNOTS), Recorder())
    objective.train()
    assert velocity.training
    assert not network.training
    objective(images=images, draw=torch.rand(4), number=NUMBERS).total.backward()
    assert all(parameter.grad is not None for parameter in velocity.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_mixed_precision_does_not_round_the_path():
    objective, images = oracle_objective()
    with torch.autocast("cpu", torch.bfloat16):
        values = latents_of(objective.autoencoder, images).float()
        objective.network.values = values
        seen = []
        objective.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        objective(images=images, draw=torch.tensor([0.1, 0.2, 0.5, 0.7]), number=NUMBERS)
    exact = objective.path.at(values, torch.tensor([0.1, 0.2, 0.5, 0.7])).position
    torch.testing.assert_close(seen[0], exact, rtol=1e-6, atol=1e-6)
