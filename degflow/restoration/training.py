"""train_sr: train a super-resolution network on real or synthesized pairs, then test it."""

from typing import cast

import torch
from torch import nn

from degflow.config import plain
from degflow.restoration.crops import PairCrops, find_pairs
from degflow.restoration.networks import RestorationObjective, build, save
from degflow.restoration.settings import TrainSRConfig
from degflow.restoration.testing import Network, NetworkTest
from degflow.training.loop import Progress, Validation, check_start, fit
from degflow.training.processes import is_main_process, local_share


def train_sr(config: TrainSRConfig) -> None:
    """Train, write network.safetensors, and test it."""
    check_start(config.fit, config.output, config)
    torch.manual_seed(config.fit.seed)
    objective = RestorationObjective(build(config.network))
    test = NetworkTest(config) if config.test and is_main_process() else None
    samples = training_crops(config)

    def validate(network: nn.Module) -> Validation:
        assert test
        return test.preview(cast(Network, network))

    def finish(result: Progress) -> None:
        network = cast(Network, result.network)
        save(network, f"{config.output}/network.safetensors", {"config": plain(config)})
        print(f"network: {config.output}/network.safetensors")
        if test:
            test.report(network)

    data = samples.identity()
    fit(objective, samples, config.fit, config.output, config, validate if test else None, finish, data)


def training_crops(config: TrainSRConfig) -> PairCrops:
    """The samples of all sources."""
    quiet = not is_main_process()
    keys = {"resize_lr": config.resize_lr, "cache": config.cache, "memory": config.memory}
    sources = []
    for name, uri in config.train.items():
        pairs = find_pairs(uri, config.levels, config.crop, quiet=quiet, share=local_share(), **keys)
        if not quiet:
            low, high = min(pair.scale for pair in pairs), max(pair.scale for pair in pairs)
            print(f"train on {name}: {len(pairs)} pairs of scale {low:.4g} to {high:.4g}")
        sources.append(pairs)
    queries = config.network.liif.queries if config.network.name == "liif" else 0
    weights = [config.weights.get(name, 1.0) for name in config.train]
    noise = [config.noise.get(name, 0.0) for name in config.train]
    return PairCrops(sources, weights, config.crop, config.fit.seed, queries, noise)
