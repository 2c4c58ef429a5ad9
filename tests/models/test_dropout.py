import pytest
import torch

from degflow.benchmarking.predict import kernels
from degflow.models.counter import sample_keys
from degflow.models.dropout import Bits, SampleDropout, number_layers
from degflow.models.velocity import VelocityConfig, VelocityNetwork
from tests.models.test_counter import correlation

NUMBERS = torch.arange(64)


def masks(p=0.3, seed=0, numbers=NUMBERS, layer=0, shape=(8, 16, 16), layers=2):
    """1 where an element is kept, "B *shape"."""
    dropout = SampleDropout(p)
    dropout.layer = layer
    x = torch.ones(len(numbers), *shape)
    out = dropout(x, Bits.of(sample_keys(seed, numbers), layers, *shape))
    assert set(out.unique().tolist()) <= {0.0, float(torch.tensor(1.0) / (1 - p))}
    return (out > 0).float()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_that_was_asked_for(p):
    kept = masks(p)
    error = (p * (1 - p)) ** 0.5  # standard deviation of one element
    assert abs(float(kept.mean()) - (1 - p)) < 5 * error / kept.numel() ** 0.5
    rows, columns = kept.flatten(1).mean(1), kept.mean(0)  # neither a sample nor a place is special
    assert float((rows - (1 - p)).abs().max()) < 5 * error / kept[0].numel() ** 0.5
    assert 0.8 < float(columns.std()) / (error / len(kept) ** 0.5) < 1.2


def test_samples_layers_seeds_and_neighbours_are_independent():
    kept = masks()
    limit = 5 / kept.numel() ** 0.5
    for other in (
        masks(layer=1),
        masks(seed=1),
        masks(seed=2**32),
        masks(numbers=NUMBERS + 1),
        masks(numbers=NUMBERS + 2**32),
        kept.roll(1, 1),
        kept.roll(1, 2),
        kept.roll(1, 3),
    ):
        assert abs(correlation(kept, other)) < limit


def test_all_pairs_of_layers_and_channels_are_independent():
    bits = Bits.of(sample_keys(0, torch.arange(16)), 12, 16, 128, 128)
    for p in (0.1, 0.5):
        kept = torch.stack([bits.mask(layer, torch.Size((16, 16, 128, 128)), p) for layer in range(12)]).float()
        rows = kept.transpose(0, 1).flatten(3).permute(1, 2, 0, 3).flatten(0, 1).flatten(1)
        found = torch.corrcoef(rows)[*torch.triu_indices(192, 192, 1)]
        assert float(found.abs().max()) < 5.5 / rows.shape[1] ** 0.5
        assert abs(float(found.std()) * rows.shape[1] ** 0.5 - 1) < 0.05


def test_a_mask_does_not_depend_on_the_other_samples_nor_on_the_global_generator():
    kept = masks()
    torch.manual_seed(123)
    assert torch.equal(masks(numbers=NUMBERS[[40, 7]], layers=5), kept[[40, 7]])


def test_a_mask_takes_few_operations():
    network = VelocityNetwork(VelocityConfig(width=16)).train().to("meta")
    latent, time = torch.empty(2, 4, 24, 24, device="meta"), torch.empty(2, device="meta")
    key = torch.empty(2, dtype=torch.int64, device="meta")
    with torch.no_grad():
        with_masks = len(kernels(lambda: network(latent, time, key), {}))
        without = len(kernels(lambda: network.eval()(latent, time), {}))
    assert network.layers == 44
    assert 9 * network.layers < with_masks - without <= 10 * network.layers + 50


def test_in_eval_mode_and_at_zero_it_is_the_identity_and_training_without_keys_is_refused():
    x = torch.randn(2, 3)
    assert SampleDropout(0.5).eval()(x, None) is x
    assert SampleDropout(0.0)(x, None) is x
    with pytest.raises(ValueError, match=r"dropout=0.5: a forward pass in training mode needs the samples' keys"):
        SampleDropout(0.5)(x, None)


def test_layers_are_numbered():
    network = torch.nn.Sequential(SampleDropout(0.1), torch.nn.Sequential(torch.nn.ReLU(), SampleDropout(0.1)))
    number_layers(network)
    assert [network[0].layer, network[1][1].layer] == [0, 1]
