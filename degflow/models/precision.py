"""Where and in which numbers the networks compute: the one place that knows, for inference and for training.

float32 means float32. By PyTorch's default it does not on NVIDIA GPUs, where cuDNN computes convolutions in TF32, with
10 bits of mantissa instead of 23. `computing` sets that too. A narrower precision is for the networks' many products.
What decides an image's last bits stays in float32 (`exactly`): the latent, its path and its steps, the first and the
last image, the targets of a training and LPIPS.
"""

import contextlib
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

PRECISIONS = {  # name -> type of the products' factors; tf32 is float32, rounded inside of the GPU
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def check_device(device: str) -> None:
    """Raise ValueError unless this is auto, cpu, cuda or cuda:N."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", device):
        raise ValueError(f"device={device}: must be auto, cpu, cuda or cuda:N")


def device_of(device: str) -> str:
    """The device that a configuration asks for; auto is cuda, where there is one.

    Raises:
        ValueError: this machine has no such device.
    """
    check_device(device)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(device[5:] or 0) >= there:
        raise ValueError(f"device={device}: PyTorch finds {there} CUDA devices here")
    return device.replace("auto", "cuda" if there else "cpu")


@contextlib.contextmanager
def computing(precision: str, device: str) -> Iterator[None]:
    """The networks' matrix products and convolutions in this precision; everything else as `exactly`.

    TF32 is a switch of the whole process, so that threads that compute at once need the same precision.

    Args:
        precision: one of `PRECISIONS`.
        device: cpu, cuda, ...

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: must be one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    with _TF32(precision == "tf32"), _autocast(device, dtype, enabled=dtype != torch.float32):
        yield


def differentiating(precision: str) -> AbstractContextManager[Any]:
    """For the backward pass, which stands outside of `computing`: its products in the precision of the forward one."""
    return _TF32(precision == "tf32")


def exactly(device: str) -> AbstractContextManager[Any]:
    """Float32 inside of `computing`, whatever its precision. Of narrower tensors make float32 ones first."""
    # torch.compile cannot trace the switch, so the graph breaks here. Outside `computing` the switch is not set.
    if _TF32.on() or (_TF32.on() is None and not torch.compiler.is_compiling()):
        stack = contextlib.ExitStack()
        stack.enter_context(_TF32(False))
        stack.enter_context(_autocast(device, enabled=False))
        return stack
    return _autocast(device, enabled=False)


def _autocast(device: str, dtype: torch.dtype | None = None, *, enabled: bool) -> AbstractContextManager[Any]:
    """PyTorch's autocast; `computing` names a type, `exactly` does not."""
    if device == "meta":
        return _Exactness(dtype is None)
    return torch.autocast(device, dtype, enabled=enabled)


def is_exact() -> bool:
    """Whether `exactly` is on, for tensors of the device meta, whose work is only counted."""
    return _Exactness.on


class _Exactness(contextlib.AbstractContextManager[None]):
    """What autocast is for other tensors; it does not know the device meta."""

    on = False

    def __init__(self, on: bool):
        self.inside = on

    def __enter__(self) -> None:
        self.before, _Exactness.on = _Exactness.on, self.inside

    def __exit__(self, *error: object) -> None:
        _Exactness.on = self.before


class _TF32:
    """A context in which NVIDIA GPUs may, or may not, round float32 factors to TF32.

    PyTorch's switches are those of the process, so threads share them: TF32 is on while all threads that are inside a
    context allow it. The first context to begin notes the process's own switches, and the last one to end sets them
    again.
    """

    _lock, _thread = threading.Lock(), threading.local()
    _inside: dict[int, list[bool]] = {}  # noqa: RUF012 (of the class) thread -> what its contexts say, the innermost last
    _outside: tuple[bool | str, bool | str]

    def __init__(self, allowed: bool):
        self.allowed = allowed

    @classmethod
    def on(cls) -> bool | None:
        """What this thread's innermost context says; None outside of all, where PyTorch's default may be on."""
        return getattr(cls._thread, "on", None)

    def __enter__(self) -> None:
        self.before, _TF32._thread.on = _TF32.on(), self.allowed
        with _TF32._lock:
            if not _TF32._inside:
                _TF32._outside = _switches()
            _TF32._inside.setdefault(threading.get_ident(), []).append(self.allowed)
            _TF32._set()

    def __exit__(self, *error: object) -> None:
        _TF32._thread.on = self.before
        with _TF32._lock:
            mine = _TF32._inside[threading.get_ident()]
            mine.pop()
            if not mine:
                del _TF32._inside[threading.get_ident()]
            _TF32._set()

    @classmethod
    def _set(cls) -> None:
        if not cls._inside:
            _switch(*cls._outside)
            return
        tf32 = all(said[-1] for said in cls._inside.values())
        allowed = {bool: tf32, str: "tf32" if tf32 else "ieee"}[type(_switches()[0])]
        _switch(allowed, allowed)


def _switches() -> tuple[bool | str, bool | str]:
    """The switches of matrix products and of convolutions, as the process has them."""
    cuda, cudnn = cast(Any, torch.backends.cuda), cast(Any, torch.backends.cudnn)
    try:
        return cuda.matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:  # the process set them by PyTorch's newer names, which do not mix with the older ones
        return cuda.matmul.fp32_precision, cudnn.conv.fp32_precision


def _switch(products: bool | str, convolutions: bool | str) -> None:
    cuda, cudnn = cast(Any, torch.backends.cuda), cast(Any, torch.backends.cudnn)
    if isinstance(products, str):
        cuda.matmul.fp32_precision, cudnn.conv.fp32_precision = products, convolutions
    else:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = products, bool(convolutions)  # type: ignore[attr-defined]
