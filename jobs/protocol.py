"""The paper's whole experiment from one configuration, cell by cell, into one table.

    python jobs/protocol.py config=configs/small_protocol.yaml photographs=photos output=runs/protocol

1. A degrader is trained on camera A's pairs (or given), and so are its ablations; each is compared with captured LR.
2. It degrades the HR photographs of camera B.
3. SR networks are trained on real and on generated pairs, and tested on the test level of both cameras.

Each step is a run of another job, with its log in output/cells; what is finished is not run again, so the same command
goes on after a stop. output/table.md has the results with the published ones beside them, and is written anew after
each cell; results.csv has every single run. Lists of words (`rae`, `lfm`, ...) are arguments of those jobs, and end
theirs; paths in them are relative to where this job is started.
"""

import csv
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from degflow.config import dump, option, required, run
from degflow.degrader import SHIPPED
from degflow.storage import Place
from degflow.training import EXIT_CODE, Stopped

JOBS = Path(__file__).parent
SOURCE = "DegFlow, AAAI 2026, table 1 (RealSR x3)"
PUBLISHED = {  # PSNR, SSIM, LPIPS
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


@dataclass(frozen=True)
class ProtocolConfig:
    """Keys of protocol."""

    output: str = required("local folder for the cells and the tables")
    data: str = option("", "RealSR-like root that holds CAMERA/Train and CAMERA/Test")
    photographs: str = option("", "in place of data: photographs that the simulated cameras capture")
    simulate: list[str] = option([], "words for simulate_scenes")
    cameras: tuple[str, str] = option(("Canon", "Nikon"), "A, which trains the degrader, and B, whose HR it degrades")
    resize_lr: bool = option(False, "bring LR images smaller than HR (RealSR V3) to HR's grid by bicubic")
    degrader: str = option(
        "", "degrader file that takes the place of the first of degraders, or shipped; empty: it is trained"
    )
    degraders: dict[str, list[str]] = option(
        {"DegFlow": []},
        "name -> words that set it apart: autoencoder.* for train_rae, scenes.* for both trainings, levels=... for "
        "evaluate, scale.* for synthesize, all others for train_lfm",
    )
    rae: list[str] = option(["config=configs/paper_rae.yaml"], "words for train_rae")
    flow: list[str] = option([], "words for a train_lfm that goes before, from which lfm starts; empty: none")
    lfm: list[str] = option(["config=configs/paper_lfm.yaml"], "words for train_lfm")
    evaluate: list[str] = option(["levels={1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}"], "words for evaluate")
    synthesize: list[str] = option(["scale.low=2", "scale.high=4"], "words for synthesize")
    rows: dict[str, list[str]] = option(
        {"real x3": ["3"], "real x2, x4": ["2", "4"], "generated x2..x4": ["DegFlow"]},
        "label -> training set of the SR networks: levels of real pairs, or names of degraders",
    )
    real: list[str] = option(["Canon"], "cameras whose Train has the real pairs of the rows")
    networks: dict[str, list[str]] = option(
        {name: [f"network.name={name}"] for name in ("swinir", "hat", "mambair")}, "name -> words for train_sr"
    )
    sr: list[str] = option(["config=configs/paper_sr.yaml"], "words for train_sr, before the network's")
    seeds: dict[str, int] = option({}, "network -> how many seeds; one for those not named")
    test_level: str = option("3", "folder label of the test images")
    launch: list[str] = option([], "how trainings start, e.g. [accelerate,launch,--multi_gpu]; empty: this Python")

    def __post_init__(self):
        if len(set(self.cameras)) != 2:
            raise ValueError(f"cameras={list(self.cameras)}: must be two")
        if wrong := set(self.real) - set(self.cameras) or (not self.real and {"nothing"}):
            raise ValueError(f"real={self.real}: must be of cameras={list(self.cameras)}, not {sorted(wrong)[0]}")
        if not self.degraders or not self.rows or not self.networks:
            raise ValueError("degraders, rows, networks: each needs at least one entry")
        for kind in ("degraders", "rows", "networks"):
            if wrong := [name for name in getattr(self, kind) if not re.fullmatch(r"[\w.,+ -]+", name)]:
                raise ValueError(f"{kind}: {wrong[0]!r} must be of letters, digits, spaces and . , + - _")
        for row, parts in self.rows.items():
            if not parts or any(not re.fullmatch(r"\d+(\.\d+)?", part) for part in set(parts) - set(self.degraders)):
                raise ValueError(f"rows: {row!r}: {parts} must be level labels and names of degraders")
        if wrong := [n for n, count in self.seeds.items() if n not in self.networks or count < 1]:
            raise ValueError(f"seeds={self.seeds}: {wrong[0]!r} must be one of networks, with a count of at least 1")


class Cell(NamedTuple):
    """One run of a job."""

    name: str
    job: str
    words: list[str]


def main(config: ProtocolConfig) -> None:
    """Run what is not finished, and write the tables."""
    place = Place(config.output)
    if not place.local:
        raise ValueError(f"output={config.output}: must be a local folder")
    if bool(config.data) == bool(config.photographs):
        raise ValueError(f"data={config.data!r}, photographs={config.photographs!r}: exactly one must be given")
    place.write("config.yaml", dump(config).encode())
    planned = cells(config)
    for number, cell in enumerate(planned, 1):
        where = f"{number} of {len(planned)}: {cell.name}"
        if not finished(cell, place):
            print(f"{where} ...", flush=True)
            print(f"{where}: {perform(cell, place, config.launch):.0f} s", flush=True)
            write_tables(config, place)
    write_tables(config, place)
    print(place.read("table.md").decode())
    print(f"tables: {config.output}")


def cells(config: ProtocolConfig) -> list[Cell]:
    """Everything that is to be run, in order."""
    planned = []
    if config.photographs:
        cameras = ",".join(camera.lower() for camera in config.cameras)
        words = [f"input={config.photographs}", f"output={root(config)}", f"cameras=[{cameras}]", *config.simulate]
        planned.append(Cell("scenes", "simulate_scenes", words))
    models: dict[str, str] = {}
    autoencoders: dict[tuple[str, ...], str] = {}
    for name, own in config.degraders.items():
        if config.degrader and not models:
            models[name] = SHIPPED if config.degrader == "shipped" else config.degrader
        else:
            trained = list(degrader_cells(config, name, own, autoencoders))
            planned += trained
            models[name] = f"{config.output}/{trained[-1].name}/degrader.safetensors"
        planned += list(use_cells(config, name, own, models[name]))
    runs = [(seed, n) for n in config.networks for seed in range(config.seeds.get(n, 1))]
    for seed, network in sorted(runs, key=lambda run: run[0]):
        planned += [sr_cell(config, network, row, seed) for row in config.rows]
    return planned


def root(config: ProtocolConfig) -> str:
    """Where the cameras' scenes are."""
    return config.data or f"{config.output}/scenes"


def degrader_cells(
    config: ProtocolConfig, name: str, own: list[str], autoencoders: dict[tuple[str, ...], str]
) -> Iterator[Cell]:
    """Stage 1, unless an earlier degrader has the same, and stage 2."""
    data = [f"scenes.data={root(config)}/{config.cameras[0]}/Train"]
    data += ["scenes.resize_lr=true"] if config.resize_lr else []
    levels = [word for word in own if word.startswith("scenes.")]
    first = tuple(config.rae + levels + [word for word in own if word.startswith("autoencoder.")])
    second = levels + [word for word in own if not word.startswith(("scenes.", "autoencoder.", "levels=", "scale."))]
    if first not in autoencoders:
        autoencoders[first] = f"{config.output}/rae/{name}/rae.safetensors"
        yield Cell(f"rae/{name}", "train_rae", [*data, f"output={config.output}/rae/{name}", *first])
    given = [*data, f"rae={autoencoders[first]}"]
    start: list[str] = []
    if config.flow:
        output = f"{config.output}/flow/{name}"
        yield Cell(f"flow/{name}", "train_lfm", [*given, f"output={output}", *config.flow, *second])
        start = [f"fit.start_from={output}/degrader.safetensors"]
    yield Cell(f"lfm/{name}", "train_lfm", [*given, f"output={config.output}/lfm/{name}", *start, *config.lfm, *second])


def use_cells(config: ProtocolConfig, name: str, own: list[str], model: str) -> Iterator[Cell]:
    """The degrader against captured LR of both cameras; and B's HR degraded by it, if a row wants it."""
    levels = [word for word in own if word.startswith("levels=")]
    resize = ["resize_lr=true"] if config.resize_lr else []
    for camera in config.cameras:
        output = f"fidelity/{name}/{camera}"
        data = [f"model={model}", f"data={root(config)}/{camera}/Test", f"output={config.output}/{output}"]
        yield Cell(output, "evaluate", [*data, *resize, *config.evaluate, *levels])
    if any(name in parts for parts in config.rows.values()):
        label = first_level(config)
        output, scales = f"generated/{name}", [word for word in own if word.startswith("scale.")]
        data = [f"input={root(config)}/{config.cameras[1]}/Train/{label}/*_HR.png"]
        yield Cell(
            output,
            "synthesize",
            [f"model={model}", *data, f"output={config.output}/{output}", *config.synthesize, *scales],
        )


def first_level(config: ProtocolConfig) -> str:
    """The folder whose HR files are degraded: the first level that a row names, as every level has the same."""
    labels = [part for parts in config.rows.values() for part in parts if part not in config.degraders]
    return min(labels, key=float, default=config.test_level)


def sr_cell(config: ProtocolConfig, network: str, row: str, seed: int) -> Cell:
    """One SR training with its tests."""
    labels = [part for part in config.rows[row] if part not in config.degraders]
    sources = {name: f"{config.output}/generated/{name}" for name in config.rows[row] if name in config.degraders}
    if labels:
        sources |= {camera: f"{root(config)}/{camera}/Train" for camera in config.real}
    name = sr_name(network, row, seed)
    words = [
        f"train={_dict(sources)}",
        f"test={_dict({camera: f'{root(config)}/{camera}/Test' for camera in config.cameras})}",
        f"test_level={config.test_level}",
        f"output={config.output}/{name}",
        f"fit.seed={seed}",
        *([f"levels={_dict({label: float(label) for label in labels})}"] if labels else []),
        *(["resize_lr=true"] if config.resize_lr else []),
    ]
    return Cell(name, "train_sr", [*words, *config.sr, *config.networks[network]])


def sr_name(network: str, row: str, seed: int) -> str:
    """Name of the cell, and of its folder."""
    return f"sr/{network}/{re.sub('[^A-Za-z0-9.]+', '-', row)}/{seed}"


def _dict(values: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()) + "}"


def finished(cell: Cell, place: Place) -> bool:
    """Whether the cell was finished with the same words.

    Raises:
        ValueError: it was finished with others.
    """
    if not place.exists(f"cells/{cell.name}.json"):
        return False
    found = json.loads(place.read(f"cells/{cell.name}.json"))
    if (found["job"], found["words"]) != (cell.job, cell.words):
        changed = sorted(set(found["words"]) ^ set(cell.words)) or ["the order of its words"]
        raise ValueError(
            f"{place.uri_of(f'cells/{cell.name}.json')}: finished with another {changed[0]}; "
            "use the same configuration or another output, or delete this file and the cell's folder"
        )
    return True


def perform(cell: Cell, place: Place, launch: Sequence[str]) -> float:
    """Run a cell; returns its seconds.

    Raises:
        Stopped: SIGTERM or SIGUSR1 came; the job was told, and had time to save.
        ValueError: the job failed; the message has its last line.
    """
    start = [*launch] if launch and cell.job.startswith("train") else [sys.executable]
    command = [*start, str(JOBS / f"{cell.job}.py"), *cell.words]
    log, begun = Path(place.path(f"cells/{cell.name}.log")), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        told, process = [], subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

        def tell(number: int, frame: Any) -> None:
            told.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code and (told or code == EXIT_CODE):
        print(f"stopped during {cell.name}; the same command goes on", flush=True)
        raise Stopped
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise ValueError(f"{cell.name}: {cell.job} ended with exit code {code}: {lines[-1]} (whole log: {log})")
    seconds = time.monotonic() - begun
    record = {"job": cell.job, "words": cell.words, "seconds": round(seconds, 1)}
    place.write(f"cells/{cell.name}.json", json.dumps(record, indent=1).encode())
    return seconds


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
    """Of every finished SR cell."""
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
    """table.md and results.csv from what is finished."""
    found, text = list(results(config, place)), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((Result._fields, *found))
    place.write("results.csv", text.getvalue().encode())
    a, b = config.cameras
    simulated = "simulated cameras, not RealSR" if config.photographs else config.data
    parts = [
        f"# SR networks by what they were trained on\n\nTested on x{config.test_level} of {a} and {b} ({simulated}): "
        "PSNR in dB / SSIM / LPIPS, mean of the two cameras, ± standard deviation over seeds. Real pairs: "
        f"{' and '.join(config.real)}, generated pairs: HR of {b}. Published: {SOURCE}.",
        sr_table(config, found),
        *([differences(config, found)] if found else []),
        *(["## Each camera", camera_table(config, found)] if found else []),
        *fidelity_tables(config, place),
    ]
    place.write("table.md", ("\n\n".join(parts) + "\n").encode())


def runs_of(found: Sequence[Result], network: str, row: str, image: str = "restored", camera: str = "") -> np.ndarray:
    """PSNR, SSIM, LPIPS of each seed, "seeds 3", of one camera or in the mean of both."""
    chosen = [r for r in found if (r.network, r.row, r.image) == (network, row, image) and camera in ("", r.camera)]
    seeds = sorted({r.seed for r in chosen})
    return np.array([np.mean([r[5:] for r in chosen if r.seed == seed], 0) for seed in seeds]).reshape(-1, 3)


def cell_text(runs: np.ndarray) -> str:
    """Means over the seeds, and their spread where there are several."""
    if not len(runs):
        return "–"
    spread = runs.std(0, ddof=1) if len(runs) > 1 else None
    forms = ("{:.2f}", "{:.4f}", "{:.4f}")
    words = [form.format(mean) for form, mean in zip(forms, runs.mean(0), strict=True)]
    if spread is not None:
        words = [f"{word} ± {form.format(s)}" for word, form, s in zip(words, forms, spread, strict=True)]
    return " / ".join(words) + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")


def sr_table(config: ProtocolConfig, found: Sequence[Result]) -> str:
    """A row per training set, and for each network what was measured and what was published."""
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


def differences(config: ProtocolConfig, found: Sequence[Result]) -> str:
    """How far the generated rows are above the real ones, in dB, beside the spread over seeds."""
    lines = ["| PSNR gained, dB | " + " | ".join(config.networks) + " |", "|---" * (len(config.networks) + 1) + "|"]
    made = [row for row, parts in config.rows.items() if set(parts) & set(config.degraders)]
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
    """Generated against captured LR of each camera, a row per degrader, from the tables of evaluate."""
    for camera in config.cameras:
        rows = {}
        for name in config.degraders:
            if place.exists(f"cells/fidelity/{name}/{camera}.json"):
                rows[name] = generated_scores(place.read(f"fidelity/{name}/{camera}/table.md").decode())
        if rows:
            levels = list(next(iter(rows.values())))
            lines = ["| degrader | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
            lines += [f"| {name} | {' | '.join(row.get(x, '–') for x in levels)} |" for name, row in rows.items()]
            yield f"## Generated against captured LR of {camera}\n\nPSNR / SSIM / LPIPS.\n\n" + "\n".join(lines)


def generated_scores(table: str) -> dict[str, str]:
    """The column "generated" of evaluate's first table by scale."""
    scores: dict[str, str] = {}
    for line in table.splitlines():
        texts = [text.strip() for text in line.strip("|").split("|")]
        if scores and not line.startswith("| x"):
            break
        if line.startswith("| x"):
            scores[texts[0]] = texts[1]
    return scores


if __name__ == "__main__":
    run(main, ProtocolConfig, __doc__)
