"""Configuration of features: the sizes of a [`FeatureSchema`], and how wide they are embedded."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .features import PATHWAYS, check_pathways
from .hub import check_sizes


@strict
class FeaturesConfig(PreTrainedConfig):
    r"""
    Configuration of features ([`FeatureEmbedding`]), an optional part of a OneRec: `OneRecConfig(features=schema.config())`.

    Args:
        user, interaction, item (`list`, default to `[]`):
            `[name, codes, slots]` of each feature, in the order of a [`FeatureSchema`].
        dim (`int`, defaults to 32):
            Width of each feature's embedding, before all of a place are concatenated (technical report: 64 of users, 128 of items at a width of 1,024).
        dropout (`float`, defaults to 0.0):
            Share of features that are hidden in training, so that a missing one costs less later.
        user_at_items (`bool`, defaults to `False`):
            Add what the user's features say to each item of the history too. In the report they are a token of their own alone, which short histories
            attend to less.
        not_positive (`list`, *optional*):
            `[place, code]`: the feature of interactions, by its place in `interaction`, whose code says that one was not positive. Its item is read, and
            neither part of the evidence nor excluded as seen.
        pathways (`dict`, *optional*):
            `{"short_term": 20, "positive": 256}`: the history is read as the latest 20 interactions of any feedback, then as the latest 256 positive
            ones, each with a network of its own for features. Needs `not_positive`. By default one history, whose interactions say whether they were.

    Raises:
        ValueError: no feature, names that are not unique, a size below 1, a dropout outside [0, 1), other pathways.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> OneRecConfig(features={"user": [["age", 8, 1]], "item": [["genres", 21, 4]]}).features.slots
        5
    """

    model_type = "onerec_features"
    base_config_key = "features"

    user: list | None = None
    interaction: list | None = None
    item: list | None = None
    dim: int = 32
    dropout: float | int = 0.0
    user_at_items: bool = False
    not_positive: list | None = None
    pathways: dict | None = None

    def __post_init__(self, **kwargs):
        for side in ("user", "interaction", "item"):
            setattr(self, side, [list(feature) for feature in getattr(self, side) or []])
        super().__post_init__(**kwargs)

    def to_dict(self):
        output = super().to_dict()
        for name in ("pathways", "user_at_items"):  # as earlier versions wrote it
            if not output.get(name):
                output.pop(name, None)
        return output

    def validate_architecture(self):
        check_sizes(self, sizes="dim", layers="")
        names = [feature[0] for feature in self.all]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"features: give at least one, with names of their own; got {names!s:.200}")
        for name, codes, slots in self.all:
            if not (isinstance(codes, int) and isinstance(slots, int) and 1 <= codes < 2**31 and 1 <= slots < 2**15):
                raise ValueError(
                    f"features: {name!r:.80} needs at least 1 code and 1 slot; got {codes!r} and {slots!r}"
                )
        if self.not_positive is not None:
            place, code = self.not_positive if len(self.not_positive) == 2 else (-1, -1)
            if not (0 <= place < len(self.interaction) and 0 < code < self.interaction[place][1]):  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
                raise ValueError(
                    f"features: not_positive={self.not_positive} is no place and code of a feature of interactions"
                )
        if self.pathways is not None:
            check_pathways(self.pathways, self.not_positive)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"features: dropout={self.dropout} must lie between 0 and 1")

    @property
    def not_positive_slot(self) -> tuple[int, int] | None:
        """Slot of `feature_ids` and code of interactions that are not positive; None where all are."""
        if self.not_positive is None:
            return None
        place, code = self.not_positive
        before = self.interaction[:place]  # pyright: ignore[reportOptionalSubscript]
        return self.user_slots + sum(slots for _, _, slots in before), code

    @property
    def all(self) -> list[list]:
        """`[name, codes, slots]` of all features, in the order of their slots."""
        return [*self.user, *self.interaction, *self.item]  # pyright: ignore[reportOptionalIterable]

    @property
    def columns(self) -> list[list]:
        """`all`, and the place's pathway where there are pathways: of the slots of `feature_ids`."""
        return self.all if self.pathways is None else [*self.all, ["pathway", 1 + len(PATHWAYS), 1]]

    @property
    def slots(self) -> int:
        return sum(slots for _, _, slots in self.columns)

    def places(self, history: int) -> int:
        """
        Most places of a history of so many interactions, without that of the user.

        Example:
            >>> from onerec_hf import OneRecConfig
            >>> features = {"interaction": [["positive", 5, 1]], "not_positive": [0, 4], "pathways": {"short_term": 20, "positive": 256}}
            >>> OneRecConfig(features=features).features.places(50)
            70
        """
        return history if self.pathways is None else sum(min(history, size) for size in self.pathways.values())

    @property
    def user_slots(self) -> int:
        return sum(slots for _, _, slots in self.user)  # pyright: ignore[reportOptionalIterable]

    @property
    def item_slots(self) -> int:
        return sum(slots for _, _, slots in self.item)  # pyright: ignore[reportOptionalIterable]


__all__ = ["FeaturesConfig"]
