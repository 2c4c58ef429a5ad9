"""degflow: real-world super-resolution training data from high-resolution photographs, at any degradation scale."""

from degflow.degrader import Degrader

__all__ = ["Degrader"]
