"""
One place per item of a history in the encoder (`config.encoder_pools_items`): the embeddings of an item's tokens are added before the first layer,
so that both attention over a history and the decoder's attention to it are `levels + 1` times shorter.
"""

import torch


def pooled_embeddings(embeddings: torch.Tensor, stride: int) -> torch.Tensor:
    """
    (rows, t, width) embeddings of tokens to (rows, t / stride, width), an item's summed.

    Raises:
        ValueError: tokens that are no whole items.
    """
    if embeddings.shape[1] % stride:
        raise ValueError(
            f"encoder_pools_items needs histories of whole items, {stride} tokens each; these have {embeddings.shape[1]} tokens"
        )
    return embeddings.unflatten(1, (-1, stride)).sum(2)


def at_places(values: torch.Tensor | None, stride: int) -> torch.Tensor | None:
    """
    What is said of tokens, (rows, t) of a mask or of segments, said of items: (rows, t / stride). None stays, and all with a stride of 1.

    Example:
        >>> at_places(torch.tensor([[1, 1, 1, 1, 0, 0]]), 2)
        tensor([[1, 1, 0]])
    """
    return values if values is None or stride == 1 else values[:, ::stride]


def ranges_of_places(history_ranges: torch.Tensor | None, stride: int) -> torch.Tensor | None:
    """
    (rows, P, 2) ranges of tokens as ranges of items; one that ends inside an item has it. None stays, and all with a
    stride of 1.

    Example:
        >>> ranges_of_places(torch.tensor([[[0, 8], [4, 12], [0, 1]]]), 4).tolist()
        [[[0, 2], [1, 3], [0, 1]]]
    """
    if history_ranges is None or stride == 1:
        return history_ranges
    return torch.stack((history_ranges[..., 0] // stride, -(-history_ranges[..., 1] // stride)), dim=-1)


__all__ = ["at_places", "pooled_embeddings", "ranges_of_places"]
