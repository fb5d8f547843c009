"""
Evidence about pairs of items: how often items follow each other in training sequences, and how similar their content is. Added to the scores of an item
head, it names items that the learned vectors miss, because counts need no gradient steps and cosines no counts.

    s(u, i) = w_head h_u . v_i + sum_f w_f phi_f(u, i)          over the history j = 1..n of user u

    near           log(1 + 10 sum_j .8^(n-j) N_ji),  N = D^-1/2 C D^-1/2,  C_ab: pairs at a distance d <= 8, weighted by .7^(d-1), backward ones by .3 more
    next           log(1 + how often i directly followed item n)
    before         log(1 + how often i directly preceded item n)
    content        the largest cosine of i's content and that of a history item
    content_last   the cosine of i's content and that of item n
    popular        log(1 + interactions of i)
    recent         log(1 + interactions of i among the N / 10 that came last before the request),  N: interactions of the log
    trending       the same of the last N / 100

The counts are neighbour lists, the largest `neighbours` per item. The weights are fitted on validation users after training; `recent` and `trending`
are there where they predict them better. They read a log of items and times, so that a request of the past is answered as it was then; without a time a
request is made at the end of the log.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_experts import PreciseBuffers
from .top_candidates import top_candidates

LISTS = ("near", "next", "before")
FEATURES = ("head", *LISTS, "content", "content_last", "popular")
#: Weights where there are no validation users: those of Amazon Beauty without `before`, whose sign depends on how a log orders equal times, and
#: `popular`, which depends on the data.
DEFAULT_WEIGHTS = (0.57, 1.1, 0.2, 0.0, 2.05, 0.6, 0.0)
#: Evidence that depends on the time of a request, and the part of the log that it counts: one interaction of so many.
RECENT = {"recent": 10, "trending": 100}
# Interactions counted at once for several users: 128 MiB of their places.
_COUNTED_AT_ONCE = 1 << 24
_DECAY = 0.8


class ItemEvidence(PreciseBuffers):
    """
    Neighbour lists of items and the weights of the evidence, as buffers. Items are rows from 1 on; row 0 is no item. Until lists and weights are set, the
    scores are the head's.

    Args:
        num_items: rows, without row 0.
        neighbours: length of a list.
        candidates: items per user whose content is compared: the best by the head and the counts.
        recent: interactions of the log of `recent` and `trending`, which have two more weights; 0 without them.

    Example:
        >>> evidence = ItemEvidence(num_items=3, neighbours=2)
        >>> evidence.set_list("next", torch.tensor([[2, 0], [0, 0], [0, 0]]), torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
        >>> evidence.set_weights(torch.tensor(DEFAULT_WEIGHTS))
        >>> scores = evidence.add(torch.zeros(1, 3), history=torch.tensor([[0, 1]]))  # item 2 followed item 1 four times
        >>> scores.argmax().item() + 1
        2
    """

    #: Buffers that bfloat16 could not hold.
    FLOATS = ("near_counts", "next_counts", "before_counts", "interactions", "evidence.weights")

    def __init__(self, num_items: int, neighbours: int = 50, candidates: int = 200, recent: int = 0):
        super().__init__()
        self.candidates = candidates
        for name in LISTS:
            self.register_buffer(f"{name}_items", torch.zeros(num_items + 1, neighbours, dtype=torch.int32))
            self.register_buffer(f"{name}_counts", torch.zeros(num_items + 1, neighbours))
        self.interactions = nn.Buffer(torch.zeros(num_items + 1))
        self.register_buffer("log_items", torch.zeros(recent, dtype=torch.int32) if recent else None)
        self.register_buffer("log_times", torch.zeros(recent, dtype=torch.int64) if recent else None)
        self._now: tuple[torch.Tensor, int, torch.Tensor] | None = None
        # Nothing is known before lists and weights are set: the head alone.
        self.weights = nn.Buffer(torch.tensor([1.0] + [0.0] * (len(self.names) - 1)))

    @property
    def names(self) -> tuple[str, ...]:
        """The evidence in the order of its weights."""
        return (*FEATURES, *RECENT) if self.recent else FEATURES

    @property
    def recent(self) -> int:
        """Interactions of the log; 0 without the evidence of it."""
        return 0 if self.log_items is None else len(self.log_items)

    def list_of(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(num_items + 1, neighbours) rows of the neighbours, 0 where a list ends, and their counts."""
        return getattr(self, f"{name}_items"), getattr(self, f"{name}_counts")

    @torch.no_grad()
    def set_list(self, name: str, items: torch.Tensor, counts: torch.Tensor) -> None:
        """
        Sets the neighbours of all items.

        Args:
            name: one of `near` (C of the formula), `next` and `before`.
            items: (num_items, k) rows of neighbours, 0 where a list ends; k at most `neighbours`.
            counts: (num_items, k) counts, in float.

        Raises:
            ValueError: other shapes, or a neighbour that is no row.
        """
        rows, values = self.list_of(name)
        if items.shape != counts.shape or len(items) != len(rows) - 1 or items.shape[1] > rows.shape[1]:
            raise ValueError(
                f"neighbours {name!r}: expected ({len(rows) - 1}, up to {rows.shape[1]}) items and counts; got {tuple(items.shape)} and {tuple(counts.shape)}"
            )
        if items.numel() and (int(items.min()) < 0 or int(items.max()) >= len(rows)):
            raise ValueError(
                f"neighbours {name!r}: rows must lie between 0 and {len(rows) - 1}; the list is of another catalogue"
            )
        rows.zero_(), values.zero_()
        rows[1:, : items.shape[1]] = items.to(rows)
        values[1:, : items.shape[1]] = torch.where(items > 0, counts.to(items.device), 0.0).to(values)

    @torch.no_grad()
    def set_log(self, items: torch.Tensor | None = None, times: torch.Tensor | None = None) -> None:
        """
        Sets the log that `recent` and `trending` count; their weights are 0 until `set_weights`. Without a log this evidence is taken away.

        Args:
            items: (N,) rows in the order of time.
            times: (N,) int64, in any unit.

        Raises:
            ValueError: other lengths, rows that do not exist, or times out of order.
        """
        has, had = items is not None and len(items) > 0, self.recent > 0
        if has:
            if times is None or len(times) != len(items) or bool((times.diff() < 0).any()):
                raise ValueError("the log needs a time for each item, in order")
            if int(items.min()) < 0 or int(items.max()) >= len(self.interactions):
                raise ValueError(f"the log's rows must lie between 0 and {len(self.interactions) - 1}")
        self.log_items = items.to(self.near_items) if has else None
        self.log_times = times.to(self.near_items.device, torch.int64) if has else None
        if has != had:
            weights = self.weights[: len(FEATURES)]
            self.weights = F.pad(weights, (0, len(RECENT))) if has else weights

    def recent_counts(self, times: torch.Tensor | None = None) -> torch.Tensor:
        """
        (users, 2, num_items + 1) float32 counts of `recent` and `trending`; of one user when no times are given.

        Args:
            times: (users,) int64 of requests, in the unit of the log: interactions before them count. The end of the log when not given.
        """
        widths = [-(-self.recent // share) for share in RECENT.values()]
        if times is None:
            return self._counts_now(widths)
        ends = torch.searchsorted(self.log_times, times.to(self.log_times))
        at_once = max(1, _COUNTED_AT_ONCE // max(widths))
        parts = [self._counted(some, widths) for some in ends.split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _counts_now(self, widths: list[int]) -> torch.Tensor:
        """The counts of all requests that are made now, kept until the log changes."""
        log: torch.Tensor = self.log_items  # pyright: ignore[reportAssignmentType]
        if self._now is None or self._now[0] is not log or self._now[1] != log._version:
            counts = self._counted(torch.full((1,), len(log), device=log.device), widths)
            if torch.compiler.is_compiling():
                return counts
            self._now = log, log._version, counts
        return self._now[2]

    def _counted(self, ends: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """(users, widths, num_items + 1) counts of the rows of the log before each end."""
        counts = self.interactions.new_zeros(len(ends), len(widths), len(self.interactions), dtype=torch.float32)
        for number, width in enumerate(widths):
            places = ends[:, None] - torch.arange(1, width + 1, device=ends.device)
            rows = torch.where(places < 0, 0, self.log_items[places.clamp(min=0)].long())  # the log begins later
            counts[:, number].scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float32))
        counts[..., 0] = 0
        return counts

    def recent_features(self, rows: torch.Tensor, times: torch.Tensor | None = None) -> torch.Tensor:
        """(users, c, 2) the evidence `recent` and `trending` of rows (users, c), as [`features`] has it."""
        counts = self.recent_counts(times).unbind(1)
        return torch.log1p(torch.stack([_at(count, rows) for count in counts], dim=-1))

    def extend(self, spread, row: torch.Tensor) -> None:
        """For [`ItemHead.extend`]: `spread` moves a table's rows to their new places, `row` has the new row of each old one."""
        for name in LISTS:
            rows, counts = self.list_of(name)
            setattr(self, f"{name}_items", spread(row[rows.long()].to(rows)))
            setattr(self, f"{name}_counts", spread(counts))
        self.interactions = spread(self.interactions)
        if self.log_items is not None:
            self.log_items = row[self.log_items.long()].to(self.log_items)

    def _from_lists(self, history: torch.Tensor, columns: torch.Tensor, width: int):
        """Per list its name, the columns that it names (users, m) and the evidence there; a column that is named twice has it twice."""
        found, sums = self.near_sums(history, columns, width)
        yield "near", found, torch.log1p(10 * sums.gather(1, found))
        last = latest(history)
        for name in LISTS[1:]:
            rows, counts = (part[last] for part in self.list_of(name))
            yield name, columns[rows.long()], torch.log1p(counts.float())

    def near_sums(self, history: torch.Tensor, columns: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns (users, m) that the neighbours of histories' items are in, and the sums of N by age (users, width)."""
        present = history > 0
        age = present.flip(1).cumsum(1).flip(1) - 1
        rows, values = self.near_pairs(history, _DECAY ** age.float() * present)
        found = columns[rows]
        # `len(history)` would make the number of users a constant of an exported graph.
        return found, values.new_zeros(history.shape[0], width).scatter_add_(1, found, values)

    def near_pairs(self, items: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the neighbours of items (..., n), and N of each pair times the item's weight: two tensors (..., n * neighbours)."""
        rows, counts = self.near_items[items].long(), self.near_counts[items].float()
        values = counts * (weights * self._inverse_root(items)).unsqueeze(-1) * self._inverse_root(rows)
        return rows.flatten(-2), values.flatten(-2)

    def _inverse_root(self, rows: torch.Tensor) -> torch.Tensor:
        """D^-1/2 of rows."""
        return (self.interactions[rows].float() + 1).rsqrt()

    def _of_rows(self, times: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """(users, num_items + 1) evidence that a history does not change, by name; of one user where it is the same for all."""
        found = {"popular": self.interactions.float()[None]}
        if self.recent:
            found |= zip(RECENT, self.recent_counts(times).unbind(1), strict=True)
        return {name: torch.log1p(count) for name, count in found.items()}

    def _with_head(self, scores: torch.Tensor, rows: torch.Tensor, times: torch.Tensor | None) -> torch.Tensor:
        """The head's scores (users, items), and the evidence that a history does not change, of rows of the same shape or (items,)."""
        scores = self._weight("head") * scores
        for name, value in self._of_rows(times).items():
            scores = scores + self._weight(name) * _at(value, rows)
        return scores

    def _weight(self, name: str) -> torch.Tensor:
        return self.weights[self.names.index(name)].float()

    def add(
        self,
        scores: torch.Tensor,
        history: torch.Tensor,
        content: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        legal: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Scores with the evidence.

        Args:
            scores: (users, items) float32 of the head.
            history: (users, n) rows of the items of histories, oldest first; 0 where there is none.
            content: (num_items + 1, d) content vectors of length 1, zeros for an item without content. Without, there is no content evidence.
            columns: (num_items + 1,) the column of `scores` of each row, the number of items for none; row i is column i - 1 when not given.
            rows: (items,) the row of each column, given with `columns`.
            legal: (users, items) bool; other items take no place among the candidates whose content is compared.
            times: (users,) int64, when the requests were made ([`recent_counts`]).

        Returns:
            (users, items) float32. An item that is no candidate gets the content evidence of the least similar candidate.
        """
        items = scores.shape[1]
        if columns is None or rows is None:
            columns, rows = self._places(items)
        # What is in no column goes into the last one.
        out = F.pad(self._with_head(scores.float(), rows, times), (0, 1))
        for name, where, value in self._from_lists(history, columns, items + 1):
            out.scatter_(1, where, out.gather(1, where) + self._weight(name) * value)
        out = out[:, :items]
        if content is None or content.shape[1] == 0:
            return out
        masked = out if legal is None else out.masked_fill(~legal, float("-inf"))
        found = top_candidates(masked, min(self.candidates, items))[1]
        largest, last = similarities(content, history, rows[found])
        bonus = self._weight("content") * largest + self._weight("content_last") * last
        return out.scatter_add(1, found, bonus - bonus.amin(1, keepdim=True))

    def _places(self, items: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of each row where row i is column i - 1, `items` for row 0, which has none; and row of each column."""
        rows = torch.arange(1, items + 1, device=self.interactions.device)
        return F.pad(rows - 1, (1, 0), value=items), rows

    def features(
        self,
        scores: torch.Tensor,
        history: torch.Tensor,
        content: torch.Tensor | None = None,
        excluded: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The evidence of the best candidates, for [`fit_weights`].

        Args:
            scores: (users, num_items) float32 of the head.
            history, content, times: as for `add`.
            excluded: (users, e) rows that are no candidates, padded with 0.

        Returns:
            (users, candidates, weights) the head's score and the evidence in the order of `names`, and (users, candidates) rows; 0 for an excluded
            item, which is there only where fewer items than candidates are left.
        """
        items = scores.shape[1]
        columns, rows = self._places(items)
        legal = None
        if excluded is not None:
            legal = torch.ones_like(scores, dtype=torch.bool)
            legal = F.pad(legal, (1, 0)).scatter_(1, excluded, False)[:, 1:]
        total = self.add(scores, history, content, legal=legal, times=times)
        total = total if legal is None else total.masked_fill(~legal, float("-inf"))
        found = total.topk(min(self.candidates, items), dim=1).indices
        parts = [scores.gather(1, found)]
        for _, where, value in self._from_lists(history, columns, items + 1):
            dense = torch.zeros(len(scores), items + 1, device=scores.device)
            parts.append(dense.scatter_(1, where, value).gather(1, found))
        if content is None or content.shape[1] == 0:
            parts += [torch.zeros_like(parts[0])] * 2
        else:
            parts += similarities(content, history, rows[found])
        parts += [_at(value, rows[found]) for value in self._of_rows(times).values()]
        which = rows[found] if legal is None else rows[found].masked_fill(~legal.gather(1, found), 0)
        return torch.stack(parts, dim=-1), which

    @torch.no_grad()
    def set_weights(self, weights: torch.Tensor) -> None:
        """Sets the weights, in the order of `names`."""
        self.weights.copy_(weights)


class SessionEvidence:
    """
    The evidence while a session is written: its items are the latest of the history. Only a few candidates per user are scored.

    Args:
        evidence: neighbour lists and weights.
        scores: (users, c) float32 of the head, of the candidates.
        history: (users, n) rows.
        content: (num_items + 1, d), or None.
        columns: (num_items + 1,) the column of each row among all items, the number of items for none.
        rows: (items,) the row of each column.
        found: (users, c) columns of the candidates, ascending.
        times: (users,) of the requests, or None.
    """

    def __init__(self, evidence: ItemEvidence, scores, history, content, columns, rows, found, times=None):
        self.evidence, self.columns, self.found, self.rows = evidence, columns, found, rows
        self.base = evidence._with_head(scores, rows[found], times)
        self.near = evidence.near_sums(history, columns, len(rows) + 1)[1].gather(1, found)
        self.last = latest(history)
        self.content = None if content is None or content.shape[1] == 0 else content
        if self.content is not None:
            self.candidates = self.content[rows[found]].float()
            self.largest, self.like_last = similarities(self.content, history, rows[found])

    def first_scores(self) -> torch.Tensor:
        """(users, c) float32 logits of the candidates before anything is written."""
        like = () if self.content is None else (self.largest[:, None], self.like_last[:, None])
        return self._total(self.near[:, None], self.last[:, None], *like).squeeze(1)

    def scores(self, written: torch.Tensor) -> torch.Tensor:
        """
        (users, beams, c) float32 logits of the candidates.

        Args:
            written: (users, beams, m) columns of the items of each beam's session so far, m at least 1.
        """
        evidence, (users, beams, items), count = self.evidence, written.shape, self.found.shape[1]
        rows = self.rows[written]
        weights = _DECAY ** torch.arange(items - 1, -1, -1, device=rows.device)
        names, values = evidence.near_pairs(rows, weights)
        near = torch.zeros(users, beams, count + 1, device=rows.device)
        near.scatter_add_(2, self._places(names), values)
        near = near[..., :count] + _DECAY**items * self.near[:, None]
        if self.content is None:
            return self._total(near, rows[..., -1])
        cosines = self.content[rows].float().flatten(1, 2) @ self.candidates.transpose(1, 2)
        cosines = cosines.view(users, beams, items, count)
        largest = torch.maximum(cosines.amax(2), self.largest[:, None])
        return self._total(near, rows[..., -1], largest, cosines[:, :, -1])

    def _total(self, near, last, largest=None, like_last=None) -> torch.Tensor:
        """Scores from the evidence: sums of N (users, beams, c), last rows (users, beams), cosines (users, beams, c)."""
        evidence = self.evidence
        total = self.base[:, None] + evidence._weight("near") * torch.log1p(10 * near)
        for name in LISTS[1:]:
            names, counts = (part[last] for part in evidence.list_of(name))
            found = torch.zeros(*last.shape, self.found.shape[1] + 1, device=last.device)
            found.scatter_(2, self._places(names.long()), torch.log1p(counts.float()))
            total = total + evidence._weight(name) * found[..., :-1]
        if largest is None or like_last is None:
            return total
        return total + evidence._weight("content") * largest + evidence._weight("content_last") * like_last

    def _places(self, names: torch.Tensor) -> torch.Tensor:
        """Places among the candidates of rows (users, beams, m); their number for a row that is no candidate."""
        columns = self.columns[names].flatten(1)
        place = torch.searchsorted(self.found, columns).clamp(max=self.found.shape[1] - 1)
        place = torch.where(self.found.gather(1, place) == columns, place, self.found.shape[1])
        return place.view_as(names)


def _at(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Values (users, num_items + 1), or (1, num_items + 1) for all users, of rows (users, c) or (items,)."""
    if rows.dim() == 1:
        return values[:, rows]
    return values.expand(rows.shape[0], -1).gather(1, rows)


def as_times(times: Iterable[float | None]) -> torch.Tensor | None:
    """
    (users,) int64 times of requests, None for one that is made now, as the largest integer; None where all are made now.

    Raises:
        ValueError: what is no finite number.

    Example:
        >>> as_times([7, None, 8.5]).tolist()
        [7, 9223372036854775807, 8]
    """
    whole = []
    for time in times:
        if time is not None and (isinstance(time, bool) or not isinstance(time, Real) or not math.isfinite(time)):
            raise ValueError(f"request_time is a number in the unit of the training table's times; got {time!r:.80}")
        whole.append(None if time is None else math.floor(time))
    if all(time is None for time in whole):
        return None
    now = torch.iinfo(torch.int64).max
    return torch.tensor([now if time is None else time for time in whole], dtype=torch.int64)


def times_of(users: int, times: Any, device: torch.device) -> torch.Tensor | None:
    """
    `request_times` as they are passed, a tensor, an array or a list, on a device.

    Raises:
        ValueError: not one time per user, or no numbers.
    """
    if times is None:
        return None
    if not isinstance(times, torch.Tensor):
        times = as_times(list(times))
    if times is not None and (times.shape != (users,) or times.is_floating_point()):
        raise ValueError(
            f"request_times needs one whole number per user, shape ({users},); got {times.dtype} of shape {tuple(times.shape)}"
        )
    return None if times is None else times.to(device, torch.int64)


def latest(history: torch.Tensor) -> torch.Tensor:
    """
    (users,) the last row of each history that is not 0; 0 where there is none.

    Example:
        >>> latest(torch.tensor([[4, 7, 0], [0, 0, 0]])).tolist()
        [7, 0]
    """
    places = torch.arange(1, history.shape[1] + 1, device=history.device)
    return history.gather(1, ((history > 0) * places).argmax(1, keepdim=True)).squeeze(1)


def similarities(
    content: torch.Tensor, history: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines of items' content with histories: the largest over a history, and that with its last item.

    Args:
        content: (num_items + 1, d), rows of length 1 or zeros.
        history: (users, n) rows.
        rows: (users, c) rows.

    Returns:
        Two tensors (users, c) float32; 0 for a history without items.
    """
    of_items, of_history = content[rows].float(), content[history].float()
    cosines = (of_items @ of_history.transpose(1, 2)).masked_fill((history == 0)[:, None], -1.0)
    largest = cosines.amax(2).masked_fill(~(history > 0).any(1, keepdim=True), 0.0)
    last = (of_items @ content[latest(history)].float().unsqueeze(-1)).squeeze(-1)
    return largest, last


def among_candidates(rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(users,) whether a user's target, a row, is one of the candidates (users, c), and of those where it is its place."""
    hit = rows == targets[:, None]
    there = hit.any(1) & (targets > 0)
    return there, hit[there].float().argmax(1)


def fit_weights(
    features: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, start: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The weights with the least cross-entropy of validation targets among their candidates. They are drawn to `start` as strongly as one user in
    units of standard deviations, so that a few users do not overfit.

    Args:
        features, rows: of [`ItemEvidence.features`].
        targets: (users,) rows of the held-out items. Users whose target is no candidate are left out.
        start: (weights,); `DEFAULT_WEIGHTS`, and 0 for further evidence, when not given.

    Returns:
        (weights,) float32; `start` where no target is a candidate.

    Example:
        >>> features = torch.randn(64, 10, 7)
        >>> rows = torch.arange(1, 11).expand(64, 10)
        >>> targets = features[..., 1].argmax(1) + 1  # the counts alone decide
        >>> bool((fit_weights(features, rows, targets).argmax() == 1))
        True
    """
    if start is None:
        start = F.pad(torch.tensor(DEFAULT_WEIGHTS), (0, features.shape[-1] - len(DEFAULT_WEIGHTS)))
    start = start.to(features.device, torch.float32)
    there, y = among_candidates(rows, targets)
    if not there.any():
        return start
    x, absent = features[there], rows[there] == 0
    deviation = x.flatten(0, 1).std(0, correction=0)
    known = deviation > 1e-6  # evidence that does not differ between candidates keeps its weight
    deviation = torch.where(known, deviation, 1.0)
    x = (x - x.flatten(0, 1).mean(0)) / deviation
    origin = start * deviation
    weights = origin.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = (x @ weights).masked_fill(absent, float("-inf"))
        loss = F.cross_entropy(logits, y) + (weights - origin).square().sum() / len(y)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = torch.where(known, weights.detach() / deviation, start)
    return found if bool(found.isfinite().all()) else start


__all__ = [
    "DEFAULT_WEIGHTS",
    "FEATURES",
    "LISTS",
    "RECENT",
    "ItemEvidence",
    "SessionEvidence",
    "among_candidates",
    "fit_weights",
    "latest",
    "similarities",
]
