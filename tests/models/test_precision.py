"""What is computed in which numbers. A CPU has no TF32: there its switches are tested, and on a GPU its numbers."""

import threading

import pytest
import torch
from torch import nn

from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.models.precision import _TF32, PRECISIONS, check_device, computing, device_of, exactly
from tests.test_degrader import degrader_of, pictures
from tests.test_objectives import Recorder, batch_of, objective_of


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_float32_is_float32_unless_tf32_is_asked_for():
    before = switches()
    assert before == (False, True)  # PyTorch's default rounds convolutions
    for precision in PRECISIONS:
        with computing(precision, "cpu"):
            assert switches() == (precision == "tf32",) * 2
            assert torch.is_autocast_enabled("cpu") == (PRECISIONS[precision] != torch.float32)
            with exactly("cpu"):
                assert switches() == (False, False)
                assert not torch.is_autocast_enabled("cpu")
            assert switches() == (precision == "tf32",) * 2
        assert switches() == before
    with pytest.raises(ZeroDivisionError), computing("tf32", "cpu"):
        raise ZeroDivisionError
    assert switches() == before
    with exactly("cpu"):  # outside of `computing` too
        assert switches() == (False, False)
    assert switches() == before


@pytest.mark.parametrize("order", [("tf32", "float32"), ("float32", "tf32")])
def test_threads_share_the_switches_float32_wins_and_the_last_one_sets_them_back(order):
    """One thread begins and ends inside the other's context, or begins in it and ends after it."""
    before, began, go_on, seen = switches(), threading.Event(), threading.Event(), []

    def other():
        with computing(order[0], "cpu"):
            began.set()
            go_on.wait(60)
            seen.append((_TF32.on(), switches()))

    for ends_first in (True, False):
        began.clear()
        go_on.clear()
        thread = threading.Thread(target=other)
        thread.start()
        began.wait(60)
        with computing(order[1], "cpu"):
            assert switches() == (False, False)
            assert _TF32.on() is (order[1] == "tf32")
            if ends_first:
                go_on.set()
                thread.join(60)
                assert switches() == (order[1] == "tf32",) * 2
        if not ends_first:
            assert switches() == (order[0] == "tf32",) * 2
            go_on.set()
            thread.join(60)
        assert switches() == before
        assert _TF32.on() is None
    assert [on for on, _ in seen] == [order[0] == "tf32"] * 2
    assert seen[0][1] == (False, False)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older names alone")
def test_a_process_that_uses_pytorchs_newer_names_may_go_on_with_them():
    new = torch.backends.cudnn.conv
    try:
        new.fp32_precision = "ieee"  # from now on PyTorch refuses to read the older name
        with computing("tf32", "cpu"):
            assert new.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "tf32"
            with exactly("cpu"):
                assert new.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert new.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False


@pytest.mark.parametrize("kind", ["path", "residual"])
def test_a_degraders_latents_are_not_rounded_before_they_are_carried(kind):
    degrader, seen = degrader_of(kind), []
    degrader.flow.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    degrader(pictures(1, 32, 32), torch.tensor([2.0]), precision="bfloat16")
    assert seen
    for inputs in seen:
        latents = inputs[:1] if kind == "path" else (inputs[0], *inputs[2][:2])
        for latent in latents:
            assert latent.dtype == torch.float32
            assert float((latent != latent.bfloat16()).float().mean()) > 0.5


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_first_and_the_last_convolution_of_a_latents_way_are_exact(part):
    torch.manual_seed(0)
    network = ResidualAutoencoder(AutoencoderConfig(base_width=8, multipliers=(1, 2), gate_init=0.5))
    head = network.encoder.head if part == "encode" else network.decoder.head
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 1 + 2**-12)  # lies between two numbers of bfloat16
    with torch.no_grad(), computing("bfloat16", "cpu"):
        latent, skips = network.encode(torch.rand(1, 3, 8, 8))
        result = latent if part == "encode" else network.decode(latent, skips)
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.full_like(result, 1 + 2**-12))


class Exact(Recorder):
    """Stands for LPIPS, and says whether its products would be narrow."""

    def forward(self, image, reference):
        self.narrow = torch.is_autocast_enabled("cpu") or torch.backends.cuda.matmul.allow_tf32
        return super().forward(image, reference)


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
@pytest.mark.parametrize("kind", ["lfm", "residual"])
def test_in_training_the_targets_and_lpips_are_exact(kind, precision):
    found = []
    for narrow in (False, True):
        objective, batch, seen = objective_of(kind), batch_of(kind), []
        if kind == "lfm":
            objective.perceptual = Exact()
        objective.network.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs))
        objective.autoencoder.encoder.register_forward_hook(
            lambda *_, seen=seen: seen.append(torch.backends.cuda.matmul.allow_tf32)
        )
        with computing(precision if narrow else "float32", "cpu"):
            objective.train()(**batch)
        found.append(seen)
        assert kind == "residual" or objective.perceptual.narrow is False
    assert all(found)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "cpu:0"])
def test_what_is_no_device_is_named(device):
    for check in (check_device, device_of):
        with pytest.raises(ValueError, match=rf"^device={device}: must be auto, cpu, cuda or cuda:N$"):
            check(device)


def test_a_device_that_is_not_there_is_named():
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"^device=cuda:{count}: PyTorch finds {count} CUDA devices here$"):
        device_of(f"cuda:{count}")
    assert device_of("cpu") == "cpu"
    assert device_of("auto") == ("cuda" if count else "cpu")
