"""Cards written by trainers (`create_model_card`, also through `push_to_hub=True`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from onerec_hf.baselines.modeling_sequential import SequentialRecommender
from onerec_hf.hub_cards.adapter import write_adapter_card
from onerec_hf.hub_cards.baseline import write_baseline_card
from onerec_hf.hub_cards.common import hub_id, names, write_card
from onerec_hf.hub_cards.facts import Training
from onerec_hf.hub_cards.generator import write_generator_card
from onerec_hf.hub_cards.reward import write_reward_card
from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward

if TYPE_CHECKING:
    from onerec_hf.hub_cards.alignment import Alignment


def write_trainer_card(
    trainer: Any,
    model_name: str | None = None,
    tags: str | list[str] | None = None,
    *,
    alignment: Alignment | None = None,
    tokens_per_expert: Any = None,
    **metadata: Any,
) -> None:
    """
    Writes the card of the trained model to a trainer's output folder.

    Args:
        trainer: a trainer of this package.
        model_name, tags: as for `transformers.Trainer.create_model_card`.
        alignment, tokens_per_expert: as for `write_generator_card`.
        metadata: further front matter, e.g. `license="mit"`, `language="en"`, `datasets=["me/clicks"]`.

    Example:
        >>> write_trainer_card(trainer, license="mit")  # doctest: +SKIP
    """
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = [tags] if isinstance(tags, str) else list(tags or ())
    shared = {
        "repo_id": trainer.hub_model_id,
        "training": Training.of(trainer),
        "metadata": {
            **({"model_name": model_name} if model_name else {}),
            **{name: value for name, value in metadata.items() if value is not None},
            "tags": [*given, *getattr(trainer, "_tag_names", ())],
        },
    }
    folder, processor = trainer.args.output_dir, trainer.processing_class
    os.makedirs(folder, exist_ok=True)  # TRL writes a card before the first checkpoint creates the folder
    if isinstance(base, OneRecForSessionReward):
        write_reward_card(folder, base, **shared)
    elif isinstance(base, SequentialRecommender):
        write_baseline_card(folder, base, **shared)
    elif not isinstance(base, OneRecForConditionalGeneration):
        write_text_card(folder, base, alignment=alignment, **shared)
    elif base is not model:
        write_adapter_card(folder, model, processor, alignment=alignment, **shared)
    else:
        facts = {"alignment": alignment, "tokens_per_expert": tokens_per_expert}
        write_generator_card(folder, processor, base, **facts, **shared)


def write_text_card(
    folder, model: Any, *, training: Training, alignment: Alignment | None, repo_id=None, metadata=None
) -> None:
    """The card of a text model (T5, Bart, ...) that `Seq2SeqDPOTrainer` trained, or of an adapter of one."""
    from huggingface_hub import ModelCardData

    named, extra = names(folder, repo_id), dict(metadata or {})
    base = hub_id(model.config)
    card_data = ModelCardData(
        **{"library_name": "transformers", "model_name": named["name"], "base_model": base, **extra}
    )
    write_card(
        folder,
        "text",
        card_data,
        **named,
        model=type(model).__name__,
        base=base,
        alignment=alignment,
        before_after={},
        training=training,
        command=None,
    )
