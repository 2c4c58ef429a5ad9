"""Train a super-resolution network on real or synthesized pairs, and test it under the published protocol.

    accelerate launch jobs/train_sr.py config=configs/paper_sr.yaml network.name=hat output=runs/hat \\
        'train={generated: runs/dataset}' 'test={canon: RealSR/Canon/Test, nikon: RealSR/Nikon/Test}'

A source of `train` is one split of a RealSR-like tree, at `levels`, or a dataset that `synthesize` made. The job writes
output/network.safetensors, table.md (means of each test tree), measurements.csv (every image) and a picture of each
test tree. The keys of a network are shown by --help network.name=NAME.

After a stop, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 save one and end the job with
exit code 75 (the launcher turns every code but 0 into 1).
"""

from degflow.config import run
from degflow.restoration.settings import TrainSRConfig
from degflow.restoration.training import train_sr

if __name__ == "__main__":
    run(train_sr, TrainSRConfig, __doc__)
