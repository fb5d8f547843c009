"""What a push takes along beside the weights: card, results, codebooks and titles of the folder or repository that a model comes from."""

from __future__ import annotations

import filecmp
import html
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from .files import UNFINISHED_NAME, find_file, read_json_object, replacing

#: Files that describe the weights, and the runs that made them.
RECORD_NAMES = (
    *("results.json", "data_options.json", "trained_on.json", "updates.json"),
    *("expert_load.png", "training_report.html", "training_report.png"),
)
#: Files that describe the semantic IDs.
SEMANTIC_ID_NAMES = (
    *("codebooks.safetensors", "item_encoder.safetensors", "content_encoder.safetensors"),
    *("semantic_ids.json", "semantic_ids.html"),
)
_TITLES, _CATALOGUE, _CARD = "items.parquet", "catalogue.safetensors", "README.md"
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
    "OneRecV2ForConditionalGeneration": (
        "A OneRec-V2 generator ([arXiv 2508.20900](https://arxiv.org/abs/2508.20900)): its lazy decoder reads a history without an encoder, and writes "
        "the next item as a semantic ID.",
        "AutoModelForSeq2SeqLM",
        (
            *("codebook_sizes", "hidden_size", "decoder_layers", "context_layers", "context_split", "context_groups"),
            *("num_experts", "num_experts_per_tok", "catalogue_hash"),
        ),
    ),
    "OneRecForSessionReward": (
        f"A OneRec session reward model ({_PAPER}, section 3.3): it predicts the rates at which a user responds to a session of items.",
        "AutoModelForSequenceClassification",
        (
            "objectives",
            "base_rates",
            "score_fusion",
            "score_weights",
            "num_items",
            "item_feature_dim",
            "statistics_dim",
            "items_hash",
        ),
    ),
}


def complete_push(folder: str | os.PathLike, repo_id: str, saved: Any) -> None:
    """
    Completes a folder that is about to be uploaded. The library has put the repository's card there, or its template if there is none:
    the template, and a card of an earlier push, is replaced by the card of the record if it describes these weights, else by one of a few
    facts. Any other card is its author's, and stays. Processors and adapters have no card of their own.

    Args:
        folder: what `save_pretrained` wrote, with the card.
        repo_id: the repository, for the card's snippet.
        saved: the model, processor or adapter that is pushed.
    """
    folder = Path(folder)
    card_path = folder / _CARD
    adapter = getattr(saved, "_hf_peft_config_loaded", False)
    records = [] if adapter else _records(folder, saved)
    for name in SEMANTIC_ID_NAMES:
        _copy(records, name, folder)
    if adapter or type(saved).__name__.endswith("Processor"):
        if card_path.is_file() and _is_template(ModelCard.load(card_path)):
            card_path.unlink()
        return
    _copy([record for record in records if _same_file(record, _CATALOGUE, folder)], _TITLES, folder)
    described = [record for record in records if _same_weights(record, folder)]
    for name in RECORD_NAMES:
        _copy(described, name, folder)
    card = ModelCard.load(card_path)
    if not _is_template(card) and _MARK not in card.text:
        return
    found = next((path for record in described if (path := record.find(_CARD))), None)
    if found is not None:
        text = _renamed(ModelCard.load(found), repo_id, card.data.tags)
    elif type(saved).__name__ in _KINDS:
        text = _facts(card, repo_id, saved)
    else:
        card_path.unlink()
        return
    with replacing(card_path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


class _Record:
    """A folder or a revision of a repository."""

    def __init__(self, place: str, revision: str | None = None):
        self.place, self.revision, self.lost = place, revision, False

    def find(self, name: str) -> str | None:
        """Path of a file; None where there is none, or the record is out of reach, which is said once."""
        if self.lost:
            return None
        try:
            return find_file(self.place, name, revision=self.revision)
        except OSError as error:
            self.lost = True
            warnings.warn(f"card, results and codebooks of {self.place} are not pushed: {error!s:.200}")
            return None


def _records(folder: Path, saved: Any) -> list[_Record]:
    """Where to look: the folder that is being saved into, and the record of the model."""
    found = [_Record(str(folder.parent))] if folder.name == UNFINISHED_NAME else []
    place, revision = saved.record_of or (None, None)
    if place is not None and (os.path.isdir(place) or not os.path.isabs(place)):  # a folder may be gone since
        found.append(_Record(place, revision))
    return found


def _copy(records: list[_Record], name: str, folder: Path) -> None:
    """Copies a file from the first record that holds it, unless `folder` does."""
    if not (folder / name).exists() and (path := next((path for one in records if (path := one.find(name))), None)):
        shutil.copyfile(path, folder / name)


def _same_file(record: _Record, name: str, folder: Path) -> bool:
    path = record.find(name)
    return path is not None and (folder / name).is_file() and filecmp.cmp(path, folder / name, shallow=False)


def _same_weights(record: _Record, folder: Path) -> bool:
    """Whether the record's weights are those of a folder, in any shards, rounded as the folder's are."""
    theirs, ours = _shards(record), _shards(_Record(str(folder)))
    if theirs.keys() != ours.keys():
        return False
    opened = {path: safe_open(path, framework="pt") for path in {*theirs.values(), *ours.values()}}
    for name, path in ours.items():
        here, there = opened[path].get_tensor(name), opened[theirs[name]].get_tensor(name)
        if here.shape != there.shape or not there.to(here.dtype).equal(here):
            return False
    return bool(ours)


def _shards(record: _Record) -> dict[str, str]:
    """The file of each weight."""
    whole = record.find("model.safetensors")
    if whole is not None:
        with safe_open(whole, framework="pt") as file:
            return dict.fromkeys(file.keys(), whole)
    index = record.find("model.safetensors.index.json")
    names = {} if index is None else read_json_object(index)["weight_map"]
    paths = {shard: record.find(shard) for shard in set(names.values())}
    return {name: path for name, shard in names.items() if (path := paths[shard]) is not None}


def _is_template(card: ModelCard) -> bool:
    return card.text.strip() == ModelCard.from_template(ModelCardData(), model_description=_TEMPLATE).text.strip()


def _renamed(card: ModelCard, repo_id: str, tags: list[str] | None) -> str:
    """The card of a record for another repository: its title and the snippet that loads it name the new one."""
    body, name = card.text.replace(_MARK, "").strip(), repo_id.split("/")[-1]
    title = re.search(r"^# (.+)$", body, re.MULTILINE)
    if title is not None:
        former = html.unescape(re.sub(r"\\(.)", r"\1", title[1]))
        body = body.replace(title[0], f"# {name}", 1)
        body = re.sub(
            r"from_pretrained\((['\"])(.*?)\1\)",
            lambda call: f"from_pretrained({repo_id!r})" if Path(call[2]).name == former else call[0],
            body,
        )
        if card.data.get("model_name") == former:
            card.data.model_name = name
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *(tags or ())]))
    return f"---\n{card.data.to_yaml()}\n---\n\n{_MARK}\n\n{body}\n"


def _facts(card: ModelCard, repo_id: str, saved: Any) -> str:
    """A card of what the configuration says."""
    about, auto_class, names = _KINDS[type(saved).__name__]
    facts = {"parameters": saved.num_parameters(), **{name: getattr(saved.config, name) for name in names}}
    card.data.tags = [*(card.data.tags or ()), *({"onerec"} - set(card.data.tags or ()))]
    return f"""---
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

Configuration:

```json
{json.dumps(facts, indent=1)}
```

Training data, settings and results were not recorded.
"""


__all__ = ["RECORD_NAMES", "SEMANTIC_ID_NAMES", "complete_push"]
