"""Stage 1: train the residual autoencoder on a RealSR-like tree.

    accelerate launch jobs/train_rae.py config=configs/small_rae.yaml \\
        scenes.data=runs/scenes/Canon/Train output=runs/rae

It ends in output/rae.safetensors. Stopped at any time, the same command goes on from the last checkpoint. SIGTERM and
SIGUSR1 save one and leave with exit code 75 (the launcher turns every code but 0 into 1). Watch `decode(encode(LR))`
against LR in the validation lines: a decoder that ignores the latent stays at the PSNR of HR.
"""

from degflow.config import run
from degflow.training.rae import TrainRAEConfig, train_rae

if __name__ == "__main__":
    run(train_rae, TrainRAEConfig, __doc__)
