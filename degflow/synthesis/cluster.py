"""What keeps a run from starting, in words: no Ray at its address, no node for an actor, none that starts."""

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private import services, state
from ray._private.utils import get_num_cpus

ANSWERS_WITHIN = 5.0  # seconds, for a Ray that is just starting
FIRST_WORD, NEXT_WORD = 20.0, 60.0  # seconds without an actor
STARTS = 3  # that fail on a node before it is named
_UNNAMED: Any = None  # as `ray.init` asks, although the type is str
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # what a gRPC client sends first
_COMPILERS = {"cpu": ("CXX", "clang++" if sys.platform == "darwin" else "g++"), "cuda": ("CC", "gcc", "clang")}


def check_address() -> None:
    """See that a Ray answers at the address that `ray.init` would join, if there is one.

    Ray itself tries for two minutes, and its C++ code writes a line every few seconds.

    Raises:
        OSError: none does.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    address = named.partition("://")[2] or services.canonicalize_bootstrap_address(_UNNAMED)
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + ANSWERS_WITHIN
    while True:
        try:
            return _greet(host.strip("[]"), int(port))
        except OSError as error:
            if time.monotonic() > deadline:
                where = f"RAY_ADDRESS={named}" if named else f"the file {get_ray_address_file(None)}"
                raise OSError(
                    f"no Ray answers at {address} ({error}), which {where} names: it was killed, or runs elsewhere. "
                    "Start it again, or set RAY_ADDRESS=local, and the job starts a Ray of its own on this machine"
                ) from None
        time.sleep(0.5)


def _greet(host: str, port: int) -> None:
    """Raise an OSError unless a gRPC server answers; after a killed Ray, its port may be another program's."""
    with socket.create_connection((host, port), timeout=5) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
            connection.sendall(_HTTP2)
            if connection.recv(9)[3:4] != b"\4":  # the kind of the frame that a server sends first
                raise OSError("what answers there is another program")


class NoCompiler(ValueError):
    """A machine lacks the compiler that `torch.compile` calls."""


def check_compiler(device: str) -> None:
    """See that this machine has the compiler that `torch.compile` calls.

    Raises:
        NoCompiler: it has not.
    """
    variable, *usual = _COMPILERS[device]
    wanted = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(shutil.which(name) for name in wanted):
        raise NoCompiler(
            f"actors.compile=true: {socket.gethostname()} has no compiler ({' or '.join(wanted)}). Install it on every "
            f"node, name another one in {variable} there, or leave actors.compile=false"
        )


def cpus() -> int:
    """How many CPUs a Ray of this machine has: in a container fewer than there are cores."""
    return int(get_num_cpus())


def machines(gpus: int, threads: int) -> int:
    """How many machines of the cluster have what an actor needs."""
    kind, least = ("GPU", 1) if gpus else ("CPU", threads)
    return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) >= least)


def lack(gpus: int, threads: int) -> str:
    """What an actor needs and no node of the cluster has, and what to do; "" if there is nothing."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    if gpus and not any(node.get("GPU", 0) >= 1 for node in nodes):
        what, otherwise = f"actors.gpus={gpus}: no node of the cluster has a GPU", "start one, or take actors.gpus=0"
    elif gpus and not most:
        what, otherwise = "no node of the cluster has a CPU, which decoding and encoding need", "start one"
    elif not gpus and most < max(1, threads):
        what, otherwise = f"actors.threads={threads}: no node of the cluster has so many CPUs", f"take at most {most}"
    else:
        return ""
    return f"{what}. Waiting for one: a cluster that adds nodes by itself may need minutes; in another, {otherwise}"


def unstarted(gpus: int, threads: int, stuck: bool = False) -> str:
    """Why no actor of this job runs, or no image is made, and what to do; "" if one runs.

    Args:
        gpus, threads: of an actor.
        stuck: no image was made since the last question.
    """
    if missing := lack(gpus, threads):
        return missing
    free = state.available_resources_per_node().values()
    if _actors("ALIVE"):
        if gpus and stuck and not any(node.get("CPU", 0) >= 1 for node in free):
            return (
                "for some time no image was made, and no node has a free CPU for decoding and encoding: other jobs "
                "hold them (`ray status` shows it), or this one decodes large photographs"
            )
        return ""
    needs = {"GPU": 1, "CPU": 1} if gpus else {"CPU": threads}
    if held := [kind for kind, count in needs.items() if not any(node.get(kind, 0) >= count for node in free)]:
        return (
            f"no actor runs: one that is starting (on a busy machine for a minute), or other jobs hold the {held[0]}s "
            "of the cluster (`ray status` shows them). Waiting for them"
        )
    return (
        "no actor runs, though a node has room for one. On a busy machine a start takes a minute; if it takes longer, "
        "the newest worker-*.err and raylet.err in /tmp/ray/session_latest/logs (Ray's folder) of the nodes say why"
    )


def _actors(state_name: str) -> list[dict[str, Any]]:
    """The rows of Ray's table for this job's actors in one state."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    table = state.state.actor_table(None, job, state_name).values()
    return [actor for actor in table if actor["ActorClassName"].startswith("MapWorker")]  # as Ray Data calls them


class FailedStarts:
    """Says where actors of this job end as they start, also while actors on other nodes run.

    A package that one node lacks has this effect, or a library that ends the process. Ray tries again for ever. Each
    failure stays in Ray's table, so after a word the next look comes later and later.
    """

    def __init__(self):
        self._told: Counter[str] = Counter()
        self._pause, self._next = NEXT_WORD, 0.0  # seconds; when to look again
        self._former: set[str] = set()  # actors of runs before this one
        with contextlib.suppress(Exception):  # Ray cannot say it now
            self._former = {actor["ActorID"] for actor in _actors("DEAD")}

    def __call__(self) -> str:
        """A sentence on each node where at least `STARTS` more starts have failed since it was named; "" if none."""
        if time.monotonic() < self._next:
            return ""
        failed, errors = self._failed()
        died = sum(actor["NumRestarts"] for actor in _actors("RESTARTING") if not actor["StartTime"])  # none ever ran
        said = [
            f"actors do not start on {node} ({failed[node]} times): {errors[node]}. Mend or remove that node"
            for node in failed
            if self._is_news(node, failed[node])
        ]
        if self._is_news("", died):
            said.append(
                f"processes of actors die as they start ({died} times); the newest worker-*.err in Ray's logs on the "
                "nodes may say why"
            )
        if said:
            self._next, self._pause = time.monotonic() + self._pause, min(2 * self._pause, 1800.0)
        return "; ".join(said)

    def _is_news(self, node: str, count: int) -> bool:
        self._told[node] = min(self._told[node], count)  # an actor that runs at last counts no more
        if count - self._told[node] < STARTS:
            return False
        self._told[node] = count
        return True

    def _failed(self) -> tuple[Counter[str], dict[str, str]]:
        """How many starts have raised on each node, and what the last one raised."""
        failed, errors = Counter[str](), {}
        for actor in _actors("DEAD"):
            cause = actor["DeathCause"]
            if actor["ActorID"] not in self._former and cause.HasField("creation_task_failure_context"):
                node = f"{actor['Address']['IPAddress']} (Ray's node {actor['Address']['NodeID'][:8]})"
                failed[node] += 1
                errors[node] = _last_line(cause.creation_task_failure_context.formatted_exception_string)
        return failed, errors


def _last_line(text: str) -> str:
    """What was raised, from Ray's text of an actor's failed start: a traceback, and then one of Ray's own."""
    return text.partition("\nDuring handling")[0].strip().rpartition("\n")[2]


class Watch:
    """Says, as long as no actor runs or no image is made, why; a context manager.

    Args:
        cause: gives the reason, or "". It is told whether no image was made since the last question.
        made: counts the images.
        say: takes a line.
    """

    def __init__(self, cause: Callable[[bool], str], made: Callable[[], float], say: Callable[[str], Any]):
        self.cause, self.made, self.say = cause, made, say
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        pause, started, before = FIRST_WORD, time.monotonic(), -1.0
        while not self._end.wait(pause):
            pause = NEXT_WORD
            with contextlib.suppress(Exception):  # Ray cannot say it, e.g. as it ends
                made = self.made()
                stuck, before = made == before, made
                if cause := self.cause(stuck):
                    self.say(f"after {time.monotonic() - started:.0f} s: {cause}")
