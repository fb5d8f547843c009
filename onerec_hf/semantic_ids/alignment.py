"""Aligns content embeddings with user behaviour: a contrastive loss pulls items together that users consume together."""

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
    Samples pairs of items that users consume close together, as training data for [`align_embeddings`].

    Pairs (i, j) are drawn with replacement in proportion to [`~onerec_hf.semantic_ids.embeddings.cooccurrence`], where items d steps apart
    count 1/d. An item is never paired with itself.

    Args:
        sequences: item indices of each user in time order. Pass training data only, to avoid leakage.
        num_items: number of items in the catalogue.
        window: maximum distance of co-occurring items, in steps.
        max_pairs: number of pairs to draw.
        seed: random seed.

    Returns:
        (max_pairs, 2) int64 item indices in random order; the two items of a pair are in random order too.

    Raises:
        ValueError: no two items co-occur.

    Example:
        >>> pairs = cooccurring_pairs([np.array([0, 1]), np.array([2, 3, 2])], 5, max_pairs=100)
        >>> pairs.shape, sorted({tuple(sorted(pair)) for pair in pairs.tolist()})
        ((100, 2), [(0, 1), (2, 3)])
    """
    import scipy.sparse

    counts = scipy.sparse.triu(cooccurrence(sequences, num_items, window), k=1).tocoo()
    if not counts.nnz:
        raise ValueError(
            f"no two items co-occur in {len(sequences)} sequences; pass longer sequences or a larger window"
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

    The second vectors of all other pairs are negatives of `first_i`, and vice versa. A random batch contains false negatives: with `items`,
    pair j is masked for i if the two pairs share an item on the same side, or if the item of `second_j` is that of `first_i`.

    Inputs:
        +------------------------------+--------+
        | pairs                        | labels |
        +==============================+========+
        | (item, item consumed nearby) | none   |
        +------------------------------+--------+

    Args:
        first, second: (B, d) float, one row per pair, normalised inside.
        temperature: temperature of the softmax.
        items: (B, 2) int64 item indices of the pairs.

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
    Maps content embeddings so that items consumed together are close (paper, section 3.1: embeddings "aligned with the real user-item
    behaviour distribution"; QARM, arXiv 2411.11739).

    The content `x` (unit rows) is fixed. One map is learned for all items,

        y = (W x + MLP(x)) / ||W x + MLP(x)||

    with `W` initialised to the `dim` principal directions of the content and the last layer of the MLP to zero, so training starts from the
    content's geometry. It minimises [`info_nce`] over the pairs (AdamW, linear decay to zero). The map depends on content only, so items
    without behaviour follow their content neighbours.

    Args:
        embeddings: (N, d) content embeddings, one row per item.
        pairs: (P, 2) item indices of items consumed together, see [`cooccurring_pairs`].
        dim: dimensions of the result (at most d).
        hidden_size: width of the MLP.
        temperature: temperature of [`info_nce`]. If items fall into few groups, many negatives belong to an item's group; a higher value
            (0.2) pushes them apart less.
        steps, batch_size, learning_rate, weight_decay: training hyperparameters.
        seed: seed of weights and batches. The global random state is unchanged.

    Returns:
        (N, at most dim) float32, unit rows. [`AlignmentMap.fit`] also keeps the map, for items that come later.

    Raises:
        ValueError: NaN or infinite embeddings, pairs of a wrong shape or with indices out of range.

    Example:
        >>> content = np.random.default_rng(0).normal(size=(40, 8))
        >>> pairs = cooccurring_pairs([np.array([0, 1]), np.array([2, 3])], 40, max_pairs=500)
        >>> aligned = align_embeddings(content, pairs, dim=8, steps=50, batch_size=16)
        >>> unit = content / np.linalg.norm(content, axis=1, keepdims=True)
        >>> aligned.shape, bool(aligned[0] @ aligned[1] > unit[0] @ unit[1])
        ((40, 8), True)
    """
    alignment = AlignmentMap.fit(
        embeddings,
        pairs,
        dim=dim,
        hidden_size=hidden_size,
        temperature=temperature,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
    )
    return alignment(embeddings)


class AlignmentMap:
    """
    The map of [`align_embeddings`]: (n, d) content embeddings to (n, at most dim) float32 unit rows.

    Example:
        >>> alignment = AlignmentMap(_Projection(4, 2, 8))
        >>> again = AlignmentMap.of(alignment.tensors())
        >>> bool((again(np.eye(4)) == alignment(np.eye(4))).all())
        True
    """

    def __init__(self, projection: _Projection):
        self._projection = projection

    @classmethod
    def fit(
        cls,
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
    ) -> AlignmentMap:
        """Learns the map; arguments and errors as for [`align_embeddings`]."""
        embeddings = check_points(embeddings).float().cpu()
        pairs = torch.as_tensor(pairs).cpu()
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
            raise ValueError(f"pairs must be (P, 2) item indices, not empty; got shape {tuple(pairs.shape)}")
        if int(pairs.min()) < 0 or int(pairs.max()) >= len(embeddings):
            raise ValueError(
                f"pairs hold item indices {int(pairs.min())} to {int(pairs.max())}, but the embeddings have rows 0 to {len(embeddings) - 1}"
            )
        generator = torch.Generator().manual_seed(seed)
        inputs = functional.normalize(embeddings, dim=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projection = _Projection(inputs.shape[1], min(dim, inputs.shape[1]), hidden_size)
        projection.turn_to(inputs)
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
        return cls(projection)

    def __call__(self, embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
        inputs = functional.normalize(check_points(embeddings).float().cpu(), dim=1)
        with torch.no_grad():
            return torch.cat([self._projection(chunk) for chunk in inputs.split(ROWS)]).numpy()

    @property
    def input_size(self) -> int:
        """Dimensions of the content."""
        return self._projection.linear.in_features

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name."""
        return self._projection.state_dict()

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> AlignmentMap:
        """
        The map with the weights of [`tensors`].

        Raises:
            ValueError: weights that do not fit together.
        """
        try:
            (dim, size), hidden_size = tensors["linear.weight"].shape, len(tensors["correction.0.bias"])
            projection = _Projection(size, dim, hidden_size)
            projection.load_state_dict(tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"the weights of the alignment do not fit together: {error!s:.200}") from error
        return cls(projection)


class _Projection(nn.Module):
    """A linear map plus an MLP initialised to zero, with unit outputs."""

    def __init__(self, size: int, dim: int, hidden_size: int):
        super().__init__()
        last = nn.Linear(hidden_size, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.linear = nn.Linear(size, dim, bias=False)
        self.correction = nn.Sequential(nn.Linear(size, hidden_size), nn.GELU(), last)

    @torch.no_grad()
    def turn_to(self, inputs: torch.Tensor) -> None:
        """Initialises the linear map to the principal directions of the inputs."""
        centred = inputs - inputs.mean(0)
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors  # ascending
        self.linear.weight.copy_(directions.T.flip(0)[: len(self.linear.weight)])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.linear(inputs) + self.correction(inputs), dim=1)
