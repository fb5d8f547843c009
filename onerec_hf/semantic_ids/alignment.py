"""Content embeddings aligned with behaviour: items that users consume together are pulled close by a contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from onerec_hf.semantic_ids.balanced_assignment import ROWS
from onerec_hf.semantic_ids.balanced_kmeans import check_points
from onerec_hf.semantic_ids.embeddings import cooccurrence


def cooccurring_pairs(
    sequences: Sequence[np.ndarray], num_items: int, *, window: int = 5, max_pairs: int = 1_000_000, seed: int = 0
) -> np.ndarray:
    """
    Pairs of items that users consume close together, to train [`align_embeddings`] on.

    Pairs are drawn with replacement, each as often as it co-occurs: (i, j) in proportion to
    [`~onerec_hf.semantic_ids.embeddings.cooccurrence`], in which a pair d steps apart counts 1/d. An item beside itself is no pair.

    Args:
        sequences: per user, rows of items in time order. Give the training part only: what is held out must not shape the embeddings.
        num_items: of the catalogue; rows lie below it.
        window: how many steps apart two items still count as together.
        max_pairs: pairs to draw.
        seed: of the draw.

    Returns:
        (max_pairs, 2) int64, in random order; the two sides of a pair are in random order too.

    Raises:
        ValueError: no two items stand together.

    Example:
        >>> pairs = cooccurring_pairs([np.array([0, 1]), np.array([2, 3, 2])], 5, max_pairs=100)
        >>> pairs.shape, sorted({tuple(sorted(pair)) for pair in pairs.tolist()})
        ((100, 2), [(0, 1), (2, 3)])
    """
    import scipy.sparse

    counts = scipy.sparse.triu(cooccurrence(sequences, num_items, window), k=1).tocoo()
    if not counts.nnz:
        raise ValueError(
            f"no two items stand together in {len(sequences)} sequences: there is no behaviour to align to"
        )
    generator = np.random.default_rng(seed)
    drawn = generator.choice(counts.nnz, max_pairs, p=counts.data / counts.data.sum())
    pairs = np.stack([counts.row[drawn], counts.col[drawn]], axis=1).astype(np.int64)
    return generator.permuted(pairs, axis=1)


def info_nce(
    first: torch.Tensor, second: torch.Tensor, *, temperature: float = 0.07, items: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Symmetric InfoNCE with in-batch negatives (van den Oord et al., 2018; the item-to-item loss of the OneRec technical report, arXiv
    2506.13695). With `s_ij = cos(first_i, second_j) / temperature`,

        loss = -1/(2B) sum_i [ log( exp(s_ii) / sum_j exp(s_ij) ) + log( exp(s_ii) / sum_j exp(s_ji) ) ]

    The second vector of every other pair is a negative of `first_i`, and the other way round. A random batch holds false ones among
    them: with `items`, pair j is left out of the sums over i where the two pairs share an item on the same side, or where `second_j` is
    the item of `first_i` itself.

    Inputs:
        +------------------------------+--------+
        | pairs                        | labels |
        +==============================+========+
        | (item, item consumed nearby) | none   |
        +------------------------------+--------+

    Args:
        first, second: (B, d) float, a row per pair; lengths do not matter.
        temperature: of the softmax.
        items: (B, 2) int64, the pairs' items.

    Returns:
        Scalar.

    Example:
        >>> vectors = torch.eye(3)
        >>> info_nce(vectors, vectors) < info_nce(vectors, vectors.roll(1, 0))
        tensor(True)
        >>> info_nce(vectors, vectors, items=torch.tensor([[0, 1], [0, 2], [0, 3]]))  # no true negative in the batch
        tensor(0.)
    """
    scores = functional.normalize(first, dim=1) @ functional.normalize(second, dim=1).T / temperature
    if items is not None:
        left, right = items.unbind(1)
        false = (left[:, None] == left) | (right[:, None] == right) | (left[:, None] == right)
        false = false & ~torch.eye(len(items), dtype=torch.bool, device=items.device)
        scores = scores.masked_fill(false, float("-inf"))
    labels = torch.arange(len(scores), device=scores.device)
    return (functional.cross_entropy(scores, labels) + functional.cross_entropy(scores.T, labels)) / 2


def align_embeddings(
    embeddings: np.ndarray | torch.Tensor,
    pairs: np.ndarray | torch.Tensor,
    *,
    dim: int = 256,
    hidden_size: int = 256,
    temperature: float = 0.07,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> np.ndarray:
    """
    Content embeddings, moved so that items consumed together lie close (paper, section 3.1: embeddings "aligned with the real user-item
    behaviour distribution"; QARM, arXiv 2411.11739).

    The content `x` (rows of length one) stays as it is; what is learned is one map for all items,

        y = (W x + MLP(x)) / ||W x + MLP(x)||

    with `W` started at the content's `dim` principal directions and the last layer of the MLP at zero, so that training starts at the
    content's own geometry. It minimises [`info_nce`] over the pairs (AdamW, learning rate down to zero). Since the map reads content alone,
    an item without behaviour goes where its content neighbours go.

    Args:
        embeddings: (N, d) content, a row per item.
        pairs: (P, 2) rows of items consumed together, see [`cooccurring_pairs`]; a step draws `batch_size` of them.
        dim: dimensions of the result; fewer come back where d is smaller.
        hidden_size: of the MLP.
        temperature: of [`info_nce`]. Where items fall into few groups, a batch holds many negatives of an item's own group; a higher one
            (0.2) then keeps them from being pushed apart.
        steps, batch_size, learning_rate, weight_decay: of the training.
        seed: of weights and batches. The caller's random state is left alone.

    Returns:
        (N, at most dim) float32, rows of length one.

    Raises:
        ValueError: NaN or infinite embeddings, pairs that are no pairs or name rows that there are not.

    Example:
        >>> content = np.random.default_rng(0).normal(size=(40, 8))
        >>> pairs = cooccurring_pairs([np.array([0, 1]), np.array([2, 3])], 40, max_pairs=500)
        >>> aligned = align_embeddings(content, pairs, dim=8, steps=50, batch_size=16)
        >>> unit = content / np.linalg.norm(content, axis=1, keepdims=True)
        >>> aligned.shape, bool(aligned[0] @ aligned[1] > unit[0] @ unit[1])
        ((40, 8), True)
    """
    embeddings = check_points(embeddings).float().cpu()
    pairs = torch.as_tensor(pairs).cpu()
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs must be (P, 2) rows of items, not empty; got shape {tuple(pairs.shape)}")
    if int(pairs.min()) < 0 or int(pairs.max()) >= len(embeddings):
        raise ValueError(
            f"pairs name rows {int(pairs.min())} to {int(pairs.max())}, but there are embeddings for rows 0 to {len(embeddings) - 1}"
        )
    generator = torch.Generator().manual_seed(seed)
    inputs = functional.normalize(embeddings, dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = _Projection(inputs, min(dim, inputs.shape[1]), hidden_size)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        batch = pairs[torch.randint(len(pairs), (batch_size,), generator=generator)]
        first, second = projection(inputs[batch.T.reshape(-1)]).chunk(2)
        loss = info_nce(first, second, temperature=temperature, items=batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return torch.cat([projection(chunk) for chunk in inputs.split(ROWS)]).numpy()


class _Projection(nn.Module):
    """Principal directions of the content plus an MLP that starts at zero, to length one."""

    def __init__(self, inputs: torch.Tensor, dim: int, hidden_size: int):
        super().__init__()
        size = inputs.shape[1]
        last = nn.Linear(hidden_size, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.linear = nn.Linear(size, dim, bias=False)
        self.correction = nn.Sequential(nn.Linear(size, hidden_size), nn.GELU(), last)
        centred = inputs - inputs.mean(0)
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors  # ascending
        with torch.no_grad():
            self.linear.weight.copy_(directions.T.flip(0)[:dim])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.linear(inputs) + self.correction(inputs), dim=1)
