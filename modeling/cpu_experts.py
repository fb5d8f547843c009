"""
Fast computation of the experts: the implementation "onerec" of transformers' experts interface, the model's default
(`experts_implementation=` of `from_pretrained` selects another one).

On accelerators, in other types than float32, under `torch.compile`, autocast and expert parallelism it is transformers' "grouped_mm". On a CPU
the tokens are sorted by expert and each expert's few tokens go through it at once, forward and backward, so that what lies between its two
products stays in the cache; and the forward products are oneDNN's, which is faster than the default one where a weight meets few rows
(benchmarks/speed/generation.py, benchmarks/speed/training.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward


def product(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    `F.linear(states, weight)` without gradients, by oneDNN where that is faster.

    Args:
        states: (rows, width).
        weight: (outputs, width), or what `torch.ops.mkldnn._reorder_linear_weight` made of it.
    """
    # A quantised weight is a subclass of tensors that knows how to be multiplied, and has no memory that oneDNN could read.
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    if (
        plain
        and states.device.type == "cpu"
        and states.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    ):
        return torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return F.linear(states, weight)


class SegmentedExperts(torch.autograd.Function):
    """
    Experts' outputs for (tokens, width) float32 states, expert by expert.

    `apply(hidden_states, top_k_index, top_k_weights, gate_up, down, act_fn, packed)`: chosen experts and their gates (tokens, k); the packed
    parameters (experts, 2 * inner, width) and (experts, width, inner); `packed`, a [`PackedExperts`] to multiply with instead, or None.
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
        first, second = (gate_up, down) if packed is None else (packed.gate_up, packed.down)
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
                torch.mm(grad_out.t(), activated.detach(), out=grad_down[expert])
            if grad_gate_up is not None:
                torch.mm(grad_projected.t(), states[rows], out=grad_gate_up[expert])
            grad_states[rows] = product(grad_projected, gate_up[expert].t())
        grad_states = F.embedding_bag(place, grad_states, mode="sum")
        return grad_states, None, grad_weights[place].squeeze(-1), grad_gate_up, grad_down, None, None


def _segments(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have tokens, and the range of their tokens in sorted order."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
            start += count


@dataclass
class PackedExperts:
    """
    A layer's expert weights in oneDNN's layout, one tensor per expert, and their sources.

    Args:
        sources: the parameters `gate_up_proj` and `down_proj`.
    """

    sources: tuple[torch.Tensor, torch.Tensor]

    def __post_init__(self):
        self.versions = [source._version for source in self.sources]
        self.gate_up, self.down = (
            [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in source.detach()] for source in self.sources
        )

    def holds(self, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
        """Whether these are the weights that were packed, unchanged: an adapter's are others."""
        now = (gate_up, down)
        return all(a is b for a, b in zip(now, self.sources, strict=True)) and self.versions == [
            a._version for a in now
        ]


@contextmanager
def packed(layers: list) -> Iterator[None]:
    """Keeps packed copies of the weights of `OneRecExperts` that a CPU holds in float32, for as long as the context lasts."""
    packable = [
        experts
        for experts in layers
        if experts.gate_up_proj.device.type == "cpu"
        and experts.gate_up_proj.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    ]
    for experts in packable:
        experts.packed = PackedExperts((experts.gate_up_proj, experts.down_proj))
    try:
        yield
    finally:
        for experts in packable:
            experts.packed = None


def onerec_experts_forward(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """The function of the experts interface (see the head of this file)."""
    gate_up, down = self.gate_up_proj, self.down_proj
    if (
        hidden_states.device.type != "cpu"
        or hidden_states.dtype != torch.float32
        or gate_up.dtype != torch.float32
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
    "EXPERTS_IMPLEMENTATION",
    "PackedExperts",
    "SegmentedExperts",
    "onerec_experts_forward",
    "packed",
    "product",
]
