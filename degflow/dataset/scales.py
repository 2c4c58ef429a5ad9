"""Which scale each draw of a photograph has: a pure function of (seed, key, draw), the same on every machine."""

import hashlib
import math
from dataclasses import dataclass

from degflow.config import option

DISTRIBUTIONS = ("uniform", "loguniform", "list", "grid")


@dataclass(frozen=True)
class ScaleConfig:
    """Which scales the draws of an image have."""

    distribution: str = option(
        "uniform", "uniform, loguniform, list (one of `values`), or grid (evenly spaced, no chance)"
    )
    low: float | None = option(None, "smallest scale; null: the smallest that the model was trained on")
    high: float | None = option(None, "largest scale; null: the largest that the model was trained on")
    values: tuple[float, ...] = option((), "scales to choose from, for distribution=list")
    per_image: int = option(1, "LR images made of each HR image; one draw of a grid is its middle")

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"scale.distribution={self.distribution}: must be one of {', '.join(DISTRIBUTIONS)}")
        if self.per_image < 1:
            raise ValueError(f"scale.per_image={self.per_image}: must be at least 1")
        if (self.distribution == "list") != bool(self.values):
            rule = "needs at least one scale" if not self.values else "has a meaning for scale.distribution=list only"
            raise ValueError(f"scale.values={list(self.values)}: {rule}")
        for name in ("low", "high"):
            bound = getattr(self, name)
            if bound is not None and self.distribution == "list":
                raise ValueError(f"scale.{name}={bound}: has no meaning for scale.distribution=list")
            if bound is not None and not (bound > 0 and math.isfinite(bound)):
                raise ValueError(f"scale.{name}={bound}: must be a positive number")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"scale.low={self.low}: must not be above scale.high={self.high}")


def uniform_of(seed: int, key: str, draw: int) -> float:
    """A number in [0, 1), with 53 random bits, that depends on these three alone: the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{draw}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def scales_of(scale: ScaleConfig, seed: int, key: str) -> list[float]:
    """The scales of an image's draws; `low` and `high` must be numbers unless they are drawn from a list."""
    draws = [uniform_of(seed, key, draw) for draw in range(scale.per_image)]
    if scale.distribution == "list":
        return [scale.values[int(u * len(scale.values))] for u in draws]
    low, high = scale.low, scale.high
    if low is None or high is None:
        raise ValueError(f"scale.low={low}, scale.high={high}: must be numbers here")
    if scale.distribution == "grid":
        draws = [n / (scale.per_image - 1) for n in range(scale.per_image)] if scale.per_image > 1 else [0.5]
    if scale.distribution == "loguniform":
        return [min(high, max(low, low * math.exp(u * math.log(high / low)))) for u in draws]
    return [min(high, low + u * (high - low)) for u in draws]
