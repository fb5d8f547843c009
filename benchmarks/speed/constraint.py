"""The catalogue constraint by itself: legal codes of many beams, compared with a dict trie and with a dense head (for generation.py)."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks.harness import interleaved, ratio_row

CONSTRAINT_ROWS = (320, 1600)


def random_codes(items: int, codes: int, levels: int = 3, seed: int = 0) -> np.ndarray:
    """(items, levels) distinct tuples."""
    rng = np.random.default_rng(seed)
    flat = rng.integers(0, codes**levels, size=int(items * 1.2) + 100)
    if items > codes**levels // 2:
        flat = rng.permutation(codes**levels)
    flat = np.unique(flat)
    flat = rng.permutation(flat)[:items]
    return np.stack(np.unravel_index(flat, (codes,) * levels), axis=1)


class DenseHead:
    """
    The dense-head design (as STATIC describes it): a bitmap for the first code, a dense table of child ranges for each first code, sorted
    arrays below; it answers with a (rows, codes) mask.
    """

    def __init__(self, codes: np.ndarray, size: int):
        import torch

        order = np.lexsort(codes.T[::-1])
        codes = codes[order]
        pairs, first = np.unique(codes[:, 0] * size + codes[:, 1], return_index=True)
        self.head = torch.zeros(size, dtype=torch.bool)
        self.head[torch.from_numpy(np.unique(codes[:, 0]))] = True
        self.second = torch.zeros(size, size, dtype=torch.bool)
        self.second.view(-1)[torch.from_numpy(pairs)] = True
        self.start = torch.full((size * size,), 0)
        self.end = torch.full((size * size,), 0)
        self.start[torch.from_numpy(pairs)] = torch.from_numpy(first)
        self.end[torch.from_numpy(pairs)] = torch.from_numpy(np.append(first[1:], len(codes)))
        self.last, self.size = torch.from_numpy(codes[:, 2].copy()), size
        self.width = int((self.end - self.start).max())

    def __call__(self, level, prefix):
        import torch

        if level == 0:
            return self.head.expand(len(prefix), -1)
        if level == 1:
            return self.second[prefix[:, 0]]
        pair = prefix[:, 0] * self.size + prefix[:, 1]
        place = self.start[pair][:, None] + torch.arange(self.width)
        inside = place < self.end[pair][:, None]
        mask = torch.zeros(len(prefix), self.size + 1, dtype=torch.bool)
        columns = torch.where(inside, self.last[place.clamp(max=len(self.last) - 1)], self.size)
        return mask.scatter_(1, columns, True)[:, : self.size]


def constraint_alone(quick: bool, repetitions: int) -> list[dict[str, Any]]:
    """
    Milliseconds per level (mean over the three) to find the scores of the legal codes among those of all, as `recommend()` does it and as
    a logits processor does it for `generate`, beside a dict trie under transformers' own
    PrefixConstrainedLogitsProcessor (one "user" with all rows as beams) and the dense head."""
    import torch
    from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

    from onerec_hf import CatalogueConstraint, SemanticIDLogitsProcessor, SemanticIDTrie
    from onerec_hf.evaluation.results import result_row

    rows, times = [], {}
    vocabulary = 832
    offsets = [4, 260, 516]
    sizes = (100_000, 300_000) if quick else (1_000_000, 10_000_000)
    for name, items in zip(("12k", "1m", "10m"), (12_000, *sizes), strict=True):
        codes = random_codes(items, 256)
        trie = SemanticIDTrie(codes, [256] * 3)
        constraint = CatalogueConstraint(trie)
        processor = SemanticIDLogitsProcessor(constraint, offsets, 1)
        dense = DenseHead(codes, 256)
        tree: dict = {}
        if name == "12k":
            for a, b, c in (codes + np.asarray(offsets)).tolist():
                tree.setdefault(a, {}).setdefault(b, {})[c] = None
        for count in CONSTRAINT_ROWS:
            picked = codes[np.random.default_rng(2).integers(0, items, count)]
            inputs = [
                torch.from_numpy(
                    np.concatenate([np.ones((count, 1), int), picked[:, :level] + np.asarray(offsets)[:level]], axis=1)
                )
                for level in range(3)
            ]
            scores = torch.randn(count, vocabulary)

            nodes = [
                trie.find_nodes(tokens[:, 1:] - torch.tensor(offsets)[: tokens.shape[1] - 1]) for tokens in inputs
            ]
            nothing_yet = torch.zeros(1, count, 0, dtype=torch.long)

            def ours(nodes=nodes, scores=scores, constraint=constraint, trie=trie, nothing_yet=nothing_yet):
                for level, parents in enumerate(nodes):
                    legal = constraint.legal_children(level, parents[None], nothing_yet)
                    of_level = scores[:, offsets[level] : offsets[level] + 256]
                    if level == 0:
                        found = of_level.index_select(1, trie.codes[0])
                    else:
                        found = of_level.gather(1, trie.child_codes(level, parents))
                    found.masked_fill_(~legal[0], float("-inf"))

            def as_processor(inputs=inputs, scores: Any = scores, processor=processor):
                for tokens in inputs:
                    processor(tokens, scores)

            def dense_head(inputs=inputs, scores=scores, dense=dense):
                for level, tokens in enumerate(inputs):
                    mask = dense(level, tokens[:, 1:] - torch.tensor(offsets[:level]))
                    scores[:, offsets[level] : offsets[level] + 256].masked_fill(~mask, float("-inf"))

            def python_trie(inputs=inputs, scores=scores, tree=tree):
                for level, tokens in enumerate(inputs):

                    def allowed(_, prefix, level=level):
                        node = tree
                        for token in prefix[1:].tolist():
                            node = node[token]
                        return list(node)

                    PrefixConstrainedLogitsProcessor(allowed, num_beams=len(tokens))(tokens, scores)

            runs = {"ours": ours, "processor": as_processor, "dense_head": dense_head}
            if tree:
                runs["trie"] = python_trie
            for run in runs.values():
                run()
            cpu, _ = interleaved(runs, 4 * repetitions)
            times[name, count] = cpu["ours"]
            rows.append(
                result_row(
                    f"constraint_{count}_rows_{name}",
                    1e3 * statistics.median(cpu["ours"]) / 3,
                    "ms",
                    spread=[1e3 * min(cpu["ours"]) / 3, 1e3 * max(cpu["ours"]) / 3],
                )
            )
            rows.append(ratio_row(f"constraint_{count}_rows_{name}_over_dense_head", cpu, "dense_head", "ours"))
            if tree:
                rows.append(ratio_row(f"constraint_{count}_rows_over_trie", cpu, "trie", "ours"))
                rows.append(ratio_row(f"processor_{count}_rows_over_trie", cpu, "trie", "processor"))
    for size in ("1m", "10m"):
        cpu = {"large": times[size, 1600], "small": times["12k", 1600]}
        rows.append(ratio_row(f"constraint_{size}_over_12k_items", cpu, "large", "small"))
    return rows
