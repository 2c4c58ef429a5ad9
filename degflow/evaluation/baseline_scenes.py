"""baseline-scenes: LR images of a baseline as a RealSR-like tree, so that SR networks can be trained on them."""

from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from degflow import images
from degflow.capture.scenes import HR_LABEL, SceneConfig, SceneImages
from degflow.config import dump, option, required
from degflow.degrader import Degrader
from degflow.evaluation.baselines import baseline
from degflow.evaluation.realism import SMALLEST
from degflow.models.precision import check_device, device_of
from degflow.storage import Place

BETWEEN = {f"{scale:g}": scale for scale in (2.0, 2.25, 2.5, 2.75, 3.25, 3.5, 3.75, 4.0)}


@dataclass(frozen=True)
class BaselineScenesConfig:
    """Keys of baseline-scenes."""

    data: str = required(
        "one split of a RealSR-like tree; it must have the degrader's levels, also where only its HR images are used"
    )
    output: str = required("folder or URI of the split that is written")
    baseline: Literal["optics", "mean", "random", "spline", "linear"] = option(
        "random",
        "optics: the degrader's optics, no noise; mean: the degrader with spread=0; random: random degradations as in "
        "Real-ESRGAN, no camera; spline, linear: a path through the latents of the captured levels",
        common=True,
    )
    model: str = option("shipped", "degrader file; shipped: the one that comes with degflow", common=True)
    levels: dict[str, float] = option(
        BETWEEN,
        "folder label -> scale of the LR images that are written",
        common=True,
    )
    resize_lr: bool = option(False, "enlarge LR images smaller than HR (RealSR V3) to HR's size by bicubic")
    device: str = option("auto", "auto (cuda when there is one), cpu, cuda or cuda:N")

    def __post_init__(self):
        check_device(self.device)
        if wrong := [label for label in self.levels if label == HR_LABEL or not label or "/" in label]:
            raise ValueError(f"levels={self.levels}: {wrong[0]!r} cannot be a folder of LR images")
        if not self.levels:
            raise ValueError("levels={}: at least one")


def baseline_scenes(config: BaselineScenesConfig) -> None:
    """Write HR and the baseline's LR of every scene, at every level; after a stop, all of it again.

    Raises:
        ValueError: levels beyond the degrader's range, a baseline that it has not, or an output in use.
    """
    device = device_of(config.device)
    degrader = Degrader.load(config.model, device)
    degrader.check_scales(min(config.levels.values()), max(config.levels.values()))
    if config.baseline in ("optics", "mean") and not degrader.draws:
        raise ValueError(f"baseline={config.baseline}: must be random, spline or linear for a degrader without draws")
    scenes = SceneImages(SceneConfig(config.data, degrader.levels, config.resize_lr, SMALLEST))
    print(f"{scenes.describe()}; baseline {config.baseline} of each")
    target, described = Place(config.output), dump(config).encode()
    if target.files() and not (target.exists("config.yaml") and target.read("config.yaml") == described):
        raise ValueError(
            f"output={config.output}: is not empty, nor of the same configuration; choose another or remove it"
        )
    target.write("config.yaml", described)
    for scene, pixels in tqdm(zip(scenes.scenes, scenes.pixels, strict=True), "degrading", len(scenes), unit="scene"):
        captured, hr = images.to_tensor(pixels, device), images.encode_png(pixels[0])
        for label, scale in config.levels.items():
            made = baseline(config.baseline, degrader, captured, scale, identity=f"{label} {scene.name}")
            target.write(f"{label}/{scene.name}_HR.png", hr)
            target.write(f"{label}/{scene.name}_LR{label}.png", images.encode_png(images.to_pixels(made)[0]))
    print(f"{len(scenes)} scenes at {', '.join(config.levels)} in {config.output}")
