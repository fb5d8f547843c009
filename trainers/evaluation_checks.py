"""What an evaluation that several ranks share needs, so that every user counts once."""

from __future__ import annotations

from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length


def check_countable(dataloader: DataLoader, ranks: int) -> None:
    """
    Checks that the evaluation's length is known where ranks share it: their last batches are filled up with users from the beginning, who can
    be taken off again only if it is known how many there are.

    Raises:
        ValueError: a stream for more than one rank.
    """
    if ranks > 1 and not has_length(dataloader.dataset):
        raise ValueError(
            f"the evaluation reads a stream, and {ranks} ranks share it: some users would count twice. Give a datasets.Dataset "
            "(Dataset.from_generator or from_parquet keep it on disk), or evaluate on one process"
        )
