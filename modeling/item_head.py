"""
A learned vector per item beside its semantic ID (`config.num_item_embeddings`): codes say what an item is like, the vector says which one it is.
The encoder reads it in histories, and with `config.item_loss_weight` the history's state also learns to name the next item by it (with
`config.item_scores_with_codes` by the embeddings of its codes too).
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import nn


class OneRecItemEmbedding(nn.Module):
    """
    Vectors of items, found by their codes. The codes are kept with the weights, so that a loaded model needs no catalogue to find them; an item
    that joins the catalogue later has no vector, and is read by its codes alone.

    Args:
        config: a `OneRecConfig` with `num_item_embeddings`, the items; `item_embedding_dropout` is the share of items whose vector is
            hidden in training, so that the codes are learned as well.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> config = OneRecConfig(codebook_sizes=[4, 4], hidden_size=8, num_attention_heads=2, num_item_embeddings=2)
        >>> embedding = OneRecItemEmbedding(config)
        >>> embedding.set_codes(torch.tensor([[1, 0], [0, 2]]))
        >>> vectors = embedding(torch.tensor([[3, 5, 8, 3, 4, 11]]))  # SEP a b: of the first item, and of one without a vector
        >>> vectors.shape, vectors.abs().sum(-1)[0].gt(0).tolist()
        (torch.Size([1, 6, 8]), [True, False, False, False, False, False])
    """

    def __init__(self, config):
        super().__init__()
        self.sizes, self.offsets = list(config.codebook_sizes), list(config.level_offsets)
        self.hidden = config.item_embedding_dropout
        # Row 0 is of items without a vector.
        self.vectors = nn.Embedding(config.num_item_embeddings + 1, config.hidden_size, padding_idx=0)
        self.keys = nn.Buffer(torch.full((config.num_item_embeddings,), prod(self.sizes), dtype=torch.long))

    def set_codes(self, codes: torch.Tensor) -> None:
        """
        Says which items the vectors are of.

        Args:
            codes: (num_item_embeddings, levels) codes, all different.

        Raises:
            ValueError: another number of items.
        """
        if len(codes) != len(self.keys):
            raise ValueError(
                f"the model has num_item_embeddings={len(self.keys)}, the catalogue {len(codes)} items; make the model for this catalogue"
            )
        self.keys.copy_(self._keys(codes.to(self.keys.device)).sort().values)

    def forget(self, codes: torch.Tensor) -> None:
        """
        Takes the vectors of these items away: what is given their codes next is another item.

        Args:
            codes: (n, levels).
        """
        gone = torch.isin(self.keys, self._keys(codes.to(self.keys.device)))
        # Each repeats the key before it, which is found first; vectors stay where they are. -1 is what `rows` asks for padding.
        self.keys.copy_(torch.where(gone, -2, self.keys).cummax(0).values)

    def _keys(self, codes: torch.Tensor) -> torch.Tensor:
        """One number per tuple of codes (..., levels)."""
        key = codes[..., 0]
        for level, size in enumerate(self.sizes[1:], 1):
            key = key * size + codes[..., level]
        return key

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of `vectors` of items written as code tokens (..., levels); 0 for padding and for items without a vector."""
        codes = tokens - torch.tensor(self.offsets, device=tokens.device)
        keys = torch.where((codes >= 0).all(-1), self._keys(codes), -1)
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[places] == keys, places + 1, 0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(rows, t) tokens `SEP a b c ...` to (rows, t, width): an item's vector at its SEP, zeros elsewhere."""
        rows = self.rows(input_ids.unflatten(1, (-1, len(self.sizes) + 1))[..., 1:])
        if self.training and self.hidden > 0:
            rows = rows * (torch.rand(rows.shape, device=rows.device) >= self.hidden)
        return F.pad(self.vectors(rows).unsqueeze(2), (0, 0, 0, len(self.sizes))).flatten(1, 2)

    def tokens(self) -> torch.Tensor:
        """(num_item_embeddings, levels) code tokens of the items, in the order of their vectors."""
        keys, tokens = self.keys, []
        for size, offset in zip(reversed(self.sizes), reversed(self.offsets), strict=True):
            tokens.append(keys % size + offset)
            keys = keys // size
        return torch.stack(tokens[::-1], dim=-1)

    def output_vectors(
        self, code_table: torch.Tensor | None = None, code_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        (items, width) what items are named by: a history's state times one of these is the logit that this item is next. Nothing learned stands
        between: what an untrained encoder hands on, the sum of a history's vectors, already names items that resemble it.

        Args:
            code_table: (vocabulary, width) embeddings of tokens; those of an item's codes are added to its vector when given.
            code_tokens: (items, levels) the items by their codes; those of `vectors` from row 1, in order, when None.
        """
        vectors = table(self.vectors)
        vectors = vectors[1:] if code_tokens is None else F.embedding(self.rows(code_tokens), vectors)
        if code_table is None:
            return vectors
        return vectors + F.embedding_bag(self.tokens() if code_tokens is None else code_tokens, code_table, mode="sum")

    def loss(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        output_vectors: torch.Tensor,
        code_tokens: torch.Tensor | float,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """
        Cross-entropy of the sessions' first items over all items, weighed as the code tokens of these items together: a sum over sessions, times
        the levels, over all code tokens of the batch.

        Args:
            states: (sessions, width) states of their histories.
            labels: (sessions, t) code tokens, -100 where nothing is predicted.
            output_vectors: (num_item_embeddings, width) of all items, in the order of their vectors.
            code_tokens: how many the batch has, in all of its parts.
            label_smoothing: share of the named item's probability that goes to all items alike.
        """
        levels = len(self.sizes)
        rows = self.rows(labels[:, :levels])
        known = rows > 0  # what is left out here, slots without a session, costs no scores
        scores = (states[known] @ output_vectors.T).float()
        value = F.cross_entropy(scores, rows[known] - 1, reduction="sum", label_smoothing=label_smoothing)
        return value * levels / code_tokens


def table(embedding: nn.Module) -> torch.Tensor:
    """(rows, width) all that an embedding gives: its weight, or what an adapter in its place (LoRA) makes of it, which `weight` leaves out."""
    if isinstance(embedding, nn.Embedding):
        return embedding.weight
    weight: torch.Tensor = embedding.weight  # pyright: ignore[reportAssignmentType]
    return embedding(torch.arange(len(weight), device=weight.device))


def history_states(
    states: torch.Tensor, attention_mask: torch.Tensor | None, history_ranges: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The encoder's states where histories end.

    Args:
        states: (rows, t, width).
        attention_mask: (rows, t); all of a row is its history when None.
        history_ranges: (rows, P, 2) of packed rows, in place of the mask.

    Returns:
        (rows, width), or (rows * P, width).
    """
    if history_ranges is not None:
        last = history_ranges[..., 1] - 1
        return states.gather(1, last.unsqueeze(-1).expand(-1, -1, states.shape[-1])).flatten(0, 1)
    if attention_mask is None:
        return states[:, -1]
    last = (attention_mask.long() * torch.arange(1, states.shape[1] + 1, device=states.device)).argmax(-1)
    return states[torch.arange(len(states), device=states.device), last]


__all__ = ["OneRecItemEmbedding", "history_states", "table"]
