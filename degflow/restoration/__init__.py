"""Super-resolution networks, the pairs they are trained on, their training and test (DegFlow, section 3.3)."""

from degflow.restoration.crops import Pair, PairCrops, find_pairs
from degflow.restoration.networks import (
    ArbitraryScale,
    FixedScale,
    NetworkConfig,
    RestorationObjective,
    build,
    load,
    save,
)

__all__ = [
    "ArbitraryScale",
    "FixedScale",
    "NetworkConfig",
    "Pair",
    "PairCrops",
    "RestorationObjective",
    "build",
    "find_pairs",
    "load",
    "save",
]
