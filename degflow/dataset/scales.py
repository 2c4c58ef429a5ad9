"""The scale and the noise seed of each draw: pure functions of (seed, key, draw), the same on every machine."""

import hashlib
import math
from dataclasses import dataclass

from degflow.config import option

DISTRIBUTIONS = ("uniform", "loguniform", "list", "grid")


@dataclass(frozen=True)
class ScaleConfig:
    """How the scales of a photograph's draws are chosen."""

    distribution: str = option(
        "uniform", "uniform, loguniform, list (one of `values` at random), or grid (evenly spaced, not random)"
    )
    low: float | None = option(None, "smallest scale; null: the smallest scale that the model was trained on")
    high: float | None = option(None, "largest scale; null: the largest scale that the model was trained on")
    values: tuple[float, ...] = option((), "scales to choose from, for distribution=list")
    per_image: int = option(1, "LR images made of each HR image; a grid of one draw is the middle of the range")

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"scale.distribution={self.distribution}: must be one of {', '.join(DISTRIBUTIONS)}")
        if self.per_image < 1:
            raise ValueError(f"scale.per_image={self.per_image}: must be at least 1")
        if (self.distribution == "list") != bool(self.values):
            rule = "needs at least one scale" if not self.values else "is for scale.distribution=list only"
            raise ValueError(f"scale.values={list(self.values)}: {rule}")
        for name in ("low", "high"):
            bound = getattr(self, name)
            if bound is not None and self.distribution == "list":
                raise ValueError(f"scale.{name}={bound}: is not for scale.distribution=list")
            if bound is not None and not (bound > 0 and math.isfinite(bound)):
                raise ValueError(f"scale.{name}={bound}: must be a positive number")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"scale.low={self.low}: must not be above scale.high={self.high}")

    def in_words(self) -> str:
        """E.g. "uniform in [1, 4]"."""
        if self.distribution == "list":
            return "chosen from " + ", ".join(f"{value:g}" for value in self.values)
        return f"{self.distribution} in [{self.low:g}, {self.high:g}]"


def uniform_of(seed: int, key: str, draw: int) -> float:
    """A number in [0, 1) with 53 random bits; it decides the draw's scale."""
    return (_bits_of(seed, key, draw, b"") >> 11) * 2.0**-53


def noise_seed_of(seed: int, key: str, draw: int) -> int:
    """A number in [0, 2^63); it decides the draw's noise, independently of its scale."""
    return _bits_of(seed, key, draw, b"noise") >> 1


def _bits_of(seed: int, key: str, draw: int, person: bytes) -> int:
    """64 random bits; blake2b gives other bits for another `person`."""
    digest = hashlib.blake2b(f"{seed}/{draw}/{key}".encode(), digest_size=8, person=person).digest()
    return int.from_bytes(digest, "little")


def scales_of(scale: ScaleConfig, seed: int, key: str) -> list[float]:
    """The scales of a photograph's draws; `low` and `high` must be numbers, except for distribution=list."""
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
