"""The keys of a training: `fit.*` of every training job."""

from dataclasses import dataclass
from typing import Literal

from degflow.config import option


@dataclass(frozen=True)
class FitConfig:
    """How to train."""

    steps: int = option(200_000, "optimiser steps", common=True)
    batch: int = option(16, "samples per step, over all processes", common=True)
    accumulate: int = option(1, "micro-batches per step in each process")
    learning_rate: float = option(1e-4, "learning rate after the warm-up", common=True)
    schedule: Literal["cosine", "halve"] = option(
        "cosine", "cosine: to final_learning_rate at the last step; halve: at 1/2, 3/4 and 7/8 of the steps"
    )
    final_learning_rate: float = option(1e-7, "learning rate at the last step of the cosine")
    warmup: int = option(0, "steps of linear warm-up before the schedule")
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's decay of the first and of the second moment")
    clip: float = option(1.0, "largest gradient norm; 0: no clipping")
    ema: float = option(0.999, "decay of the averaged weights, which are the result; 0: no averaging")
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = option(
        "float32", "of matrix products and convolutions: float32, or on a GPU tf32, bfloat16 or float16", common=True
    )
    compile: bool = option(False, "torch.compile the objective")
    workers: int = option(2, "data loader processes per training process", common=True)
    seed: int = option(0, "decides initial weights, order, crops, flips, levels, times and dropout")
    log_every: int = option(50, "steps between log lines")
    validate_every: int = option(2000, "steps between validations (scalars and a picture); also at the end")
    save_every: int = option(2000, "steps between checkpoints; also at the end, and on SIGTERM or SIGUSR1")
    keep: int = option(2, "checkpoints to keep")
    resume: Literal["auto", "never"] = option(
        "auto", "auto: continue from the newest checkpoint in output; never: delete its checkpoints and start again"
    )
    start_from: str = option(
        "",
        "file whose weights replace the initial ones: of the same kind of network (a degrader or autoencoder as "
        ".safetensors, or shipped; for train-sr its network.safetensors), or a checkpoint (checkpoints/step-N.pt, its "
        "averaged weights). A resumed run ignores it",
        common=True,
    )
    profile: int = option(0, "steps whose operations are timed, after the first ten: profile.json, for ui.perfetto.dev")
    timeout: int = option(600, "seconds after which waiting for another process is an error")

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "log_every", "validate_every", "save_every", "keep", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "final_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must be above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"fit.ema={self.ema}: must lie in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"fit.betas={list(self.betas)}: must lie in [0, 1)")
        for name in ("clip", "warmup", "workers", "seed", "profile"):
            if getattr(self, name) < 0:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must not be negative")
        if self.profile and self.profile + 10 > self.steps:
            raise ValueError(f"fit.profile={self.profile}: must be at most fit.steps - 10 = {self.steps - 10}")
        if self.batch % self.accumulate:
            raise ValueError(f"fit.batch={self.batch}: must be a multiple of fit.accumulate={self.accumulate}")
