"""The paper's experiment: the cells (`plan`), `checks` before them, running them (`cells`, `run`), and `tables`."""

from degflow.protocol.cells import finished, perform
from degflow.protocol.plan import Cell, ProtocolConfig, cells
from degflow.protocol.tables import write_tables

__all__ = ["Cell", "ProtocolConfig", "cells", "finished", "perform", "write_tables"]
