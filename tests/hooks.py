"""Functions that Ray's workers call as they start, for the tests of the pool (worker_process_setup_hook)."""

import functools
import os
import signal
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
    """Let one file's decoder take up to 8 GiB, a little at a time, until it is killed."""
    from degflow import images

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
