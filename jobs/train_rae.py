"""Stage 1: train the residual autoencoder on a RealSR-like tree.

    accelerate launch jobs/train_rae.py config=configs/small_rae.yaml \\
        scenes.data=runs/scenes/Canon/Train output=runs/rae

writes output/rae.safetensors. Compare `decode(encode(LR))` with LR in the validation lines: a decoder that ignores the
latent stays at the PSNR of HR.

After a stop, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 save one and end the job with
exit code 75 (the launcher turns every code but 0 into 1).
"""

from degflow.config import run
from degflow.training.rae import TrainRAEConfig, train_rae

if __name__ == "__main__":
    run(train_rae, TrainRAEConfig, __doc__)
