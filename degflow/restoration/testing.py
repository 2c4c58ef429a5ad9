"""The test of a super-resolution network against HR, under the published protocol."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from degflow import evaluation, images
from degflow.capture.scenes import HR_LABEL, SceneConfig, SceneImages
from degflow.evaluation.crops import central
from degflow.models.precision import computing
from degflow.objectives import to_float
from degflow.perceptual import Perceptual
from degflow.restoration.networks import ArbitraryScale, FixedScale
from degflow.restoration.settings import TrainSRConfig
from degflow.storage import Place
from degflow.training.loop import Validation

Network = FixedScale | ArbitraryScale


class Score(NamedTuple):
    """One image of a test tree compared with HR; `image` is "restored" or "LR", the input itself."""

    tree: str
    scene: str
    image: str
    psnr: float
    ssim: float
    lpips: float


class NetworkTest:
    """The test trees of a configuration, in memory, and what is measured on them.

    Raises:
        ValueError: a tree lacks the test level, or LPIPS its weights.
    """

    def __init__(self, config: TrainSRConfig):
        self.config = config
        levels = {HR_LABEL: 1.0, config.test_level: config.scale}
        self.trees = {
            name: SceneImages(SceneConfig(uri, levels, config.resize_lr, 32, config.cache), quiet=True)
            for name, uri in config.test.items()
        }
        for name, scenes in self.trees.items():
            print(f"test on {name}: {scenes.describe()}")
        self.perceptual = (
            None if config.test_lpips == "none" else Perceptual(config.test_lpips, config.test_lpips_weights)
        )
        self.crops = {name: evaluation.validation_crops(scenes, count=4) for name, scenes in self.trees.items()}

    def preview(self, network: Network) -> Validation:
        """PSNR on central crops of each tree, and a picture of the first tree's: LR | restored | HR."""
        parts = [(name, self._restored(network, crops)) for name, crops in self.crops.items()]
        scalars = {name: float(evaluation.psnr(restored, hr).mean()) for name, (_, restored, hr) in parts}
        return Validation(scalars, _picture(*parts[0][1]))

    def report(self, network: Network) -> None:
        """Measure every image; write table.md, measurements.csv and a picture of each tree."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = network.to(device)
        total = 2 * sum(map(len, self.trees.values()))
        scores = list(tqdm(self.measure(network), "testing", total, unit="image"))
        place, text = Place(self.config.output), io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((Score._fields, *scores))
        place.write("measurements.csv", text.getvalue().encode())
        table = table_of(scores)
        place.write("table.md", f"{table}\n".encode())
        for name, crops in self.crops.items():
            place.write(f"test-{name}.png", images.encode_png(_picture(*self._restored(network, crops))))
        lpips = self.config.test_lpips
        print(f"x{self.config.test_level}, PSNR in dB / SSIM / LPIPS ({lpips}) against HR\n\n{table}\n")
        print(f"tables: {self.config.output}")

    @torch.inference_mode()
    def measure(self, network: Network) -> Iterator[Score]:
        """The scores of every image, not quantised; its sides are first cut to multiples of 4."""
        device = next(network.parameters()).device
        perceptual = self.perceptual.to(device) if self.perceptual else None
        for name, tree in self.trees.items():
            for scene, pixels in zip(tree.scenes, tree.pixels, strict=True):
                hr, lr = images.to_tensor(cut(pixels, self.config.test_crop), device).split(1)
                for image, made in (("restored", self._restore(network, lr)), ("LR", lr)):
                    psnr, ssim = float(evaluation.psnr(made, hr)), float(evaluation.ssim(made, hr))
                    with computing("float32", device.type):
                        lpips = float(perceptual(made, hr)) if perceptual else float("nan")
                    yield Score(name, scene.name, image, psnr, ssim, lpips)

    def _restored(self, network: Network, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Crops uint8 "N 2 3 H W" -> LR, restored and HR images."""
        hr, lr = to_float(crops.to(next(network.parameters()).device)).unbind(1)
        return lr, self._restore(network, lr), hr

    def _restore(self, network: Network, lr: Tensor) -> Tensor:
        with computing("float32", lr.device.type):
            return network.restore(lr, self.config.scale)


def cut(pixels: np.ndarray, crop: int) -> np.ndarray:
    """ "K H W 3" -> its central crop (0: all), cut at the bottom and the right to sides that are multiples of 4."""
    pixels = central(pixels, crop)
    height, width = (side // 4 * 4 for side in pixels.shape[1:3])
    return pixels[:, :height, :width]


def table_of(scores: Sequence[Score]) -> str:
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


def _picture(lr: Tensor, restored: Tensor, hr: Tensor) -> np.ndarray:
    return evaluation.contact_sheet([("LR", lr), ("restored", restored), ("HR", hr)])
