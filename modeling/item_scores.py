"""
Scores of items by an item head and its evidence, and these scores as a guide of beam search: the probability of a node of the catalogue's trie is the
sum over the items below it, so that item scores count from the first code on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from .constraint import CatalogueConstraint, SemanticIDTrie
from .item_evidence import SessionEvidence
from .top_candidates import top_candidates


class ItemScorer:
    """
    Scores of a trie's leaves by an item head and its evidence.

    Args:
        encoder: the model's encoder, with an item head that has a `loss_weight`.
        code_tokens: (items, levels) code tokens of the items.
    """

    def __init__(self, encoder, code_tokens: torch.Tensor):
        head, self.scored = encoder.item_head, None
        self.evidence, self.content = head.evidence, head.content
        self.rows = head.rows(code_tokens)
        # The best of many items differ by less than bfloat16 tells apart: vectors and scores are float32.
        # For the catalogue that the model was made for, in the order of codes, nothing needs to be gathered.
        if torch.equal(self.rows, torch.arange(1, len(head.keys) + 1, device=self.rows.device)):
            self.vectors = head.output_vectors(encoder.embed_tokens, dtype=torch.float32)
        else:
            self.vectors = head.output_vectors(encoder.embed_tokens, code_tokens, torch.float32)
            if not (head.config.score_codes or self.rows.all()):
                self.scored = self.rows > 0
        # The column of each row of the item head; the number of items for rows without one, and for row 0.
        self.columns = torch.full((len(head.keys) + 1,), len(self.rows), device=self.rows.device)
        self.columns[self.rows] = torch.arange(len(self.rows), device=self.rows.device)
        self.columns[0] = len(self.rows)

    def scores(
        self,
        states: torch.Tensor,
        history: torch.Tensor | None = None,
        legal: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        (users, items) float32 logits. A new item without any score has -inf.

        Args:
            states: (users, width).
            history: (users, n) rows of the histories' items ([`ItemHead.history_rows`]), for a head with evidence.
            legal: (users, items) bool, the items that may be ranked; None for all.
            times: (users,) int64, when the requests were made; None for now.
        """
        scores = self.head_scores(states)
        if self.evidence is not None:
            if history is None:
                raise ValueError("the item head's evidence needs the history: pass input_ids")
            scores = self.evidence.add(scores, history, self.content, self.columns, self.rows, legal, times)
        return scores

    def head_scores(self, states: torch.Tensor) -> torch.Tensor:
        """(users, items) float32 logits without evidence."""
        scores = (states.float() @ self.vectors.T).float()
        return scores if self.scored is None else scores.masked_fill(~self.scored, float("-inf"))

    def log_probs(
        self,
        states: torch.Tensor,
        history: torch.Tensor | None = None,
        legal: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(users, items) float32, as `scores`. A new item without a vector scores as the least probable item that has one."""
        scores = self.scores(states, history, legal, times).log_softmax(-1)
        if self.scored is None:
            return scores
        return torch.where(self.scored, scores, scores.masked_fill(~self.scored, 0.0).amin(-1, keepdim=True))


_PROBES = 1024
# Scores of this many users times items exist at once: 128 MiB of float32.
_SCORES_AT_ONCE = 1 << 25
# The scorer of each encoder, with what it was made from: at a million items its vectors take longer to compute than an answer.
_SCORERS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, list, ItemScorer]] = weakref.WeakKeyDictionary()


def kept_scorer(encoder, trie: SemanticIDTrie, code_tokens: Callable[[], torch.Tensor]) -> ItemScorer:
    """
    The scorer of an encoder for a trie's leaves. While no gradients are needed, it is kept until a weight changes.

    Args:
        encoder: as for [`ItemScorer`].
        code_tokens: makes the (leaves, levels) code tokens, where the scorer is made anew.
    """
    made = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _made_from(encoder)
    kept = _SCORERS.get(encoder)
    if made is not None and kept is not None and kept[0] is trie and kept[1] == made:
        return kept[2]
    scorer = ItemScorer(encoder, code_tokens())
    if made is not None:
        _SCORERS[encoder] = trie, made, scorer
    return scorer


def _made_from(encoder) -> list | None:
    """The state of the weights behind item scores; None under adapters, which are switched without a change of weights."""
    modules = [*encoder.item_head.modules(), encoder.embed_tokens]
    if any(type(module).__module__.startswith("peft") for module in modules):
        return None
    weights = [weight for module in modules for weight in (*module.parameters(False), *module.buffers(False))]
    # Fused optimizers change weights without counting a version: some of the entries tell.
    probes = [weight.flatten()[:: 1 + weight.numel() // _PROBES].double().sum() for weight in weights]
    named = [(id(weight), weight._version, weight.data_ptr(), weight.dtype) for weight in weights]
    return [named, torch.stack(probes).tolist()]


class ItemScores:
    """
    Item scores of histories: a guide of beam search, and a ranking of single items.

    Args:
        scorer: of the trie's leaves, in order.
        states: (users, width) states at the ends of the histories ([`~item_head.history_states`]).
        trie: the catalogue's semantic IDs, on the device of the states.
        weight: factor of the log-probabilities, positive.
        history: (users, n) rows of the histories' items, for a head with evidence.
        times: (users,) int64, when the requests were made; None for now.
    """

    def __init__(
        self,
        scorer: ItemScorer,
        states: torch.Tensor,
        trie: SemanticIDTrie,
        weight: float,
        history: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
    ):
        self.scorer, self.states, self.trie, self.weight = scorer, states, trie, weight
        self.history, self.times = history, times

    @property
    def reads_sessions(self) -> bool:
        """Whether the items after a session's first one have item scores: by evidence, which reads the items before them."""
        return self.scorer.evidence is not None and self.history is not None

    def at_leaves(self, users: slice, constraint: CatalogueConstraint) -> torch.Tensor:
        """(users, leaves) float32 log-probabilities, -inf for items that `constraint` does not allow them."""
        legal = constraint.legal_leaves()
        history, times = (None if part is None else part[users] for part in (self.history, self.times))
        leaves = self.scorer.log_probs(self.states[users], history, legal, times)
        return leaves if legal is None else leaves.masked_fill(~legal, float("-inf"))

    def best(self, constraint: CatalogueConstraint, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(users, count) log-probabilities and leaves of the best items, in a stable order; -inf where no item is left."""
        at_once, parts = max(1, _SCORES_AT_ONCE // self.trie.num_leaves), []
        for start in range(0, len(self.states), at_once):
            some = slice(start, start + at_once)
            parts.append(top_candidates(self.at_leaves(some, constraint.of(some)), count))
        scores, leaves = zip(*parts, strict=True)
        return torch.cat(scores), torch.cat(leaves)

    def guide(self, users: slice, constraint: CatalogueConstraint) -> SessionGuide:
        """The guide of beam search for some of the users."""
        return SessionGuide(self, users, constraint)


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


class SessionGuide:
    """
    Item scores of the children of beams' nodes. A session's first item has the scores of the whole catalogue ([`node_scores`]). Later items have some
    only by evidence, which reads what the beam has written: they are computed for the best candidates of the history, and the other items share their
    probability equally.

    Args:
        item_scores: of all users.
        users: these users of them.
        constraint: what these users may get.
    """

    def __init__(self, item_scores: ItemScores, users: slice, constraint: CatalogueConstraint):
        self.trie, self.weight = item_scores.trie, item_scores.weight
        leaves = item_scores.at_leaves(users, constraint)
        self.first = node_scores(self.trie, leaves, self.weight)
        self._session = None
        if item_scores.reads_sessions:
            assert item_scores.history is not None
            times = None if item_scores.times is None else item_scores.times[users]
            self._session = item_scores.scorer, item_scores.states[users], item_scores.history[users], leaves, times
        self._evidence: SessionEvidence | None = None

    def guides(self, item: int) -> bool:
        """Whether the session's item with this number has item scores."""
        return item == 0 or self._session is not None

    def begin(self, item: int, written: torch.Tensor) -> None:
        """Before the first code of each item: `item` is its number in the session, `written` (users, beams, item) the leaves of the items before it."""
        if item > 0 and self._session is not None:
            self._begin(written)

    def at_children(self, item: int, level: int, nodes: torch.Tensor) -> torch.Tensor:
        """
        (users, beams, children) float32 scores of the children, on `level`, of nodes (users, beams) of the level above; columns beyond a node's
        children are of other nodes.
        """
        trie, width = self.trie, self.trie.max_children[level]
        first = trie.children[level][nodes]
        children = (first[..., None] + torch.arange(width, device=nodes.device)).clamp_(max=len(trie.codes[level]) - 1)
        if item == 0:
            return self.first[level].gather(1, children.flatten(1)).view(children.shape)
        return self._at(level, children)

    def at(self, item: int, level: int, nodes: torch.Tensor) -> torch.Tensor:
        """(users, beams) scores of nodes of a level."""
        if item == 0:
            return self.first[level].gather(1, nodes)
        return self._at(level, nodes.unsqueeze(-1)).squeeze(-1)

    def increments(self, children: torch.Tensor, item: int, level: int, nodes: torch.Tensor) -> torch.Tensor:
        """(users, beams, children) what the scores of children (`at_children`) add to those of their nodes; the root has the score 0."""
        return children if level == 0 else children - self.at(item, level - 1, nodes)[..., None]

    def reorder(self, origin: torch.Tensor) -> None:
        """Beam i continues beam `origin[i]`: (users, beams)."""
        if self._evidence is not None:
            self._sums = self._sums.gather(1, origin[..., None].expand(-1, -1, self._sums.shape[2]))
            self._rest = self._rest.gather(1, origin)

    def _begin(self, written: torch.Tensor) -> None:
        """Probabilities of the candidates of the next item of each beam."""
        if self._evidence is None:
            self._find_candidates()
        assert self._evidence is not None
        scores = self._evidence.scores(written).double()
        taken = (self._evidence.found[:, None, :, None] == written[:, :, None, :]).any(-1)
        scores = scores.masked_fill(taken | ~self._legal[:, None], float("-inf"))
        total = torch.logaddexp(scores.logsumexp(-1), self._others[:, None])
        shares = (scores - total[..., None]).exp().cumsum(-1)
        self._sums = torch.nn.functional.pad(shares, (1, 0))
        self._rest = (self._others[:, None] - total).exp()

    def _find_candidates(self) -> None:
        assert self._session is not None
        scorer, states, history, leaves, times = self._session
        count = min(scorer.evidence.candidates, leaves.shape[1])
        found = leaves.topk(count, dim=1).indices.sort(dim=1).values
        head = scorer.head_scores(states)
        self._evidence = SessionEvidence(
            scorer.evidence, head.gather(1, found), history, scorer.content, scorer.columns, scorer.rows, found, times
        )
        self._legal = leaves.gather(1, found).isfinite()
        # The others keep the evidence of the history for the whole session. What log-probabilities and logits differ by is the same for all
        # candidates.
        shift = (
            (self._evidence.first_scores() - leaves.gather(1, found)).masked_fill(~self._legal, float("-inf")).amax(1)
        )
        self._others = leaves.double().scatter(1, found, float("-inf")).logsumexp(1) + shift
        self._count = max(1, leaves.shape[1] - count)
        self._ancestors = [self.trie.ancestors(level, found) for level in range(self.trie.num_levels)]

    def _at(self, level: int, nodes: torch.Tensor) -> torch.Tensor:
        """`weight` times the log-probability below nodes (users, beams, n)."""
        ancestors, flat = self._ancestors[level], nodes.flatten(1)
        begin = torch.searchsorted(ancestors, flat).view_as(nodes)
        end = torch.searchsorted(ancestors, flat, right=True).view_as(nodes)
        share = self._sums.gather(2, end) - self._sums.gather(2, begin)
        below = self.trie.leaves[level][nodes + 1] - self.trie.leaves[level][nodes] - (end - begin)
        share = share + self._rest[..., None] * below / self._count
        return (share.clamp(min=torch.finfo(torch.float32).tiny).log() * self.weight).float()


__all__ = ["ItemScorer", "ItemScores", "SessionGuide", "kept_scorer", "node_scores"]
