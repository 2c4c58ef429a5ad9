"""The pictures of README and docs.

pip install -e ".[docs]"
python docs/figures.py ladder                 # docs/ladder.png: HR, captured LR and generated LR at fixed scales
python docs/figures.py curves runs/fidelity   # docs/fidelity.png: from the parquet files that evaluate leaves there
python docs/figures.py restored TREE ... NAME=NETWORK ...   # docs/restored.png: x3 of test trees by SR networks
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from degflow import Degrader, evaluation, images
from degflow.capture.camera import SimulatedCamera
from degflow.capture.scenes import SceneConfig, SceneImages
from degflow.evaluation.crops import central, most_detailed
from degflow.restoration.networks import load

DOCS = Path(__file__).parent
PHOTOGRAPH, PLACE, SIDE = DOCS.parent / "examples" / "photographs" / "chelsea.jpg", (95, 130), 96
SCALES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
METHODS = {  # of measurements.parquet: how each is drawn
    "generated": ("generated, draws", "tab:red", "-"),
    "mean": ("generated, mean", "tab:orange", "-"),
    "optics": ("optics alone", "tab:blue", "--"),
    "gaussian": ("Gaussian blur", "tab:green", ":"),
    "bicubic": ("bicubic", "tab:gray", ":"),
}


def ladder() -> None:
    """Draw docs/ladder.png: a place of one photograph, captured by the simulated camera above, generated below."""
    photo = np.asarray(Image.open(PHOTOGRAPH).convert("RGB"))
    camera, degrader = SimulatedCamera.named("canon"), Degrader.load()
    hr = camera.capture(photo, 1.0)
    pixels = torch.from_numpy(hr).permute(2, 0, 1)[None] / 127.5 - 1
    drawn = degrader(pixels, torch.tensor([SCALES], dtype=torch.float64), seed=1)[0]
    generated = ((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = {
        "captured": [hr, *(camera.capture(photo, scale) for scale in SCALES)],
        "generated": [hr, *generated],
    }
    figure, axes = plt.subplots(2, len(SCALES) + 1, figsize=(14, 4.35), dpi=100)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture[PLACE[0] :, PLACE[1] :][:SIDE, :SIDE], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=13)
    for axis, scale in zip(axes[0], (None, *SCALES), strict=True):
        axis.set_title(f"x{scale:g}" if scale else "HR", fontsize=13)
    figure.subplots_adjust(left=0.03, right=0.998, top=0.93, bottom=0.01, wspace=0.03, hspace=0.03)
    figure.savefig(DOCS / "ladder.png")


def curves(folder: Path) -> None:
    """Draw docs/fidelity.png from `folder`/measurements.parquet: scores over the scale, means of the scenes."""
    rows = pq.read_table(folder / "measurements.parquet").to_pandas()
    rows = rows[rows.scale > 1]
    means = rows.groupby(["method", "scale"]).mean(numeric_only=True)
    noise = rows.groupby(["method", "scale"]).median(numeric_only=True)
    panels = {
        "psnr": "PSNR-Y in dB (higher is closer)",
        "lpips": "LPIPS (lower is closer)",
        "noise": "noise, levels of Y",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 4.2), dpi=100)
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for method, (label, colour, line) in METHODS.items():
            values = (noise if column == "noise" else means).loc[method, column]
            axis.plot(values.index, values, line, marker="o", markersize=4, color=colour, label=label)
        axis.set(title=title, xlabel="scale")
        axis.grid(alpha=0.3)
    captured = noise.loc["generated", "captured_noise"]
    axes[-1].plot(captured.index, captured, "-", marker="s", markersize=5, color="black", label="captured")
    axes[-1].set_ylim(bottom=0)
    axes[-1].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(DOCS / "fidelity.png")


@torch.inference_mode()
def restored(trees: list[str], networks: dict[str, str]) -> None:
    """Draw docs/restored.png: the most detailed place of every scene at 200%, LR, by each network, and HR."""
    scenes = [pixels for tree in trees for pixels in SceneImages(SceneConfig(tree, {"1": 1.0, "3": 3.0})).pixels]
    loaded = {title: load(uri) for title, uri in networks.items()}
    columns: dict[str, list[torch.Tensor]] = {title: [] for title in ("LR", *networks, "HR")}
    for pixels in scenes:
        hr, lr = images.to_tensor(central(pixels, 256)).split(1)
        top, left = most_detailed(hr, SIDE)
        made = {"LR": lr, **{title: network.restore(lr, 3.0) for title, network in loaded.items()}, "HR": hr}
        for title, image in made.items():
            shown = image[..., top : top + SIDE, left : left + SIDE]
            columns[title].append(shown.repeat_interleave(2, 2).repeat_interleave(2, 3))
    sheet = evaluation.contact_sheet([(title, torch.cat(shown)) for title, shown in columns.items()])
    (DOCS / "restored.png").write_bytes(images.encode_png(sheet))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ladder"]:
            ladder()
        case ["curves", folder]:
            curves(Path(folder))
        case ["restored", *words]:
            named = dict(word.split("=", 1) for word in words if "=" in word)
            restored([word for word in words if "=" not in word], named)
        case _:
            sys.exit(__doc__)
