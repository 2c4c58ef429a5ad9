"""The Frechet distance between captured and generated LR patches, in features of the LPIPS backbone.

It asks whether patches *as a set* look like captured ones: a Gaussian is fitted to the features of each set, and the
distance of the two is |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau, 1982; used for images by Heusel et al.,
"GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017). Features here are
those of the backbone's third block, averaged over windows of 32 pixels: they see noise and small textures, where
Inception's see objects. It is not zero for two finite sets of one distribution, so compare it only between methods on
the same images.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from degflow.perceptual import Perceptual

WINDOW = 32  # pixels along the side of a patch; patches overlap by half
BLOCK = 2  # VGG: 256 features after relu3_3; AlexNet: 384 after its third convolution
CAPTURED = "captured"


class Distance(NamedTuple):
    """Of one method's LR images to the captured ones at one level, over all scenes."""

    label: str
    method: str
    distance: float
    patches: int


class Moments:
    """Mean and covariance of features that come in parts, in float64."""

    def __init__(self):
        self.count, self.sum, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Take in "N D"."""
        features = features.double()
        self.count += len(features)
        self.sum = self.sum.to(features) + features.sum(0)
        self.products = self.products.to(features) + features.T @ features

    @property
    def mean(self) -> Tensor:
        """ "D"."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """ "D D"."""
        return self.products / self.count - torch.outer(self.mean, self.mean)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Frechet distance of the two Gaussians."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    both = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + a.covariance.trace() + b.covariance.trace() - 2 * both))  # rounding may leave -1e-4


class Frechet:
    """Collects images by level and method; CAPTURED is the method of the captured ones.

    Args:
        perceptual: whose backbone's features are taken.
    """

    def __init__(self, perceptual: Perceptual):
        self.perceptual = perceptual
        self.moments: defaultdict[tuple[str, str], Moments] = defaultdict(Moments)

    @torch.inference_mode()
    def add(self, label: str, method: str, image: Tensor) -> None:
        """Take in the patches of "1 3 H W" in [-1, 1]; H and W at least 32, smaller images are left out."""
        if min(image.shape[-2:]) < WINDOW:
            return
        features = self.perceptual.features(image)[BLOCK]
        side = min(round(WINDOW * features.shape[-1] / image.shape[-1]), *features.shape[-2:])
        self.moments[label, method].add(F.avg_pool2d(features, side, max(1, side // 2))[0].flatten(1).T)

    def distances(self) -> list[Distance]:
        """Of every level and method, in the order in which they came."""
        return [
            Distance(label, method, frechet_distance(self.moments[label, CAPTURED], found), found.count)
            for (label, method), found in self.moments.items()
            if method != CAPTURED
        ]
