"""Model and dataset cards, filled from the facts of a run."""

from onerec_hf.hub_cards.adapter import write_adapter_card
from onerec_hf.hub_cards.alignment import Alignment
from onerec_hf.hub_cards.baseline import write_baseline_card
from onerec_hf.hub_cards.facts import Training
from onerec_hf.hub_cards.generator import write_generator_card
from onerec_hf.hub_cards.preferences import write_preferences_card
from onerec_hf.hub_cards.reward import write_reward_card
from onerec_hf.hub_cards.training import write_trainer_card

__all__ = [
    "Alignment",
    "Training",
    "write_adapter_card",
    "write_baseline_card",
    "write_generator_card",
    "write_preferences_card",
    "write_reward_card",
    "write_trainer_card",
]
