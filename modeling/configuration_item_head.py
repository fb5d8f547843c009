"""Configuration of the item head: a learned vector per item in addition to its semantic ID, and item scores from it."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .hub import check_sizes


def check_log(config, name: str = "") -> None:
    """
    Checks `recent` of a config with `evidence`.

    Raises:
        ValueError: a log without evidence, of negative length, or of an earlier version, whose `recent` was true.
    """
    if config.recent is True or config.recent < 0 or (config.recent and not config.evidence):
        raise ValueError(
            f"{name}recent={config.recent} is the length of a log that the evidence reads; it needs evidence=True and is not negative (true: of an "
            "earlier version, fit the evidence again)"
        )


@strict
class ItemHeadConfig(PreTrainedConfig):
    r"""
    Configuration of the item head ([`ItemHead`]), an optional part of a OneRec: `OneRecConfig(item_head={"num_items": 12101})`. The paper has none.

    Args:
        num_items (`int`):
            Items that have a vector: the catalogue that the model is made for. Items that join the catalogue later are read by their codes alone.
        dropout (`float`, defaults to 0):
            Share of a history's items whose vector is hidden in training, so that the codes are learned as well.
        loss_weight (`float`, defaults to 1):
            Weight of the item loss, a cross-entropy of a session's first item over the catalogue. With 0 the encoder reads the vectors, and no item
            has a score.
        score_codes (`bool`, defaults to `False`):
            Adds the embeddings of an item's codes to its vector in the scores, as the encoder does when it reads the item. Items that share codes
            then learn from each other, and an item that joins the catalogue later has a score.
        content_dim (`int`, defaults to 0):
            Width of fixed content vectors of the items (text, images), which are projected and added to their vectors; 0 for none.
        evidence (`bool`, defaults to `False`):
            Adds evidence about pairs of items to the scores: counts from training sequences and cosines of content ([`ItemEvidence`]).
        neighbours (`int`, defaults to 50):
            Length of the neighbour lists of the evidence.
        recent (`int`, defaults to 0):
            Interactions of the log by which the evidence counts what is asked for lately; the fit of the evidence sets it where it predicts better.
        rank (`int`, *optional*):
            Rank of the rarest items' vectors, below the hidden size: the vectors are then of low rank in blocks by popularity ([`item_blocks`]), with
            fewer parameters. None for full vectors.
        blocks (`list[int]`, *optional*):
            Items of the blocks, the most popular first; chosen when None. Items that join the catalogue later join the last block.

    Raises:
        ValueError: a size or weight outside its range.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> OneRecConfig(item_head={"num_items": 40, "dropout": 0.3}).item_head.loss_weight
        1.0
    """

    model_type = "onerec_item_head"
    base_config_key = "item_head"

    num_items: int | None = None
    dropout: float | int = 0.0
    loss_weight: float | int = 1.0
    score_codes: bool = False
    content_dim: int = 0
    evidence: bool = False
    neighbours: int = 50
    recent: int | bool = 0  # an earlier version wrote false
    rank: int | None = None
    blocks: list[int] | None = None

    def to_dict(self):
        # A head without rank is saved as earlier versions saved it.
        return {
            name: value
            for name, value in super().to_dict().items()
            if value is not None or name not in ("rank", "blocks")
        }

    def validate_architecture(self):
        if self.num_items is None:
            raise ValueError("item_head needs num_items, the number of items of the catalogue")
        check_sizes(self, sizes="num_items neighbours", layers="")
        if not 0 <= self.content_dim < 2**20:
            raise ValueError(
                f"item_head: content_dim={self.content_dim} must not be negative, nor larger than a vector"
            )
        if self.evidence and not self.loss_weight:
            raise ValueError(
                "item_head: evidence=True needs a loss_weight above 0, otherwise there are no item scores to add it to"
            )
        check_log(self, "item_head: ")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"item_head: dropout={self.dropout} must lie between 0 and 1")
        if self.loss_weight < 0:
            raise ValueError(f"item_head: loss_weight={self.loss_weight} must not be negative")
        if self.score_codes and not self.loss_weight:
            raise ValueError(
                "item_head: score_codes=True needs a loss_weight above 0, otherwise nothing learns the scores"
            )
        if self.rank is None and self.blocks is not None:
            raise ValueError("item_head: blocks need a rank, the rank of the last block")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"item_head: rank={self.rank} must be at least 1")
        if self.blocks is not None and (min(self.blocks, default=0) < 1 or sum(self.blocks) != self.num_items):
            raise ValueError(
                f"item_head: blocks={self.blocks!s:.80} must be positive and sum to num_items={self.num_items}"
            )


def item_blocks(config: ItemHeadConfig, width: int) -> list[tuple[int, int]]:
    """
    Items and rank of each block of an item head with `rank`, the most popular items first. Ranks are the width, a fourth of it, a sixteenth, ..., and at
    last `rank`; without `config.blocks` each block has four times as many items as the one before, so that blocks have about as many parameters.

    Args:
        width: the model's hidden size.

    Raises:
        ValueError: a rank that is not below the width, fewer items than blocks, or another number of blocks.

    Example:
        >>> item_blocks(ItemHeadConfig(num_items=1_000_000, rank=8), width=128)
        [(47619, 128), (190476, 32), (761905, 8)]
    """
    rank, items = config.rank or 0, config.num_items or 0
    if rank >= width:
        raise ValueError(f"item_head: rank={rank} must be below hidden_size={width}; leave it out for full vectors")
    ranks = [width]
    while ranks[-1] > rank:
        ranks.append(max(rank, ranks[-1] // 4))
    sizes = config.blocks
    if sizes is None:
        shares = sum(4**block for block in range(len(ranks)))
        sizes = [max(1, items * 4**block // shares) for block in range(len(ranks) - 1)]
        sizes.append(items - sum(sizes))
    if len(sizes) != len(ranks) or min(sizes) < 1:
        raise ValueError(
            f"item_head: rank={rank} makes {len(ranks)} blocks of ranks {ranks}, num_items={items} and blocks={config.blocks} do not fit them"
        )
    return list(zip(sizes, ranks, strict=True))


__all__ = ["ItemHeadConfig", "item_blocks"]
