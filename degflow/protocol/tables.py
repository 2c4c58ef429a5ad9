"""The results: SR networks by training set beside the published numbers, and the degraders' fidelity."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from degflow import evaluation
from degflow.protocol.plan import TEST_LEVEL, ProtocolConfig, sr_name
from degflow.storage import Place

SOURCE = "DegFlow, AAAI 2026, table 1 (RealSR x3)"
PUBLISHED = {  # row -> network -> PSNR, SSIM, LPIPS; "generated" is by the published method
    "real x3": {
        "swinir": (30.69, 0.8647, 0.3217),
        "hat": (30.71, 0.8645, 0.3221),
        "mambair": (30.62, 0.8636, 0.3208),
    },
    "real x2, x4": {
        "swinir": (30.23, 0.8597, 0.3255),
        "hat": (30.39, 0.8607, 0.3248),
        "mambair": (30.39, 0.8660, 0.3240),
    },
    "generated x2..x4": {
        "swinir": (30.78, 0.8658, 0.3193),
        "hat": (30.86, 0.8668, 0.3186),
        "mambair": (30.86, 0.8686, 0.3152),
    },
}


class Result(NamedTuple):
    """Means over the test images of one camera, of one SR run."""

    network: str
    row: str
    seed: int
    camera: str
    image: str
    psnr: float
    ssim: float
    lpips: float


def results(config: ProtocolConfig, place: Place) -> Iterator[Result]:
    """The results of every finished SR cell."""
    for network in config.networks:
        for row in config.rows:
            for seed in range(config.seeds.get(network, 1)):
                name = sr_name(network, row, seed)
                if not place.exists(f"cells/{name}.json"):
                    continue
                scores = list(csv.DictReader(io.StringIO(place.read(f"{name}/measurements.csv").decode())))
                for camera in config.cameras:
                    for image in ("restored", "LR"):
                        rows = [score for score in scores if (score["tree"], score["image"]) == (camera, image)]
                        means = (float(np.mean([float(score[key]) for score in rows])) for key in Result._fields[5:])
                        yield Result(network, row, seed, camera, image, *means)


def write_tables(config: ProtocolConfig, place: Place) -> None:
    """Write table.md and results.csv from the finished cells."""
    found, text = list(results(config, place)), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((Result._fields, *found))
    place.write("results.csv", text.getvalue().encode())
    a, b = config.cameras
    simulated = "simulated cameras, not RealSR" if config.photographs else config.data
    parts = [
        f"# SR networks by what they were trained on\n\nTested on x{TEST_LEVEL} of {a} and {b} ({simulated}): "
        "PSNR in dB / SSIM / LPIPS, mean of the two cameras, ± standard deviation over seeds. Real pairs: "
        f"{' and '.join(config.real)}, generated pairs and baselines: HR of {b} (latent paths: pairs of {a}). "
        f"Published: {SOURCE}.",
        *([sr_table(config, found)] if config.rows else []),
        *([differences(config, found)] if found and generated(config) else []),
        *(["## Each camera", camera_table(config, found)] if found else []),
        *fidelity_tables(config, place),
    ]
    place.write("table.md", ("\n\n".join(parts) + "\n").encode())


def runs_of(found: Sequence[Result], network: str, row: str, image: str = "restored", camera: str = "") -> np.ndarray:
    """PSNR, SSIM, LPIPS of each seed, "seeds 3", of one camera or averaged over both."""
    chosen = [r for r in found if (r.network, r.row, r.image) == (network, row, image) and camera in ("", r.camera)]
    seeds = sorted({r.seed for r in chosen})
    return np.array([np.mean([r[5:] for r in chosen if r.seed == seed], 0) for seed in seeds]).reshape(-1, 3)


def cell_text(runs: np.ndarray) -> str:
    """Means over the seeds, and their standard deviation where there are several."""
    if not len(runs):
        return "–"
    runs = runs[:, np.isfinite(runs).all(0)]  # LPIPS may have been left out
    forms = ("{:.2f}", "{:.4f}", "{:.4f}")[: runs.shape[1]]
    words = [form.format(mean) for form, mean in zip(forms, runs.mean(0), strict=True)]
    if len(runs) == 1:
        return " / ".join(words)
    spread = [form.format(value) for form, value in zip(forms, runs.std(0, ddof=1), strict=True)]
    return " / ".join(f"{word} ± {s}" for word, s in zip(words, spread, strict=True)) + f" ({len(runs)} seeds)"


def sr_table(config: ProtocolConfig, found: Sequence[Result]) -> str:
    """A row per training set; for each network the measured and the published scores."""
    titles = [title for network in config.networks for title in (network, f"{network}, published")]
    lines = ["| trained on | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    same = [runs_of(found, network, row, "LR") for network in config.networks for row in config.rows]
    unchanged = next((runs[:1] for runs in same if len(runs)), np.empty((0, 3)))
    lines.append("| (LR as it is) | " + " | ".join([cell_text(unchanged), "–"] * len(config.networks)) + " |")
    for row in config.rows:
        texts = []
        for network in config.networks:
            published = PUBLISHED.get(row, {}).get(network)
            texts += [cell_text(runs_of(found, network, row)), cell_text(np.array([published] if published else []))]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def generated(config: ProtocolConfig) -> list[str]:
    """The rows with a degrader's pairs."""
    return [row for row, parts in config.rows.items() if set(parts) & set(config.degraders)]


def differences(config: ProtocolConfig, found: Sequence[Result]) -> str:
    """PSNR of the generated rows minus that of each other row, in dB, with the standard deviation over seeds."""
    lines = ["| PSNR gained, dB | " + " | ".join(config.networks) + " |", "|---" * (len(config.networks) + 1) + "|"]
    made = generated(config)
    for row in made:
        for other in [other for other in config.rows if other not in made]:
            texts = []
            for network in config.networks:
                a, b = (runs_of(found, network, name)[:, 0] for name in (row, other))
                count = min(len(a), len(b))
                gained = a[:count] - b[:count]
                spread = f" ± {gained.std(ddof=1):.2f}" if count > 1 else ""
                texts.append(f"{gained.mean():+.2f}{spread}" if count else "–")
            lines.append(f"| {row} over {other} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def camera_table(config: ProtocolConfig, found: Sequence[Result]) -> str:
    """Each camera's own means."""
    titles = [f"{network}, {camera}" for network in config.networks for camera in config.cameras]
    lines = ["| trained on | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for row in config.rows:
        texts = [
            cell_text(runs_of(found, network, row, camera=camera))
            for network in config.networks
            for camera in config.cameras
        ]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def fidelity_tables(config: ProtocolConfig, place: Place) -> Iterator[str]:
    """Generated against captured LR of each camera, a row per degrader; then the energy scores of those that draw."""
    for camera in config.cameras:
        scores, energies = {}, {}
        for name in config.degraders:
            folder = f"fidelity/{name}/{camera}"
            if not place.exists(f"cells/{folder}.json"):
                continue
            rows = evaluation.read_measurements(place.read(f"{folder}/measurements.parquet"))
            scores[name] = evaluation.generated_scores(rows)
            if place.exists(f"{folder}/draws.parquet"):
                energies[name] = evaluation.energy_scores(place.read(f"{folder}/draws.parquet"))
        if scores:
            yield f"## Generated against captured LR of {camera}\n\nPSNR / SSIM / LPIPS.\n\n{_by_level(scores)}"
        if energies:
            yield f"Energy score of the draws, lower is better.\n\n{_by_level(energies)}"


def _by_level(rows: Mapping[str, Mapping[str, str]]) -> str:
    levels = list(next(iter(rows.values())))
    lines = ["| degrader | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row.get(x, '–') for x in levels)} |" for name, row in rows.items()]
    return "\n".join(lines)
