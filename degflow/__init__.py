"""degflow: real-world super-resolution training data from high-resolution photographs, at any degradation scale."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from degflow.degrader import Degrader

__all__ = ["Degrader"]


def __getattr__(name: str) -> object:
    # Codec processes import rooms of degflow, and need not wait for torch.
    if name == "Degrader":
        from degflow.degrader import Degrader

        return Degrader
    raise AttributeError(f"module 'degflow' has no attribute {name!r}")
