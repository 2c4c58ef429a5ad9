"""The paper's whole experiment from one configuration, cell by cell, into one table.

    python jobs/protocol.py config=configs/small_protocol.yaml photographs=photos output=runs/protocol

1. A degrader is trained on camera A's pairs (or given), and so are its ablations; each is compared with captured LR.
2. It degrades the HR photographs of camera B.
3. SR networks are trained on real and on generated pairs, and tested on the test level of both cameras.

Each step is a run of another job, with its log in output/cells; what is finished is not run again, so the same command
goes on after a stop. output/table.md has the results with the published ones beside them, and is written anew after
each cell; results.csv has every single run. Lists of words (`rae`, `lfm`, ...) are arguments of those jobs, and end
theirs; paths in them are relative to where this job is started.
"""

from pathlib import Path

from degflow.config import run
from degflow.protocol.run import ProtocolConfig, run_protocol

if __name__ == "__main__":
    run(lambda config: run_protocol(config, Path(__file__).parent), ProtocolConfig, __doc__)
