"""Photographs -> RealSR-like scene folders, captured by simulated cameras at several scales."""

import csv
import io
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from degflow import images
from degflow.capture.camera import SCALE_RANGE, SimulatedCamera
from degflow.capture.scenes import HR_LABEL
from degflow.config import dump, option, required
from degflow.storage import Place


@dataclass(frozen=True)
class SimulateConfig:
    """Keys of simulate-scenes."""

    input: str = required("folder or URI with photographs (png, jpg, jpeg, webp, tif, tiff)")
    output: str = required("folder or URI for the tree")
    cameras: tuple[str, ...] = option(
        ("canon", "nikon"), "simulated cameras (canon, nikon, soft); each photograph goes to one of them"
    )
    scales: dict[str, float] = option(
        {"1.532": 1.532, "2": 2.0, "3": 3.0, "3.361": 3.361, "4": 4.0}, "folder label -> optical scale"
    )
    test_fraction: float = option(
        0.2,
        "share of each camera's photographs that goes to Test: at least one of two, unless `test` names some; 0: none",
    )
    test: tuple[str, ...] = option((), "file names that always go to Test")
    longest_side: int = option(
        2048, "shrink photographs to this before the capture, so that HR is sharp; 0: no shrinking"
    )
    seed: int = option(0, "decides which camera gets which photograph, and the noise")

    def __post_init__(self):
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras={list(self.cameras)}: at least one, each once")
        for camera in self.cameras:
            SimulatedCamera.named(camera)
        if not self.scales or not all(1 < scale <= SCALE_RANGE[1] for scale in self.scales.values()):
            raise ValueError(f"scales={self.scales}: at least one, each above 1 and at most {SCALE_RANGE[1]:g}")
        if wrong := [label for label in self.scales if label == HR_LABEL or "/" in label]:
            raise ValueError(f"scales={self.scales}: {wrong[0]!r} cannot be a folder of LR images")
        if not 0 <= self.test_fraction <= 1:
            raise ValueError(f"test_fraction={self.test_fraction}: must lie in [0, 1]")
        if self.longest_side and self.longest_side < images.SMALLEST_SIDE:
            raise ValueError(f"longest_side={self.longest_side}: must be 0 or at least {images.SMALLEST_SIDE}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")


def simulate_scenes(config: SimulateConfig) -> None:
    """Assign each photograph to a camera, and capture it at scale 1 and at every scale.

    A run that was stopped (there is no scenes.csv) is made again from its beginning, with the same configuration.
    """
    source, target = Place(config.input), Place(config.output)
    keys = [file.key for file in source.files() if file.key.lower().endswith(images.SUFFIXES)]
    if not keys:
        raise ValueError(f"input={config.input}: no photograph there (files ending in {', '.join(images.SUFFIXES)})")
    described = dump(config).encode()
    stopped = target.exists("config.yaml") and not target.exists("scenes.csv")
    if target.files() and not (stopped and target.read("config.yaml") == described):
        raise ValueError(f"output={config.output}: is not empty; choose another or remove it")
    assigned = assign(config, keys)
    for key in keys:  # decoding is cheap beside a capture, and a damaged file is named before anything is written
        photograph(config, source, key)
    target.write("config.yaml", described)
    listing = io.StringIO(newline="")
    rows = csv.writer(listing, lineterminator="\n")
    rows.writerow(("scene", "photograph"))
    for camera, split, number, key in tqdm(assigned, "capturing", unit="photo"):
        name = f"{camera.capitalize()}_{number:03d}"
        photo = photograph(config, source, key)
        capture(config, photo, SimulatedCamera.named(camera), target, f"{camera.capitalize()}/{split}", name)
        rows.writerow((name, key))
    target.write("scenes.csv", listing.getvalue().encode())
    print(f"{len(assigned)} scenes at {', '.join(config.scales)} in {config.output} (scenes.csv names the photographs)")


def assign(config: SimulateConfig, keys: list[str]) -> list[tuple[str, str, int, str]]:
    """(camera, split, scene number, photograph) of every photograph; each has one camera and one split."""
    if len(keys) < len(config.cameras):
        raise ValueError(
            f"input={config.input}: {len(keys)} photographs are too few for cameras={list(config.cameras)}, one each"
        )
    named = [key for key in keys if key.rpartition("/")[2] in config.test]
    if missing := set(config.test) - {key.rpartition("/")[2] for key in named}:
        raise ValueError(f"test={sorted(missing)[0]}: no such photograph in {config.input}")
    order = np.random.default_rng(config.seed).permutation(len(keys))
    shares: dict[str, list[str]] = {camera: [] for camera in config.cameras}
    for turn, index in enumerate(order):
        shares[config.cameras[turn % len(config.cameras)]].append(keys[index])
    assigned = []
    for camera, share in shares.items():
        free = [key for key in share if key not in named]
        count = round(len(free) * config.test_fraction)
        if config.test_fraction and len(free) > 1 and not named:
            count = max(count, 1)  # few photographs have a test scene too
        test = {key for key in share if key in named} | set(free[:count])
        assigned += [(camera, "Test" if key in test else "Train", n, key) for n, key in enumerate(share, 1)]
    return assigned


def photograph(config: SimulateConfig, source: Place, key: str) -> np.ndarray:
    """A photograph's pixels, shrunk to `longest_side`."""
    try:
        photo = images.decode(source.read(key))
        height, width, _ = photo.shape
        if config.longest_side and max(height, width) > config.longest_side:
            height, width = images.shrunk_size(height, width, max(height, width) / config.longest_side)
            images.check_size(height, width)
            photo = images.resize(photo, height, width)
    except images.ImageError as error:
        raise ValueError(f"{source.uri_of(key)}: {error}") from None
    return photo


def capture(
    config: SimulateConfig, photo: np.ndarray, camera: SimulatedCamera, target: Place, folder: str, name: str
) -> None:
    """Write one scene: its HR capture and its LR capture, into the folder of every scale."""
    seed = config.seed * 100_003 + int(name.rpartition("_")[2])
    hr = images.encode_png(camera.capture(photo, 1.0, seed=seed))
    for label, scale in config.scales.items():
        target.write(f"{folder}/{label}/{name}_HR.png", hr)
        lr = camera.capture(photo, scale, seed=seed)
        target.write(f"{folder}/{label}/{name}_LR{label}.png", images.encode_png(lr))
