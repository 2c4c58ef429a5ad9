"""Measurements as Markdown tables of means over the scenes, and as parquet."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from degflow.capture.scenes import HR_LABEL
from degflow.evaluation.baselines import BASELINES
from degflow.evaluation.curve import BestTime
from degflow.evaluation.draws import BRIGHTNESS, DrawScore
from degflow.evaluation.fidelity import METHODS, TITLES, Measurement, methods_of
from degflow.evaluation.frechet import Distance
from degflow.trajectory import Timeline

_FORMS = (("psnr", "{:.2f}"), ("ssim", "{:.4f}"), ("lpips", "{:.4f}"))


def fidelity_table(measurements: Sequence[Measurement]) -> str:
    """A row per level: mean PSNR / SSIM / LPIPS of each of METHODS, and PSNR against HR."""
    rows = []
    for label in _labels(measurements):
        captured, generated = (_of(measurements, label, method) for method in ("hr", "generated"))
        to_hr = (_mean(captured, "psnr", "{:.2f}"), _mean(generated, "psnr_to_hr", "{:.2f}"))
        rows.append((f"x{label}", *(_scores(_of(measurements, label, method)) for method in METHODS), *to_hr))
    return _markdown(("scale", *map(TITLES.get, METHODS), "captured LR to HR", "generated to HR"), rows)


def baselines_table(measurements: Sequence[Measurement], sigmas: Mapping[str, float]) -> str:
    """A row per level: mean PSNR / SSIM / LPIPS of the generated LR and of each of BASELINES that was measured.

    Args:
        measurements: of `measure`.
        sigmas: label -> sigma of the Gaussian blur.
    """
    methods = ["generated", *(method for method in methods_of(measurements) if method in BASELINES)]
    rows = []
    for label in _labels(measurements):
        cells = []
        for method in methods:
            cell = _scores(_of(measurements, label, method))
            cells.append(f"{cell} (sigma {sigmas[label]:.2f})" if method == "gaussian" else cell)
        rows.append((f"x{label}", *cells))
    return _markdown(("scale", *map(TITLES.get, methods)), rows)


def realism_table(measurements: Sequence[Measurement], distances: Sequence[Distance] = ()) -> str:
    """A row per level for the captured LR and each method: the means of `realism`'s measures, and the Frechet distance.

    Noise and its correlation are medians, because in a scene without flat blocks they include texture.
    """
    apart = {(row.label, row.method): f"{row.distance:.2f}" for row in distances}
    rows = []
    for label in _labels(measurements):
        captured = _of(measurements, label, "generated")
        noise = (_middle(captured, "captured_noise"), _middle(captured, "captured_correlation"))
        rows.append((f"x{label}", "captured LR", "0", *noise, "0", "0" if distances else "—"))
        for method in methods_of(measurements):
            if found := _of(measurements, label, method):
                noise = (_middle(found, "noise"), _middle(found, "correlation"))
                means = (_mean(found, "spectrum", "{:.2f}"), _mean(found, "divergence", "{:.3f}"))
                last = (means[1], apart.get((label, method), "—"))
                rows.append((f"x{label}", TITLES[method], means[0], *noise, *last))
    titles = ("scale", "LR image", "spectrum, dB", "noise", "its correlation", "residuals, nats", "Frechet")
    return _markdown(titles, rows)


def best_time_table(best: Sequence[BestTime], optical: Mapping[str, float], timeline: Timeline) -> str:
    """A row per level: the time of the highest PSNR-Y beside that of the level's own scale and of the optical one.

    Args:
        best: of `best_times`.
        optical: label -> optical scale, where it is known.
        timeline: the degrader's.
    """
    rows = []
    for label in dict.fromkeys(row.level for row in best):
        found = [row for row in best if row.level == label]
        times, ends = [row.time for row in found], sum(row.at_end for row in found)
        mean = float(np.mean(times))
        rows.append(
            (
                f"x{label}",
                f"{found[0].own_time:.3f}",
                f"{timeline.time(optical[label]):.3f}" if label in optical else "—",
                f"{mean:.3f} (x{timeline.scale(mean):.2f})",
                f"{min(times):.3f} to {max(times):.3f}" + (f", {ends} at an end" if ends else ""),
                f"{np.mean([row.own_psnr for row in found]):.2f}",
                f"{np.mean([row.psnr for row in found]):.2f}",
            )
        )
    titles = ("scale", "t of the level's scale", "t of the optical scale", "best t, mean", "of single scenes")
    return _markdown((*titles, "PSNR at its own t", "PSNR at the best t"), rows)


def curve_table(curves: Mapping[str, Mapping[float, float]], count: int = 11) -> str:
    """A column for each of about `count` scales, a row for each level's curve.

    Args:
        curves: level label -> `mean_curve`, all at the same scales.
        count: largest number of columns.
    """
    scales = list(next(iter(curves.values())))
    shown = scales[:: math.ceil(len(scales) / count)]
    titles = {label: "to HR" if label == HR_LABEL else f"to captured x{label}" for label in curves}
    rows = [(titles[label], *(f"{curve[scale]:.2f}" for scale in shown)) for label, curve in curves.items()]
    return _markdown(("scale", *(f"x{scale:.2f}" for scale in shown)), rows)


def falls(curve: Mapping[float, float]) -> bool:
    """Whether every value is lower than the one before it."""
    return all(after < before for before, after in pairwise(curve.values()))


def parquet(rows: Iterable[Any]) -> bytes:
    """NamedTuples of one class, with plain values, as a parquet file."""
    table = pa.Table.from_pylist([row._asdict() for row in rows])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_measurements(data: bytes) -> list[Measurement]:
    """Read the rows that `parquet` wrote."""
    return [Measurement(**row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()]


def generated_scores(measurements: Sequence[Measurement]) -> dict[str, str]:
    """ "PSNR / SSIM / LPIPS", means of the generated LR images, by level."""
    return {f"x{label}": _scores(_of(measurements, label, "generated")) for label in _labels(measurements)}


def energy_scores(data: bytes) -> dict[str, str]:
    """The mean energy score of the draws by level, from a file of `DrawScore`s that `parquet` wrote."""
    rows = pq.read_table(pa.BufferReader(data), columns=["label", "energy"]).to_pylist()
    labels = dict.fromkeys(row["label"] for row in rows)
    return {f"x{x}": f"{np.mean([row['energy'] for row in rows if row['label'] == x]):.2f}" for x in labels}


def _labels(measurements: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(row.label for row in measurements))


def _of(measurements: Sequence[Measurement], label: str, method: str) -> list[Measurement]:
    return [row for row in measurements if row.label == label and row.method == method]


def _scores(rows: Sequence[Measurement]) -> str:
    return " / ".join(_mean(rows, name, form) for name, form in _FORMS) if rows else "—"


def _mean(rows: Sequence[Measurement], name: str, form: str) -> str:
    return form.format(float(np.mean([getattr(row, name) for row in rows])))


def _middle(rows: Sequence[Measurement], name: str) -> str:
    """The median without NaN: an image without noise has no correlation."""
    values = [value for row in rows if not math.isnan(value := getattr(row, name))]
    return f"{float(np.median(values)) if values else math.nan:.2f}"


def _markdown(titles: Sequence[Any], rows: Iterable[Sequence[str]]) -> str:
    head = ("| " + " | ".join(map(str, titles)) + " |", "|---" * len(titles) + "|")
    return "\n".join((*head, *("| " + " | ".join(row) + " |" for row in rows)))


def draws_table(scores: Sequence[DrawScore]) -> str:
    """A row per level of `DrawScore`.

    The columns of noise have the median captured level, and the median over the scenes of drawn / captured: levels
    differ tenfold from scene to scene, so medians of both would compare different scenes. All other columns have means,
    captured / drawn.
    """
    header = ("scale", "draws", "mean", "optics", *BRIGHTNESS, "correlation", "comb 8", "comb 4")
    header += ("gray's colour", "energy score, of the mean", "rank error, fine, all")
    rows = []
    for label in dict.fromkeys(score.label for score in scores):
        found = np.array([score[2:] for score in scores if score.label == label]).T
        column = dict(zip(DrawScore._fields[2:], found, strict=True))
        mean = {name: _known(np.mean, values) for name, values in column.items()}
        noises = [_noise(column[name], column[f"{name}_drawn"]) for name in BRIGHTNESS]
        paired = ("correlation", "comb8", "comb4", "chroma")
        pairs = [f"{mean[name]:.2f} / {mean[f'{name}_drawn']:.2f}" for name in paired]
        quality = [f"{mean[name]:.2f}" for name in ("psnr", "mean_psnr", "optics_psnr")]
        last = [
            f"{mean[first]:.3f}, {mean[second]:.3f}"
            for first, second in (("energy", "energy_of_mean"), ("fine_rank_error", "rank_error"))
        ]
        rows.append((f"x{label}", *quality, *noises, *pairs, *last))
    return _markdown(header, rows)


def _noise(captured: np.ndarray, drawn: np.ndarray) -> str:
    ratios = np.divide(drawn, captured, out=np.full(len(captured), np.nan), where=captured > 0)
    return f"{_known(np.median, captured):.2f}; {_known(np.median, ratios):.2f}"


def _known(average: Callable[[np.ndarray], Any], values: np.ndarray) -> float:
    """The average without NaN; NaN if there is nothing else."""
    known = values[~np.isnan(values)]
    return float(average(known)) if len(known) else math.nan
