"""The authors' two released weight files -> one degrader file for everything in degflow.

    python jobs/import_released.py autoencoder=AE.pth flow=FLOW.pth output=runs/released/degrader.safetensors

Any width and depth of the released architecture is accepted, and safetensors files with the same names too. Files are
read as tensors only: a pickle that would run code is refused.
"""

from degflow.config import run
from degflow.training.released import ImportConfig, import_released

if __name__ == "__main__":
    run(import_released, ImportConfig, __doc__)
