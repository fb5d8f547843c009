"""Training arguments of a session head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class SessionHeadArguments:
    """
    How a session head is trained.

    Example:
        >>> SessionHeadArguments(epochs=0).check()
        Traceback (most recent call last):
        ...
        ValueError: epochs must be at least 1; got 0
    """

    candidates: int = field(
        default=100, metadata={"help": "The item head's best items, which sessions are made of; at most 4096."}
    )
    width: int = field(default=64, metadata={"help": "Width of the session head, a multiple of 4."})
    epochs: int = field(default=4, metadata={"help": "Passes over the examples."})
    batch_size: int = field(default=128, metadata={"help": "Examples of a step."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of AdamW; it falls to zero along a cosine."}
    )
    drawn: int = field(
        default=8,
        metadata={
            "help": "Sessions drawn for a history, from the second epoch on: the best and the worst by reward count."
        },
    )
    unlikelihood: float = field(default=1.0, metadata={"help": "Weight of sessions of low utility."})
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Penalty on likeness to the items placed before, in [0, 1); the best on held-out histories by default."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of weights, order and sessions."})

    def check(self) -> None:
        """
        Raises:
            ValueError: a number outside its range.
        """
        for name, least in (("candidates", 2), ("width", 4), ("epochs", 1), ("batch_size", 1), ("drawn", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.width % 4 or self.candidates > 4096:
            raise ValueError(
                f"width={self.width} must be a multiple of 4, and candidates={self.candidates} at most 4096"
            )
        if not 0 < self.learning_rate < math.inf or not 0 <= self.unlikelihood < math.inf:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be positive, and unlikelihood={self.unlikelihood} at least 0"
            )
        if self.alpha is not None and not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1)")
