"""
Self-attention of the encoder without a softmax (`config.encoder_attention = "pointwise"`): each earlier token counts by itself, as in HSTU (Zhai et
al., arXiv 2402.17152, equations 1 to 3), so that how much of the history speaks for an item is not divided away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .rotary_onerec import apply_rotary

# What the weights are divided by, HSTU's length of a history. The sums then lie about the root of the norm's epsilon: a history that says little
# stays small, where a norm of larger sums would blow it up.
_LENGTH = 10


class OneRecPointwiseAttention(nn.Module):
    """
    `o(norm(silu(q k^T / sqrt(d)) v / 10) * u)` with q, k, v and u the SiLU of linear maps, and rotary positions where HSTU has a bias.
    All weights of a row exist at once, whatever the model's attention implementation is.

    Args:
        config: a `OneRecConfig`.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> attention = OneRecPointwiseAttention(OneRecConfig(hidden_size=8, num_attention_heads=2))
        >>> angles = torch.zeros(1, 3, 4)
        >>> out, weights = attention(torch.randn(1, 3, 8), (angles.cos(), angles.sin()), torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())
        >>> out.shape, weights.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 3]))
    """

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(width, heads, bias=False)
        self.k_proj = nn.Linear(width, heads // self.groups, bias=False)
        self.v_proj = nn.Linear(width, heads // self.groups, bias=False)
        self.u_proj = nn.Linear(width, heads, bias=False)
        self.o_proj = nn.Linear(heads, width, bias=False)
        self.norm = nn.RMSNorm(heads, eps=config.rms_norm_eps)
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        """`attention_mask`: bool, True where a query (dim -2) sees a key (dim -1), of [`visible_tokens`]."""
        projected = (F.silu(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (
            states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2) for states in projected
        )
        query, key = apply_rotary(query, position_embeddings), apply_rotary(key, position_embeddings)
        key, value = (states.repeat_interleave(self.groups, dim=1) for states in (key, value))
        weights = (F.silu(query @ key.mT * self.head_dim**-0.5) / _LENGTH).masked_fill(~attention_mask, 0.0)
        out = self.norm((self.attention_dropout(weights) @ value).transpose(1, 2).flatten(2))
        return self.o_proj(out * F.silu(self.u_proj(hidden_states))), weights


def visible_tokens(
    states: torch.Tensor, attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """
    Which tokens of a history each token sees: (rows or 1, 1, t, t) bool.

    Args:
        states: (rows, t, width).
        attention_mask: (rows, t), 0 for padding; all tokens are real when None.
        segment_ids: (rows, t) of packed rows, in place of the mask.

    Example:
        >>> visible_tokens(torch.zeros(1, 3, 2), torch.tensor([[1, 1, 0]]), None, causal=True)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    """
    t = states.shape[1]
    visible = torch.ones(1, 1, t, t, dtype=torch.bool, device=states.device)
    if causal:
        visible = visible.tril()
    if segment_ids is not None:
        return visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return visible if attention_mask is None else visible & attention_mask[:, None, None, :].bool()


__all__ = ["OneRecPointwiseAttention", "visible_tokens"]
