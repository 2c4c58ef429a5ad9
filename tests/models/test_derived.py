"""The weights that a decoder computes of its own: made once, and never stale."""

import copy
import pickle

import pytest
import torch

from degflow.benchmarking.predict import kernels
from degflow.models import AutoencoderConfig, ResidualAutoencoder


def decoder_in_eval(**sizes):
    torch.manual_seed(0)
    network = ResidualAutoencoder(AutoencoderConfig(base_width=8, gate_init=0.5, **sizes)).eval()
    return network, network.encode(torch.rand(1, 3, 32, 32) * 2 - 1)


def made_from(decoder):
    """The derived weights of another decoder with these weights, which never kept any."""
    fresh = ResidualAutoencoder(AutoencoderConfig(base_width=8)).to(decoder.head.weight.dtype)
    fresh.decoder.load_state_dict(decoder.state_dict())
    return fresh.decoder.train().derived()


def assert_equal(found, wanted):
    for pair in zip((*found.expands, found.head), (*wanted.expands, wanted.head), strict=True):
        for one, other in zip(*pair, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@torch.no_grad()
def change_in_place(decoder):
    decoder.expands[1].narrow.bias.add_(1)


@torch.no_grad()
def change_in_inference_mode(decoder):
    with torch.inference_mode():
        decoder.head.weight.mul_(2)


def step_of_adam(decoder):
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(decoder.parameters()).step()


def load(decoder):
    decoder.load_state_dict({name: tensor + 1 for name, tensor in decoder.state_dict().items()})


def load_by_assigning(decoder):
    state = {name: tensor + 1 for name, tensor in decoder.state_dict().items()}
    decoder.load_state_dict(state, assign=True)


def put_other_data_there(decoder):
    decoder.expands[0].merge.weight.data = torch.rand_like(decoder.expands[0].merge.weight)


def replace_a_parameter(decoder):
    decoder.head.bias = torch.nn.Parameter(torch.rand(3))


def write_past_autograd(decoder):
    decoder.expands[0].widen.weight.data.mul_(2)
    decoder.eval()


def round_to_half(decoder):
    decoder.half().float()  # may come to lie where the weights lay before


CHANGES = (
    *(change_in_place, change_in_inference_mode, step_of_adam, load, load_by_assigning, put_other_data_there),
    *(replace_a_parameter, write_past_autograd, round_to_half, torch.nn.Module.double),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_derived_weights_follow_every_change_of_the_decoders(change):
    network, _ = decoder_in_eval()
    decoder = network.decoder
    with torch.no_grad():
        before = decoder.derived()
        assert decoder.derived() is before
        assert_equal(before, made_from(decoder))
    change(decoder)
    with torch.no_grad():
        assert_equal(decoder.derived(), made_from(decoder))


def test_derived_weights_are_made_once():
    decoder = decoder_in_eval()[0].to("meta").decoder
    latent, skips = torch.empty(1, 4, 4, 4, device="meta"), []
    for level, width in enumerate((8, 8, 16)):
        skips.append(torch.empty(1, width, 32 >> level, 32 >> level, device="meta"))
    with torch.no_grad():
        merged = decoder.merged(tuple(skips))
        first, second, third = (len(kernels(lambda: decoder(latent, merged), {})) for _ in range(3))
    assert second == third
    assert first - second >= 3 * 6  # the operations of each product


def test_derived_weights_change_no_image():
    network, (latent, skips) = decoder_in_eval()
    with torch.no_grad():
        decoder, merged = network.decoder, network.decoder.merged(skips)
        found = [decoder(latent, merged) for _ in range(2)]
        assert all(torch.equal(image, decoder(latent, merged, decoder._derive())) for image in found)


def test_for_a_compiled_decoder_they_are_constants_in_size_and_change_without_another_graph():
    network, (latent, skips) = decoder_in_eval(multipliers=(1, 2), blocks=1)
    decoder, graphs = network.decoder, []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(decoder, backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        merged = decoder.merged(skips)
        for _ in range(2):
            found, wanted = compiled(latent, merged, decoder.derived()), decoder(latent, merged)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            decoder.expands[0].merge.bias.add_(0.5)
    (graph,) = graphs
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder" and "derived" in node.name]
    shapes = [node.meta["example_value"].shape for node in inputs]
    assert len(shapes) == 4
    assert all(isinstance(side, int) for shape in shapes for side in shape)


def test_derived_weights_are_kept_in_no_training_and_for_no_gradient():
    network, (latent, skips) = decoder_in_eval()
    decoder = network.decoder
    with torch.no_grad():
        kept = decoder.derived()
    assert decoder.derived() is not kept
    assert decoder.derived().head[0].requires_grad
    decoder.train()
    with torch.no_grad():
        assert decoder.derived() is not decoder.derived()
    decoder.eval().requires_grad_(False)
    with torch.inference_mode():
        decoder.derived()
    latent = latent.detach().requires_grad_(True)  # as in stage 2: frozen weights, and a gradient through them
    network.decode(latent, tuple(skip.detach() for skip in skips)).sum().backward()
    assert bool(latent.grad.abs().sum() > 0)


def test_weights_made_in_inference_mode_are_never_stale():
    with torch.inference_mode():
        network, _ = decoder_in_eval()
        network.decoder.derived()
        network.decoder.head.weight.mul_(2)
        assert_equal(network.decoder.derived(), made_from(network.decoder))


def test_a_copy_has_derived_weights_of_its_own_and_the_file_has_none():
    network, _ = decoder_in_eval()
    names = list(network.state_dict())
    with torch.no_grad():
        network.decoder.derived()
        for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            copied.decoder.head.weight.mul_(2)
            assert_equal(copied.decoder.derived(), made_from(copied.decoder))
            assert_equal(network.decoder.derived(), made_from(network.decoder))
    assert list(network.state_dict()) == names
    assert len(list(network.parameters())) == len(names)
