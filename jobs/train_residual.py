"""Stage 2 for draws: train the flow of captured residuals on a RealSR-like tree, the autoencoder of stage 1 frozen.

    accelerate launch jobs/train_residual.py config=configs/small_residual.yaml scenes.data=runs/scenes/Canon/Train \\
        rae=runs/rae/rae.safetensors output=runs/residual

Stage 1 must have been trained with skips=optics. It ends in ONE file, output/degrader.safetensors, for
`jobs/synthesize.py model=...` and `Degrader.load`.

After a stop, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 save one and end the job with
exit code 75 (the launcher turns every code but 0 into 1).
"""

from degflow.config import run
from degflow.training.residual import TrainResidualConfig, train_residual

if __name__ == "__main__":
    run(train_residual, TrainResidualConfig, __doc__)
