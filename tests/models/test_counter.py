"""Numbers that are functions of their place: keys that spread, and Gaussian numbers that are normal and independent."""

import pytest
import torch
from scipy import stats

from degflow.models.counter import _NOISE, gaussian, sample_keys

SEEDS = torch.arange(16)
SHAPE = (4, 64, 64)


def noise(seeds=SEEDS, shape=SHAPE):
    return gaussian(seeds, *shape).double()


def correlation(a, b):
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a * b).mean() / (a.std() * b.std()))


@pytest.mark.parametrize("channel", [slice(None), 0, 1, 3], ids=["all", "cosine", "sine", "second pair"])
def test_moments_are_those_of_a_standard_normal_distribution(channel):
    x = noise()[:, channel].flatten()
    # The means of n normal numbers to the powers 1 to 4 have the variances 1 / n, 2 / n, 15 / n and 96 / n.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 4 * (variance / len(x)) ** 0.5, power


def test_normality_tests_of_scipy_find_nothing():
    x = noise().flatten().numpy()
    assert stats.normaltest(x).pvalue > 0.01
    assert stats.kstest(x, "norm").pvalue > 0.01
    counts = [float((abs(x) > limit).sum()) for limit in (3, 4)]  # the tails
    expected = [2 * stats.norm.sf(limit) * len(x) for limit in (3, 4)]
    for count, mean in zip(counts, expected, strict=True):
        assert abs(count - mean) < 4 * mean**0.5


def test_places_are_independent_in_value_and_in_size():
    x = noise()
    others = {
        "other channel of the pair": (x[:, :1], x[:, 1:2]),
        "other pair": (x[:, :2], x[:, 2:]),
        "row below": (x[:, :, 1:], x[:, :, :-1]),
        "column beside": (x[..., 1:], x[..., :-1]),
        "rows for columns": (x.triu(1), x.mT.triu(1)),
        "next seed": (x[1:], x[:-1]),
        "seed + 2^32": (x, noise(SEEDS + 2**32)),
        "seed + 2^62": (x, noise(SEEDS + 2**62)),
    }
    for name, (one, other) in others.items():
        one, other = (part[part != 0] for part in (one, other))
        limit = 4.5 / one.numel() ** 0.5
        assert abs(correlation(one, other)) < limit, name
        assert abs(correlation(one.square(), other.square())) < limit, name  # a shared radius would show here


def test_a_number_depends_on_its_seed_channel_row_and_column_alone():
    x = gaussian(SEEDS, *SHAPE)
    torch.manual_seed(123)
    assert torch.equal(gaussian(SEEDS[[9, 3]], *SHAPE), x[[9, 3]])
    for channels, height, width in ((1, 64, 64), (3, 64, 64), (4, 1, 1), (2, 33, 17), (4, 64, 5)):
        assert torch.equal(gaussian(SEEDS, channels, height, width), x[:, :channels, :height, :width])
    larger = gaussian(SEEDS[:2], 7, 70, 101)
    assert torch.equal(larger[:, :4, :64, :64], x[:2])
    places = torch.tensor([[3, 40], [20, 0]])
    for n, (top, left) in enumerate(places.tolist()):
        assert torch.equal(gaussian(SEEDS[:2], 4, 30, 20, place=places)[n], x[n, :, top : top + 30, left : left + 20])


def test_numbers_are_float32_and_finite_for_every_seed():
    seeds = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1])
    x = gaussian(seeds, 3, 128, 128)
    assert x.dtype == torch.float32
    assert x.shape == (5, 3, 128, 128)
    assert bool(x.isfinite().all())
    assert len({tuple(image.flatten()[:8].tolist()) for image in x}) == 5


def test_seeds_whose_first_keys_are_equal_have_numbers_of_their_own():
    seeds = torch.tensor([3682016118230443986, 5285979655695105178])
    first, other = sample_keys(_NOISE, seeds).tolist()
    assert first == other
    x = gaussian(seeds, 2, 64, 64)
    assert abs(correlation(x[0], x[1])) < 0.05
    # Nor may both keys be hashed to one again: of half a million seeds some thirty pairs would then have equal numbers.
    many = torch.randint(2**32, 2**63 - 1, (500_000,), generator=torch.Generator().manual_seed(0))
    channel = gaussian(many, 1, 1, 2).flatten(1)
    assert len(channel.unique(dim=0)) == len(channel)
    # Seeds below 2^32 have keys of their own.
    few = sample_keys(_NOISE, torch.arange(1_000_000))
    assert len(few.unique()) == len(few)


def test_any_device_that_has_a_shape_will_do():
    x = gaussian(torch.empty(2, dtype=torch.int64, device="meta"), 5, 6, 7)
    assert (x.shape, x.dtype, x.device.type) == ((2, 5, 6, 7), torch.float32, "meta")


def test_compiled_it_gives_the_same_numbers():
    compiled = torch.compile(gaussian, fullgraph=True, backend="eager")
    assert torch.equal(compiled(SEEDS, 3, 8, 8), gaussian(SEEDS, 3, 8, 8))


def test_keys_are_32_bits_and_depend_on_every_bit_of_seed_and_number():
    numbers = torch.cat((torch.zeros(1, dtype=torch.int64), 2 ** torch.arange(63)))
    keys = torch.cat([sample_keys(seed, numbers) for seed in (0, *(2**bit for bit in range(63)))])
    assert keys.dtype == torch.int64
    assert 0 <= int(keys.min()) <= int(keys.max()) < 2**32
    assert len(keys.unique()) == len(keys)  # 4096 keys; two equal ones among so many have a chance of 0.2%
