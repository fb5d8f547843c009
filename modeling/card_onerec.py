"""What `push_to_hub` says of a repository without a card of its own: the facts in the config, in place of the library's template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .files import replacing

_MARK = "<!-- Written by push_to_hub, and anew by each one: without this line the card is yours, and is kept. -->"
# As transformers writes it, blanks and all.
_TEMPLATE = "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been automatically generated."
_PAPER = "[arXiv 2502.18965](https://arxiv.org/abs/2502.18965)"
_KINDS = {
    "OneRecForConditionalGeneration": (
        f"A OneRec generator ({_PAPER}): it reads a history of items and writes a session of items as semantic IDs.",
        "AutoModelForSeq2SeqLM",
        (
            *("codebook_sizes", "session_length", "hidden_size", "encoder_layers", "decoder_layers"),
            *("num_experts", "num_experts_per_tok", "catalogue_hash"),
        ),
    ),
    "OneRecForSessionReward": (
        f"A OneRec session reward model ({_PAPER}, section 3.3): it says at which rates a user would respond to a session of items.",
        "AutoModelForSequenceClassification",
        ("objectives", "base_rates", "score_fusion", "score_weights", "num_items", "item_feature_dim", "items_hash"),
    ),
}


def replace_template(path: str | os.PathLike, repo_id: str, saved: Any) -> None:
    """
    Puts a card of a few facts where `push_to_hub` has put the library's template, or an earlier one of these. Any other card is its
    author's, and stays. What is no whole model (a processor, an adapter) gets no card in the template's place.

    Args:
        path: `README.md` as it is about to be uploaded; it need not exist.
        repo_id: the repository, for the snippet.
        saved: what is pushed.
    """
    path = Path(path)
    if not path.is_file():
        return
    card = ModelCard.load(path)
    template = ModelCard.from_template(ModelCardData(), model_description=_TEMPLATE)
    untouched = card.text.strip() == template.text.strip()
    kind = None if getattr(saved, "_hf_peft_config_loaded", False) else _KINDS.get(type(saved).__name__)
    if kind is None:
        if untouched:
            path.unlink()
        return
    if not untouched and _MARK not in card.text:
        return
    about, auto_class, names = kind
    facts = {"parameters": saved.num_parameters(), **{name: getattr(saved.config, name) for name in names}}
    card.data.tags = [*(card.data.tags or ()), *({"onerec"} - set(card.data.tags or ()))]
    text = f"""---
{card.data.to_yaml()}
---

{_MARK}

# {repo_id.split("/")[-1]}

{about}

```python
import onerec_hf  # registers the Auto classes
from transformers import {auto_class}

model = {auto_class}.from_pretrained({repo_id!r})
```

What its configuration says:

```json
{json.dumps(facts, indent=1)}
```

How it was trained, on which data, and how well it does, this card does not know.
"""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


__all__ = ["replace_template"]
