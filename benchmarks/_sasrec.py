"""
SASRec (Kang and McAuley, arXiv 1808.09781), the pointwise baseline: causal self-attention over item embeddings, the next item by their inner
products with all items. Trained with the full softmax, which on public data beats the sampled binary loss of the paper by far (arXiv 2309.07602).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class SASRec(nn.Module):
    """Item rows 0..N-1 are embeddings 1..N; 0 pads on the left."""

    def __init__(
        self, num_items: int, width: int = 64, layers: int = 2, heads: int = 2, max_length: int = 30, dropout=0.2
    ):
        super().__init__()
        self.max_length, self.heads = max_length, heads
        self.items = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.places = nn.Embedding(max_length, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(users, t) ids to (users, t, width) states."""
        t = ids.shape[1]
        states = self.dropout(self.items(ids) + self.places.weight[-t:])
        # What is padded may look at itself, so that no row of the attention is empty.
        seen = torch.ones(t, t, dtype=torch.bool).tril() & ((ids != 0)[:, None, :] | torch.eye(t, dtype=torch.bool))
        return self.layers(states, mask=~seen.repeat_interleave(self.heads, dim=0))

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.items.weight[1:].T

    @torch.no_grad()
    def rank(self, histories: Sequence[np.ndarray], k: int, batch_size: int = 256) -> np.ndarray:
        """(users, k) item rows, best first, without those of the history."""
        self.eval()
        parts = []
        for start in range(0, len(histories), batch_size):
            some = histories[start : start + batch_size]
            scores = self.scores(self(self.batch(some))[:, -1])
            for place, history in enumerate(some):
                scores[place, torch.as_tensor(np.asarray(history))] = -torch.inf
            parts.append(scores.topk(k).indices.numpy())
        return np.concatenate(parts)

    def batch(self, sequences: Sequence[np.ndarray]) -> torch.Tensor:
        ids = torch.zeros(len(sequences), self.max_length, dtype=torch.long)
        for place, sequence in enumerate(sequences):
            latest = torch.as_tensor(np.asarray(sequence)[-self.max_length :]) + 1
            ids[place, self.max_length - len(latest) :] = latest
        return ids


def train_sasrec(
    sequences: Sequence[np.ndarray],
    num_items: int,
    seed: int,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    share: float = 0.25,
    **settings,
) -> SASRec:
    """
    Trains on next items of every sequence by the cross-entropy over all items. A step takes a share of the places, drawn anew: the scores of all
    items at all places would be most of the work.

    Args:
        sequences: per user the item rows in time order, two at least.
        num_items: size of the catalogue.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = SASRec(num_items, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for _ in range(epochs):
        model.train()
        order = rng.permutation(len(sequences))
        for start in range(0, len(order), batch_size):
            some = [sequences[i] for i in order[start : start + batch_size]]
            inputs, targets = model.batch([s[:-1] for s in some]), model.batch([s[1:] for s in some])
            real = (targets != 0) & (torch.from_numpy(rng.random(targets.shape)) < share)
            loss = F.cross_entropy(model.scores(model(inputs)[real]), targets[real] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model
