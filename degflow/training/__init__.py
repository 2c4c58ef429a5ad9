"""Training on Accelerate: `fit` in `loop`, its processes, checkpoints, logs, and being stopped in time."""

from degflow.training.loop import Progress, RankSampler, Validation, fit, learning_rate
from degflow.training.processes import is_main_process, local_share
from degflow.training.settings import FitConfig
from degflow.training.stopping import EXIT_CODE, Stopped

__all__ = [
    "EXIT_CODE",
    "FitConfig",
    "Progress",
    "RankSampler",
    "Stopped",
    "Validation",
    "fit",
    "is_main_process",
    "learning_rate",
    "local_share",
]
