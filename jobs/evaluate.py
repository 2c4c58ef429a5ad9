"""How close a degrader's LR images come to captured ones, at seen and unseen scales, beside simple baselines.

    python jobs/evaluate.py data=runs/scenes/Canon/Test output=runs/fidelity

writes output/table.md (means over the scenes), measurements.parquet (every image), sweep.parquet (PSNR of every scene
over a fine grid of scales, against HR and each captured level), best_times.parquet and figure.png (captured levels
above generated images at even steps of t).
"""

from degflow.config import run
from degflow.evaluation.run import EvaluateConfig, evaluate

if __name__ == "__main__":
    run(evaluate, EvaluateConfig, __doc__)
