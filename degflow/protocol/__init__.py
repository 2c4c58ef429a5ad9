"""The paper's experiment: what is to be run (`plan`), running it (`cells`), and what came out (`tables`)."""

from degflow.protocol.cells import finished, perform
from degflow.protocol.plan import Cell, ProtocolConfig, cells
from degflow.protocol.tables import write_tables

__all__ = ["Cell", "ProtocolConfig", "cells", "finished", "perform", "write_tables"]
