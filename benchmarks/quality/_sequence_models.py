"""
The field's sequence models, as baselines: a history of item embeddings becomes one state per place, and items are ranked by their inner products
with the last one. [`SASRec`], [`GRU4Rec`] and [`HSTU`] differ in how; [`_sequence_training.py`] trains them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class SequenceModel(nn.Module):
    """
    Item rows 0..N-1 are embeddings 1..N; 0 pads on the left. Subclasses define `encode`.

    Args:
        num_items: size of the catalogue.
        width: of embeddings and states.
        max_length: latest items of a history that are read.
        features: (items, d) what is known of the items, their texts' embeddings say. Centred and scaled, and through a linear map, it is added to
            the items' embeddings.
    """

    def __init__(
        self,
        num_items: int,
        width: int = 64,
        max_length: int = 50,
        dropout: float = 0.2,
        features: np.ndarray | None = None,
    ):
        super().__init__()
        self.max_length, self.width = max_length, width
        self.items = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.items.weight, std=0.02)
        self.project = None
        if features is not None:
            # A step of Adam moves each weight of the map as far as each of an embedding: with absolute values that sum to 1 both move an item alike.
            centred = torch.from_numpy(features - features.mean(0)).float()
            small = centred / centred.abs().sum(1).mean()
            self.features = nn.Buffer(F.pad(small, (0, 0, 1, 0)), persistent=False)
            self.project = nn.Linear(features.shape[1], width, bias=False)
            nn.init.normal_(self.project.weight, std=float(0.02 / small.square().sum(1).mean().sqrt()))

    def encode(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """(users, t, width) states after places have seen what lies before them; `real` (users, t) is False on padding."""
        raise NotImplementedError

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) ids to (..., width): these rows of [`table`], without making the others."""
        read = self.items(ids)
        return read if self.project is None else read + self.project(self.features[ids])

    def table(self) -> torch.Tensor:
        """(items + 1, width) what items are read and named by."""
        return self.items.weight if self.project is None else self.items.weight + self.project(self.features)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(users, t) ids to (users, t, width) states."""
        return self.encode(self.embed(ids), ids != 0)

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """(..., width) states to (..., items) scores."""
        return states @ self.table()[1:].T

    @torch.no_grad()
    def rank(
        self, histories: Sequence[np.ndarray], k: int, exclude_seen: bool = True, batch_size: int = 256
    ) -> np.ndarray:
        """(users, k) item rows, best first; without those of the history where `exclude_seen`."""
        self.eval()
        parts = []
        for start in range(0, len(histories), batch_size):
            some = histories[start : start + batch_size]
            scores = self.scores(self(self.batch(some))[:, -1])
            if exclude_seen:
                for place, history in enumerate(some):
                    scores[place, torch.as_tensor(np.asarray(history), device=scores.device)] = -torch.inf
            parts.append(scores.topk(k).indices.cpu().numpy())
        return np.concatenate(parts)

    def batch(self, sequences: Sequence[np.ndarray]) -> torch.Tensor:
        """(users, longest that is read) ids."""
        longest = min(self.max_length, max(map(len, sequences)))
        ids = np.zeros((len(sequences), longest), dtype=np.int64)
        for place, sequence in enumerate(sequences):
            latest = np.asarray(sequence)[-longest:] + 1
            ids[place, longest - len(latest) :] = latest
        return torch.from_numpy(ids).to(self.items.weight.device)


class SASRec(SequenceModel):
    """
    Causal self-attention (Kang and McAuley, arXiv 1808.09781), in its pre-norm form; places count from the end of the history.

    Args:
        scaled: embeddings times sqrt(width), as the paper's code has them.
    """

    def __init__(
        self, num_items: int, width: int = 64, layers: int = 2, heads: int = 2, scaled: bool = False, **settings
    ):
        super().__init__(num_items, width, **settings)
        self.heads, self.scale = heads, width**0.5 if scaled else 1.0
        self.places = nn.Embedding(self.max_length, width)
        nn.init.normal_(self.places.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, self.dropout.p, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def encode(self, states, real):
        t = states.shape[1]
        states = self.dropout(self.scale * states + self.places.weight[-t:])
        # What is padded may look at itself, so that no row of the attention is empty.
        before, itself = (
            torch.ones(t, t, dtype=torch.bool, device=real.device).tril(),
            torch.eye(t, device=real.device),
        )
        seen = before & (real[:, None, :] | itself.bool())
        return self.layers(states, mask=~seen.repeat_interleave(self.heads, dim=0))


class GRU4Rec(SequenceModel):
    """A gated recurrent network (Hidasi et al., arXiv 1511.06939; here with the loss that all rows are trained with)."""

    def __init__(self, num_items: int, width: int = 64, layers: int = 1, inner: int = 128, **settings):
        super().__init__(num_items, width, **settings)
        self.gru = nn.GRU(width, inner, layers, batch_first=True)
        self.out = nn.Linear(inner, width)

    def encode(self, states, real):
        # Rolled so that the padding comes last: a network that has read it would depend on who shares the batch.
        t, lengths = states.shape[1], real.sum(1, keepdim=True)
        to_left, back = (
            (torch.arange(t, device=real.device) + shift).remainder(t).unsqueeze(-1) for shift in (-lengths, lengths)
        )
        states = self.dropout(states).take_along_dim(to_left, dim=1)
        return self.out(self.gru(states)[0].take_along_dim(back, dim=1))


class HSTULayer(nn.Module):
    """One layer of HSTU: pointwise attention by SiLU in place of softmax, gated (Zhai et al., arXiv 2402.17152, equations 1 to 3)."""

    def __init__(self, width: int, heads: int, max_length: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 4 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(heads, max_length))  # by distance; the paper's has time in it as well

    def forward(self, states, real):
        users, t, width = states.shape
        gate, value, query, key = F.silu(self.project(self.before(states))).chunk(4, dim=-1)
        value, query, key = (x.view(users, t, self.heads, -1).transpose(1, 2) for x in (value, query, key))
        places = torch.arange(t, device=real.device)
        distance = places[:, None] - places
        weights = F.silu(query @ key.mT + self.bias[:, distance.clamp(min=0)]) / self.bias.shape[1]
        weights = weights.masked_fill(~((distance >= 0) & real[:, None, None, :]), 0.0)
        seen = (weights @ value).transpose(1, 2).reshape(users, t, width)
        return states + self.dropout(self.out(self.between(seen) * gate))


class HSTU(SequenceModel):
    """Hierarchical sequential transduction units over item embeddings; positions only, no times or actions."""

    def __init__(self, num_items: int, width: int = 64, layers: int = 2, heads: int = 2, **settings):
        super().__init__(num_items, width, **settings)
        self.layers = nn.ModuleList(HSTULayer(width, heads, self.max_length, self.dropout.p) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def encode(self, states, real):
        states = self.dropout(states * self.width**0.5)
        for layer in self.layers:
            states = layer(states, real)
        return self.norm(states)


SEQUENCE_MODELS: dict[str, type[SequenceModel]] = {"sasrec": SASRec, "gru4rec": GRU4Rec, "hstu": HSTU}
