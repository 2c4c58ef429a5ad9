"""The processes of a training: their numbers, what they exchange, and the error when one is lost."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor, distributed

FINISH = 24 * 3600  # seconds that the main process may take for what comes after the last step


def is_main_process() -> bool:
    """Whether this process prints and writes; known before `fit`, from the launcher's environment."""
    return int(os.environ.get("RANK", "0")) == 0


def local_share() -> tuple[int, int]:
    """(n, N): this is process n of the N of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_device() -> torch.device:
    """The device that Accelerate gives this process; known before `fit`, for what is computed apart from it."""
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.device("cuda", local_share()[0])


def join(precision: str, timeout: int) -> Accelerator:
    """Connect to the other processes.

    Args:
        precision: one of `PRECISIONS`. Accelerate scales the gradients of float16; `fit` does the rest.
        timeout: seconds after which waiting for another process is an error.

    Raises:
        ValueError: a kind of launch that `fit` does not support.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    with lost(f"fit.timeout={timeout}"):
        scaled = "fp16" if precision == "float16" else "no"
        accelerator = Accelerator(mixed_precision=scaled, kwargs_handlers=[patience])
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate launch --gradient_accumulation_steps={accelerator.gradient_accumulation_steps}: "
            "leave it at 1 and set fit.accumulate"
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate launch with {accelerator.distributed_type.value}: only data parallelism (DDP) works"
        )
    return accelerator


class Hosts:
    """What the processes tell each other from host to host, without waiting for their devices.

    Args:
        accelerator: of `join`.
        timeout: as in `join`.
    """

    def __init__(self, accelerator: Accelerator, timeout: int):
        self.alone = accelerator.num_processes == 1
        self.group, self.last = (None, None) if self.alone else (_group(timeout), _group(FINISH))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, the same in all of them."""
        if self.alone:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, self.group)
        return int(found)

    def meet(self) -> None:
        """Wait until all processes have come here, for at most `FINISH` seconds."""
        if not self.alone:
            distributed.barrier(self.last)


def gathered(accelerator: Accelerator, number: int) -> list[int]:
    """The number that each process has."""
    return cast(Tensor, accelerator.gather(torch.tensor([number], device=accelerator.device))).tolist()


def _group(timeout: int) -> distributed.ProcessGroup:
    """All processes, which may wait so many seconds for each other."""
    return cast(distributed.ProcessGroup, distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))


@contextlib.contextmanager
def lost(patience: str) -> Iterator[None]:
    """Turn the RuntimeError of a broken connection into a ConnectionError that says what it means."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error).lower():
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConnectionError(
            f"another process of this training ended, or did not answer within {patience} s; "
            f"its own message says why ({type(error).__name__}: {reason})"
        ) from error
