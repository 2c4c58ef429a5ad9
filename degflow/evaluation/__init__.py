"""How close generated LR images come to captured ones: scores, realism, baselines, tables, pictures.

1. `metrics` has the scores of the published protocol, `realism` measures what they miss, `draws` the distribution of
   draws, and `frechet` that of patches. `crops` says which part of a scene is compared.
2. `fidelity` scores the degrader and the `baselines` (with `random_pipeline`) against captured levels; `curve` scores
   the degrader over a fine grid of scales.
3. `tables` and `pictures` show the results; `validation` is for trainings while they run.
4. `run` is the job; `baseline_scenes` is the job that writes a baseline's LR images for SR networks.
5. `explore` is a local page that compares the pictures of one's own photograph.
"""

from degflow.evaluation.baselines import (
    BASELINES,
    Baselines,
    baseline,
    bicubic,
    fit_sigmas,
    interpolate,
    reconstruct,
)
from degflow.evaluation.crops import validation_crops
from degflow.evaluation.curve import BestTime, SweepPoint, best_times, mean_curve, sweep
from degflow.evaluation.fidelity import METHODS, Measurement, count, measure
from degflow.evaluation.metrics import SHAVE, luma, psnr, ssim
from degflow.evaluation.pictures import closeups, contact_sheet, continuum
from degflow.evaluation.random_pipeline import random_degradation
from degflow.evaluation.realism import (
    flat_blocks,
    noise,
    radial_spectrum,
    residual_divergence,
    spectrum_distance,
)
from degflow.evaluation.tables import (
    baselines_table,
    best_time_table,
    curve_table,
    energy_scores,
    falls,
    fidelity_table,
    generated_scores,
    parquet,
    read_measurements,
    realism_table,
)
from degflow.evaluation.validation import generation, reconstruction

__all__ = [
    "BASELINES",
    "METHODS",
    "SHAVE",
    "Baselines",
    "BestTime",
    "Measurement",
    "SweepPoint",
    "baseline",
    "baselines_table",
    "best_time_table",
    "best_times",
    "bicubic",
    "closeups",
    "contact_sheet",
    "continuum",
    "count",
    "curve_table",
    "energy_scores",
    "falls",
    "fidelity_table",
    "fit_sigmas",
    "flat_blocks",
    "generated_scores",
    "generation",
    "interpolate",
    "luma",
    "mean_curve",
    "measure",
    "noise",
    "parquet",
    "psnr",
    "radial_spectrum",
    "random_degradation",
    "read_measurements",
    "realism_table",
    "reconstruct",
    "reconstruction",
    "residual_divergence",
    "spectrum_distance",
    "ssim",
    "sweep",
    "validation_crops",
]
