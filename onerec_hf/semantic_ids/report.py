"""Quality report of semantic IDs: error, balance, entropy, collisions, neighbour agreement; and comparison of quantisers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from onerec_hf.modeling.files import read_json_object, refusing, replacing
from onerec_hf.semantic_ids.balanced_assignment import ROWS, squares
from onerec_hf.semantic_ids.process_group import SINGLE_PROCESS, SingleProcess
from onerec_hf.semantic_ids.quantizer import Quantizer

_NEIGHBOURS, _QUERIES, _QUERY_ROWS = 10, 1000, 50


@dataclass(frozen=True)
class SemanticIDReport:
    """
    Statistics of a fit. Lists have one entry per level of the quantiser.

    Args:
        method: method of the quantiser.
        num_items, codebook_sizes: size of the catalogue and of its codebooks.
        residual_energy: share of the embeddings' variance not explained by the codes up to this level (squared residuals over squared
            distances to the mean), before collisions are resolved. `reconstruction_error` is the mean squared residual.
        cluster_sizes: smallest and largest number of items per code. This and the following fields are computed after collisions are
            resolved. With balanced codes they differ by at most one on all levels but the last.
        utilisation: share of codes in use.
        entropy: entropy of the code distribution, divided by its maximum log K.
        distinct_prefixes: number of distinct code prefixes up to this level.
        neighbour_agreement: share of the 10 nearest neighbours in embedding space (of at most 1,000 sampled items) with the same prefix up
            to this level.
        collisions: number of items that shared all codes with an earlier item before collisions were resolved.
        moved: number of items whose last code was changed.
        extra_digit: number of codes of the added level, 0 if none was added.
    """

    method: str
    num_items: int
    codebook_sizes: list[int]
    residual_energy: list[float]
    reconstruction_error: list[float]
    cluster_sizes: list[list[int]]
    utilisation: list[float]
    entropy: list[float]
    distinct_prefixes: list[int]
    neighbour_agreement: list[float]
    collisions: int
    moved: int
    extra_digit: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serialisable dict."""
        return asdict(self)

    @classmethod
    def load(cls, path: str | os.PathLike) -> SemanticIDReport:
        """
        Reads `semantic_ids.json` (`as_dict` as JSON), written by `onerec-hf semantic-ids fit`.

        Raises:
            ValueError: invalid JSON, or not a report.
            OSError: missing file.
        """
        content = read_json_object(path)
        with refusing(path):
            wanted = {part.name: str(part.type) for part in fields(cls)}
            wrong = [name for name, kind in wanted.items() if name in content and not _is(content[name], kind)]
            if wrong:
                raise ValueError(f"its {wrong[0]} is not a {wanted[wrong[0]]}")
            report = cls(**content)
            levels = {len(value) for value in content.values() if isinstance(value, list)}
            if len(levels) != 1 or 0 in levels or any(len(sizes) != 2 for sizes in report.cluster_sizes):
                raise ValueError("its lists do not have one entry per level")
            if report.num_items < 1:
                raise ValueError(f"its num_items is {report.num_items}")
            return report

    def table(self) -> str:
        """The report as an aligned text table."""
        return compare_reports([self])

    def resolution(self) -> str:
        """One sentence on the collisions and their resolution."""
        collided = f"{self.collisions:,} collisions among {self.num_items:,} items"
        if self.extra_digit:
            return f"{collided}, resolved by an additional level of {self.extra_digit:,} codes"
        return f"{collided}, resolved by moving {self.moved:,} ({self.moved / self.num_items:.1%})"


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value matches a type annotation."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(_is(part, kind[5:-1]) for part in value)
    return isinstance(value, {"str": str, "int": int, "float": (int, float)}[kind])


def describe_ids(
    embeddings: torch.Tensor,
    quantizer: Quantizer,
    codes: torch.Tensor,
    moved: int,
    extra_digit: int = 0,
    seed: int = 0,
    ranks: SingleProcess = SINGLE_PROCESS,
) -> SemanticIDReport:
    """
    The report of a fitted quantiser and its unique codes.

    Args:
        embeddings: (N, d) float32, the quantised embeddings (this rank's, with `ranks`).
        codes: (N, L) int64, the quantiser's levels after collisions are resolved, of all items.
        moved, extra_digit: see [`SemanticIDReport`].
        seed: seed of the sample for neighbour agreement.
    """
    sizes = quantizer.codebook_sizes
    mean = ranks.mean(embeddings)
    parts = (float((rows - mean).square().sum(dtype=torch.double)) for rows in embeddings.split(ROWS))
    variance = float(ranks.sum(torch.tensor(sum(parts), dtype=torch.double, device=embeddings.device)))
    variance = max(variance / len(codes), 1e-12)
    errors = [
        float(quantizer.reconstruction_error(embeddings, quantizer.codes_[:, : level + 1], ranks))
        for level in range(len(sizes))
    ]
    fitted = ranks.gather(quantizer.codes_)
    counts = [column.bincount(minlength=size) for column, size in zip(codes.unbind(1), sizes, strict=True)]
    prefixes = _prefix_numbers(codes)
    return SemanticIDReport(
        method=str(quantizer.method),
        num_items=len(codes),
        codebook_sizes=list(sizes),
        residual_energy=[error / variance for error in errors],
        reconstruction_error=errors,
        cluster_sizes=[[int(count.min()), int(count.max())] for count in counts],
        utilisation=[float((count > 0).double().mean()) for count in counts],
        entropy=[_entropy(count) for count in counts],
        distinct_prefixes=[int(numbers.max()) + 1 for numbers in prefixes],
        neighbour_agreement=_neighbour_agreement(embeddings, prefixes, seed, ranks),
        collisions=len(codes) - int(_prefix_numbers(fitted)[-1].max()) - 1,
        moved=moved,
        extra_digit=extra_digit,
    )


def _prefix_numbers(codes: torch.Tensor) -> list[torch.Tensor]:
    """Per level, an integer id for each distinct prefix up to it."""
    numbers = [torch.unique(codes[:, 0], return_inverse=True)[1]]
    for column in codes.unbind(1)[1:]:
        numbers.append(torch.unique(numbers[-1] * (int(column.max()) + 1) + column, return_inverse=True)[1])
    return numbers


def _entropy(counts: torch.Tensor) -> float:
    if len(counts) == 1:
        return 1.0
    share = counts.double() / counts.sum()
    return float(-torch.xlogy(share, share).sum() / np.log(len(counts)))


def _neighbour_agreement(
    embeddings: torch.Tensor, prefixes: list[torch.Tensor], seed: int, ranks: SingleProcess
) -> list[float]:
    first, items = ranks.span(len(embeddings))
    neighbours = min(_NEIGHBOURS, items - 1)
    if neighbours == 0:
        return [1.0] * len(prefixes)
    sampled = torch.randperm(items, generator=torch.Generator().manual_seed(seed))[:_QUERIES].to(embeddings.device)
    vectors = ranks.pick(embeddings, first, sampled)
    agreed = np.zeros(len(prefixes))
    for rows, queries in zip(sampled.split(_QUERY_ROWS), vectors.split(_QUERY_ROWS), strict=True):
        distances = squares(queries, embeddings)
        here = ((rows >= first) & (rows < first + len(embeddings))).nonzero().squeeze(1)
        distances[here, rows[here] - first] = float("inf")
        near = _nearest_of_all(distances, neighbours, first, ranks)
        agreed += [float((numbers[near] == numbers[rows, None]).double().mean(1).sum()) for numbers in prefixes]
    return (agreed / len(sampled)).tolist()


def _nearest_of_all(distances: torch.Tensor, k: int, first: int, ranks: SingleProcess) -> torch.Tensor:
    """(q, k) global indices of the nearest rows, from each rank's (q, n) distances to its rows."""
    values, near = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
    if ranks.size == 1:
        return near
    values, near = ranks.gather(values.T).T, ranks.gather((near + first).T).T
    return near.gather(1, values.topk(k, dim=1, largest=False).indices)


def compare_reports(reports: Sequence[SemanticIDReport]) -> str:
    """
    Compares reports in an aligned text table: one line per method and level, then one sentence per method on its collisions.

    Example:
        >>> from onerec_hf.semantic_ids import fit_semantic_ids
        >>> vectors = np.random.default_rng(0).normal(size=(50, 8))
        >>> fitted = fit_semantic_ids(range(50), vectors, codebook_sizes=[5, 5, 5])
        >>> print(compare_reports([fitted.report]).splitlines()[0])
        method    level  codes  items per code   used  entropy  variance left  distinct prefixes  neighbours agree
    """
    header = (
        "method    level  codes  items per code   used  entropy  variance left  distinct prefixes  neighbours agree"
    )
    lines = [header]
    for report in reports:
        for level, size in enumerate(report.codebook_sizes):
            low, high = report.cluster_sizes[level]
            spread = f"{low}" if low == high else f"{low} to {high}"
            lines.append(
                f"{report.method if level == 0 else '':<8}  {level + 1:>5}  {size:>5}  {spread:>14}  {report.utilisation[level]:>5.0%}  "
                f"{report.entropy[level]:>7.4f}  {report.residual_energy[level]:>13.1%}  {report.distinct_prefixes[level]:>17,}  "
                f"{report.neighbour_agreement[level]:>16.1%}"
            )
    lines += [f"{report.method}: {report.resolution()}" for report in reports]
    return "\n".join(lines)


def plot_reports(reports: Sequence[SemanticIDReport], path: str | os.PathLike) -> None:
    """
    Plots residual variance, entropy, distinct prefixes and neighbour agreement per level, one line per method, as a PNG (extra `plots`).

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            'plotting needs matplotlib, which is not installed. Run: pip install "onerec-hf[plots]"'
        ) from None
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = {
        "variance left": "residual_energy",
        "entropy / log K": "entropy",
        "distinct prefixes / items": "distinct_prefixes",
        "10 nearest neighbours with the same prefix": "neighbour_agreement",
    }
    for axes, (title, field) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for report in reports:
            values = np.asarray(getattr(report, field), dtype=float)
            if field == "distinct_prefixes":
                values = values / report.num_items
            axes.plot(range(1, len(values) + 1), values, marker="o", label=report.method)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("level")
        axes.set_xticks(range(1, max(len(report.codebook_sizes) for report in reports) + 1))
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
