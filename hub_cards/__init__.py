"""Model cards: templates and the code that fills them."""

from onerec_hf.hub_cards.cards import write_generator_card

__all__ = ["write_generator_card"]
