"""
The item head (`config.item_head`): a learned vector per item in addition to its semantic ID. Codes describe an item, the vector identifies it.

The encoder adds the vectors to a history's embeddings. With a `loss_weight` the state at the end of a history also learns to predict the next item by
a softmax over the catalogue, and these item scores guide the beams of `recommend()` and `generate()` (`item_score_weight`).
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import nn

from .constraint import CatalogueConstraint, SemanticIDTrie


class ItemHead(nn.Module):
    """
    Vectors of items, found by their codes. The codes are kept with the weights, so that a loaded model finds them without a catalogue. An item that
    joins the catalogue later has no vector, and is read by its codes alone.

    Args:
        config: a `OneRecConfig` with an `item_head`.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> config = OneRecConfig(codebook_sizes=[4, 4], hidden_size=8, num_attention_heads=2, item_head={"num_items": 2})
        >>> head = ItemHead(config)
        >>> head.set_codes(torch.tensor([[1, 0], [0, 2]]))
        >>> vectors = head(torch.tensor([[3, 5, 8, 3, 4, 11]]))  # SEP a b: of the first item, and of one without a vector
        >>> vectors.shape, vectors.abs().sum(-1)[0].gt(0).tolist()
        (torch.Size([1, 6, 8]), [True, False, False, False, False, False])
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.sizes, self.offsets = (
            config.item_head,
            list(config.codebook_sizes),
            list(config.level_offsets),
        )
        self.dropout = float(self.config.dropout)  # a float of the module, which alignment's `disable_dropout` finds
        # Row 0 is for items without a vector.
        self.vectors = nn.Embedding(self.config.num_items + 1, config.hidden_size, padding_idx=0)
        self.keys = nn.Buffer(torch.full((self.config.num_items,), prod(self.sizes), dtype=torch.long))

    def set_codes(self, codes: torch.Tensor) -> None:
        """
        Assigns the vectors to items.

        Args:
            codes: (num_items, levels) codes, all different.

        Raises:
            ValueError: another number of items.
        """
        if len(codes) != len(self.keys):
            raise ValueError(
                f"the model's item_head has num_items={len(self.keys)}, the catalogue {len(codes)} items; make the model for this catalogue"
            )
        self.keys.copy_(self._keys(codes.to(self.keys.device)).sort().values)

    def forget(self, codes: torch.Tensor) -> None:
        """
        Removes the vectors of items whose codes were freed: the next item with these codes is another one.

        Args:
            codes: (n, levels).
        """
        gone = torch.isin(self.keys, self._keys(codes.to(self.keys.device)))
        # Each repeats the key before it, which is found first; vectors keep their rows. -1 is the key of padding.
        self.keys.copy_(torch.where(gone, -2, self.keys).cummax(0).values)

    def _keys(self, codes: torch.Tensor) -> torch.Tensor:
        """One number per tuple of codes (..., levels)."""
        key = codes[..., 0]
        for level, size in enumerate(self.sizes[1:], 1):
            key = key * size + codes[..., level]
        return key

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of `vectors` of items given as code tokens (..., levels); 0 for padding and for items without a vector."""
        codes = tokens - torch.tensor(self.offsets, device=tokens.device)
        keys = torch.where((codes >= 0).all(-1), self._keys(codes), -1)
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[places] == keys, places + 1, 0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(rows, t) tokens `SEP a b c ...` to (rows, t, width): an item's vector at its SEP, zeros elsewhere."""
        rows = self.rows(input_ids.unflatten(1, (-1, len(self.sizes) + 1))[..., 1:])
        if self.training and self.dropout > 0:
            rows = rows * (torch.rand(rows.shape, device=rows.device) >= self.dropout)
        return F.pad(self.vectors(rows).unsqueeze(2), (0, 0, 0, len(self.sizes))).flatten(1, 2)

    def tokens(self) -> torch.Tensor:
        """(num_items, levels) code tokens of the items, in the order of their vectors."""
        keys, tokens = self.keys, []
        for size, offset in zip(reversed(self.sizes), reversed(self.offsets), strict=True):
            tokens.append(keys % size + offset)
            keys = keys // size
        return torch.stack(tokens[::-1], dim=-1)

    def output_vectors(self, token_embedding: nn.Module, code_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """
        (items, width) output vectors: a history's state times an item's vector is the logit of that item. No linear map is between them: already in
        an untrained encoder the state is the sum of a history's vectors, and scores similar items high.

        Args:
            token_embedding: the encoder's embedding of tokens; with `score_codes` the embeddings of an item's codes are added.
            code_tokens: (items, levels) code tokens of the items; those of `vectors` from row 1, in order, when None.
        """
        vectors = _table(self.vectors)
        vectors = vectors[1:] if code_tokens is None else F.embedding(self.rows(code_tokens), vectors)
        if not self.config.score_codes:
            return vectors
        code_tokens = self.tokens() if code_tokens is None else code_tokens
        return vectors + F.embedding_bag(code_tokens, _table(token_embedding), mode="sum")

    def loss(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        history_ranges: torch.Tensor | None,
        labels: torch.Tensor,
        token_embedding: nn.Module,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """
        Cross-entropy of the sessions' first items over all items, summed over sessions. It counts as much as the code tokens of these items together:
        it is multiplied by the levels, and the model divides it by the number of code tokens.

        Args:
            states, attention_mask, history_ranges: as for [`history_states`].
            labels: (sessions, t) code tokens, -100 where nothing is predicted. Sessions may repeat the users: all users once, then all again.
            token_embedding: as for [`output_vectors`].
            label_smoothing: share of an item's probability that is spread over all items.
        """
        levels = len(self.sizes)
        states = history_states(states, attention_mask, history_ranges)
        states = states.repeat(len(labels) // len(states), 1)
        rows = self.rows(labels[:, :levels])
        known = rows > 0  # slots without a session cost no scores
        scores = (states[known] @ self.output_vectors(token_embedding).T).float()
        return levels * F.cross_entropy(scores, rows[known] - 1, reduction="sum", label_smoothing=label_smoothing)


class ItemScorer:
    """
    Scores of given items by an item head.

    Args:
        encoder: the model's encoder, with an item head that has a `loss_weight`.
        code_tokens: (items, levels) code tokens of the items.
    """

    def __init__(self, encoder, code_tokens: torch.Tensor):
        head, self.scored = encoder.item_head, None
        rows = head.rows(code_tokens)
        # For the catalogue that the model was made for, in the order of codes, nothing needs to be gathered.
        if torch.equal(rows, torch.arange(1, len(head.keys) + 1, device=rows.device)):
            self.vectors = head.output_vectors(encoder.embed_tokens)
        else:
            self.vectors = head.output_vectors(encoder.embed_tokens, code_tokens)
            if not (head.config.score_codes or rows.all()):
                self.scored = rows > 0

    def log_probs(self, states: torch.Tensor) -> torch.Tensor:
        """(users, items) float32 for states (users, width). A new item without a vector scores as the least probable item that has one."""
        scores = (states @ self.vectors.T).float()
        if self.scored is None:
            return scores.log_softmax(-1)
        scores = scores.masked_fill(~self.scored, float("-inf")).log_softmax(-1)
        return torch.where(self.scored, scores, scores.masked_fill(~self.scored, 0.0).amin(-1, keepdim=True))


class ItemScores:
    """
    Item scores of histories as a guide of beam search. The probability of a node of the catalogue's trie is the sum over the items below it, so that the
    scores count from a session's first code on, and not only among the items that the decoder alone would find.

    Args:
        scorer: of the trie's leaves, in order.
        states: (users, width) states at the ends of the histories ([`history_states`]).
        trie: the catalogue's semantic IDs, on the device of the states.
        weight: factor of the log-probabilities, positive.
    """

    def __init__(self, scorer: ItemScorer, states: torch.Tensor, trie: SemanticIDTrie, weight: float):
        self.scorer, self.states, self.trie, self.weight = scorer, states, trie, weight

    def at_nodes(self, users: slice, constraint: CatalogueConstraint) -> list[torch.Tensor]:
        """Scores of the nodes of each level for some of the users ([`node_scores`]), of the items that `constraint` allows them."""
        leaves, legal = self.scorer.log_probs(self.states[users]), constraint.legal_leaves()
        if legal is not None:
            leaves = leaves.masked_fill(~legal, float("-inf"))
        return node_scores(self.trie, leaves, self.weight)


def node_scores(trie: SemanticIDTrie, leaf_scores: torch.Tensor, weight: float) -> list[torch.Tensor]:
    """
    `weight` times the log of the probability below each node, per level (users, nodes) float32. They telescope: the increments along the codes of an
    item add up to `weight` times the item's score.

    Args:
        leaf_scores: (users, leaves) float32 log-probabilities of items, -inf for items that are not legal.
        weight: positive.

    Example:
        >>> trie = SemanticIDTrie([[0, 0], [0, 1], [1, 1]], codebook_sizes=[2, 2])
        >>> levels = node_scores(trie, torch.tensor([[0.5, 0.3, 0.2]]).log(), weight=1.0)
        >>> [level.exp() for level in levels]
        [tensor([[0.8000, 0.2000]]), tensor([[0.5000, 0.3000, 0.2000]])]
    """
    largest = leaf_scores.amax(1, keepdim=True)
    shares, leaves = (leaf_scores - largest).exp(), torch.arange(trie.num_leaves, device=leaf_scores.device)
    tiny = torch.finfo(shares.dtype).tiny  # a probability too small for a float remains possible
    levels = []
    for level in range(trie.num_levels - 1):
        below = shares.new_zeros(len(shares), len(trie.codes[level]))
        below.index_add_(1, trie.ancestors(level, leaves), shares)
        levels.append((below.clamp_(min=tiny).log_() + largest) * weight)
    return [*levels, leaf_scores * weight]


def history_states(
    states: torch.Tensor, attention_mask: torch.Tensor | None, history_ranges: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The encoder's states at the ends of histories.

    Args:
        states: (rows, t, width).
        attention_mask: (rows, t); the whole row is the history when None.
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
    # `len(states)` would make the number of users a constant of an exported graph.
    return states[torch.arange(states.shape[0], device=states.device), last]


def _table(embedding: nn.Module) -> torch.Tensor:
    """(rows, width) all vectors of an embedding: its weight, or the output of an adapter around it (LoRA), which `weight` leaves out."""
    if isinstance(embedding, nn.Embedding):
        return embedding.weight
    weight: torch.Tensor = embedding.weight  # pyright: ignore[reportAssignmentType]
    return embedding(torch.arange(len(weight), device=weight.device))


__all__ = ["ItemHead", "ItemScorer", "ItemScores", "history_states", "node_scores"]
