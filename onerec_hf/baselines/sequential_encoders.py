"""The networks of SASRec, HSTU and GRU4Rec: from the item embeddings of a history to states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from onerec_hf.baselines.configuration_sequential import SequentialConfig


class SASRecEncoder(nn.Module):
    """Causal self-attention, pre-norm (Kang and McAuley, arXiv 1808.09781); positions count from the end of the history."""

    def __init__(self, config: SequentialConfig):
        super().__init__()
        assert config.intermediate_size is not None  # the config fills both in
        assert config.num_hidden_layers is not None
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.positions = nn.Embedding(config.max_history, width)
        self.dropout = nn.Dropout(config.dropout_rate)
        layer = nn.TransformerEncoderLayer(
            width, self.heads, config.intermediate_size, config.dropout_rate, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, config.num_hidden_layers, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        t, device = states.shape[1], real.device
        states = self.dropout(states + self.positions.weight[-t:])
        causal = torch.ones(t, t, dtype=torch.bool, device=device).tril()
        # Padding attends to itself, so that no row of the attention is empty.
        attends = causal & (real[:, None, :] | torch.eye(t, dtype=torch.bool, device=device))
        return self.layers(states, mask=~attends.repeat_interleave(self.heads, dim=0))


def roll(states: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """
    (users, t, width) states rolled along t by the (users, 1) places of each row, as `torch.roll`. By the histories' lengths, leading padding comes last:
    after it, recurrent states would depend on how much of it there is.
    """
    t = states.shape[1]
    places = (torch.arange(t, device=states.device) - by).remainder(t)
    return states.take_along_dim(places.unsqueeze(-1), dim=1)


class GRU4RecEncoder(nn.Module):
    """A gated recurrent network (Hidasi et al., arXiv 1511.06939)."""

    def __init__(self, config: SequentialConfig):
        super().__init__()
        assert config.intermediate_size is not None  # the config fills both in
        assert config.num_hidden_layers is not None
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gru = nn.GRU(config.hidden_size, config.intermediate_size, config.num_hidden_layers, batch_first=True)
        self.out = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        lengths = real.sum(1, keepdim=True)
        states = roll(self.dropout(states), lengths)
        return self.out(roll(self.gru(states)[0], -lengths))


class HSTULayer(nn.Module):
    """One layer of HSTU: gated pointwise attention, SiLU in place of softmax (Zhai et al., arXiv 2402.17152, equations 1 to 3)."""

    def __init__(self, config: SequentialConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm, self.attention_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 4 * width)
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.distance_bias = nn.Parameter(torch.empty(self.heads, config.max_history))  # the paper's has time as well

    def forward(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        users, t, width = states.shape
        gate, value, query, key = F.silu(self.in_proj(self.norm(states))).chunk(4, dim=-1)
        value, query, key = (x.view(users, t, self.heads, -1).transpose(1, 2) for x in (value, query, key))
        positions = torch.arange(t, device=real.device)
        distance = positions[:, None] - positions
        weights = F.silu(query @ key.mT + self.distance_bias[:, distance.clamp(min=0)]) / self.distance_bias.shape[1]
        weights = weights.masked_fill(~((distance >= 0) & real[:, None, None, :]), 0.0)
        attended = (weights @ value).transpose(1, 2).reshape(users, t, width)
        return states + self.dropout(self.out_proj(self.attention_norm(attended) * gate))


class HSTUEncoder(nn.Module):
    """Hierarchical sequential transduction units over item embeddings; positions only, no times or actions."""

    def __init__(self, config: SequentialConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout_rate)
        assert config.num_hidden_layers is not None  # the config fills it in
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        states = self.dropout(states)
        for layer in self.layers:
            states = layer(states, real)
        return self.norm(states)
