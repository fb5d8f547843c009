"""
The item head (`config.item_head`): a learned vector per item in addition to its semantic ID. Codes describe an item, the vector identifies it.

The encoder adds the vectors, and a projection of the items' content vectors, to a history's embeddings. With a `loss_weight` the state at the end of a history also learns to predict the next item by
a softmax over the catalogue, and these item scores guide the beams of `recommend()` and `generate()` (`item_score_weight`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_item_head import item_blocks
from .cpu_experts import PreciseBuffers
from .item_evidence import ItemEvidence
from .low_rank import LowRankVectors


class ItemHead(PreciseBuffers):
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

    #: Buffers that stay float32 whatever the model's dtype is.
    FLOATS = ("content_mean", "content_scale", *ItemEvidence.FLOATS)

    def __init__(self, config):
        super().__init__()
        self.config, self.sizes, self.offsets = (
            config.item_head,
            list(config.codebook_sizes),
            list(config.level_offsets),
        )
        self.dropout = float(self.config.dropout)  # a float of the module, which alignment's `disable_dropout` finds
        # Row 0 is for items without a vector.
        if self.config.rank is None:
            self.vectors = nn.Embedding(self.config.num_items + 1, config.hidden_size, padding_idx=0)
        else:
            self.vectors = LowRankVectors(item_blocks(self.config, config.hidden_size))
        self.keys = nn.Buffer(torch.full((self.config.num_items,), prod(self.sizes), dtype=torch.long))
        width, rows = self.config.content_dim, self.config.num_items + 1
        # Row 0 is for items without content, like all rows of zeros.
        self.register_buffer("content", torch.zeros(rows, width, dtype=torch.float16) if width else None)
        self.register_buffer("content_mean", torch.zeros(width) if width else None)
        self.register_buffer("content_scale", torch.ones(()) if width else None)
        self.content_proj = nn.Linear(width, config.hidden_size, bias=False) if width else None
        self.evidence = None
        if self.config.evidence:
            self.evidence = ItemEvidence(rows - 1, self.config.neighbours, recent=self.config.recent)

    def set_codes(self, codes: torch.Tensor, popularity: torch.Tensor | None = None) -> None:
        """
        Assigns the vectors to items.

        Args:
            codes: (num_items, levels) codes, all different.
            popularity: (num_items,) interaction counts, for a head with `rank`; of equal counts the first item is the more popular one.

        Raises:
            ValueError: another number of items, or a head with `rank` and no popularity.
        """
        if len(codes) != len(self.keys):
            raise ValueError(
                f"the model's item_head has num_items={len(self.keys)}, the catalogue {len(codes)} items; make the model for this catalogue"
            )
        keys, order = self._keys(codes.to(self.keys.device)).sort()
        # The vectors of items that were ordered once stay theirs, whatever is popular now.
        if isinstance(self.vectors, LowRankVectors) and not torch.equal(keys, self.keys):
            if popularity is None:
                raise ValueError(
                    "item_head.rank orders items by popularity, which the catalogue lacks; make it with popularity=..., or leave rank out"
                )
            counts = popularity.to(order.device)
            place = torch.empty_like(order)
            place[counts.argsort(descending=True, stable=True)] = torch.arange(len(order), device=order.device)
            self.vectors.set_order(place[order])
        self.keys.copy_(keys)

    @torch.no_grad()
    def set_content(self, codes: torch.Tensor, content: torch.Tensor) -> None:
        """
        Sets the content vectors of all items, scaled to length 1, and initialises their projection to the size of the item vectors: for a new model.

        Args:
            codes: (num_items, levels) codes of the items.
            content: (num_items, content_dim) finite floats; a row of zeros for an item without content.

        Raises:
            ValueError: a head without content, another shape, values that are not finite.
        """
        content = self.check_content(content, len(self.keys))
        self.content[self.rows_of(codes)] = content.to(self.content)
        known = content.any(-1)
        mean = content[known].mean(0) if known.any() else content.new_zeros(content.shape[1])
        self.content_mean.copy_(mean)
        # A step of Adam moves each weight of the projection as far as each of a vector: with absolute values that sum to 1 both move an item
        # by as much.
        centred = (content[known] - mean) if known.any() else content[:1]
        scale = centred.abs().sum(1).mean().clamp(min=1e-6).reciprocal()
        self.content_scale.fill_(scale)
        size = (centred * scale).square().sum(1).mean().sqrt().clamp(min=1e-6)
        nn.init.normal_(self.content_proj.weight, std=float(_table(self.vectors)[1:].std() / size))

    def check_content(self, content: torch.Tensor, items: int | None = None) -> torch.Tensor:
        """
        Content vectors in float32, scaled to length 1.

        Raises:
            ValueError: a head without content, another shape, values that are not finite.
        """
        if self.content is None:
            raise ValueError("this item_head has no content; make the model with item_head={'content_dim': ..., ...}")
        expected = (len(content) if items is None else items, self.content.shape[1])
        if tuple(content.shape) != expected:
            raise ValueError(f"content: expected shape {expected} (items, content_dim); got {tuple(content.shape)}")
        if not content.isfinite().all():
            bad = (~content.isfinite().all(1)).nonzero().flatten()
            raise ValueError(f"content: {len(bad)} rows hold NaN or infinity (first: row {int(bad[0])})")
        return F.normalize(content.to(self.content.device, torch.float32), dim=1)

    @torch.no_grad()
    def extend(self, codes: torch.Tensor, content: torch.Tensor | None = None) -> None:
        """
        Adds rows for items that joined the catalogue: their vectors are zeros, so that content and codes score them, and their lists are empty.

        Args:
            codes: (n, levels) codes that no row has.
            content: (n, content_dim) their content vectors.
        """
        if content is not None:
            content = self.check_content(content, len(codes))
        old = len(self.keys)
        keys, order = torch.cat([self.keys, self._keys(codes.to(self.keys.device))]).sort(stable=True)
        row = torch.empty_like(order)
        row[order] = torch.arange(1, len(order) + 1, device=order.device)
        row = F.pad(row, (1, 0))  # new rows of the old rows, row 0 among them, and of the items

        def spread(table: torch.Tensor) -> torch.Tensor:
            larger = table.new_zeros(len(order) + 1, *table.shape[1:])
            larger[row[: old + 1]] = table
            return larger

        if isinstance(self.vectors, LowRankVectors):
            self.vectors.extend(row)
            self.config.blocks = [items for items, _ in self.vectors.blocks]
        else:
            self.vectors.weight = nn.Parameter(spread(self.vectors.weight))
            self.vectors.num_embeddings = len(order) + 1
        self.keys = keys
        if self.content is not None:
            self.content = spread(self.content)
            if content is not None:
                self.content[row[old + 1 :]] = content.to(self.content)
        if self.evidence is not None:
            self.evidence.extend(spread, row)
        self.config.num_items = len(order)

    def forget(self, codes: torch.Tensor) -> None:
        """
        Removes the vectors of items whose codes were freed: the next item with these codes is another one.

        Args:
            codes: (n, levels).
        """
        gone = torch.isin(self.keys, self._keys(codes.to(self.keys.device)))
        # Each repeats the key before it, which is found first; vectors keep their rows. -1 is the key of padding.
        self.keys.copy_(torch.where(gone, -2, self.keys).cummax(0).values)

    def follow(self, former, catalogue, content: Mapping[Any, Any] | None = None) -> None:
        """
        The rows of a catalogue that grew from `former`: items whose codes were freed lose theirs, added ones get one where they have content.

        Args:
            content: content vectors (content_dim,) of added items by item id.

        Raises:
            ValueError: content of items that were not added, or that does not fit.
        """
        changes = former.diff(catalogue)
        if content is not None:
            if unknown := [item for item in content if item not in set(changes.added)]:
                raise ValueError(
                    f"content has vectors for {len(unknown)} items that this catalogue did not add (first: {unknown[0]!r}); leave them out"
                )
            vectors = torch.stack([torch.as_tensor(vector, dtype=torch.float32) for vector in content.values()])
            self.check_content(vectors)
        freed = former.codes[former.indices([*changes.removed, *changes.recoded])]
        self.forget(torch.tensor(freed, dtype=torch.long))
        if content is not None:
            codes = catalogue.codes[catalogue.indices(list(content))]
            self.extend(torch.tensor(codes, dtype=torch.long), vectors)

    def _keys(self, codes: torch.Tensor) -> torch.Tensor:
        """One number per tuple of codes (..., levels)."""
        key = codes[..., 0]
        for level, size in enumerate(self.sizes[1:], 1):
            key = key * size + codes[..., level]
        return key

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of `vectors` of items given as code tokens (..., levels); 0 for padding and for items without a vector."""
        return self.rows_of(tokens - torch.tensor(self.offsets, device=tokens.device))

    def rows_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Rows of `vectors` of codes (..., levels); 0 for negative ones and for items without a row."""
        codes = codes.to(self.keys.device)
        keys = torch.where((codes >= 0).all(-1), self._keys(codes), -1)
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[places] == keys, places + 1, 0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(rows, t) tokens `SEP a b c ...` to (rows, t, width): an item's vector at its SEP, zeros elsewhere."""
        rows = seen = self.history_rows(input_ids)
        if self.training and self.dropout > 0:
            rows = rows * (torch.rand(rows.shape, device=rows.device) >= self.dropout)
        vectors = self.vectors(rows)
        if self.content_proj is not None:
            vectors = vectors + self._projected(self.content[seen])
        return F.pad(vectors.unsqueeze(2), (0, 0, 0, len(self.sizes))).flatten(1, 2)

    def history_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the items of histories: (users, t) tokens to (users, items); 0 for padding and for items without a row."""
        return self.rows(input_ids.unflatten(1, (-1, len(self.sizes) + 1))[..., 1:])

    def _projected(self, content: torch.Tensor) -> torch.Tensor:
        """(..., width) of content vectors (..., content_dim), zeros where there is no content."""
        known = content.any(-1, keepdim=True)
        centred = (content.to(self.content_mean.dtype) - self.content_mean) * self.content_scale
        return self.content_proj((centred * known).to(self.content_proj.weight.dtype))

    def tokens(self) -> torch.Tensor:
        """(num_items, levels) code tokens of the items, in the order of their vectors."""
        keys, tokens = self.keys, []
        for size, offset in zip(reversed(self.sizes), reversed(self.offsets), strict=True):
            tokens.append(keys % size + offset)
            keys = keys // size
        return torch.stack(tokens[::-1], dim=-1)

    def output_vectors(
        self, token_embedding: nn.Module, code_tokens: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """
        (items, width) output vectors: a history's state times an item's vector is the logit of that item. No linear map is between them: already in
        an untrained encoder the state is the sum of a history's vectors, and scores similar items high.

        Args:
            token_embedding: the encoder's embedding of tokens; with `score_codes` the embeddings of an item's codes are added.
            code_tokens: (items, levels) code tokens of the items; those of `vectors` from row 1, in order, when None.
            dtype: in which the parts of a vector are added; that of the weights when None.
        """
        vectors, rows = _table(self.vectors, dtype), None if code_tokens is None else self.rows(code_tokens)
        vectors = vectors[1:] if rows is None else F.embedding(rows, vectors)
        if self.content_proj is not None:
            vectors = vectors + self._projected(self.content[1:] if rows is None else self.content[rows])
        if not self.config.score_codes:
            return vectors
        code_tokens = self.tokens() if code_tokens is None else code_tokens
        return vectors + F.embedding_bag(code_tokens, _table(token_embedding, dtype), mode="sum")

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


def _table(embedding: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    (rows, width) all vectors of an embedding: its weight, or the output of an adapter around it (LoRA), which `weight` leaves out. Products of low rank
    are made in `dtype`.
    """
    if isinstance(embedding, LowRankVectors):
        return embedding.table(dtype)
    if isinstance(embedding, nn.Embedding):
        return embedding.weight.to(dtype)
    weight: torch.Tensor = embedding.weight  # pyright: ignore[reportAssignmentType]
    return embedding(torch.arange(len(weight), device=weight.device)).to(dtype)


__all__ = ["ItemHead", "history_states"]
