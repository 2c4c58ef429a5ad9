"""The paper's whole experiment from one configuration, cell by cell, into one table.

    python jobs/protocol.py config=configs/small_protocol.yaml photographs=photos output=runs/protocol

1. A degrader is trained on camera A's pairs (or given), and so are its ablations. Each is compared with captured LR.
2. It degrades the HR photographs of camera B.
3. SR networks are trained on real and on generated pairs, and tested on the test level of both cameras.

Each cell is a run of another job, with its log in output/cells. Finished cells are not run again, so the same command
continues after a stop. output/table.md shows the results beside the published ones and is rewritten after each cell;
results.csv has every single run. Lists of words (`rae`, `lfm`, ...) are added to the arguments of those jobs. Paths in
them are relative to the current folder.
"""

from pathlib import Path

from degflow.config import run
from degflow.protocol.run import ProtocolConfig, run_protocol

if __name__ == "__main__":
    run(lambda config: run_protocol(config, Path(__file__).parent), ProtocolConfig, __doc__)
