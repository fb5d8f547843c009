"""
Beam search over the catalogue, sampling of whole sessions without replacement (stochastic beam search, Kool et al. 2019, arXiv 1903.06059), and
the incremental decoder that both run instead of the training forward.

The history's keys and values are projected once per user and read by all of its beams. The keys and values of the session are in one buffer for all
layers: reordering the beams copies whole rows between two buffers that are allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from .constraint import CatalogueConstraint, SharedItemPenalty
from .cpu_experts import product
from .item_scores import SessionGuide
from .layers_onerec import history_positions, rotate
from .top_candidates import top_candidates

_step: ContextVar[Callable[[], None] | None] = ContextVar("step", default=None)


@contextmanager
def between_steps(call: Callable[[], None]) -> Iterator[None]:
    """
    Calls a function before each step of the beam searches in the block, in the thread that they run in: a server computes something urgent
    there, or ends the search by an exception.
    """
    before = _step.set(call)
    try:
        yield
    finally:
        _step.reset(before)


class BeamDecoder:
    """
    Decodes sessions incrementally: `step` feeds the next tokens of every beam, `reorder` selects the beam that each one continues.

    Dropout is off. Adapters work: projections and experts are called as modules.

    Args:
        decoder: the model's `OneRecDecoder`.
        history: (users, t, width) encoder states.
        history_mask: (users, t), 1 for tokens, or None where nothing is padding.
        max_beams: most beams of a user.
        max_tokens: most tokens that will be fed.
        static: attend to all `max_tokens` positions under a mask instead of to those filled so far: shapes then depend only on the number
            of beams and of tokens per step, as CUDA graphs and `torch.compile` require.
    """

    def __init__(
        self,
        decoder: nn.Module,
        history: torch.Tensor,
        history_mask: torch.Tensor | None,
        max_beams: int,
        max_tokens: int,
        static: bool = False,
    ):
        self.decoder, self.static, self.length = decoder, static, 0
        self.config = config = decoder.config
        self.head_dim, self.users = config.head_dim, len(history)
        self._grouped = config.num_key_value_heads != config.num_attention_heads
        groups = config.num_key_value_heads * config.head_dim
        shape = (self.users * max_beams, max_tokens, config.decoder_layers, 2, groups)
        # Masked values must be finite too.
        new = history.new_zeros if static else history.new_empty
        self.buffer, self._spare = new(shape), new(shape)
        self._places = positions = torch.arange(max_tokens, device=history.device)
        self._cos, self._sin = (part[0, :, None] for part in decoder.rotary_emb(history, positions[None]))
        self._visible = (positions[None, :] <= positions[:, None])[None, None]
        self._history_visible = None
        if history_mask is not None and not bool(history_mask.all()):
            self._history_visible = history_mask[:, None, None, :].bool()
        self._cross_rope = None
        key_rope = None
        if config.cross_attention_rope:
            keys = history_positions(history, history_mask)
            key_rope = tuple(part.unsqueeze(-2) for part in decoder.rotary_emb(history, keys))
            queries = keys[:, -1:] + 1 + positions
            self._cross_rope = tuple(part[:, None, :, None] for part in decoder.rotary_emb(history, queries))
        self._cross = self._history_keys_values(history, key_rope)

    def _history_keys_values(self, history, key_rope):
        """Keys and values (users, groups, t, head_dim) that the layers read."""
        found = []
        for layer in self.decoder.layers:
            key, value = (self._heads(proj(history)) for proj in (layer.cross_attn.k_proj, layer.cross_attn.v_proj))
            if key_rope is not None:
                key = rotate(key, *key_rope)
            found.append((key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()))
        return found

    def normalized_over(self, level_tokens: slice) -> slice:
        """The tokens that the softmax of a level is over."""
        return slice(0, self.config.vocab_size)

    def reorder(self, origin: torch.Tensor) -> None:
        """Row `i` continues row `origin[i]`: (rows,) int64; their number may change."""
        source = self.buffer if self.static else self.buffer[:, : self.length]
        target = self._spare[: len(origin)] if self.static else self._spare[: len(origin), : self.length]
        torch.index_select(source, 0, origin, out=target)
        self.buffer, self._spare = self._spare, self.buffer

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The decoder's normed states (rows, width) after the last of `tokens` (rows, n), rows being the users' beams in order."""
        start, self.length = self.length, self.length + tokens.shape[1]
        if self.static:
            return self.forward(tokens, torch.arange(start, self.length, device=tokens.device))
        return self.forward(tokens, slice(start, self.length))

    def forward(self, tokens: torch.Tensor, places: slice | torch.Tensor) -> torch.Tensor:
        """One step for tokens at the positions `places` of the session: a slice, or int64 indices when static."""
        buffer = self.buffer[: len(tokens)]
        rope, cross_rope, visible = self._at(places)
        if isinstance(places, slice):
            buffer = buffer[:, : places.stop]
            visible = visible[:, :, :, : places.stop]
        hidden = self.decoder.embedded(tokens)
        last = len(self.decoder.layers) - 1
        for index, layer in enumerate(self.decoder.layers):
            states = layer.input_layernorm(hidden)
            key = rotate(self._heads(layer.self_attn.k_proj(states)), *rope).flatten(-2)
            buffer[:, places, index, 0] = key
            buffer[:, places, index, 1] = layer.self_attn.v_proj(states)
            if index == last:  # of the tokens before the last one only the keys and values are needed any more
                hidden, states, visible = hidden[:, -1:], states[:, -1:], visible[:, :, -1:]
                rope = tuple(part[-1:] for part in rope)
                cross_rope = cross_rope and tuple(part[:, :, -1:] for part in cross_rope)
            hidden = hidden + self._attend_session(layer.self_attn, states, buffer[:, :, index], rope, visible)
            hidden = hidden + self._attend_history(
                layer.cross_attn, layer.cross_attn_layernorm(hidden), self._cross[index], cross_rope
            )
            states = layer.post_attention_layernorm(hidden)
            hidden = hidden + (layer.mlp(states)[0] if layer.is_sparse else layer.mlp(states))
        return self.decoder.norm(hidden[:, -1])

    def _at(self, places):
        """Rotary embeddings of both attentions and the causal mask at these positions of the session."""
        rope = self._cos[places], self._sin[places]
        cross_rope = self._cross_rope and tuple(part[:, :, places] for part in self._cross_rope)
        return rope, cross_rope, self._visible[:, :, places]

    def _heads(self, states):
        return states.unflatten(-1, (-1, self.head_dim))

    def _attend_session(self, attention, states, keys_values, rope, visible):
        query = rotate(self._heads(attention.q_proj(states)), *rope).transpose(1, 2)
        key, value = self._heads(keys_values).permute(2, 0, 3, 1, 4)
        # A single token sees all that is filled; without a mask it is cheaper.
        mask = visible if self.static or states.shape[1] > 1 else None
        out = self._attend(query, key, value, mask, attention.scaling)
        return attention.o_proj(out.transpose(1, 2).flatten(-2))

    def _attend_history(self, attention, states, keys_values, rope):
        query = self._heads(attention.q_proj(states)).unflatten(0, (self.users, -1))
        if rope is not None:
            query = rotate(query, *rope)
        query = query.flatten(1, 2).transpose(1, 2)
        out = self._attend(query, *keys_values, self._history_visible, attention.scaling)
        return attention.o_proj(out.transpose(1, 2).reshape(states.shape[0], states.shape[1], -1))

    def _attend(self, query, key, value, mask, scale):
        """(rows, heads, n, head_dim) of queries, where `mask` is True or None."""
        if self._grouped or not (query.is_cpu and query.dtype == torch.bfloat16):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale, enable_gqa=self._grouped
            )
        # torch's attention on a CPU has no kernel in bfloat16 of its own; products by oneDNN take half its time.
        if query.shape[2] == 1:  # of one query, products of matrices cost more than sums
            weights = (query * key).sum(-1, keepdim=True, dtype=torch.float32).mul_(scale)
            if mask is not None:
                weights.masked_fill_(~mask.transpose(-1, -2), float("-inf"))
            return (weights.softmax(2).to(value.dtype) * value).sum(2, keepdim=True)
        weights = (query @ key.mT).float().mul_(scale)
        if mask is not None:
            weights.masked_fill_(~mask, float("-inf"))
        return weights.softmax(-1).to(value.dtype) @ value


# Logits of this many rows times the vocabulary exist at once: 32 MiB of float32.
_LOGITS_AT_ONCE = 1 << 23


@dataclass
class Beams:
    """
    Sessions found by [`beam_search`], per user best first.

    Args:
        leaves (`torch.LongTensor` of shape `(users, beams, items)`): leaves of the trie.
        scores (`torch.FloatTensor` of shape `(users, beams)`): log-probabilities; -inf where no session was left.
        perturbed (`torch.FloatTensor` of shape `(users, beams)`, *optional*): when sampled, the Gumbel keys that the beams are sorted by.
        sampled_from (`torch.FloatTensor` of shape `(users, beams)`, *optional*): when sampled, log-probabilities under the distribution
            that was sampled from, which sums to one over the legal sessions.
    """

    leaves: torch.Tensor
    scores: torch.Tensor
    perturbed: torch.Tensor | None = None
    sampled_from: torch.Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[Beams]) -> Beams:
        """The beams of several groups of users."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(cls)]
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


def beam_search(
    decoder: BeamDecoder,
    lm_head: nn.Linear,
    constraint: CatalogueConstraint,
    num_beams: int,
    session_length: int,
    sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    guide: SessionGuide | None = None,
    decoder_weight: float = 1.0,
    penalty: SharedItemPenalty | None = None,
) -> Beams:
    """
    The `num_beams` most probable sessions of `session_length` items per user, level by level; or with `sample` as many sessions drawn
    without replacement.

    Scores are log-probabilities under the softmax over the full vocabulary, as in training; BOS between two items is given and adds
    nothing. Equal scores keep the order of their beams, then of their codes.

    Sampling draws from the model restricted to legal items: at each level, softmax over the legal children of `logits / temperature`. A
    session's key is its log-probability plus Gumbel noise, drawn top-down so that the largest keys below a node are found without
    looking at all of its sessions (Kool et al., algorithm 1).

    Args:
        decoder: with room for `session_length * (levels + 1) - 1` tokens.
        lm_head: states (rows, width) to logits (rows, vocabulary).
        generator: of the Gumbel noise, on the device of the model; or one per user, so that sessions do not depend on the other users of the batch.
        guide: item scores of nodes, added to the scores of beams there; a complete item keeps its score. Sampling adds the increments to the logits.
        decoder_weight: factor of the decoder's log-probabilities (and, when sampling, of its logits) beside the guide.
        penalty: taken from the beams that generate its items, in their ranking alone: it is no part of their scores. Not for sampling.
    """
    trie, users, config = constraint.trie, decoder.users, decoder.config
    device = trie.leaf_to_index.device
    scores = torch.zeros(users, 1, device=device)
    sampled_from, perturbed = (torch.zeros_like(scores), torch.zeros_like(scores)) if sample else (None, None)
    nodes = torch.zeros(users, 1, dtype=torch.long, device=device)
    leaves = nodes.new_zeros(users, 1, 0)
    tokens = nodes.new_full((users, 1), config.bos_token_id)
    first_row = torch.arange(users, device=device)[:, None]
    charged = torch.zeros_like(scores)  # the penalties of a beam's complete items
    decoder.length = 0
    call_between = _step.get()
    for item in range(session_length):
        if guide is not None:
            guide.begin(item, leaves)
        for level in range(trie.num_levels):
            if call_between is not None:
                call_between()
            completes = level == trie.num_levels - 1
            first = trie.children[level][nodes]
            legal = constraint.legal_children(level, nodes, leaves)
            beams, width = nodes.shape[1], legal.shape[2]
            level_tokens = slice(config.level_offsets[level], config.level_offsets[level] + trie.codebook_sizes[level])
            # On level 0 all beams have the same children.
            child_codes = trie.child_codes(level, nodes.flatten()) if level else trie.codes[0][None]
            among = decoder.normalized_over(level_tokens)
            logits, normalizer = _child_logits(decoder.step(tokens), lm_head, among, level_tokens, child_codes)
            logits = logits.view(users, beams, width).masked_fill_(~legal, float("-inf"))
            normalizer = normalizer.view(users, beams, 1)
            if decoder_weight != 1:
                logits, normalizer = logits * decoder_weight, normalizer * decoder_weight
                logits.masked_fill_(~legal, float("-inf"))  # 0 times -inf is no number
            added = None
            if guide is not None and guide.guides(item):
                added = guide.at_children(item, level, nodes)
            if sample:
                scored = logits if added is None else logits + guide.increments(added, item, level, nodes)
                conditional = (scored / temperature).log_softmax(-1)
                # A beam without any legal child has nan here.
                drawn_from = (sampled_from[..., None] + conditional).masked_fill_(~legal, float("-inf"))
                keys = _conditional_gumbels(drawn_from, perturbed, generator)
                perturbed, place = top_candidates(keys.flatten(1), num_beams)
                sampled_from = drawn_from.flatten(1).gather(1, place)
                scores = (scores[..., None] + (logits - normalizer)).flatten(1).gather(1, place)
            else:
                totals = logits.sub_(normalizer).add_(scores[..., None]).flatten(1)
                guided = totals if added is None else totals + added.flatten(1)
                if penalty is not None:
                    charges = charged[..., None] + penalty.of_children(item, level, first, width)
                    guided = guided - charges.flatten(1)
                found, place = top_candidates(guided, num_beams)
                scores = found if guided is totals else totals.gather(1, place)
                if penalty is not None:
                    # A prefix is charged anew with each of its codes, a complete item once and for all.
                    charged = charges.flatten(1).gather(1, place) if completes else charged.gather(1, place // width)
            if added is not None and completes:
                scores = scores + added.flatten(1).gather(1, place)
            origin = place // width
            # A dead beam's node need not exist; its score is -inf and stays so.
            nodes = (first.gather(1, origin) + place % width).clamp_(max=len(trie.codes[level]) - 1)
            leaves = leaves.gather(1, origin[..., None].expand(-1, -1, item))
            tokens = (trie.codes[level][nodes] + config.level_offsets[level]).view(-1, 1)
            if completes:
                leaves = torch.cat([leaves, nodes[..., None]], dim=2)
                nodes = torch.zeros_like(nodes)
                # BOS is given: it goes in together with the code before it.
                tokens = F.pad(tokens, (0, 1), value=config.bos_token_id)
            if guide is not None:
                guide.reorder(origin)
            if item < session_length - 1 or not completes:
                decoder.reorder((origin + beams * first_row).flatten())
    return Beams(leaves, scores, perturbed, sampled_from)


def has_rows(lm_head: nn.Module) -> bool:
    """Whether logits of some tokens are products with rows of a head's weight: not with an adapter around it, nor with a quantised or sharded weight."""
    return type(lm_head) is nn.Linear and type(lm_head.weight) in (torch.Tensor, nn.Parameter)


def _child_logits(hidden, lm_head, among, level_tokens, codes):
    """
    float32 logits of a level's `codes`, (rows, children) or one row for all, and the log of the softmax's denominator over the tokens `among`
    (rows,).
    """
    at_once = max(1, _LOGITS_AT_ONCE // (among.stop - among.start))
    own = slice(level_tokens.start - among.start, level_tokens.stop - among.start)
    weight = lm_head.weight[among] if has_rows(lm_head) else None
    if weight is not None and hidden.is_cpu:  # logits as coarse as bfloat16 tie
        hidden, weight = hidden.float(), weight.float()
    logits, normalizers = [], []
    for start in range(0, len(hidden), at_once):
        rows = slice(start, start + at_once)
        part = lm_head(hidden[rows])[:, among] if weight is None else product(hidden[rows], weight)
        part = part.float()
        of_level = part[:, own]
        logits.append(of_level.index_select(1, codes[0]) if len(codes) == 1 else of_level.gather(1, codes[rows]))
        normalizers.append(part.logsumexp(-1))
    return torch.cat(logits), torch.cat(normalizers)


def _conditional_gumbels(log_probabilities, maximum, generator):
    """
    Gumbel keys of the children (users, beams, children) of nodes whose keys are `maximum` (users, beams): drawn independently, then shifted
    so that their largest equals the node's key (Kool et al., section 3.2 and appendix B.3).
    """
    keys = log_probabilities + gumbel_noise(torch.empty_like(log_probabilities), generator)
    largest = keys.amax(-1, keepdim=True)
    maximum = maximum[..., None]
    v = maximum - keys + torch.log1p(-(keys - largest).exp())
    shifted = maximum - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    return shifted.masked_fill(log_probabilities == float("-inf"), float("-inf"))


def gumbel_noise(values: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> torch.Tensor:
    """Fills (users, ...) values with Gumbel noise, of one generator or of one per user."""
    if isinstance(generator, Sequence):
        for of_user, own in zip(values, generator, strict=True):
            of_user.exponential_(generator=own)
    else:
        values.exponential_(generator=generator)
    return values.log_().neg_()


__all__ = ["BeamDecoder", "Beams", "beam_search", "between_steps", "gumbel_noise"]
