"""
Beam search over the catalogue, and its random twin: sampling of whole sessions without replacement (stochastic beam search, Kool et al. 2019,
arXiv 1903.06059).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from .constraint import CatalogueConstraint
from .cpu_experts import product
from .decoding_onerec import BeamDecoder

# Logits of this many rows times the vocabulary exist at once: 32 MiB of float32.
_LOGITS_AT_ONCE = 1 << 23
_BLOCK = 64


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


def top_candidates(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k largest of each row, best first, equal ones in the order of their places: `torch.topk` with a rule for ties.

    Args:
        scores: (rows, n) floats, -inf where there is no candidate.

    Returns:
        (rows, min(k, n)) values and int64 places.

    Example:
        >>> top_candidates(torch.tensor([[1.0, 3.0, 1.0, 3.0]]), k=3)
        (tensor([[3., 3., 1.]]), tensor([[1, 3, 0]]))
    """
    rows, n = scores.shape
    if n <= k:
        values, places = scores.sort(dim=1, descending=True, stable=True)
        return values, places
    if n > 16 * k * _BLOCK:
        # The k best stand in the k blocks with the best maxima: of a block that is left out, k others hold something better (or equal
        # and before it).
        blocks = F.pad(scores, (0, -n % _BLOCK), value=float("-inf")).view(rows, -1, _BLOCK)
        _, chosen = top_candidates(blocks.amax(2), k)
        chosen = chosen.sort(dim=1).values  # in order of places, for the ties
        values, inside = top_candidates(blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).view(rows, -1), k)
        return values, chosen.gather(1, inside // _BLOCK) * _BLOCK + inside % _BLOCK
    threshold = scores.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    better, tied = scores > threshold, scores == threshold
    wanted = better | (tied & (tied.cumsum(1) <= k - better.sum(1, keepdim=True)))
    places = wanted.nonzero()[:, 1].view(rows, k)
    values, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def beam_search(
    decoder: BeamDecoder,
    lm_head: nn.Linear,
    constraint: CatalogueConstraint,
    num_beams: int,
    session_length: int,
    sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    guide: Sequence[torch.Tensor] | None = None,
) -> Beams:
    """
    The `num_beams` most probable sessions of `session_length` items per user, level by level; or with `sample` as many sessions drawn
    without replacement.

    Scores are log-probabilities under the softmax over the full vocabulary, as in training; BOS between two items is given and adds
    nothing. Equal scores keep the order of their beams, then of their codes.

    Sampling draws from the model held to what is legal: at each level, softmax over the legal children of `logits / temperature`. A
    session's key is its log-probability plus Gumbel noise, drawn top-down so that the largest keys below a node are found without
    looking at all of its sessions (Kool et al., algorithm 1).

    Args:
        decoder: fresh, with room for `session_length * (levels + 1) - 1` tokens.
        lm_head: states (rows, width) to logits (rows, vocabulary).
        generator: of the Gumbel noise, on the device of the model; or one per user, whose sessions then depend on nobody else's.
        guide: per level (users, nodes) floats: what is added to the scores of beams whose first item lies below a node, for as long as they
            have come no further; a whole session has its first item's added. Not for sampling.
    """
    trie, users, config = constraint.trie, decoder.users, decoder.config
    device = trie.leaf_to_row.device
    scores = torch.zeros(users, 1, device=device)
    sampled_from, perturbed = (torch.zeros_like(scores), torch.zeros_like(scores)) if sample else (None, None)
    nodes = torch.zeros(users, 1, dtype=torch.long, device=device)
    leaves = nodes.new_zeros(users, 1, 0)
    tokens = nodes.new_full((users, 1), config.bos_token_id)
    first_row = torch.arange(users, device=device)[:, None]
    for item in range(session_length):
        for level in range(trie.num_levels):
            first = trie.children[level][nodes]
            legal = constraint.legal_children(level, nodes, leaves)
            beams, width = nodes.shape[1], legal.shape[2]
            level_tokens = slice(config.level_offsets[level], config.level_offsets[level] + trie.codebook_sizes[level])
            # On level 0 all beams have the same children.
            child_codes = trie.child_codes(level, nodes.flatten()) if level else trie.codes[0][None]
            logits, normalizer = _child_logits(
                decoder.step(tokens), lm_head, config.vocab_size, level_tokens, child_codes
            )
            logits = logits.view(users, beams, width).masked_fill_(~legal, float("-inf"))
            normalizer = normalizer.view(users, beams, 1)
            if sample:
                conditional = (logits / temperature).log_softmax(-1)
                # A beam without any legal child has nan here.
                drawn_from = (sampled_from[..., None] + conditional).masked_fill_(~legal, float("-inf"))
                keys = _conditional_gumbels(drawn_from, perturbed, generator)
                perturbed, place = top_candidates(keys.flatten(1), num_beams)
                sampled_from = drawn_from.flatten(1).gather(1, place)
                scores = (scores[..., None] + (logits - normalizer)).flatten(1).gather(1, place)
            else:
                totals = logits.sub_(normalizer).add_(scores[..., None]).flatten(1)
                if guide is None or item > 0:
                    scores, place = top_candidates(totals, num_beams)
                else:
                    children = (first[..., None] + torch.arange(width, device=device)).flatten(1)
                    added = guide[level].gather(1, children.clamp_(max=len(trie.codes[level]) - 1))
                    guided, place = top_candidates(totals + added, num_beams)
                    scores = guided if level == trie.num_levels - 1 else totals.gather(1, place)
            origin = place // width
            # A dead beam's node need not exist; its score is -inf and stays so.
            nodes = (first.gather(1, origin) + place % width).clamp_(max=len(trie.codes[level]) - 1)
            leaves = leaves.gather(1, origin[..., None].expand(-1, -1, item))
            tokens = (trie.codes[level][nodes] + config.level_offsets[level]).view(-1, 1)
            if level == trie.num_levels - 1:
                leaves = torch.cat([leaves, nodes[..., None]], dim=2)
                nodes = torch.zeros_like(nodes)
                # BOS is given: it goes in together with the code before it.
                tokens = F.pad(tokens, (0, 1), value=config.bos_token_id)
            if item < session_length - 1 or level < trie.num_levels - 1:
                decoder.reorder((origin + beams * first_row).flatten())
    return Beams(leaves, scores, perturbed, sampled_from)


def _child_logits(hidden, lm_head, vocab_size, level_tokens, codes):
    """
    float32 logits of a level's `codes`, (rows, children) or one row for all, and the log of the softmax's denominator over the full
    vocabulary (rows,).
    """
    at_once = max(1, _LOGITS_AT_ONCE // vocab_size)
    plain = type(lm_head) is nn.Linear  # and not an adapter around one
    logits, normalizers = [], []
    for start in range(0, len(hidden), at_once):
        rows = slice(start, start + at_once)
        part = (product(hidden[rows], lm_head.weight) if plain else lm_head(hidden[rows])).float()
        of_level = part[:, level_tokens]
        logits.append(of_level.index_select(1, codes[0]) if len(codes) == 1 else of_level.gather(1, codes[rows]))
        normalizers.append(part.logsumexp(-1))
    return torch.cat(logits), torch.cat(normalizers)


def _conditional_gumbels(log_probabilities, maximum, generator):
    """
    Gumbel keys of the children (users, beams, children) of nodes whose keys are `maximum` (users, beams): drawn independently, then shifted
    so that their largest equals the node's key (Kool et al., section 3.2 and appendix B.3).
    """
    noise = torch.empty_like(log_probabilities)
    if isinstance(generator, Sequence):
        for of_user, own in zip(noise, generator, strict=True):
            of_user.exponential_(generator=own)
    else:
        noise.exponential_(generator=generator)
    keys = log_probabilities + noise.log_().neg_()
    largest = keys.amax(-1, keepdim=True)
    maximum = maximum[..., None]
    v = maximum - keys + torch.log1p(-(keys - largest).exp())
    shifted = maximum - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    return shifted.masked_fill(log_probabilities == float("-inf"), float("-inf"))


__all__ = ["Beams", "beam_search", "top_candidates"]
