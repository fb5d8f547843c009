"""Popularity and item-kNN as saved artefacts: `config.json` with the model type and settings, `model.safetensors` with counts, similarities and item ids."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from onerec_hf.baselines.item_index import ItemIndex
from onerec_hf.baselines.memory import ItemKNNBaseline, PopularityBaseline, RankingBaseline
from onerec_hf.modeling.files import read_json_object, read_safetensors, refusing, replacing_files
from onerec_hf.modeling.hub import FORMAT_VERSION

#: The classes by the `model_type` of their artefacts.
RANKING_TYPES: dict[str, type[RankingBaseline]] = {
    "onerec_popularity": PopularityBaseline,
    "onerec_item_knn": ItemKNNBaseline,
}


def save_ranking(folder: str | os.PathLike, baseline: RankingBaseline, items: ItemIndex) -> None:
    """
    Saves a fitted baseline with the ids of its items. `config.json` comes last: a folder with one holds a complete baseline.

    Args:
        items: the ids in the order of the indices that the baseline was fitted with.

    Raises:
        ValueError: another number of items.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fitted = ItemKNNBaseline(last_n=5).fit([[0, 1], [0, 1, 2]], num_items=3)
        ...     save_ranking(folder, fitted, ItemIndex(["a", "b", "c"]))
        ...     again, items = load_ranking(folder)
        ...     again.settings["last_n"], items.ids(again.recommend([[0]], k=2)[0])
        (5, ['b', 'c'])
    """
    from safetensors.torch import save_file

    if baseline.num_items != len(items):
        raise ValueError(f"the baseline was fitted for {baseline.num_items} items, and items has {len(items)} ids")
    (kind,) = (name for name, each in RANKING_TYPES.items() if type(baseline) is each)
    config = {"model_type": kind, "format_version": FORMAT_VERSION, "num_items": len(items), **baseline.settings}
    arrays = {name: torch.from_numpy(array) for name, array in baseline.arrays().items()}
    os.makedirs(folder, exist_ok=True)
    with replacing_files(folder, last="config.json") as temporary:
        save_file({**arrays, "item_keys": items.to_tensor()}, os.path.join(temporary, "model.safetensors"))
        Path(temporary, "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_ranking(folder: str | os.PathLike) -> tuple[RankingBaseline, ItemIndex]:
    """
    The baseline that [`save_ranking`] wrote, and the ids of its items.

    Raises:
        ValueError: damaged files, another kind of model, or a newer format.
        OSError: no such folder.
    """
    config = read_json_object(Path(folder, "config.json"))
    kind, version = config.pop("model_type", None), config.pop("format_version", None)
    if kind not in RANKING_TYPES:
        raise ValueError(f"it holds a model of type {kind!r:.40}, not one of {', '.join(RANKING_TYPES)}")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"its format_version is {version!r:.40}, this onerec-hf reads up to {FORMAT_VERSION}. Upgrade onerec-hf"
        )
    path = Path(folder, "model.safetensors")
    tensors, _ = read_safetensors(path)
    with refusing(path):
        items = ItemIndex.from_tensor(tensors.pop("item_keys"))
        arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}  # the file may be replaced
        if config.pop("num_items") != len(items) or len(arrays["popularity"]) != len(items):
            raise ValueError("config.json and the weights have different numbers of items")
        return RANKING_TYPES[kind](**config).restore(arrays), items
