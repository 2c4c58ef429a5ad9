"""The configuration of the experiment, and the cells that it asks for."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from degflow.config import option, required
from degflow.evaluation.baseline_scenes import BETWEEN

TEST_LEVEL = "3"  # label and scale of the test images
DRAWING = ("spread=", "solver.")  # what a degrader's words say to synthesize, and to evaluate
SYNTHESIS = ("scale.", *DRAWING)
_OURS = ("train=", "test=", "test_level=", "output=", "fit.seed=")  # keys that a cell of train-sr has anyway


@dataclass(frozen=True)
class ProtocolConfig:
    """Keys of protocol."""

    output: str = required("local folder for the cells and the tables")
    data: str = option("", "RealSR-like root that holds CAMERA/Train and CAMERA/Test", common=True)
    photographs: str = option("", "in place of data: photographs that the simulated cameras capture", common=True)
    simulate: list[str] = option([], "arguments for simulate-scenes")
    cameras: tuple[str, str] = option(
        ("Canon", "Nikon"), "A, whose pairs train the degrader, and B, whose HR images it degrades"
    )
    resize_lr: bool = option(False, "enlarge LR images smaller than HR (RealSR V3) to HR's size by bicubic")
    degraders: dict[str, list[str]] = option(
        {"draws": [], "published": ["stage2=train_lfm", "skips=hr"]},
        "name -> its own arguments: model=FILE or model=shipped in place of a training; stage2=train_lfm or "
        "train_residual (the default); skips=..., autoencoder.* for train-rae; scenes.* for both trainings; levels=... "
        "for evaluate; scale.* for synthesize; spread=..., solver.* for both; all others for stage 2",
        common=True,
    )
    rae: list[str] = option(["config=paper_rae", "skips=optics"], "arguments for train-rae")
    lfm: list[str] = option(["config=paper_lfm"], "arguments for train-lfm")
    residual: list[str] = option([], "arguments for train-residual")
    evaluate: list[str] = option(["levels={1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}"], "arguments for evaluate")
    synthesize: list[str] = option(["scale.low=2", "scale.high=4"], "arguments for synthesize")
    baselines: dict[str, list[str]] = option(
        {}, "name -> arguments for baseline-scenes; its HR images are B's, but spline and linear take A's pairs"
    )
    trees: dict[str, str] = option({}, "name -> one split of another RealSR-like tree, for the rows")
    between: dict[str, float] = option(
        BETWEEN, "of baselines and trees: folder label -> scale of the LR images; must not contain the test level"
    )
    rows: dict[str, list[str]] = option(
        {"real x3": ["3"], "real x2, x4": ["2", "4"], "generated x2..x4, draws": ["draws"]},
        "label -> training set of the SR networks: levels of real pairs, or names of degraders, baselines and trees; "
        "{} trains none",
        common=True,
    )
    row_words: dict[str, list[str]] = option({}, "row -> arguments for its train-sr, after all others")
    real: list[str] = option(["Canon"], "cameras whose Train gives the rows' real pairs")
    networks: dict[str, list[str]] = option(
        {name: [f"network.name={name}"] for name in ("swinir", "hat", "mambair")},
        "name -> arguments for train-sr",
        common=True,
    )
    sr: list[str] = option(["config=paper_sr"], "arguments for train-sr, before the network's")
    seeds: dict[str, int] = option({}, "network -> how many seeds; one for those not named")
    launch: list[str] = option(
        [],
        "what starts trainings, before `-m degflow`, e.g. [accelerate,launch,--multi_gpu]; empty: this Python",
        common=True,
    )

    def __post_init__(self):
        if len(set(self.cameras)) != 2:
            raise ValueError(f"cameras={list(self.cameras)}: must be two")
        if wrong := set(self.real) - set(self.cameras) or (not self.real and {"nothing"}):
            raise ValueError(f"real={self.real}: must be of cameras={list(self.cameras)}, not {sorted(wrong)[0]}")
        for name, words in self.degraders.items():
            for word in words:
                if word.startswith("stage2=") and word not in ("stage2=train_lfm", "stage2=train_residual"):
                    raise ValueError(f"degraders: {name}: {word}: must be stage2=train_lfm or stage2=train_residual")
            used = ("model=", "levels=", *SYNTHESIS)
            if any(word.startswith("model=") for word in words):
                for word in words:
                    if not word.startswith(used):
                        raise ValueError(f"degraders: {name}: {word}: does nothing beside model=, which is not trained")
        if not self.networks:
            raise ValueError("networks={}: needs at least one entry")
        groups = {"sr": self.sr} | {
            f"{kind}: {name}": words
            for kind in ("networks", "row_words")
            for name, words in getattr(self, kind).items()
        }
        for group, words in groups.items():
            if wrong := [word for word in words if word.startswith(_OURS)]:
                raise ValueError(f"{group}: {wrong[0]}: the protocol itself gives each train-sr this key")
        if not self.between or {float(TEST_LEVEL), 1.0} & set(self.between.values()):
            rule = f"at least one level, and neither scale 1 nor the test level {TEST_LEVEL}"
            raise ValueError(f"between={self.between}: {rule}")
        named = [*self.degraders, *self.baselines, *self.trees]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"degraders, baselines, trees: {twice[0]!r} is the name of two")
        for kind in ("degraders", "baselines", "trees", "rows", "networks"):
            if wrong := [name for name in getattr(self, kind) if not re.fullmatch(r"[\w.,+ -]+", name)]:
                raise ValueError(f"{kind}: {wrong[0]!r} must be of letters, digits, spaces and . , + - _")
        if len({slug(row) for row in self.rows}) < len(self.rows):
            raise ValueError(f"rows: {list(self.rows)} must differ in letters and digits, which name their folders")
        for row, parts in self.rows.items():
            labels = [part for part in parts if part not in named]
            if not parts or any(not re.fullmatch(r"\d+(\.\d+)?", label) for label in labels):
                raise ValueError(
                    f"rows: {row!r}: {parts} must be level labels and names of degraders, baselines, trees"
                )
            if labels and set(parts) & {*self.baselines, *self.trees}:
                raise ValueError(f"rows: {row!r}: {parts}: level {labels[0]} cannot stand beside a baseline or a tree")
        if wrong := sorted(set(self.row_words) - set(self.rows)):
            raise ValueError(f"row_words: {wrong[0]!r} must be one of rows={list(self.rows)}")
        if wrong := [n for n, count in self.seeds.items() if n not in self.networks or count < 1]:
            raise ValueError(f"seeds={self.seeds}: {wrong[0]!r} must be one of networks, with a count of at least 1")


class Cell(NamedTuple):
    """One run of a job."""

    name: str
    job: str
    words: list[str]


def cells(config: ProtocolConfig) -> list[Cell]:
    """All cells, in the order in which they run."""
    planned = []
    if config.photographs:
        cameras = ",".join(camera.lower() for camera in config.cameras)
        words = [f"input={config.photographs}", f"output={root(config)}", f"cameras=[{cameras}]", *config.simulate]
        planned.append(Cell("scenes", "simulate_scenes", words))
    models: dict[str, str] = {}
    autoencoders: dict[tuple[str, ...], str] = {}
    for name, own in config.degraders.items():
        given = [word.removeprefix("model=") for word in own if word.startswith("model=")]
        if given:
            models[name] = given[-1]
        else:
            trained = list(degrader_cells(config, name, own, autoencoders))
            planned += trained
            models[name] = f"{config.output}/{trained[-1].name}/degrader.safetensors"
        planned += list(use_cells(config, name, own, models[name]))
    for name, words in config.baselines.items():
        planned.append(baseline_cell(config, name, words))
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
    """Stage 1, unless an earlier degrader has the same stage 1, and stage 2."""
    data = [f"scenes.data={root(config)}/{config.cameras[0]}/Train"]
    data += ["scenes.resize_lr=true"] if config.resize_lr else []
    job = next((word.removeprefix("stage2=") for word in own if word.startswith("stage2=")), "train_residual")
    both = [word for word in own if word.startswith("scenes.")]
    first = tuple(config.rae + both + [word for word in own if word.startswith(("autoencoder.", "skips="))])
    if first not in autoencoders:
        autoencoders[first] = f"{config.output}/rae/{name}/rae.safetensors"
        yield Cell(f"rae/{name}", "train_rae", [*data, f"output={config.output}/rae/{name}", *first])
    elsewhere = ("autoencoder.", "skips=", "scenes.", "levels=", *SYNTHESIS, "stage2=")
    words = (config.residual if job == "train_residual" else config.lfm) + both
    words += [word for word in own if not word.startswith(elsewhere)]
    output = f"{config.output}/stage2/{name}"
    yield Cell(f"stage2/{name}", job, [*data, f"rae={autoencoders[first]}", f"output={output}", *words])


def use_cells(config: ProtocolConfig, name: str, own: list[str], model: str) -> Iterator[Cell]:
    """Compare the degrader with captured LR of both cameras; degrade B's HR images with it, if a row needs them."""
    how = [word for word in own if word.startswith("levels=")]
    how += [word.removeprefix("solver.") for word in own if word.startswith(DRAWING)]
    resize = ["resize_lr=true"] if config.resize_lr else []
    for camera in config.cameras:
        output = f"fidelity/{name}/{camera}"
        data = [f"model={model}", f"data={root(config)}/{camera}/Test", f"output={config.output}/{output}"]
        yield Cell(output, "evaluate", [*data, *resize, *config.evaluate, *how])
    if any(name in parts for parts in config.rows.values()):
        label = first_level(config)
        output, scales = f"generated/{name}", [word for word in own if word.startswith(SYNTHESIS)]
        data = [f"input={root(config)}/{config.cameras[1]}/Train/{label}/*_HR.*"]
        yield Cell(
            output,
            "synthesize",
            [f"model={model}", *data, f"output={config.output}/{output}", *config.synthesize, *scales],
        )


def baseline_cell(config: ProtocolConfig, name: str, words: list[str]) -> Cell:
    """LR images of a baseline: of A's pairs where it needs captured ones, otherwise of B's HR images."""
    a, b = config.cameras
    camera = a if {"baseline=spline", "baseline=linear"} & set(words) else b
    data = [f"data={root(config)}/{camera}/Train", f"output={config.output}/baselines/{name}"]
    data += [f"levels={_dict(config.between)}", *(["resize_lr=true"] if config.resize_lr else [])]
    return Cell(f"baselines/{name}", "baseline_scenes", [*data, *words])


def first_level(config: ProtocolConfig) -> str:
    """The level folder whose HR files are degraded, the lowest that a row names: all levels have the same HR files."""
    labels = [part for row in config.rows for part in labels_of(config, row)]
    return min(labels, key=float, default=TEST_LEVEL)


def sr_cell(config: ProtocolConfig, network: str, row: str, seed: int) -> Cell:
    """One SR training with its tests."""
    parts, labels = config.rows[row], labels_of(config, row)
    sources = {name: f"{config.output}/generated/{name}" for name in parts if name in config.degraders}
    sources |= {name: f"{config.output}/baselines/{name}" for name in parts if name in config.baselines}
    sources |= {name: config.trees[name] for name in parts if name in config.trees}
    levels = {label: float(label) for label in labels}
    if set(parts) & {*config.baselines, *config.trees}:
        levels = config.between
    if labels:
        sources |= {camera: f"{root(config)}/{camera}/Train" for camera in config.real}
    name = sr_name(network, row, seed)
    words = [
        f"train={_dict(sources)}",
        f"test={_dict({camera: f'{root(config)}/{camera}/Test' for camera in config.cameras})}",
        f"test_level={TEST_LEVEL}",
        f"output={config.output}/{name}",
        f"fit.seed={seed}",
        *([f"levels={_dict(levels)}"] if levels else []),
        *(["resize_lr=true"] if config.resize_lr else []),
    ]
    return Cell(name, "train_sr", [*words, *config.sr, *config.networks[network], *config.row_words.get(row, [])])


def labels_of(config: ProtocolConfig, row: str) -> list[str]:
    """The levels of real pairs in a row."""
    return [part for part in config.rows[row] if part not in {*config.degraders, *config.baselines, *config.trees}]


def sr_name(network: str, row: str, seed: int) -> str:
    """Name of the cell, and of its folder."""
    return f"sr/{network}/{slug(row)}/{seed}"


def slug(row: str) -> str:
    """A row's label as the name of a folder."""
    return re.sub("[^A-Za-z0-9]+", "-", row)


def _dict(values: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()) + "}"
