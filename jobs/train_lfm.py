"""The published stage 2: train the latent flow on a RealSR-like tree, the autoencoder of stage 1 frozen.

    accelerate launch jobs/train_lfm.py config=configs/small_lfm.yaml scenes.data=runs/scenes/Canon/Train \\
        rae=runs/rae/rae.safetensors output=runs/lfm

It ends in ONE file, output/degrader.safetensors, for `jobs/synthesize.py model=...` and `Degrader.load`.

After a stop, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 save one and end the job with
exit code 75 (the launcher turns every code but 0 into 1).
"""

from degflow.config import run
from degflow.training.lfm import TrainLFMConfig, train_lfm

if __name__ == "__main__":
    run(train_lfm, TrainLFMConfig, __doc__)
