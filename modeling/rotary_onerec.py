"""Rotary positions: of histories, of packed histories and of sessions, for the training forward and for beam search."""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.models.qwen3_moe.modeling_qwen3_moe import rotate_half

from .packing_onerec import segment_positions


class OneRecRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs):  # the name that PreTrainedModel._init_weights looks for
        base, dim = config.rope_parameters["rope_theta"], config.head_dim
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        return (emb.cos() * self.attention_scaling).to(x.dtype), (emb.sin() * self.attention_scaling).to(x.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns states (..., head_dim) by cosines and sines that broadcast to them."""
    return states * cos + rotate_half(states) * sin


def apply_rotary(states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns (batch, heads, length, head_dim) by the cosines and sines (batch or 1, length, head_dim) of its positions."""
    return rotate(states, *(part.unsqueeze(1) for part in position_embeddings))


def history_positions(
    states: torch.Tensor, attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """(users or 1, t) position of each token among its history's real tokens, wherever the padding stands."""
    if segment_ids is not None:
        return segment_positions(segment_ids)
    if attention_mask is None:
        return torch.arange(states.shape[1], device=states.device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


__all__ = ["OneRecRotaryEmbedding", "apply_rotary", "history_positions", "rotate"]
