"""How close generated LR images come to captured ones: PSNR and SSIM under the published protocol, tables, pictures.

The protocol of RealSR's papers: luma of ITU-R BT.601 in 16..235, 4 pixels shaved from each border, data range 255,
float64; SSIM with a 7 x 7 uniform window and sample covariance; LPIPS on full RGB. `psnr`
and `ssim` do not quantise; `measure` scores LR images as the 8-bit images that a dataset holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from degflow import images
from degflow.degrader import Degrader, pad
from degflow.models import ResidualAutoencoder
from degflow.objectives import to_float
from degflow.scenes import SceneImages

SHAVE = 4


def luma(image: Tensor) -> Tensor:
    """Y of ITU-R BT.601: "B 3 H W" in [-1, 1] -> "B H W" float64 in 16..235."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=image.device)
    return 16 + torch.einsum("c,bchw->bhw", weights, (image.double() + 1) / 2)


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, "B 3 H W" twice -> "B" float64; inf for equal images."""
    a, b = _shaved(image, reference, 1)
    return 10 * torch.log10(255**2 / (a - b).square().mean((1, 2)))


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, uniform 7 x 7 window), "B 3 H W" twice -> "B" float64."""
    a, b = (part[:, None] for part in _shaved(image, reference, 7))
    mean_a, mean_b = F.avg_pool2d(a, 7, 1), F.avg_pool2d(b, 7, 1)
    unbiased = 49 / 48
    var_a = unbiased * (F.avg_pool2d(a * a, 7, 1) - mean_a**2)
    var_b = unbiased * (F.avg_pool2d(b * b, 7, 1) - mean_b**2)
    cov = unbiased * (F.avg_pool2d(a * b, 7, 1) - mean_a * mean_b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean((1, 2, 3))


def _shaved(image: Tensor, reference: Tensor, smallest: int) -> tuple[Tensor, Tensor]:
    if image.shape != reference.shape:
        raise ValueError(f"image {tuple(image.shape)} and reference {tuple(reference.shape)}: must have one shape")
    if min(image.shape[-2:]) < 2 * SHAVE + smallest:
        raise ValueError(
            f"image {tuple(image.shape)}: sides must be at least {2 * SHAVE + smallest} "
            f"({SHAVE} pixels are shaved from each border)"
        )
    inner = slice(SHAVE, -SHAVE)
    return luma(image)[:, inner, inner], luma(reference)[:, inner, inner]


def bicubic(hr: Tensor, scale: float) -> Tensor:
    """The baseline: antialiased bicubic down by `scale` and back, through 8-bit, "B 3 H W" in [-1, 1]."""

    def there_and_back(pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        return images.resize(images.resize(pixels, *images.shrunk_size(height, width, scale)), height, width)

    return images.to_tensor(np.stack([there_and_back(pixels) for pixels in images.to_pixels(hr)]))


@torch.inference_mode()
def reconstruct(autoencoder: ResidualAutoencoder, hr: Tensor, lr: Tensor) -> Tensor:
    """decode(encode(LR); skips of HR), the best that any flow could reach with this autoencoder."""
    multiple = autoencoder.config.compression
    _, skips = autoencoder.encode(pad(hr, multiple))
    latent, _ = autoencoder.encode(pad(lr, multiple))
    return autoencoder.decode(latent, skips)[..., : hr.shape[-2], : hr.shape[-1]].clamp(-1, 1)


class Measurement(NamedTuple):
    """One LR image of one scene, made by one method, against the captured one."""

    scene: str
    label: str
    scale: float
    method: str
    psnr: float
    ssim: float
    lpips: float
    psnr_to_hr: float


METHODS = ("generated", "hr", "bicubic", "autoencoder")


def measure(
    degrader: Degrader,
    scenes: SceneImages,
    levels: Mapping[str, float],
    perceptual: nn.Module | None,
    crop: int = 0,
    **solver: int | str,
) -> Iterator[Measurement]:
    """Compare every method's LR with the captured one, at every level but HR's.

    Args:
        degrader: what is judged.
        scenes: captured scenes with the levels' images.
        levels: label -> scale, in the scenes' order; label 1 (HR) is what the methods start from.
        perceptual: LPIPS, or None to leave it out (NaN).
        crop: side of the central crop (smaller where a scene is); 0 takes whole images.
        solver: `steps`, `solver` of the degrader.
    """
    labels = [label for label in levels if label != "1"]
    device = next(degrader.parameters()).device
    for scene, pixels in zip(scenes.scenes, scenes.pixels, strict=True):
        real = images.to_tensor(_center(pixels, crop)).to(device)
        hr = real[:1]
        scales = torch.tensor([[levels[label] for label in labels]], dtype=torch.float64)
        generated = degrader(hr, scales, **solver)[0]  # type: ignore[arg-type]
        for n, label in enumerate(labels):
            lr = real[n + 1 : n + 2]
            made = (generated[n : n + 1], hr, bicubic(hr.cpu(), levels[label]).to(device))
            made = (*made, reconstruct(degrader.autoencoder, hr, lr))
            for method, image in zip(METHODS, made, strict=True):
                image = images.to_tensor(images.to_pixels(image)).to(device)
                with torch.inference_mode():
                    lpips = float(perceptual(image, lr)) if perceptual else float("nan")
                scores = (float(psnr(image, lr)), float(ssim(image, lr)), lpips, float(psnr(image, hr)))
                yield Measurement(scene.name, label, levels[label], method, *scores)


def _center(pixels: np.ndarray, crop: int) -> np.ndarray:
    if not crop:
        return pixels
    top, left = (max(0, side - crop) // 2 for side in pixels.shape[1:3])
    return pixels[:, top : top + crop, left : left + crop]


def fidelity_table(measurements: Sequence[Measurement]) -> str:
    """Markdown: a row per level, mean PSNR / SSIM / LPIPS of each method over the scenes."""
    titles = {
        "generated": "generated",
        "hr": "HR unchanged",
        "bicubic": "bicubic",
        "autoencoder": "autoencoder's limit",
    }
    lines = ["| scale | " + " | ".join(titles.values()) + " | captured LR to HR | generated to HR |"]
    lines.append("|---" * (len(titles) + 3) + "|")
    for label in dict.fromkeys(row.label for row in measurements):
        cells = []
        for method in METHODS:
            rows = [row for row in measurements if row.label == label and row.method == method]
            cells.append(" / ".join(_mean(rows, name, form) for name, form in _FORMS))
        captured = [row for row in measurements if row.label == label and row.method == "hr"]
        generated = [row for row in measurements if row.label == label and row.method == "generated"]
        cells += [_mean(captured, "psnr", "{:.2f}"), _mean(generated, "psnr_to_hr", "{:.2f}")]
        lines.append(f"| x{label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_FORMS = (("psnr", "{:.2f}"), ("ssim", "{:.4f}"), ("lpips", "{:.4f}"))


def _mean(rows: Sequence[Measurement], name: str, form: str) -> str:
    return form.format(float(np.mean([getattr(row, name) for row in rows])))


def sweep(
    degrader: Degrader, scenes: SceneImages, count: int, crop: int = 0, **solver: int | str
) -> dict[float, float]:
    """Mean PSNR in dB of generated LR against HR, on an even grid of `count` scales over the trained range."""
    scales = torch.linspace(degrader.low, degrader.high, count, dtype=torch.float64)
    totals = torch.zeros(count, dtype=torch.float64)
    device = next(degrader.parameters()).device
    for pixels in scenes.pixels:
        hr = images.to_tensor(_center(pixels, crop)[:1]).to(device)
        for part in torch.arange(count).split(8):
            made = degrader(hr, scales[None, part], **solver)[0]  # type: ignore[arg-type]
            totals[part] += psnr(made, hr.expand(len(part), -1, -1, -1)).cpu()
    return dict(zip(scales.tolist(), (totals / len(scenes)).tolist(), strict=True))


def validation_crops(scenes: SceneImages, count: int = 6, side: int = 192) -> Tensor:
    """Central crops of evenly spaced scenes, uint8 "N K 3 side side" (smaller where a scene is)."""
    chosen = np.unique(np.linspace(0, len(scenes) - 1, count).astype(int))
    side = min(side, *(min(scenes.pixels[n].shape[1:3]) for n in chosen))
    crops = np.stack([_center(scenes.pixels[n], side) for n in chosen])
    return torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 1, 4, 2, 3)))


def reconstruction(
    autoencoder: ResidualAutoencoder, crops: Tensor, labels: Sequence[str]
) -> tuple[dict[str, float], np.ndarray]:
    """PSNR of decode(encode(level); HR skips) at every level, and a picture with rows HR | LR | decoded LR ..."""
    device = next(autoencoder.parameters()).device
    image = to_float(crops.to(device))
    hr, scalars, columns = image[:, 0], {}, []
    for level, label in enumerate(labels):
        decoded = reconstruct(autoencoder, hr, image[:, level])
        scalars[f"x{label}"] = float(psnr(decoded, image[:, level]).mean())
        columns += [(f"x{label}", image[:, level]), (f"x{label} decoded", decoded)]
    return scalars, contact_sheet(columns)


def generation(degrader: Degrader, crops: Tensor, labels: Sequence[str]) -> tuple[dict[str, float], np.ndarray]:
    """PSNR of generated against real LR at every trained level, and a picture: HR | real and generated LR | between."""
    device = next(degrader.parameters()).device
    image = to_float(crops.to(device))
    scales = [degrader.levels[label] for label in labels[1:]]
    between = [(a + b) / 2 for a, b in zip(list(degrader.levels.values()), scales, strict=False)]
    made = degrader(image[:, 0], torch.tensor([scales + between], dtype=torch.float64).expand(len(image), -1))
    scalars, columns = {}, [("HR", image[:, 0])]
    for n, label in enumerate(labels[1:]):
        scalars[f"x{label}"] = float(psnr(made[:, n], image[:, n + 1]).mean())
        columns += [(f"x{label} real", image[:, n + 1]), (f"x{scales[n]:.2f} generated", made[:, n])]
    columns += [(f"x{scale:.2f} generated", made[:, len(scales) + n]) for n, scale in enumerate(between)]
    return scalars, contact_sheet(columns)


def contact_sheet(columns: Sequence[tuple[str, Tensor]], margin: int = 4, title: int = 16) -> np.ndarray:
    """Columns of titled images ("N 3 H W" each) -> one picture, uint8 "H W 3"."""
    count, _, height, width = columns[0][1].shape
    size = (len(columns) * (width + margin) + margin, title + count * (height + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, batch) in enumerate(columns):
        left = margin + column * (width + margin)
        draw.text((left, 2), name, fill="black")
        for row, pixels in enumerate(images.to_pixels(batch)):
            sheet.paste(Image.fromarray(pixels), (left, title + margin + row * (height + margin)))
    return np.asarray(sheet)
