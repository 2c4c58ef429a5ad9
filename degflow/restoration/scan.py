"""The selective scan of Mamba (Gu and Dao 2023, section 3) in plain PyTorch.

    h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t        y_t = C_t . h_t

A sequence of length L is cut into about sqrt(L) chunks. They are scanned in parallel, position by position, each from a
zero state. Then the final states are carried from chunk to chunk, and their decayed values added inside each chunk. All
products of decays are below 1, so nothing overflows. States are not stored: the backward pass scans again.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_STATES = 1 << 26  # most states in memory at once; larger inputs are processed in parts of the channels


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Scan each channel of each group along the sequence; in float32, or float64 if `x` is.

    Args:
        x: "N G D L", batch, groups (scan directions), channels, positions.
        delta: "N G D L", positive step sizes.
        A: "G D S", negative decay rates of S states.
        B: "N G S L", from the input into the states.
        C: "N G S L", from the states into the output.

    Returns:
        y, "N G D L".
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return _SelectiveScan.apply(*(tensor.to(wide) for tensor in (x, delta, A, B, C)))  # type: ignore[return-value]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        x, delta, A, B, C = inputs
        x, delta, B, C = (_fold(tensor) for tensor in (x, delta, B, C))
        y = torch.empty_like(x)
        for part in _parts(x, A):
            decay, entry = _decay_and_entry(x[..., part], delta[..., part], A[:, part], B)
            y[..., part] = _recur(decay, entry).mul_(C[..., None]).sum(-2)
        return _unfold(y, inputs[0].shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        (grad_y,) = grad_outputs
        with torch.autocast(grad_y.device.type, enabled=False):
            return _gradients(*ctx.saved_tensors, grad_y)  # type: ignore[call-arg]


def _gradients(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    length = x.shape[-1]
    x, delta, B, C, grad_y = (_fold(tensor) for tensor in (x, delta, B, C, grad_y))
    grads = [
        torch.empty_like(x),
        torch.empty_like(delta),
        torch.empty_like(A),
        torch.zeros_like(B),
        torch.zeros_like(C),
    ]
    grad_x, grad_delta, grad_A, grad_B, grad_C = grads
    for part in _parts(x, A):
        x_, delta_, A_ = x[..., part], delta[..., part], A[:, part].mT
        grad = grad_y[..., None, part]
        decay, entry = _decay_and_entry(x_, delta_, A[:, part], B)
        states = _recur(decay.clone(), entry)
        grad_C += (grad * states).sum(-1)
        grad_entry = _recur(_shifted(decay, 1), grad * C[..., None], backward=True)
        grad_exponent = _shifted(states, -1).mul_(grad_entry).mul_(decay)
        into = (grad_entry * B[..., None]).sum(-2)
        grad_x[..., part] = delta_ * into
        grad_delta[..., part] = x_ * into + (grad_exponent * A_).sum(-2)
        grad_A[:, part] = grad_exponent.mul_(delta_[..., None, :]).sum((0, 1, 2)).mT
        grad_B += grad_entry.mul_((delta_ * x_)[..., None, :]).sum(-1)
    grad_x, grad_delta, grad_B, grad_C = (_unfold(g, length) for g in (grad_x, grad_delta, grad_B, grad_C))
    return grad_x, grad_delta, grad_A, grad_B, grad_C


def _decay_and_entry(x: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(delta A) and delta x B, "T K N G S D"; channels last, so that sums over them are vectorised."""
    return (delta[..., None, :] * A.mT).exp_(), (delta * x)[..., None, :] * B[..., None]


def _recur(a: Tensor, b: Tensor, backward: bool = False) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, or backward a_t h_{t+1} + b_t, over "T K *" (position, chunk); overwrites a and b."""
    order = slice(None, None, -1) if backward else slice(None)
    positions, chunks = range(a.shape[0])[order], range(a.shape[1])[order]
    for before, at in pairwise(positions):
        b[at].addcmul_(a[at], b[before])
        a[at].mul_(a[before])
    last = positions[-1]
    for before, at in pairwise(chunks):
        b[last, at].addcmul_(a[last, at], b[last, before])
    if backward:
        b[1:, :-1].addcmul_(a[1:, :-1], b[:1, 1:])
    else:
        b[:-1, 1:].addcmul_(a[:-1, 1:], b[-1:, :-1])
    return b


def _shifted(tensor: Tensor, by: int) -> Tensor:
    """Element t + by of the sequence at t, zero beyond its ends; "T K *", by = 1 or -1."""
    result = torch.zeros_like(tensor)
    if by == 1:
        result[:-1] = tensor[1:]
        result[-1, :-1] = tensor[0, 1:]
    else:
        result[1:] = tensor[:-1]
        result[0, 1:] = tensor[-1, :-1]
    return result


def _fold(tensor: Tensor) -> Tensor:
    """ "N G * L" -> "T K N G *", padded with zeros, which do not change a state."""
    length = tensor.shape[-1]
    steps = math.ceil(math.sqrt(length))
    chunks = math.ceil(length / steps)
    padded = F.pad(tensor, (0, steps * chunks - length))
    return padded.unflatten(-1, (chunks, steps)).permute(4, 3, 0, 1, 2).contiguous()


def _unfold(tensor: Tensor, length: int) -> Tensor:
    return tensor.permute(2, 3, 4, 1, 0).flatten(3)[..., :length]


def _parts(x: Tensor, A: Tensor) -> Iterator[slice]:
    """Slices of the channels of "T K N G D" with at most `_STATES` states each."""
    channels = x.shape[-1]
    count = max(1, _STATES // (x.numel() // channels * A.shape[-1]))
    return (slice(first, first + count) for first in range(0, channels, count))
