"""How much of a GPU a training uses: model FLOP utilisation (MFU), and memory.

MFU is the work of a step over what the GPU could have done meanwhile. The work is that of the products and
convolutions, forward and backward. It is counted once, on the device meta, whose tensors have shapes but no numbers:
this takes no memory, and changes nothing of the training.
"""

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from degflow.models.precision import computing, differentiating

# Products without sparsity in bfloat16, in 1e12 FLOP/s, from NVIDIA's data sheets. The first name that is in the GPU's
# own counts. TF32 has half of it; float32 has no such rule.
RATES = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L4": 121.0,
}
_SHARES = {"bfloat16": 1.0, "float16": 1.0, "tf32": 0.5, "float32": 0.0}


def rate_of(device: torch.device, precision: str) -> float:
    """1e12 FLOP/s that a device reaches at most in this precision; 0: unknown."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    rate = next((rate for known, rate in RATES.items() if re.search(rf"\b{known}\b", name)), 0.0)
    return rate * _SHARES[precision]


def memory_of(device: torch.device) -> dict[str, float]:
    """`memory_gb`, the most of a GPU's memory since the last call; nothing of a CPU."""
    if device.type != "cuda":
        return {}
    most = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory_gb": most}


def on_meta(objective: nn.Module) -> nn.Module:
    """A copy on the device meta, made without copying numbers."""
    tensors: dict[int, object] = {}
    for parameter in objective.parameters():
        tensors[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in objective.buffers():
        tensors[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(objective, tensors)


def work_of(objective: nn.Module, batch: Mapping[str, Tensor], precision: str) -> float:
    """FLOP of a forward and a backward pass; 0: unknown, for the objective has operations that know no device meta.

    Args:
        objective: on the device meta (see `on_meta`), in training mode.
        batch: its arguments, on any device.
        precision: of the training.
    """
    shapes = {name: torch.empty_like(value, device="meta") for name, value in batch.items()}
    try:
        with FlopCounterMode(display=False) as counter:
            with computing(precision, "meta"):
                total = objective(**shapes).total
            with differentiating(precision):
                total.backward()
    except (RuntimeError, NotImplementedError, TypeError):  # a figure in a log must not end a training
        return 0.0
    return float(counter.get_total_flops())
