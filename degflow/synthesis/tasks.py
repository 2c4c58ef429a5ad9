"""The codec in Ray tasks: other processes, on any node, that ask for memory and may die."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import ray.exceptions
from ray._private import worker as ray_worker

from degflow.storage import Source
from degflow.synthesis.codec import DIED, Codec, CodecDied, Draw, NeedsMemory

CRASHES = 3  # after which Ray starts a task again; lost results, after which we do
KILLS = 5  # by Ray's memory monitor; it alone would start a task again for ever
_LEAST = 256 << 20  # bytes asked for, always a power of two: Ray keeps a queue for each size
_OF_A_NODE = (ray.exceptions.NodeDiedError, ray.exceptions.RaySystemError, ray.exceptions.ObjectLostError)
_FRESH = 60.0  # seconds for which the nodes' memory is believed


@ray.remote(max_retries=CRASHES)
def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    # With max_retries=0, Ray would kill the actor instead of this task when memory runs out.
    if attempts_before() >= KILLS:
        raise CodecDied(f"{DIED}, {KILLS} times over: killed as its node ran out of memory")
    return function(*arguments)


def attempts_before() -> int:
    """How often Ray has started the task that runs here, or the call of an actor, in processes that died."""
    process: Any = ray_worker.global_worker
    return process.core_worker.get_current_task_attempt_number()


class _Task:
    """A Ray task; a `codec.Handle`. `start` starts it, with so many bytes of memory."""

    def __init__(self, start: Callable[[int], ray.ObjectRef], memory: int):
        self.start, self.memory, self.lost = start, memory, 0
        self.reference = start(memory)

    def result(self) -> Any:
        """Wait for its result, and raise what the function raised.

        One that needs more memory is started again, and so is one whose node is gone or starts no process.
        """
        while isinstance(found := self._found(), NeedsMemory):
            self.memory = found.bytes
            self.reference = self.start(self.memory)
        return found

    def _found(self) -> Any:
        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise CodecDied(f"{DIED}, {CRASHES + 1} times over ({type(error).__name__})") from None
        except _OF_A_NODE:
            self.lost += 1
            if self.lost > CRASHES:
                raise
            return NeedsMemory(self.memory)


class Tasks:
    """Run the codec as Ray tasks; `codec.Workers`.

    If the actors are on GPUs, a task takes one CPU of any node; Ray prefers nodes without GPUs. If they are on CPUs, it
    takes none, because the actors may have taken all of them. Either takes memory, so that no node is overfilled.

    Args:
        gpus: of an actor.
    """

    def __init__(self, gpus: int):
        self.cpus = 1 if gpus else 0
        self._most, self._seen = 0, 0.0

    def load(self, codec: Codec, source: Source, patience: float | None = None) -> _Task:
        """Start `Codec.load`."""

        def start(memory: int) -> ray.ObjectRef:
            asked = self._asked(memory)
            # What no node has is not asked for: the file is then decoded with all the memory of the largest node.
            room = asked if asked >= memory else None
            return self._remote(asked).remote(codec.load, source, patience, room)

        return _Task(start, codec.memory_for(source))

    def encode(self, codec: Codec, item: _Task, draws: Sequence[Draw], lrs: np.ndarray) -> _Task:
        """Start `Codec.encode` of what another task has loaded."""

        def start(memory: int) -> ray.ObjectRef:
            return self._remote(self._asked(memory)).remote(codec.encode, item.reference, draws, lrs)

        return _Task(start, codec.memory_to_encode(lrs))

    def _remote(self, memory: int) -> Any:
        return _call.options(num_cpus=self.cpus, memory=memory)

    def _asked(self, memory: int) -> int:
        """The bytes to ask for: `memory`, rounded up, or all that the largest node has."""
        if time.monotonic() - self._seen > _FRESH or not self._most:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            able = [int(node.get("memory", 0)) for node in nodes if node.get("CPU", 0) >= self.cpus]
            self._most, self._seen = max(able, default=0), time.monotonic()
        return min(max(_LEAST, 1 << (memory - 1).bit_length()), self._most)
