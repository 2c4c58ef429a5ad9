"""HR images -> a dataset of LR images at randomly sampled, continuous degradation scales.

    python jobs/synthesize.py input=photos output=runs/dataset
    ray job submit --working-dir . -- python jobs/synthesize.py input=s3://bucket/photos output=s3://bucket/dataset

It joins a running Ray cluster (RAY_ADDRESS) or starts a Ray on this machine. The same command continues a run that was
stopped, and leaves a finished dataset alone.
"""

from degflow.config import run
from degflow.synthesis import SynthesizeConfig, synthesize

if __name__ == "__main__":
    run(synthesize, SynthesizeConfig, __doc__)
