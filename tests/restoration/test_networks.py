"""Networks and scan against independent computations."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from degflow import images, restoration
from degflow.restoration import NetworkConfig, RestorationObjective, liif, scan
from degflow.restoration.liif import LIIF, LIIFConfig
from degflow.restoration.mambair import MambaIRConfig, Scan2d, StateSpaceBlock
from degflow.restoration.networks import HATConfig, RCANConfig, SwinIRConfig
from degflow.training.loop import learning_rate
from degflow.training.settings import FitConfig
from tests import ROOT

TINY = {
    "swinir": SwinIRConfig(width=8, depths=(2,), heads=2, window=4),
    "hat": HATConfig(width=8, depths=(2,), heads=2, window=4, compress=2, squeeze=4),
    "mambair": MambaIRConfig(width=8, depths=(2,), expand=2.0, states=3, compress=2, squeeze=1),
    "rcan": RCANConfig(width=8, groups=1, blocks=2, squeeze=4),
    "liif": LIIFConfig(width=8, blocks=1, hidden=(16, 16), queries=50),
}


def network(name, **keys):
    torch.manual_seed(0)
    return restoration.build(NetworkConfig(name=name, **{name: TINY[name], **keys}))


def loop(x, delta, A, B, C):
    """The recurrence as it is written."""
    state, outputs = torch.zeros(*x.shape[:3], A.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[-1]):
        entry = (delta[..., t] * x[..., t])[..., None] * B[..., None, :, t]
        state = torch.exp(delta[..., t, None] * A) * state + entry
        outputs.append((state * C[..., None, :, t]).sum(-1))
    return torch.stack(outputs, -1)


def scan_inputs(length, dtype=torch.float64):
    random = torch.Generator().manual_seed(length)
    x, delta, A, B, C = (
        torch.randn(*shape, generator=random, dtype=dtype)
        for shape in ((2, 4, 5, length), (2, 4, 5, length), (4, 5, 3), (2, 4, 3, length), (2, 4, 3, length))
    )
    return x, delta.exp(), -A.exp(), B, C


@pytest.mark.parametrize(("length", "states"), [(1, 1 << 26), (2, 1 << 26), (7, 1 << 26), (16, 1), (50, 500)])
def test_the_scan_and_its_gradients_are_the_loops(length, states, monkeypatch):
    monkeypatch.setattr(scan, "_STATES", states)  # down to one channel at a time
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in scan_inputs(length)] for _ in range(2))
    y, expected = scan.selective_scan(*ours), loop(*theirs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(y.shape, dtype=y.dtype)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_the_scan_stays_in_float32_under_autocast():
    inputs = [tensor.float() for tensor in scan_inputs(600)]
    with torch.autocast("cpu", torch.bfloat16):
        y = scan.selective_scan(inputs[0].bfloat16(), *inputs[1:])
    expected = loop(inputs[0].bfloat16().double(), *(tensor.double() for tensor in inputs[1:]))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("order", "turn"), [((1, 0, 3, 2), "transpose"), ((2, 3, 0, 1), "half a turn")])
def test_the_four_directions_are_rows_and_columns_forth_and_back(order, turn):
    torch.manual_seed(0)
    module = Scan2d(4, 1.0, 2)
    other = Scan2d(4, 1.0, 2)
    for name in ("select", "delta_weight", "delta_bias", "log_decay", "direct"):
        torch.nn.init.normal_(getattr(module, name))
        getattr(other, name).data = getattr(module, name).data[list(order)]
    image = torch.randn(2, 4, 5, 7)
    turned = (lambda x: x.transpose(2, 3)) if turn == "transpose" else (lambda x: x.flip(2, 3))
    torch.testing.assert_close(other._scan(turned(image)), turned(module._scan(image)))


@pytest.mark.parametrize("upsampling", ["one", "two"])
@pytest.mark.parametrize("name", ["swinir", "hat", "mambair", "rcan"])
def test_a_fixed_scale_network_keeps_any_size_and_trains_every_weight(name, upsampling):
    model = network(name, upsampling=upsampling)
    lr, hr = (torch.randint(256, (2, 3, 37, 22), dtype=torch.uint8) for _ in range(2))
    losses = RestorationObjective(model)(lr, hr)
    losses.total.backward()
    assert model(lr / 127.5 - 1).shape == hr.shape
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    one = model.eval().restore(lr[:1] / 127.5 - 1, 3.0)
    torch.testing.assert_close(model.restore(lr / 127.5 - 1, 3.0)[:1], one)  # whatever the batch mates


@pytest.mark.parametrize("name", ["swinir", "hat"])
def test_attention_masks_are_made_once_for_a_size_and_are_those_of_spandrel(name, monkeypatch):
    model, calls = network(name).eval(), []
    first, second = (torch.rand(1, 3, side, 40) for side in (24, 56))
    kept = [[model.restore(image, 2.0) for image in (first, second)] for _ in range(2)]
    masked = [module for module in model.modules() if hasattr(module, "calculate_mask")]
    copied = copy.deepcopy(model)
    assert all(
        module.calculate_mask.module is module
        for module in copied.modules()
        if module is not copied and hasattr(module, "calculate_mask")
    )
    for module in masked:
        made = module.calculate_mask
        module.calculate_mask = lambda *size, made=made, **how: calls.append(1) or made.make(made.module, *size, **how)
    for image, *found in zip((first, second), *kept, strict=True):
        assert all(torch.equal(each, model.restore(image, 2.0)) for each in found)
    assert calls
    for made in (module.calculate_mask for module in copied.modules() if hasattr(module, "calculate_mask")):
        monkeypatch.setattr(made, "make", lambda *_, **__: pytest.fail("made again"))
    copied.train()(first).sum().backward()


@pytest.mark.parametrize("name", sorted(TINY))
def test_networks_train_in_bfloat16(name):
    model, lr = network(name), torch.randint(256, (2, 3, 32, 32)).byte()
    where = {"coordinates": torch.rand(2, 50, 2) * 2 - 1, "cell": torch.full((2, 2), 0.05)} if name == "liif" else {}
    hr = lr.flatten(2)[..., :50] if where else lr
    plain = RestorationObjective(model)(lr, hr, **where).total.item()
    with torch.autocast("cpu", torch.bfloat16):
        total = RestorationObjective(model)(lr, hr, **where).total
        total.backward()
    assert total.item() == pytest.approx(plain, rel=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_with_residual_training_starts_at_the_lr_image():
    lr = torch.rand(1, 3, 24, 32) * 2 - 1
    for name in ("swinir", "hat", "mambair", "rcan"):
        model = network(name, residual=True)
        assert torch.equal(model.restore(lr, 3.0), lr), name
        assert name == "rcan" or not model.body.conv_after_body.weight.any()
    small = images.to_tensor(images.resize(images.to_pixels(lr)[0], 8, 11))[None]
    expected = F.interpolate(small, (24, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network("liif", residual=True).restore(lr, 3.0), expected)


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_network_file_describes_itself(name, tmp_path):
    model, file = network(name).eval(), str(tmp_path / "network.safetensors")
    restoration.save(model, file, {"seed": 1})
    loaded, lr = restoration.load(file), torch.rand(1, 3, 20, 26) * 2 - 1
    assert loaded.config == model.config
    assert torch.equal(loaded.restore(lr, 2.5), model.restore(lr, 2.5))
    with pytest.raises(ValueError, match=r"pyproject.toml: not a degflow checkpoint"):
        restoration.load(str(ROOT / "pyproject.toml"))


def test_published_sizes_are_the_defaults():
    counts = {"swinir": 11.9, "rcan": 15.6}  # million parameters of the papers' x4 networks for 3 channels
    for name, expected in counts.items():
        model = restoration.build(NetworkConfig(name=name))
        found = sum(p.numel() for p in model.parameters()) - 45 * 9 * getattr(model.config, name).width
        assert found / 1e6 == pytest.approx(expected, abs=0.06), name


def test_mambair_has_the_published_number_of_weights():
    model = restoration.build(NetworkConfig(name="mambair"))
    assert sum(p.numel() for p in model.parameters()) == 20_642_475  # of csguoh/MambaIR, with 48 input channels


def test_mambair_goes_without_some_scans_while_training():
    size = {**vars(TINY["mambair"]), "drop_path": 0.6}
    drops = [
        block.drop for group in network("mambair", mambair=MambaIRConfig(**size)).body.groups for block in group.blocks
    ]
    assert drops == pytest.approx([0, 0.6])
    block, x = StateSpaceBlock(MambaIRConfig(**size), 0.6), torch.randn(400, 3, 3, 8)
    scanned, kept = block.keep1 * x + block.scan(block.norm1(x)) / 0.4, block.keep1 * x
    made = block.train()._dropped(block.scan(block.norm1(x))) + block.keep1 * x
    dropped = torch.tensor([torch.equal(one, other) for one, other in zip(made, kept, strict=True)])
    assert 0.5 < dropped.float().mean() < 0.7
    torch.testing.assert_close(made[~dropped], scanned[~dropped])
    assert torch.equal(block.eval()._dropped(x), x)


@pytest.mark.parametrize(("name", "window"), [("swinir", 6), ("swinir", 34), ("hat", 4), ("hat", 12)])
def test_windows_of_every_allowed_size_work(name, window):
    size = {**vars(TINY[name]), "window": window}
    model = network(name, **{name: type(TINY[name])(**size)})
    shifts = {module.shift_size for module in model.modules() if hasattr(module, "shift_size")}
    assert shifts - {0} == {window // 2}
    assert model(torch.rand(1, 3, 20, 28)).shape == (1, 3, 20, 28)


def centred(model):
    """A function that gives the feature itself, offset / slope, or the cell."""
    with torch.no_grad():
        model.function = torch.nn.Linear(9 + 4, 3, bias=False)
        model.function.weight.zero_()
    return model.function.weight.data


def test_liif_of_constant_answers_is_bilinear_interpolation():
    model = LIIF(LIIFConfig(width=1, blocks=1, hidden=(4,)))
    centred(model)[:, 4] = 1.0  # the middle of the nine neighbours
    image, coordinates = torch.randn(2, 1, 5, 8), torch.rand(2, 40, 2) * 2 - 1
    features = F.unfold(image, 3, padding=1).unflatten(-1, (5, 8))
    answer = model.ask(features, coordinates, torch.ones(2, 2))[..., 0]
    expected = F.grid_sample(image, coordinates.flip(-1)[:, None], padding_mode="border", align_corners=False)
    torch.testing.assert_close(answer, expected[:, 0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_liif_is_bilinear_where_queries_lie_on_rows_of_centres_too(factor):
    """At odd factors the middle query of a pixel lies on its centre."""
    model = LIIF(LIIFConfig(width=1, blocks=1, hidden=(4,)))
    centred(model)[:, 4] = 1.0
    image, size = torch.randn(1, 1, 100, 7), (100 * factor, 7 * factor)
    features = F.unfold(image, 3, padding=1).unflatten(-1, (100, 7))
    answer = model.ask(features, liif.pixel_centres(*size)[None], torch.ones(1, 2))[0, :, 0].unflatten(0, size)
    expected = F.interpolate(image, size, mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(answer, expected, rtol=0, atol=3e-4)


def test_liif_knows_where_a_coordinate_lies_in_its_pixel_and_how_large_the_cell_is():
    model = LIIF(LIIFConfig(width=1, blocks=1, hidden=(4,)))
    weight, (height, width) = centred(model), (6, 9)
    weight[0, 4], weight[0, 9] = 1.0, 1 / height  # the pixel's row, and how far below it the coordinate is
    weight[1, 11], weight[2, 12] = 1.0, 1.0
    rows = liif.pixel_centres(height, width)[:, 0].view(1, 1, height, width)
    coordinates = torch.rand(1, 50, 2) * 1.98 - 0.99  # inside and in the outermost half pixels
    features = F.unfold(F.pad(rows, (1, 1, 1, 1), "replicate"), 3).unflatten(-1, (height, width))
    answer = model.ask(features, coordinates, torch.tensor([[2 / 18, 2 / 27]]))
    torch.testing.assert_close(answer[..., 0], coordinates[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer[0, :, 1:], torch.tensor([2 / 3, 2 / 3]).expand(50, 2))


def test_liif_trains_every_weight():
    model = network("liif")
    where = {"coordinates": torch.rand(2, 50, 2) * 2 - 1, "cell": torch.full((2, 2), 0.05)}
    lr, hr = torch.randint(256, (2, 3, 8, 8)).byte(), torch.randint(256, (2, 3, 50)).byte()
    RestorationObjective(model)(lr, hr, **where).total.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_liif_answers_part_by_part_as_at_once(monkeypatch):
    model, lr = network("liif").eval(), torch.rand(1, 3, 22, 31) * 2 - 1
    whole = model.restore(lr, 2.3)
    small = images.to_tensor(images.resize(images.to_pixels(lr)[0], 10, 13))[None]
    asked = model(small, liif.pixel_centres(22, 31)[None], torch.tensor([[2 / 22, 2 / 31]]))
    torch.testing.assert_close(whole, asked.unflatten(-1, (22, 31)).clamp(-1, 1))
    monkeypatch.setattr(restoration.networks, "_QUERIES", 100)
    torch.testing.assert_close(model.restore(lr, 2.3), whole)
    assert whole.shape == lr.shape


def test_only_swinir_hat_and_rcan_need_spandrel(monkeypatch):
    script = "import sys, degflow.restoration\nprint([name for name in sys.modules if name.startswith('spandrel')])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    monkeypatch.setitem(sys.modules, "spandrel.architectures", None)
    with pytest.raises(ImportError, match=r"network.name=hat: needs spandrel: pip install 'degflow\[sr\]'"):
        network("hat")
    network("mambair")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SwinIRConfig(width=10, heads=4), "swinir.width=10: must be a multiple of swinir.heads=4"),
        (lambda: HATConfig(window=5), "hat.window=5: must be even"),
        (lambda: HATConfig(window=10), "hat.window=10: must be a multiple of 4"),
        (lambda: MambaIRConfig(drop_path=1.0), r"mambair.drop_path=1.0: must lie in \[0, 1\)"),
        (lambda: HATConfig(width=18, squeeze=30), "hat.squeeze=30: must lie in"),
        (lambda: MambaIRConfig(depths=()), "mambair.depths=.*: at least one entry"),
        (lambda: MambaIRConfig(states=0), "mambair.states=0: must be above 0"),
        (lambda: RCANConfig(width=8), "rcan.width=8: must be at least rcan.squeeze=16"),
        (lambda: LIIFConfig(hidden=()), "liif.hidden=.*: at least one entry"),
    ],
)
def test_sizes_that_cannot_be_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_rate_halves_at_one_half_three_quarters_and_seven_eighths():
    config = FitConfig(steps=80, learning_rate=1.0, schedule="halve", warmup=2)
    rates = [learning_rate(step, config) for step in range(80)]
    assert rates[0] == 0.5
    assert np.flatnonzero(np.diff(rates)).tolist() == [0, 39, 59, 69]
    assert rates[39:41] + rates[60:61] + rates[79:] == [1.0, 0.5, 0.25, 0.125]
