"""The ranks of a training: which one this process is, and the parts that all of them read."""

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed

from degflow.dataset.reader import Part, parts_there


def processes(rank: int | None, world: int | None) -> tuple[int, int]:
    """Rank and number of processes: as given, or else from torch.distributed, or else from the launcher.

    Raises:
        ValueError: not 0 <= rank < world; or a launcher of several processes that does not tell this one its rank.
    """
    if rank is None and world is None:
        if _in_group():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world = _launched()
    if rank is None or world is None or not 0 <= rank < world:
        raise ValueError(f"rank={rank}, world={world}: give both, with 0 <= rank < world")
    return rank, world


def check_rank(rank: int, world: int) -> None:
    """Raise ValueError if torch.distributed has started meanwhile, and says something else."""
    if _in_group() and (torch.distributed.get_rank(), torch.distributed.get_world_size()) != (rank, world):
        raise ValueError(
            f"made as rank {rank} of {world} before torch.distributed started, which says rank "
            f"{torch.distributed.get_rank()} of {torch.distributed.get_world_size()}: make this object after that, or "
            "give it rank and world"
        )


def own_rank() -> int:
    """The rank of this process: of torch.distributed, or else the launcher's.

    Raises:
        ValueError: a launcher of several processes that does not tell this one its rank.
    """
    if _in_group():
        return torch.distributed.get_rank()
    return int(os.environ["RANK"]) if "RANK" in os.environ else _launched()[0]


def _launched() -> tuple[int, int]:
    """RANK and WORLD_SIZE of the environment; 0 and 1 where no launcher started several processes."""
    given = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if len(given) < 2:
        # Of Lightning's processes before they join, of srun, and of mpirun; LOCAL_RANK begins with 0.
        least = {"WORLD_SIZE": 2, "LOCAL_RANK": 1, "SLURM_STEP_NUM_TASKS": 2, "OMPI_COMM_WORLD_SIZE": 2}
        if signs := [f"{name}={os.environ[name]}" for name in least if int(os.environ.get(name, 0)) >= least[name]]:
            raise ValueError(
                f"{', '.join(signs)}: one of several processes, but RANK and WORLD_SIZE do not say which. Make this "
                "object after torch.distributed has started, or give it the rank (SynthesizedPairs: and the world)"
            )
    return given.get("RANK", 0), given.get("WORLD_SIZE", 1)


def agreed_parts(uri: str, names: Sequence[str] | None, world: int, *, given: bool) -> list[Part]:
    """The parts that are there, the same on all ranks; all ranks must call it.

    Args:
        uri: the dataset's folder or URI.
        names: of the parts; None: all that rank 0 sees.
        world: number of ranks.
        given: whether the user gave rank and world; then torch.distributed may have others.

    Raises:
        ValueError: no dataset, no such part, no rows yet, or ranks that could differ.
        OSError: the dataset cannot be read.
    """
    if names is not None or world == 1:
        return _with_rows(uri, names)
    if given or not _in_group():
        raise ValueError(
            f"unfinished=True, world={world}: ranks that look at different moments would read different parts; start "
            "torch.distributed first and leave out rank and world, or give all ranks the same parts="
        )
    told: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            told = [_with_rows(uri, None)]
        except (ValueError, OSError) as error:  # the others wait for an answer
            told = [error]
    torch.distributed.broadcast_object_list(told)
    if isinstance(told[0], Exception):
        raise told[0]
    return told[0]


def _with_rows(uri: str, names: Sequence[str] | None) -> list[Part]:
    parts = parts_there(uri, names)
    if not any(part.rows for part in parts):
        raise ValueError(f"{uri}: no rows yet" if names is None else f"{uri}: parts={list(names)}: no rows in them")
    return parts


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
