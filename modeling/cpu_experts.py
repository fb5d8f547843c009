"""
Fast products on a CPU: of linear layers, and of experts as the implementation "onerec" of transformers' experts interface, the model's default
(`experts_implementation=` of `from_pretrained` selects another one).

torch's default float32 product is MKL's, which has its best kernels on Intel's processors only; oneDNN is torch's other library, and its only one
in bfloat16. Which is faster for many rows is measured once ([`onednn_is_faster`]); for the few rows of an expert it is oneDNN.

On accelerators, under `torch.compile`, autocast and expert parallelism, linear layers are torch's and experts transformers' "grouped_mm". On a CPU
the tokens are sorted by expert and each expert's few tokens go through it at once, forward and backward, so that what lies between its two
products stays in the cache (benchmarks/speed/generation.py, benchmarks/speed/training.py, benchmarks/speed/precision.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

DTYPES = ("auto", "float32", "bfloat16")
# From so many rows on a product is bound by its arithmetic, not by reading the weight.
_MANY_ROWS, _FEW_ROWS = 64, 8
# How much faster oneDNN must be: where both take about as long, two processes decide alike.
_CLEARLY = 1.25


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies many float32 rows faster than torch's default on this CPU. Measured once per process, in about 10 ms."""
    if not _multiplies(torch.float32):
        return False
    default, onednn = _shortest((F.linear, torch.float32, 256), (_onednn, torch.float32, 256))
    return default > _CLEARLY * onednn


@cache
def bfloat16_is_faster(width: int) -> bool:
    """
    Whether this CPU multiplies in bfloat16 clearly faster than in float32: with AMX or AVX-512's bf16 it does, for a model that is not tiny. Measured
    once per width and process.
    """
    if not _multiplies(torch.bfloat16):
        return False
    wide = _onednn if onednn_is_faster() else F.linear
    in_float32, in_bfloat16 = _shortest((wide, torch.float32, width), (_onednn, torch.bfloat16, width))
    return in_float32 > _CLEARLY * in_bfloat16


def inference_dtype(name: str, width: int) -> torch.dtype:
    """
    The dtype that a `--dtype` option names for a generator of this width on this machine: "auto" is bfloat16 on a CPU that multiplies faster in it,
    and float32 everywhere else.

    Raises:
        ValueError: another name.

    Example:
        >>> inference_dtype("bfloat16", width=256)
        torch.bfloat16
    """
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r:.40}: choose one of {', '.join(DTYPES)}")
    if name == "auto":
        return torch.bfloat16 if not torch.accelerator.is_available() and bfloat16_is_faster(width) else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _shortest(*kinds: tuple[Callable, torch.dtype, int]) -> list[float]:
    """The shortest seconds of products of several kinds, in turns: a function, a dtype and a width."""
    seconds: list[list[float]] = [[] for _ in kinds]
    # The first forward pass asks, perhaps one that is counted, on fake tensors or under autocast.
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        pairs = [
            tuple(torch.ones(rows, width, dtype=dtype, device="cpu") for rows in (_MANY_ROWS, 4 * width))
            for _, dtype, width in kinds
        ]
        for _ in range(9):
            for (run, *_), pair, taken in zip(kinds, pairs, seconds, strict=True):
                started = time.perf_counter()
                run(*pair)
                taken.append(time.perf_counter() - started)
    return [min(taken) for taken in seconds]


def _onednn(states, weight):
    return torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")


def _count_flops(states_shape, weight_shape, *_, **__) -> int:
    return 2 * math.prod(states_shape) * weight_shape[0]


# What counts a model's operations (FlopCounterMode) knows torch's default product only. Code of a Hub repository is a second copy of this file.
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_count_flops)


def _by_onednn(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a float32 product on a CPU may be oneDNN's."""
    # A quantised weight is a subclass of tensors that knows how to be multiplied, and has no memory that oneDNN could read.
    return (
        states.dtype == torch.float32
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and states.is_cpu
        and weight.dtype == torch.float32
        and _multiplies(torch.float32)
    )


def product(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    `F.linear(states, weight)` without gradients, by oneDNN where that is faster for a weight that is not in the cache.

    Args:
        states: (rows, width).
        weight: (outputs, width), or what `torch.ops.mkldnn._reorder_linear_weight` made of it.
    """
    if weight.is_mkldnn or (_by_onednn(states, weight) and (len(states) < _MANY_ROWS or onednn_is_faster())):
        return _onednn(states, weight)
    return F.linear(states, weight)


class PreciseBuffers(nn.Module):
    """
    A module whose buffers stay as precise as they are when the model is converted to a lower precision: counts above 256, biases of a choice and
    rotary frequencies are wrong in bfloat16.

    Example:
        >>> module = PreciseBuffers()
        >>> module.counts = nn.Buffer(torch.tensor([257.0]))
        >>> module.bfloat16().counts
        tensor([257.])
    """

    def _apply(self, fn, recurse=True):
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer.is_floating_point() and torch.finfo(now.dtype).eps > torch.finfo(buffer.dtype).eps:
                self._buffers[name] = buffer.to(now.device)
        return self


class LinearProduct(torch.autograd.Function):
    """`F.linear` with the products of oneDNN, forward and backward: `apply(states, weight)`, (..., width) and (outputs, width) in float32."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.save_for_backward(states, weight)
        return _onednn(states, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        grad_states = _onednn(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_states, None
        return grad_states, _onednn(grad.flatten(0, -2).t(), states.flatten(0, -2).t())


class OneRecLinear(nn.Linear):
    """
    A linear layer that multiplies by oneDNN where that is faster: on CPUs with [`onednn_is_faster`], in float32, for many rows.

    Example:
        >>> layer = OneRecLinear(8, 4, bias=False)
        >>> layer(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.packed: PackedWeights | None = (
            None  # a second copy of the weight, within `OneRecGenerationMixin.packed_experts`
        )

    def forward(self, input):
        weight, dtype = self.weight, input.dtype
        rows = input.numel() // self.in_features
        if (
            not input.is_cpu
            or dtype != weight.dtype
            or rows < (_FEW_ROWS if dtype == torch.float32 else 1)
            or self.bias is not None
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or type(weight) is not nn.Parameter
        ):
            return super().forward(input)
        learns = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if dtype == torch.float32:
            if not onednn_is_faster():
                return super().forward(input)
            if learns:
                return LinearProduct.apply(input, weight)
        if self.packed is not None and not learns and self.packed.holds(weight):
            weight = self.packed.weights[0]
        return _onednn(input, weight) if dtype == torch.float32 or weight.is_mkldnn else super().forward(input)


class SegmentedExperts(torch.autograd.Function):
    """
    Experts' outputs for (tokens, width) states in float32 or bfloat16, expert by expert.

    `apply(hidden_states, top_k_index, top_k_weights, gate_up, down, act_fn, packed)`: chosen experts and their gates (tokens, k); the packed
    parameters (experts, 2 * inner, width) and (experts, width, inner); `packed`, [`PackedWeights`] to multiply with instead, or None.
    """

    @staticmethod
    def forward(ctx, hidden_states, top_k_index, top_k_weights, gate_up, down, act_fn, packed):
        tokens, k = top_k_index.shape
        chosen = top_k_index.flatten()
        order = chosen.argsort()
        counts = torch.bincount(chosen, minlength=len(gate_up)).tolist()
        states = hidden_states.index_select(0, order // k)
        inner = states.new_empty(len(states), gate_up.shape[1]) if any(ctx.needs_input_grad) else None
        out = torch.empty_like(states)
        first, second = (gate_up, down) if packed is None else packed.weights
        for expert, rows in _segments(counts):
            projected = product(states[rows], first[expert])
            if inner is not None:
                inner[rows] = projected
            gate, up = projected.chunk(2, dim=-1)
            activated = act_fn(gate).mul_(up)
            out[rows] = product(activated, second[expert])
        ctx.counts, ctx.act_fn = counts, act_fn
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        place = place.view(tokens, k)
        ctx.save_for_backward(states, order, place, top_k_weights, gate_up, down, inner, out)
        # Gathers, weighs and sums in one pass.
        return F.embedding_bag(place, out, mode="sum", per_sample_weights=top_k_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, order, place, top_k_weights, gate_up, down, inner, out = ctx.saved_tensors
        grad = grad.index_select(0, order // top_k_weights.shape[1])
        weights = top_k_weights.flatten()[order, None]
        grad_weights, grad_states = torch.empty_like(weights), torch.empty_like(states)
        # Experts without tokens keep zeros.
        grad_gate_up = torch.zeros_like(gate_up) if ctx.needs_input_grad[3] else None
        grad_down = torch.zeros_like(down) if ctx.needs_input_grad[4] else None
        for expert, rows in _segments(ctx.counts):
            torch.sum(grad[rows] * out[rows], dim=-1, keepdim=True, out=grad_weights[rows])
            grad_out = grad[rows] * weights[rows]
            with torch.enable_grad():  # the activation is any that the config names
                projected = inner[rows].requires_grad_()
                gate, up = projected.chunk(2, dim=-1)
                activated = ctx.act_fn(gate) * up
            (grad_projected,) = torch.autograd.grad(activated, projected, product(grad_out, down[expert].t()))
            if grad_down is not None:
                _weight_gradient(grad_out, activated.detach(), grad_down[expert])
            if grad_gate_up is not None:
                _weight_gradient(grad_projected, states[rows], grad_gate_up[expert])
            grad_states[rows] = product(grad_projected, gate_up[expert].t())
        grad_states = F.embedding_bag(place, grad_states, mode="sum")
        return grad_states, None, grad_weights[place].squeeze(-1), grad_gate_up, grad_down, None, None


def _weight_gradient(grad: torch.Tensor, states: torch.Tensor, out: torch.Tensor) -> None:
    """Writes `grad.t() @ states`."""
    if grad.dtype == torch.float32 and onednn_is_faster():
        out.copy_(_onednn(grad.t(), states.t()))
    else:
        torch.mm(grad.t(), states, out=out)


def _segments(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have tokens, and the range of their tokens in sorted order."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
            start += count


@dataclass
class PackedWeights:
    """
    A layer's weights in oneDNN's layout, and their sources.

    Args:
        sources: parameters (outputs, width) or, of experts, (experts, outputs, width), which become a list.
    """

    sources: tuple[torch.Tensor, ...]

    def __post_init__(self):
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.versions = [source._version for source in self.sources]
        self.weights = [
            reorder(source.detach()) if source.ndim == 2 else [reorder(weight) for weight in source.detach()]
            for source in self.sources
        ]

    def holds(self, *weights: torch.Tensor) -> bool:
        """Whether these are the weights that were packed, unchanged: an adapter's are others."""
        return all(a is b for a, b in zip(weights, self.sources, strict=True)) and self.versions == [
            a._version for a in weights
        ]


@contextmanager
def packed(layers: list[nn.Module]) -> Iterator[None]:
    """Keeps packed copies of the weights of experts and [`OneRecLinear`] layers that a CPU holds, for as long as the context lasts."""
    packable = []
    for layer in layers:
        weights = tuple(layer.parameters(recurse=False))
        if all(type(each) is nn.Parameter and each.is_cpu and _multiplies(each.dtype) for each in weights):
            packable.append((layer, weights))
    for layer, weights in packable:
        layer.packed = PackedWeights(weights)
    try:
        yield
    finally:
        for layer, _ in packable:
            layer.packed = None


def onerec_experts_forward(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """The function of the experts interface (see the head of this file)."""
    gate_up, down = self.gate_up_proj, self.down_proj
    if (
        not hidden_states.is_cpu
        or hidden_states.dtype not in (torch.float32, torch.bfloat16)
        or gate_up.dtype != hidden_states.dtype
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or self._is_expert_parallel
    ):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    packed = self.packed if self.packed is not None and self.packed.holds(gate_up, down) else None
    return SegmentedExperts.apply(hidden_states, top_k_index, top_k_weights, gate_up, down, self.act_fn, packed)


EXPERTS_IMPLEMENTATION = "onerec"
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, onerec_experts_forward)

__all__ = [
    "DTYPES",
    "EXPERTS_IMPLEMENTATION",
    "LinearProduct",
    "OneRecLinear",
    "PackedWeights",
    "PreciseBuffers",
    "SegmentedExperts",
    "bfloat16_is_faster",
    "inference_dtype",
    "onednn_is_faster",
    "onerec_experts_forward",
    "packed",
    "product",
]
