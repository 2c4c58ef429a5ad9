"""Functions that Ray's workers call as they start, for the tests of the pool (worker_process_setup_hook)."""

import functools
import os
import random
import signal
import sys
import time

import ray

DEADLY = b"\x89PNG\r\n\x1a\nthis one kills its decoder"
HUNGRY = b"\x89PNG\r\n\x1a\nthis one makes its decoder take all memory"


def fragile_decoder():
    """Let one file kill its decoder, as a bug in a C library would."""
    from degflow import images

    decode = images.decode

    def dies(data, **rule):
        if data == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(data, **rule)

    images.decode = dies


def hungry_decoder():
    """Let one file's decoder take up to 8 GiB, a little at a time, until it is killed; twice, not five times."""
    from degflow import images
    from degflow.synthesis import tasks

    tasks.KILLS = 2

    decode, full = images.decode, []

    def takes(data, **rule):
        while data == HUNGRY and len(full) < 256:
            full.append(b"\1" * (1 << 25))
            time.sleep(0.01)
        return decode(data, **rule)

    images.decode = takes


def trace():
    """Note the node of each call in the file named by DEGFLOW_TRACE.

    Every process of a node runs this, so it does not import torch.
    """
    from degflow.dataset.writer import ShardWriter
    from degflow.synthesis.codec import Codec

    def traced(function, name):
        @functools.wraps(function)
        def noting(*arguments, **options):
            with open(os.environ["DEGFLOW_TRACE"], "a") as file:
                file.write(f"{name} {ray.get_runtime_context().get_node_id()}\n")
            return function(*arguments, **options)

        return noting

    Codec.load, Codec.encode = traced(Codec.load, "load"), traced(Codec.encode, "encode")
    ShardWriter.__init__ = traced(ShardWriter.__init__, "actor")  # an actor makes one for each of its shards


def stress():
    """Let a share of an actor's calls and starts raise, and write PNGs at another level; see tests/stress.py.

    DEGFLOW_STRESS_RATE is the share, and each error is a line in DEGFLOW_STRESS_LOG. DEGFLOW_STRESS_PNG is the level.
    Every process of a node runs this, so it does not import torch.
    """
    from degflow import images
    from degflow.dataset.writer import ShardWriter
    from degflow.synthesis.codec import Codec, Threads

    rate, draw = float(os.environ["DEGFLOW_STRESS_RATE"]), random.SystemRandom()
    images.encode_png = functools.partial(images.encode_png, compress_level=int(os.environ["DEGFLOW_STRESS_PNG"]))

    def unreliable(function):
        @functools.wraps(function)
        def call(*arguments, **options):
            if draw.random() < rate:
                with open(os.environ["DEGFLOW_STRESS_LOG"], "a") as file:
                    file.write(f"{function.__qualname__}\n")
                raise RuntimeError(f"injected into {function.__qualname__}")
            return function(*arguments, **options)

        return call

    start = unreliable(Threads.__init__)

    def started(self, count):  # an actor on CPUs begins with this
        sys.modules["degflow.synthesis.actor"].ShardActor.PAUSE = 1.0
        start(self, count)

    Threads.__init__ = started
    for owner, names in ((Codec, ("load", "encode")), (ShardWriter, ("__init__", "add", "finish"))):
        for name in names:
            setattr(owner, name, unreliable(getattr(owner, name)))
