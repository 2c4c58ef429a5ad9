"""degflow: real-world super-resolution training data from high-resolution photographs, at any degradation scale."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from degflow.dataset.pairs import SynthesizedPairs
    from degflow.degrader import Degrader
    from degflow.restoration.degraded_crops import DegradedCrops
    from degflow.restoration.random_degradation import RandomDegradation

__version__ = "0.1.0"
__all__ = ["DegradedCrops", "Degrader", "RandomDegradation", "SynthesizedPairs"]

# On CPUs the kernel's handing out of fresh 4 KiB pages costs a third of the time of a megapixel image; PyTorch asks for
# pages of 2 MiB if this stands in the environment when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> object:
    # Imported when first asked for: the processes that read and write files need not wait for torch.
    if name == "Degrader":
        from degflow.degrader import Degrader

        return Degrader
    if name == "SynthesizedPairs":
        from degflow.dataset.pairs import SynthesizedPairs

        return SynthesizedPairs
    if name == "RandomDegradation":
        from degflow.restoration.random_degradation import RandomDegradation

        return RandomDegradation
    if name == "DegradedCrops":
        from degflow.restoration.degraded_crops import DegradedCrops

        return DegradedCrops
    raise AttributeError(f"module 'degflow' has no attribute {name!r}")
