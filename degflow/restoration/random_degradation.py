"""Degradation inside a training loop: HR crops -> LR crops at random scales, drawn anew in every step.

A scale and a noise seed are pure functions of (seed, rank, call, place in the batch). So a resumed training sees the
same LR images, a longer batch begins with those of a shorter one, and every rank draws its own.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from degflow.config import plain
from degflow.dataset.ranks import own_rank
from degflow.dataset.scales import ScaleConfig, noise_seed_of, scales_of
from degflow.degrader import MEMORY, Degrader
from degflow.images import SMALLEST_SIDE

RANGES = ((-1, 1), (0, 1))
_ROUNDING = 1e-3  # of half precision


class RandomDegradation:
    """Degrades each batch of a training loop, at scales and with noise of its own.

        degrade = RandomDegradation(seed=0, value_range=(0, 1), margin=32)
        for hr in loader:  # "B 3 192 192"
            lr, scale = degrade(hr)  # "B 3 128 128" and "B"
            loss = criterion(network(lr), degrade.without_margin(hr))

    It is no module: a network that holds one gets no parameters, no gradients and no weights in its `state_dict` from
    it. PyTorch's random numbers are neither used nor changed, and autocast around it changes nothing (see
    `precision`).

    Args:
        model: a degrader's file or URI; "shipped": the one that comes with degflow; or a `Degrader`, which then moves
            with the batches.
        scale: "uniform" or "loguniform" between `low` and `high`, or a list of scales to choose from.
        low: the smallest scale; None: that of the range that the degrader was trained on.
        high: the largest scale; None: that of the range.
        seed: decides scales and noise, with the rank and the number of the call.
        rank: of this process; None: from torch.distributed, else from RANK, else 0.
        value_range: of HR and LR: (-1, 1) or (0, 1).
        margin: pixels that are cut off at each side of LR. A crop's edge is not the photograph's: there LR differs from
            the same place of the degraded photograph. 32 makes what is left almost equal; see docs/on_the_fly.md.
        rounded: round LR to the 256 levels of an 8-bit file, as in a dataset.
        spread: 1 draws LR images, 0 gives their mean.
        steps: see `Degrader.forward`; so are the next three.
        solver: of the flow.
        memory: GB to work in.
        precision: of the networks' products.
        device: where to degrade; None: where each batch is.

    Raises:
        ValueError: an argument that breaks its rule; no degrader in the file.
    """

    def __init__(
        self,
        model: Degrader | str | os.PathLike[str] = "shipped",
        scale: str | Sequence[float] = "uniform",
        *,
        low: float | None = None,
        high: float | None = None,
        seed: int = 0,
        rank: int | None = None,
        value_range: tuple[float, float] = (-1, 1),
        margin: int = 0,
        rounded: bool = True,
        spread: float = 1.0,
        steps: int = 0,
        solver: str = "",
        memory: float = MEMORY,
        precision: str = "float32",
        device: str | torch.device | None = None,
    ):
        self.rank = own_rank() if rank is None else rank
        check_arguments(seed=seed, rank=self.rank, margin=margin)
        self.seed, self.margin, self.rounded, self.device = seed, margin, rounded, device
        self.low_value = check_value_range(value_range)
        self.degrader = load(model)
        self.scale = scale_config(scale, low, high, self.degrader)
        self.options: dict[str, Any] = {"spread": spread, "steps": steps, "solver": solver}
        self.options |= {"memory": memory, "precision": precision}
        self.calls = 0

    def __call__(self, hr: Tensor) -> tuple[Tensor, Tensor]:
        """Degrade a batch.

        Args:
            hr: floating-point "B 3 H W" in `value_range`. Values are checked in every call on a CPU, and in the first
                one on a GPU, where reading them would make the CPU wait.

        Returns:
            LR "B 3 H W" without the margin, of HR's type, device and range, without gradients; and the scales,
            float64 "B" on HR's device.

        Raises:
            ValueError: images of another type, shape or range; the message says what was given.
        """
        self._check(hr)
        scale, seed = self._draws(len(hr))
        device = torch.device(self.device) if self.device is not None else hr.device
        if next(self.degrader.parameters()).device != device:
            self.degrader.to(device)  # outside inference mode, where its weights could not be trained any more
        with torch.inference_mode():
            lr = self._degraded(hr, scale, seed)
        self.calls += 1
        # Outside inference mode a clone is a tensor that a training can use.
        return lr.clone(), scale.to(hr.device, non_blocking=True)

    def without_margin(self, image: Tensor) -> Tensor:
        """The part of "... H W" that LR shows: a view of it without the margin."""
        height, width = image.shape[-2:]
        return image[..., self.margin : height - self.margin, self.margin : width - self.margin]

    def state_dict(self) -> dict[str, Any]:
        """What decides the next draws; the same on every rank."""
        return {"calls": self.calls, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next call draw what came after the state's last one.

        Raises:
            ValueError: the state belongs to other arguments or to another degrader.
        """
        there = state["identity"]
        changed = [f"{n} was {there.get(n)}, now {now}" for n, now in self._identity().items() if there.get(n) != now]
        if changed:
            raise ValueError(f"RandomDegradation: the state does not fit: {'; '.join(changed)}")
        self.calls = state["calls"]

    def _identity(self) -> dict[str, Any]:
        own = {"seed": self.seed, "scale": plain(self.scale), "model": self.degrader.sha256}
        return own | {name: self.options[name] for name in ("spread", "steps", "solver")}

    def _draws(self, count: int) -> tuple[Tensor, Tensor]:
        key = f"{self.rank}/{self.calls}"
        scales = scales_of(replace(self.scale, per_image=count), self.seed, key)
        seeds = [noise_seed_of(self.seed, key, place) for place in range(count)]
        return torch.tensor(scales, dtype=torch.float64), torch.tensor(seeds)

    def _degraded(self, hr: Tensor, scale: Tensor, seed: Tensor) -> Tensor:
        image = hr.to(next(self.degrader.parameters()).device, torch.float32)
        if self.low_value == 0:
            image = 2 * image - 1
        how = {"seed": seed, "checks_range": False} | self.options  # `_check` has looked at the values
        lr = self.without_margin(self.degrader(image.clamp(-1, 1), scale, **how))
        return to_range(lr, self.low_value, self.rounded).to(hr.device, hr.dtype)

    def _check(self, hr: Tensor) -> None:
        least, low = SMALLEST_SIDE + 2 * self.margin, self.low_value
        given = f"hr: {hr.dtype} {list(hr.shape)}" if isinstance(hr, Tensor) else f"hr: {type(hr).__name__}"
        if not isinstance(hr, Tensor) or not hr.is_floating_point():
            raise ValueError(f"{given}: must be a floating-point tensor in [{low}, 1]")
        if hr.ndim != 4 or hr.shape[1] != 3 or not len(hr):
            rule = "must be [B, 3, H, W]: images of three channels, channels before rows and columns"
            raise ValueError(f"{given}: {rule}")
        if min(hr.shape[-2:]) < least:
            rule = f"H and W must be at least {least}" + f", {SMALLEST_SIDE} without the margins" * bool(self.margin)
            raise ValueError(f"{given}: {rule}")
        if hr.device.type == "cpu" or self.calls == 0:
            smallest, largest = (float(value) for value in hr.detach().aminmax())
            if not (low - _ROUNDING <= smallest and largest <= 1 + _ROUNDING):
                raise ValueError(
                    f"hr: values from {smallest:g} to {largest:g}: must lie in value_range=({low}, 1); "
                    "(-1, 1) and (0, 1) are accepted as value_range"
                )


def to_range(image: Tensor, low: int, rounded: bool) -> Tensor:
    """An image in [-1, 1] -> the same in [low, 1], on request rounded to 256 levels."""
    if rounded:
        levels = ((image + 1) * 127.5).round()
        return levels / 255 if low == 0 else levels / 127.5 - 1
    return (image + 1) / 2 if low == 0 else image


def check_value_range(value_range: tuple[float, float]) -> int:
    """The lower of the two values."""
    if tuple(value_range) not in RANGES:
        raise ValueError(f"value_range={value_range}: must be (-1, 1) or (0, 1)")
    return int(value_range[0])


def check_arguments(**numbers: int) -> None:
    """Raise ValueError for a number below 0."""
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name}={number}: must not be negative")


def load(model: Degrader | str | os.PathLike[str]) -> Degrader:
    """The degrader, or that in a file."""
    return model if isinstance(model, Degrader) else Degrader.load(model)


def scale_config(
    scale: str | Sequence[float], low: float | None, high: float | None, degrader: Degrader
) -> ScaleConfig:
    """How scales are drawn, within the degrader's range."""
    if isinstance(scale, str):
        if scale not in ("uniform", "loguniform"):
            raise ValueError(f"scale={scale}: must be uniform, loguniform or a list of scales")
        low, high = degrader.low if low is None else low, degrader.high if high is None else high
        found = ScaleConfig(scale, float(low), float(high))
        degrader.check_scales(low, high)
        return found
    found = ScaleConfig("list", low, high, tuple(map(float, scale)))
    degrader.check_scales(min(found.values), max(found.values))
    return found
