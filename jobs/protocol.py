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

from degflow import protocol
from degflow.config import dump, run
from degflow.protocol import ProtocolConfig
from degflow.storage import Place

JOBS = Path(__file__).parent


def main(config: ProtocolConfig) -> None:
    """Run what is not finished, and write the tables."""
    place = Place(config.output)
    if not place.local:
        raise ValueError(f"output={config.output}: must be a local folder")
    if bool(config.data) == bool(config.photographs):
        raise ValueError(f"data={config.data!r}, photographs={config.photographs!r}: exactly one must be given")
    place.write("config.yaml", dump(config).encode())
    planned = protocol.cells(config)
    for number, cell in enumerate(planned, 1):
        where = f"{number} of {len(planned)}: {cell.name}"
        if not protocol.finished(cell, place):
            print(f"{where} ...", flush=True)
            print(f"{where}: {protocol.perform(cell, place, JOBS, config.launch):.0f} s", flush=True)
            protocol.write_tables(config, place)
    protocol.write_tables(config, place)
    print(place.read("table.md").decode())
    print(f"tables: {config.output}")


if __name__ == "__main__":
    run(main, ProtocolConfig, __doc__)
