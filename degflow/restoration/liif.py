"""LIIF (Chen, Liu and Wang 2021, section 3): an image as a function of continuous coordinates.

Coordinates are (row, column) in [-1, 1], -1 and 1 being the image's outer borders.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.config import option


@dataclass(frozen=True)
class LIIFConfig:
    """Size of a LIIF network; the defaults are the paper's, on EDSR-baseline."""

    width: int = option(64, "channels of the encoder")
    blocks: int = option(16, "residual blocks of the encoder")
    hidden: tuple[int, ...] = option((256, 256, 256, 256), "hidden layers of the function")
    queries: int = option(2304, "HR pixels of each training sample")

    def __post_init__(self):
        for name in ("width", "blocks", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"liif.{name}={getattr(self, name)}: must be at least 1")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"liif.hidden={list(self.hidden)}: at least one entry, each at least 1")


class EDSRBlock(nn.Module):
    """Two convolutions, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """ "B C H W" -> the same shape."""
        return x + self.body(x)


class LIIF(nn.Module):
    """An encoder, and a function of its features and coordinates.

    Args:
        config: sizes.
    """

    def __init__(self, config: LIIFConfig):
        super().__init__()
        self.first = nn.Conv2d(3, config.width, 3, padding=1)
        blocks = [EDSRBlock(config.width) for _ in range(config.blocks)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(config.width, config.width, 3, padding=1))
        sizes = (9 * config.width + 4, *config.hidden)
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.function = nn.Sequential(*layers, nn.Linear(sizes[-1], 3))

    def encode(self, image: Tensor) -> Tensor:
        """ "B 3 h w" -> features of each pixel and its eight neighbours, "B 9C h w" (feature unfolding)."""
        first = self.first(image)
        features = first + self.blocks(first)
        return F.unfold(features, 3, padding=1).unflatten(-1, features.shape[-2:])

    def ask(self, features: Tensor, coordinates: Tensor, cell: Tensor) -> Tensor:
        """Colours at coordinates: of the four nearest pixels, each weighted by the area of the opposite rectangle.

        Args:
            features: "B 9C h w".
            coordinates: "B Q 2".
            cell: "B 2", height and width of the wanted pixels.

        Returns:
            "B Q 3".
        """
        height, width = features.shape[-2:]
        signs = torch.arange(-1.0, 2.0, 2.0, device=coordinates.device, dtype=coordinates.dtype)
        size = torch.stack((signs.new_full((), height), signs.new_full((), width)))  # made there: nothing waits
        corners = torch.cartesian_prod(signs, signs)
        pixels, batch = features.flatten(2).transpose(1, 2), torch.arange(len(features), device=size.device)[:, None]
        answers, areas = [], []
        for corner in corners:
            # The nearest pixel centre in this direction; the shift is a little less than half a pixel.
            index = ((coordinates + corner * (1 - 1e-4) / size + 1) / 2 * size).floor()
            index = torch.minimum(index.clamp(min=0), size - 1)
            found = pixels[batch, (index[..., 0] * width + index[..., 1]).long()]
            offset = (coordinates - ((2 * index + 1) / size - 1)) * size
            cells = (cell * size)[:, None].expand_as(offset)
            answers.append(self.function(torch.cat((found, offset.to(found.dtype), cells.to(found.dtype)), -1)))
            areas.append((offset.abs() + 1e-6).prod(-1))  # a query in a row of centres has two corners there
        weights = torch.stack(areas[::-1])  # the corner opposite to (-1, -1) is (1, 1), and so on
        weights = (weights / weights.sum(0))[..., None]
        return (torch.stack(answers) * weights).sum(0)


def pixel_centres(height: int, width: int) -> Tensor:
    """Coordinates of every pixel's centre in row-major order, "H*W 2"."""
    rows, columns = ((2 * torch.arange(side) + 1) / side - 1 for side in (height, width))
    return torch.cartesian_prod(rows, columns)
