"""The training objectives: exact in cases whose answer is known, and of fixed shape from end to end."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from degflow.models import (
    AutoencoderConfig,
    ResidualAutoencoder,
    ResidualConfig,
    ResidualFlow,
    ResidualNetwork,
    Spread,
    VelocityConfig,
    VelocityNetwork,
)
from degflow.models.counter import gaussian, sample_keys
from degflow.models.residual import lost_detail
from degflow.objectives import LatentObjective, LFMObjective, RAEObjective, ResidualObjective, residuals, to_float
from degflow.trajectory import NaturalCubicSpline, PiecewiseLinear

KNOTS = (0.0, 1 / 3, 1.0)
NUMBERS = torch.arange(4)
TIMES = torch.tensor([[0.0], [0.2], [0.4], [0.9]], dtype=torch.float64)


def crops(count=4, levels=3, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, levels, 3, side, side), generator=generator, dtype=torch.uint8)


def autoencoder(**settings):
    torch.manual_seed(0)
    return ResidualAutoencoder(AutoencoderConfig(base_width=8, multipliers=(1, 2, 2), gate_init=0.5, **settings))


class Oracle(nn.Module):
    """Knows each sample's path, and returns its velocity, moved by an offset."""

    def __init__(self, path, values, offset=0.0):
        super().__init__()
        self.path, self.values, self.offset = path, values, offset

    def forward(self, latent, time, key):
        with torch.autocast("cpu", enabled=False):
            point = self.path.at(self.values, time)
        torch.testing.assert_close(latent, point.position, rtol=1e-6, atol=1e-6)
        return point.velocity + self.offset


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


# Stage 1


@pytest.mark.parametrize("guided", [False, True], ids=["skips of HR", "skips of a guide"])
def test_rae_loss_is_the_l1_of_the_target_decoded_with_the_guides_skips(guided):
    network, images = autoencoder(), crops(3)
    target, guide = images[:, 1], images[:, 2 if guided else 0]
    losses = RAEObjective(network)(target=target, guide=guide, number=NUMBERS[:3])
    errors = []
    for sample in range(3):
        _, skips = network.encode(to_float(guide[sample : sample + 1]))
        image = to_float(target[sample : sample + 1])
        errors.append((network.decode(network.encode(image)[0], skips) - image).abs().mean())
    torch.testing.assert_close(losses.total, torch.stack(errors).mean())
    assert list(losses.parts) == ["l1"]
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_rae_trains_the_encoder_through_the_guide_too():
    network, images = autoencoder(), crops(2)
    RAEObjective(network)(target=images[:, 1], guide=images[:, 2]).total.backward()
    both = network.encoder.stem.weight.grad
    image, network.encoder.stem.weight.grad = to_float(images[:, 1]), None
    skips = tuple(skip.detach() for skip in network.skips(to_float(images[:, 2])))
    F.l1_loss(network.decode(network.encode(image)[0], skips), image).backward()
    assert float((both - network.encoder.stem.weight.grad).abs().max()) > 1e-3 * float(both.abs().max())


# The published stage 2


def test_an_oracle_velocity_has_zero_flow_loss_on_either_path():
    for path_type in (NaturalCubicSpline, PiecewiseLinear):
        objective, images = oracle_objective(path_type)
        losses = objective(images=images, time=torch.tensor([[0.0], [0.2], [0.5], [0.999]]), number=NUMBERS)
        assert float(losses.total) < 1e-10


def test_flow_loss_is_the_mean_squared_velocity_error():
    objective, images = oracle_objective(offset=0.5)
    losses = objective(images=images, time=torch.rand(4, 1), number=NUMBERS)
    torch.testing.assert_close(losses.total, torch.tensor(0.25), rtol=1e-4, atol=0)


def test_perceptual_term_compares_the_next_levels_image_with_its_own_decoding_under_the_true_velocity():
    perceptual = Recorder()
    objective, images = oracle_objective(perceptual=perceptual, weight=0.1)
    losses = objective(images=images, time=TIMES, number=NUMBERS)
    image, next_level = to_float(images), torch.tensor([1, 1, 2, 2])
    target = image[torch.arange(4), next_level]
    assert torch.equal(perceptual.reference, target)
    _, skips = objective.autoencoder.encode(image[:, 0])
    wanted = objective.autoencoder.decode(objective.autoencoder.encode(target)[0], skips)
    torch.testing.assert_close(perceptual.image, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(losses.total, 0.1 * losses.parts["lpips"] + losses.parts["cfm"])


def test_a_velocity_error_moves_the_taylor_step_by_itself_times_the_gap():
    perceptual = Recorder()
    objective, images = oracle_objective(perceptual=perceptual, offset=0.5)
    objective(images=images, time=TIMES, number=NUMBERS)
    _, skips = objective.autoencoder.encode(to_float(images[:, 0]))
    level = torch.tensor([1, 1, 2, 2])
    gap = torch.tensor(KNOTS)[level] - TIMES[:, 0].float()
    landed = objective.network.values[torch.arange(4), level] + 0.5 * gap.view(4, 1, 1, 1)
    torch.testing.assert_close(perceptual.image, objective.autoencoder.decode(landed, skips), rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"perceptual": Recorder(), "weight": 0.0}])
def test_without_lpips_or_its_weight_flow_matching_is_all(settings):
    objective, images = oracle_objective(**settings)
    assert list(objective(images=images, time=TIMES, number=NUMBERS).parts) == ["cfm"]


def test_mixed_precision_does_not_round_the_path():
    objective, images = oracle_objective()  # the oracle compares the place on the path with its own
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(images=images, time=TIMES, number=NUMBERS)
    assert float(losses.total) < 1e-10


# Stage 2 for draws


class KnowsResiduals(nn.Module):
    """Returns the velocity from where a sample stands to its captured residual, moved by an offset."""

    def __init__(self, captured, offset=0.0):
        super().__init__()
        self.captured, self.offset = captured, offset
        self.config = ResidualConfig()

    def forward(self, y, tau, guide):
        self.seen = y, tau, guide
        return (self.captured - y) / (1 - tau[:, None, None, None]) + self.offset


def spread():
    found = Spread(4, KNOTS)
    root = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = root @ root.mT + 0.1 * torch.eye(4)
    found.fit(covariance[:, None, None])
    return found


class NoOptics(nn.Module):
    """Stands for the optics, which a training never calls: its samples were made with them."""

    working_channels = 0.0


def residual_objective(network, seed=0, kind=ResidualObjective):
    return kind(autoencoder(), ResidualFlow(NoOptics(), spread(), network, compression=4), seed)


SCALE_TIMES = torch.tensor([0.2, 1 / 3, 0.5, 1.0], dtype=torch.float64)


def residual_batch(seed=0, count=4):
    hr, skeleton, lr = crops(count, seed=seed).unbind(1)
    taus = torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)[:count]
    return {
        "hr": hr, "skeleton": skeleton, "lr": lr, "time": SCALE_TIMES[:count], "tau": taus, "number": NUMBERS[:count],
    }  # fmt: skip


def known_residuals(seed=0):
    batch = residual_batch()
    images = (batch[name] for name in ("hr", "skeleton", "lr"))
    return batch, residuals(autoencoder(), spread(), *images, SCALE_TIMES.float())


def test_residuals_are_what_capture_adds_to_the_optics_in_units_of_their_spread():
    batch, (guide, captured) = known_residuals()
    network, (hr, skeleton, lr) = autoencoder(), (to_float(batch[name]) for name in ("hr", "skeleton", "lr"))
    z_hr, z_skeleton, z_lr = (network.encode(image)[0] for image in (hr, skeleton, lr))
    torch.testing.assert_close(guide.source, z_hr)
    torch.testing.assert_close(guide.optics, z_skeleton)
    assert torch.equal(guide.gain, lost_detail(hr, skeleton, 4))
    assert torch.equal(guide.time, SCALE_TIMES.float())
    torch.testing.assert_close(z_skeleton + guide.gain * spread().at(guide.time)[1] * captured, z_lr)
    assert not captured.requires_grad


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_a_network_that_knows_the_captured_residual_has_its_error_squared_as_loss(offset):
    batch, (guide, captured) = known_residuals()
    network = KnowsResiduals(captured, offset)
    losses = residual_objective(network, seed=7)(**batch)
    torch.testing.assert_close(losses.total, torch.tensor(offset**2), rtol=1e-3, atol=1e-8)
    assert list(losses.parts) == ["cfm"]
    y, tau, seen = network.seen
    torch.testing.assert_close(seen, guide)
    torch.testing.assert_close(tau, batch["tau"].float())
    factor = spread().at(guide.time)[0][..., 0, 0]
    begin = torch.einsum("bij,bjhw->bihw", factor, gaussian(sample_keys(7, NUMBERS), *captured.shape[1:]))
    torch.testing.assert_close(y, torch.lerp(begin, captured, tau[:, None, None, None]))


def test_a_flow_of_the_straight_velocities_draws_the_captured_latent():
    batch, (guide, captured) = known_residuals()
    keys = sample_keys(0, NUMBERS)
    factor = spread().at(guide.time)[0][..., 0, 0]
    begin = torch.einsum("bij,bjhw->bihw", factor, gaussian(keys, *captured.shape[1:]))

    class Straight(nn.Module):
        config = ResidualConfig()

        def forward(self, y, tau, guide):
            return captured - begin

    flow = ResidualFlow(NoOptics(), spread(), Straight(), 4)
    drawn = flow.latent(guide, keys, 1.0, steps=1, solver="euler")
    torch.testing.assert_close(drawn, autoencoder().encode(to_float(batch["lr"]))[0], rtol=0, atol=1e-4)


def test_mixed_precision_keeps_residuals_and_noise_in_float32():
    batch = residual_batch()
    network = KnowsResiduals(torch.zeros(4, 4, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        losses = residual_objective(network)(**batch)
    assert network.seen[0].dtype == losses.total.dtype == torch.float32


# All of them


def small_networks():
    torch.manual_seed(1)
    velocity = VelocityNetwork(VelocityConfig(width=16, multipliers=(1, 1), blocks=1, dropout=0.3))
    residual = ResidualNetwork(ResidualConfig(width=16, blocks=1))
    nn.init.normal_(residual.head.weight)
    return velocity, residual


def objective_of(kind, seed=0):
    velocity, residual = small_networks()
    if kind == "rae":
        return RAEObjective(autoencoder())
    if kind == "residual":
        return residual_objective(residual, seed)
    if kind == "latents":
        return residual_objective(residual, seed, LatentObjective)
    return LFMObjective(autoencoder(), velocity, NaturalCubicSpline(KNOTS), Recorder(), 0.5, seed)


def batch_of(kind):
    if kind == "rae":
        return {"target": crops()[:, 1], "guide": crops()[:, 2], "number": NUMBERS}
    if kind == "latents":
        return latent_batch()
    return residual_batch() if kind == "residual" else {"images": crops(), "time": TIMES, "number": NUMBERS}


def latent_batch():
    """What `residual_batch` is after the encoder, the gain behind the latent of the image after the optics."""
    batch, (guide, captured) = known_residuals()
    lr = guide.optics + guide.gain * spread().at(guide.time)[1] * captured
    latents = {"hr": (guide.source, 0 * guide.gain), "skeleton": (guide.optics, guide.gain), "lr": (lr, 0 * guide.gain)}
    return batch | {name: torch.cat(parts, 1).detach() for name, parts in latents.items()}


def resized(images, side):
    """Images "* 3 H W" of another size, of the same type."""
    return F.interpolate(images.flatten(0, -4), (side, side)).view(*images.shape[:-2], side, side)


KINDS = ("rae", "lfm", "residual", "latents")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_the_parts_of_a_batch_have_its_loss_and_its_gradient_on_average(kind, size):
    objective, batch = objective_of(kind).train(), batch_of(kind)

    def losses(parts):
        objective.zero_grad()
        results = [objective(**{name: value[part] for name, value in batch.items()}) for part in parts]
        (sum(result.total for result in results) / len(results)).backward()
        grads = torch.cat([parameter.grad.flatten() for parameter in objective.network.parameters()])
        return {name: sum(result.parts[name] for result in results) / len(results) for name in results[0].parts}, grads

    whole, grads = losses([NUMBERS])
    parts, grads_of_parts = losses(NUMBERS.split(size))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)
    assert float((grads_of_parts - grads).norm() / grads.norm()) < 1e-5


def test_the_points_of_a_crop_have_the_mean_loss_of_as_many_samples_and_their_gradient():
    points = torch.tensor([[0.1, 0.7, 0.3], [0.9, 0.2, 0.5], [0.0, 0.6, 0.8], [0.4, 0.35, 0.95]])
    batch = batch_of("lfm")

    def learned(batches):
        objective = objective_of("lfm").train()
        losses = [objective(**each) for each in batches]
        (sum(loss.total for loss in losses) / len(losses)).backward()
        grads = torch.cat([parameter.grad.flatten() for parameter in objective.network.parameters()])
        return torch.stack([sum(loss.parts[name] for loss in losses) / len(losses) for name in losses[0].parts]), grads

    loss, grads = learned([{**batch, "time": points}])
    each = [{**batch, "time": points[:, [n]], "number": 3 * NUMBERS + n} for n in range(3)]
    wanted, wanted_grads = learned(each)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert float((grads - wanted_grads).norm() / wanted_grads.norm()) < 1e-5


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_loss_is_a_function_of_seed_and_numbers(kind):
    batch = batch_of(kind)
    loss = objective_of(kind).train()(**batch).total
    torch.manual_seed(99)
    assert torch.equal(objective_of(kind).train()(**batch).total, loss)
    for other in (
        objective_of(kind, seed=1).train()(**batch).total,
        objective_of(kind).train()(**{**batch, "number": NUMBERS + 1}).total,
    ):
        assert abs(float(other.detach() / loss.detach()) - 1) > 1e-4  # other masks of dropout, other noise


@pytest.mark.parametrize("kind", KINDS[1:])
def test_only_the_flows_network_is_trained_and_the_frozen_parts_stay_in_eval_mode(kind):
    objective = objective_of(kind).train()
    assert objective.network.training
    assert not objective.autoencoder.training
    objective(**batch_of(kind)).total.backward()
    assert all(parameter.grad is not None for parameter in objective.network.parameters())
    assert all(parameter.grad is None for parameter in objective.autoencoder.parameters())
    objective.eval()
    assert not any(module.training for module in objective.modules())


def test_latents_that_were_encoded_before_have_the_loss_of_their_images():
    pixels, latents = (objective_of(kind).train()(**batch_of(kind)).total for kind in ("residual", "latents"))
    torch.testing.assert_close(latents, pixels, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_an_objective_is_one_graph_for_all_sizes_with_the_same_loss(kind):
    objective = objective_of(kind).train()

    def batch_of_size(side):  # contiguous, as a loader gives it
        given = batch_of(kind).items()
        return {name: resized(value, side).contiguous() if value.ndim > 3 else value for name, value in given}

    batch = batch_of_size(16)
    wanted = objective(**batch).total.detach()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(objective, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(**batch).total.detach(), wanted)
    for side in (24, 48, 40, 56):
        compiled(**batch_of_size(side))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_never_waits_for_its_device(kind):
    # Tensors without numbers: what reads one raises, and so does what mixes them with the CPU's.
    objective = objective_of(kind).train().to("meta")
    total = objective(**{name: value.to("meta") for name, value in batch_of(kind).items()}).total
    total.backward()
    assert (total.device.type, total.shape) == ("meta", ())
