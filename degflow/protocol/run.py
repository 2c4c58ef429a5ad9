"""The experiment: every cell that is not finished, then the tables."""

from dataclasses import replace

from degflow.config import dump
from degflow.protocol.cells import finished, perform
from degflow.protocol.checks import check
from degflow.protocol.plan import ProtocolConfig, cells
from degflow.protocol.tables import write_tables
from degflow.storage import Place


def run_protocol(config: ProtocolConfig) -> None:
    """Run what is not finished, and write the tables.

    Raises:
        ValueError: before any cell runs, a cell that could not run, or that was finished with other words.
    """
    place = Place(config.output)
    if not place.local:
        raise ValueError(f"output={config.output}: must be a local folder")
    if bool(config.data) == bool(config.photographs):
        raise ValueError(f"data={config.data!r}, photographs={config.photographs!r}: exactly one must be given")
    config = replace(config, output=place.uri)  # without a slash at the end: words are compared
    planned = cells(config)
    missing = [(number, cell) for number, cell in enumerate(planned, 1) if not finished(cell, place)]
    check([cell for _, cell in missing], config.output)
    place.write("config.yaml", dump(config).encode())
    for number, cell in missing:
        where = f"{number} of {len(planned)}: {cell.name}"
        print(f"{where} ...", flush=True)
        print(f"{where}: {perform(cell, place, config.launch):.0f} s", flush=True)
        write_tables(config, place)
    write_tables(config, place)
    print(place.read("table.md").decode())
    print(f"tables: {config.output}")
