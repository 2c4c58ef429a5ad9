"""Training on Accelerate: stage 1 (`rae`), the published stage 2 (`lfm`), and stage 2 for draws (`residual`).

`loop` has `fit`, one loop for any objective. Beside it: its settings, processes, checkpoints, logs, and how it stops.
"""

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
