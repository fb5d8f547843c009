"""
The lifelong pathway (technical report, arXiv 2506.13695, section 2.2): a history of up to 100,000 items that the encoder reads as a few states.

Items beyond the latest ones are compressed twice: hierarchical k-means over their vectors leaves one item per cluster (lifelong_history.py), and a
Q-Former turns these into `queries` states, which stand before the history in the encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .layers_onerec import OneRecMLP, OneRecRMSNorm


class LifelongBlock(nn.Module):
    """Cross-attention of the queries to the items' keys and values, which all blocks share, and a feed-forward layer."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm = OneRecRMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = OneRecRMSNorm(width, config.rms_norm_eps)
        self.mlp = OneRecMLP(config)

    def forward(
        self, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Queries (users, q, width), keys and values (users, heads, n, head width), and what is added to the logits, (users, 1, 1, n)."""
        query = self.q_proj(self.norm(queries)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        queries = queries + self.o_proj(out.transpose(1, 2).flatten(-2))
        return queries + self.mlp(self.mlp_norm(queries))


class LifelongPathway(nn.Module):
    """
    Dense(LeakyReLU(Dense)) of the compressed items' embeddings, and a Q-Former over them. Its blocks share keys and values: there are many items, and each
    projection of them costs as much as a layer of the encoder's.

    A cluster of n items counts n times: log(n) is added to its logits, so that a query sees what it would see of n items like the one that stands for them.

    Args:
        config: a `OneRecConfig` with `lifelong`.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> config = OneRecConfig(hidden_size=8, num_attention_heads=2, lifelong={"queries": 4})
        >>> pathway = LifelongPathway(config)
        >>> pathway(torch.randn(2, 6, 8), torch.tensor([[3, 1, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0]])).shape
        torch.Size([2, 4, 8])
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.queries = nn.Parameter(torch.zeros(config.lifelong.queries, width))
        self.dense = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width))
        self.norm = OneRecRMSNorm(width, config.rms_norm_eps)
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList([LifelongBlock(config) for _ in range(config.lifelong.layers)])

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Queries that differ, about as large as a token's embedding."""
        init.normal_(self.queries, std=std)

    def forward(self, items: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Embeddings (users, n, width) and cluster sizes (users, n), 0 for padding, to (users, queries, width); zeros for a user without items."""
        there = sizes > 0
        some = there.any(1, keepdim=True)
        # A user without items attends to padding, so that no row of the softmax is empty; its states are zeros.
        counts = sizes.clamp(min=1).to(
            torch.promote_types(items.dtype, torch.float32)
        )  # bfloat16 counts no further than 256
        bias = counts.log().masked_fill(~there, float("-inf")).masked_fill(~some, 0.0)[:, None, None].to(items.dtype)
        items = self.norm(self.dense(items))
        key, value = (of(items).unflatten(-1, (self.heads, -1)).transpose(1, 2) for of in (self.k_proj, self.v_proj))
        states = self.queries.expand(len(items), -1, -1)
        for block in self.blocks:
            states = block(states, key, value, bias)
        return states * some[..., None].to(states.dtype)


def with_lifelong(
    encoder: nn.Module, embeddings: torch.Tensor, lifelong_ids: torch.Tensor | None, segment_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    The encoder's inputs (users, t, width) with the pathway's states in place of its first `queries`.

    Args:
        encoder: a `OneRecEncoder`.
        lifelong_ids: (users, n, 1 + levels) sizes of clusters, 0 for padding, and code tokens of the items that stand for them.

    Raises:
        ValueError: lifelong items for a model without the pathway, none for a model with it, other users, or packed rows.
    """
    pathway, config = encoder.lifelong, encoder.config
    if pathway is None:
        if lifelong_ids is not None:
            raise ValueError("this model has no lifelong pathway; take its own processor, or leave lifelong_ids out")
        return embeddings
    if segment_ids is not None:
        raise ValueError("the lifelong pathway reads one history per row: train on windows without packing")
    if lifelong_ids is None:
        raise ValueError(
            "this model has a lifelong pathway: pass lifelong_ids beside input_ids, as the processor that was saved with it makes them"
        )
    queries, width = len(pathway.queries), config.tokens_per_item
    if len(lifelong_ids) != len(embeddings) or embeddings.shape[1] <= queries or lifelong_ids.shape[2:] != (width,):
        raise ValueError(
            f"lifelong_ids of shape {tuple(lifelong_ids.shape)} do not belong to input_ids of {len(embeddings)} users and {embeddings.shape[1]} states, "
            f"of which {queries} are the pathway's; pass both from one call of the processor"
        )
    lifelong_ids = lifelong_ids.to(embeddings.device)
    sizes = lifelong_ids[..., 0]
    opened = torch.where(sizes > 0, config.sep_token_id, config.pad_token_id)
    tokens = torch.cat([opened[..., None], lifelong_ids[..., 1:]], dim=-1).flatten(1)
    items = encoder.embed_tokens(tokens).unflatten(1, (-1, width)).sum(2)
    if encoder.item_head is not None:
        items = items + encoder.item_head(tokens)[:, ::width]
    scale = config.hidden_size**0.5 if config.encoder_scales_embeddings else 1.0
    return torch.cat([pathway(items, sizes).to(embeddings.dtype) * scale, embeddings[:, queries:]], dim=1)


__all__ = ["LifelongPathway", "with_lifelong"]
