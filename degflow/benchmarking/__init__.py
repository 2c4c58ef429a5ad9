"""The speed tables: what each part of degflow costs, beside the released procedure with the same weights.

Times are medians over repeats in which the ways alternate, and ratios are medians of each repeat's ratio: a busy
machine slows both. `inference` has the networks, `optimisations` what each optimisation should gain and does, `steps`
the training steps, `pipeline` the Ray job and the codecs.
"""

from degflow.benchmarking.inference import accuracy, comparison, large, roofline
from degflow.benchmarking.measure import Table, machine
from degflow.benchmarking.optimisations import optimisations
from degflow.benchmarking.pipeline import actors, codecs, job
from degflow.benchmarking.steps import training

__all__ = [
    "Table",
    "accuracy",
    "actors",
    "codecs",
    "comparison",
    "job",
    "large",
    "machine",
    "optimisations",
    "roofline",
    "training",
]
