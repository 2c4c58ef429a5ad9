"""HR images -> a dataset of LR images at randomly sampled, continuous degradation scales.

    python jobs/synthesize.py input=photos output=runs/dataset
    ray job submit --runtime-env cluster/ray/runtime_env.yaml -- python jobs/synthesize.py input=s3://... output=s3://...

It joins a running Ray cluster (RAY_ADDRESS) or starts a Ray on this machine. The same command continues a run that was
stopped, and leaves a finished dataset alone.
"""

from degflow.config import run
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig

if __name__ == "__main__":
    run(synthesize, SynthesizeConfig, __doc__)
