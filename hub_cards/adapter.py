"""Card of an adapter (PEFT) of a generator: settings, base model, and how to load both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.hub_cards.common import hub_id, names, origin, write_card

if TYPE_CHECKING:
    from onerec_hf.hub_cards.alignment import Alignment
    from onerec_hf.hub_cards.facts import Training
    from onerec_hf.modeling.processing_onerec import OneRecProcessor


def write_adapter_card(
    folder: str | os.PathLike,
    model: Any,
    processor: OneRecProcessor,
    base: str | None = None,
    repo_id: str | None = None,
    *,
    data: str = "",
    training: Training | None = None,
    alignment: Alignment | None = None,
    command: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes `README.md` for an adapter to `folder`, instead of PEFT's template.

    Args:
        model: the `PeftModel` around a generator.
        processor: the processor of the training; the snippet loads it from `folder` if it is saved there, else from the base.
        base: folder or Hub id of the base model, for the snippet (default: where it was loaded from). If the base was never saved, the card
            has no snippet.
        repo_id: the Hub repository of the adapter (default: `folder`).
        data: description of the training data.
        training, alignment, command, metadata: as for `write_generator_card`.

    Example:
        >>> write_adapter_card("my-adapter", peft_model, processor)  # doctest: +SKIP
    """
    from huggingface_hub import ModelCardData

    folder, named, generator = Path(folder), names(folder, repo_id), model.get_base_model()
    catalogue, adapter = processor.catalogue, model.peft_config[model.active_adapter]
    assert catalogue is not None
    trained, total = model.get_nb_trainable_parameters()
    settings = {
        "kind": getattr(adapter.peft_type, "value", adapter.peft_type),
        "rank": getattr(adapter, "r", None),
        "alpha": getattr(adapter, "lora_alpha", None),
        "dropout": getattr(adapter, "lora_dropout", None),
        "modules": _listed(getattr(adapter, "target_modules", None)),
        "parameters (packed experts)": _listed(getattr(adapter, "target_parameters", None)),
        "saved whole": _listed(adapter.modules_to_save if hasattr(adapter, "modules_to_save") else None),
    }
    extra = dict(metadata or {})
    tags = ["onerec", "generative-recommendation", *extra.pop("tags", ())]
    write_card(
        folder,
        "adapter",
        ModelCardData(
            **{
                "library_name": "peft",
                "base_model": hub_id(generator.config),
                "tags": list(dict.fromkeys(tags)),
                "model_name": named["name"],
                **extra,
            }
        ),
        **named,
        base=base or generator.config._name_or_path,
        base_is_folder=os.path.isdir(base or generator.config._name_or_path),
        base_name=origin(generator.config) if base is None else base,
        own_processor=(folder / "processor_config.json").exists(),
        example_history=catalogue.ids(range(min(3, len(catalogue)))),
        session_length=generator.config.session_length,
        catalogue=catalogue,
        settings={name: value for name, value in settings.items() if value not in (None, "")},
        trained=trained,
        total=total,
        data=data,
        alignment=alignment,
        before_after={},
        training=training,
        command=command,
    )


def _listed(names: Any) -> str:
    return names if isinstance(names, str) else ", ".join(sorted(names or ()))
