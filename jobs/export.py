"""A finished dataset -> folders or tars that SR trainers read.

    python jobs/export.py input=runs/dataset output=runs/paired                                   # gt/, lq/, meta_info
    python jobs/export.py input=s3://bucket/dataset output=runs/tars layout=webdataset
    python jobs/export.py input=runs/dataset output=runs/tree layout=realsr labels='{2: 2.0, 3: 3.0, 4: 4.0}'

The same command continues an export that was stopped, and leaves a finished one alone.
"""

from degflow.config import run
from degflow.dataset.exports import ExportConfig, export

if __name__ == "__main__":
    run(export, ExportConfig, __doc__)
