"""What a GPU should take: each kernel's work, bytes and launch, counted without a GPU.

The work runs on the device `meta`, whose tensors have shapes but no numbers. So it takes no memory, and few seconds for
any size. Where a product runs in half precision, its float32 factors are read, rounded and written before: autocast
does so, and keeps the stream between the products in float32.

What stays in float32 at any precision (`exactly`) counts as such in forward passes. In backward passes it counts as the
other products, which changes less than 1% of a step. One thing differs on a GPU: attention, which the published flow
has, is one kernel there that stores no scores. Here it is five that do, so the published flow is predicted too slow.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from degflow.models.precision import PRECISIONS, is_exact

LAUNCH = 5e-6  # seconds that PyTorch needs to start a kernel, assumed
SHARES = {"float32": 1 / 15, "tf32": 1 / 2, "bfloat16": 1.0, "float16": 1.0}  # of bfloat16's FLOP/s, on an H100
REST = "optics, steps, noise, finish"  # what runs in none of the parts
_NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "lift_fresh")  # they only reserve memory, or name it anew


class GPU(NamedTuple):
    """Rates of a GPU: 1e12 FLOP/s of products in bfloat16, 1e12 bytes/s of memory."""

    tflops: float
    terabytes: float


class Kernel(NamedTuple):
    """One kernel: its part, its FLOP if it is a product, and the bytes that it reads and writes in float32."""

    part: str
    flop: int
    read: int
    written: int
    exact: bool = False  # in float32 at any precision

    def seconds(self, gpu: GPU, precision: str) -> float:
        """The slowest of computing, memory and launch."""
        precision = "float32" if self.exact else precision
        half = bool(self.flop) and PRECISIONS[precision] != torch.float32
        # half: read float32, write half, read half; write half
        moved = 2 * self.read + self.written / 2 if half else self.read + self.written
        launches = 2 if half else 1
        return max(
            self.flop / (1e12 * gpu.tflops * SHARES[precision]), moved / (1e12 * gpu.terabytes), launches * LAUNCH
        )

    def fused(self, gpu: GPU, precision: str) -> float:
        """As if all but products were parts of other kernels, and stored nothing: a bound of what compiling can do."""
        if not self.flop:
            return 0.0
        precision = "float32" if self.exact else precision
        moved = (self.read + self.written) * PRECISIONS[precision].itemsize / 4
        return max(self.flop / (1e12 * gpu.tflops * SHARES[precision]), moved / (1e12 * gpu.terabytes))


class _Counting(TorchDispatchMode):
    """Notes every kernel on the device meta."""

    def __init__(self):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.part = REST

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        made = func(*args, **kwargs)
        given, out = (_on_meta(values) for values in ((args, kwargs), made))
        name = func.overloadpacket.__name__
        if out and not _is_view(func) and not name.startswith(_NO_KERNEL):
            count = flop_registry.get(func.overloadpacket)
            flop = int(count(*args, **kwargs, out_val=made)) if count else 0
            self.kernels.append(Kernel(self.part, flop, sum(map(_bytes, given)), sum(map(_bytes, out)), is_exact()))
        return made

    def named(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call whose kernels belong to this part."""
        before, self.part = self.part, name
        try:
            return call(*args, **kwargs)
        finally:
            self.part = before


def kernels(way: Callable[[], object], parts: Mapping[str, Iterable[tuple[nn.Module, str]]]) -> list[Kernel]:
    """All kernels of a call, backward passes included.

    Args:
        way: works on tensors of the device meta.
        parts: name -> modules and names of their methods, whose kernels are that part's. The methods stay wrapped.
    """
    counting = _Counting()
    for name, methods in parts.items():
        for module, method in methods:
            setattr(module, method, partial(counting.named, name, getattr(module, method)))
    with counting:
        way()
    return counting.kernels


def total(found: Iterable[Kernel], gpu: GPU, precision: str, fused: bool = False) -> float:
    """Seconds of kernels one after the other; fused: see `Kernel.fused`."""
    return sum(kernel.fused(gpu, precision) if fused else kernel.seconds(gpu, precision) for kernel in found)


def _on_meta(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_meta]


def _bytes(tensor: Tensor) -> int:
    """Of an expanded tensor only what is stored."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_view(func: Any) -> bool:
    alias = [returned.alias_info for returned in func._schema.returns]
    return bool(alias) and all(info is not None and not info.is_write for info in alias)
