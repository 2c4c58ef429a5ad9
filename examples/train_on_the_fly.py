"""Train a small SR network on photographs that are degraded inside the training loop, without making a dataset first.

    pip install -e ".[sr]"
    python examples/train_on_the_fly.py examples/photographs 60

Takes 40 s on two CPU cores. The loss is L1 in [0, 1]; "of LR" is the loss of an unchanged LR image, where
this network starts. So few steps show that the loop works; a network gets better than its input in hundreds of them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from degflow import RandomDegradation
from degflow.restoration.networks import NetworkConfig, RCANConfig, build

CROP, MARGIN, BATCH, PRINT_EVERY = 64, 16, 8, 10


class HRCrops(Dataset):
    """Random HR crops in [0, 1], "3 side side": what a trainer such as BasicSR calls GT."""

    def __init__(self, folder, side):
        self.files, self.side = sorted(Path(folder).glob("*.jpg")) + sorted(Path(folder).glob("*.png")), side

    def __len__(self):
        return 1000 * len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files[index % len(self.files)]) as photograph:
            left, top = (int(torch.randint(size - self.side + 1, ())) for size in photograph.size)
            crop = photograph.convert("RGB").crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(crop)).movedim(-1, 0) / 255


def train(folder, steps):
    """Train for some steps, and print the loss."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rcan = RCANConfig(width=32, groups=2, blocks=4, squeeze=8)
    network = build(NetworkConfig("rcan", residual=True, upsampling="one", rcan=rcan)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 2e-4)
    degrade = RandomDegradation(seed=0, value_range=(0, 1), margin=MARGIN)  # the degrader that ships, x1 to x4

    crops = HRCrops(folder, CROP + 2 * MARGIN)
    losses = []
    for step, hr in enumerate(DataLoader(crops, BATCH, shuffle=True, num_workers=1), 1):
        hr = hr.to(device)
        lr, _ = degrade(hr)  # the scales are for networks that want to know them
        hr = degrade.without_margin(hr)
        restored = (network(2 * lr - 1) + 1) / 2  # degflow's networks work in [-1, 1]
        loss = F.l1_loss(restored, hr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), F.l1_loss(lr, hr).item()))
        if step % PRINT_EVERY == 0 or step == steps:
            mine, unchanged = torch.tensor(losses).mean(0).tolist()
            print(f"step {step}: loss {mine:.4f} (of LR {unchanged:.4f})", flush=True)
            losses = []
        if step == steps:
            return


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "examples/photographs", int(sys.argv[2]) if len(sys.argv) > 2 else 60)
