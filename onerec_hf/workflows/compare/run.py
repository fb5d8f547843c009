"""
One run of a comparison in a process of its own: trains a family with given settings and a seed, ranks held-out users with the saved artefact, and
writes what it measured into one JSON file.

    python -m onerec_hf.workflows.compare.run SPEC.json
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
import traceback
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.modeling.files import short
from onerec_hf.workflows.artefact import recommender_of, write_bytes
from onerec_hf.workflows.auto import FEATURE_DROPOUT, codebook_size
from onerec_hf.workflows.compare.families import Family
from onerec_hf.workflows.compare.ranking import METRIC, TOP_K, parameters, per_user, rankable, rankings
from onerec_hf.workflows.dataset import InMemoryDataset
from onerec_hf.workflows.loading import load_in_memory
from onerec_hf.workflows.settings import DataSettings

if TYPE_CHECKING:
    from onerec_hf.workflows.compare.progress import Progress

FEW = 20  # users that `train` evaluates at the end of a trial, whose result nobody reads


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        found = {"state": "finished", **train_and_rank(spec)}
    except Exception as error:  # any failure of a family is a row of the report
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        found = {"state": "failed", "reason": short(reason, 500)}
    write_bytes(Path(spec["result"]), (json.dumps({"spec": spec, **found}, indent=1) + "\n").encode())


def train_and_rank(spec: dict[str, Any]) -> dict[str, Any]:
    """
    A trial (`split` "validation") or a winner with a seed ("test").

    Returns:
        `metrics` on the split's users (a winner's on both splits), CPU and wall seconds of the training, peak memory, parameters.
    """
    family, folder = Family(**spec["family"]), Path(spec["folder"])
    began = time.perf_counter()
    data = load_in_memory(DataSettings(**{**spec["data"], **family.data}))
    data, _ = rankable(data, spec["exclude_seen"], spec["validation_users"])
    validation, trial = data.validation, spec["split"] == "validation"
    if trial:
        data = replace(data, split=replace(data.split, test=validation.select(range(min(FEW, len(validation))))))
    from onerec_hf.workflows.compare.progress import Progress

    progress = Progress(Path(spec["progress"]))
    fit = {"ranking": _fit_ranking, "sequential": _fit_sequential, "onerec": _fit_onerec}[family.kind]
    settings = resolved(spec["settings"], data)
    with redirect_stdout(sys.stderr):  # Trainer prints its logs
        fit(data, folder, settings, spec, progress)
    cost = progress.cost()
    recommender = recommender_of(folder)
    found: dict[str, Any] = {"settings": settings, "metrics": {}, "parameters": parameters(recommender)}
    for split, examples in {"validation": validation, **({} if trial else {"test": data.test})}.items():
        ranked = rankings(recommender, examples, data.item_ids, spec["exclude_seen"])
        found["metrics"] |= {
            f"{split}/{name}": float(np.mean(of)) for name, of in per_user(ranked, examples, data).items()
        }
        if split == "test":
            np.savez_compressed(spec["rankings"], rows=ranked.astype(np.int32))
    return {**found, **cost, "peak_gib": peak_gib(), "seconds": time.perf_counter() - began}


def resolved(settings: dict[str, Any], data: InMemoryDataset) -> dict[str, Any]:
    """The settings with `content` and `auto` replaced by what they mean for this table; families.py has their meaning."""
    found, items = dict(settings), data.items
    for name in ("embedding", "features"):
        if name in found:
            kind = "given" if items is not None and items.embeddings is not None else "text"
            found[name] = "behaviour" if items is None else found[name].replace("content", kind)
    if found.get("codebook_sizes") == "auto":
        found["codebook_sizes"] = [codebook_size(len(data.item_ids))] * 3
    return found


def _fit_ranking(
    data: InMemoryDataset, folder: Path, settings: dict[str, Any], spec: dict[str, Any], progress: Progress
):
    from onerec_hf.baselines import ItemIndex, ItemKNNBaseline, PopularityBaseline, save_ranking

    settings = dict(settings)
    model = {"popularity": PopularityBaseline, "item_knn": ItemKNNBaseline}[settings.pop("model")](**settings)
    model.fit(data.train_rows(), len(data.item_ids))
    progress.ends()
    items = ItemIndex(data.item_ids)
    save_ranking(folder, model, items)
    _save_beside(folder, data, items, spec["exclude_seen"], reads_features=False)


def _fit_sequential(
    data: InMemoryDataset, folder: Path, settings: dict[str, Any], spec: dict[str, Any], progress: Progress
):
    from onerec_hf.baselines import ItemIndex
    from onerec_hf.trainers import fit_sequential
    from onerec_hf.workflows.semantic_ids import embed_items
    from onerec_hf.workflows.settings import SemanticIDSettings

    settings, features = dict(settings), None
    if "features" in settings:
        how = SemanticIDSettings(embedding=settings.pop("features"), semantic_id_seed=spec["seed"])
        features = embed_items(data, how)[0]
    options = {"max_history": data.max_history, "eval_exclude_seen": spec["exclude_seen"], "seed": spec["seed"]}
    model = fit_sequential(
        data.train_sequences,  # pyright: ignore[reportArgumentType] (arrays are sequences of ids)
        data.validation,
        item_ids=data.item_ids,
        features=features,
        coded=data.features,
        callbacks=[progress],
        **{**options, **of_features(data), **settings},
    )
    model.save_pretrained(folder)
    items = model.items
    assert isinstance(items, ItemIndex)
    _save_beside(folder, data, items, spec["exclude_seen"])


def _fit_onerec(
    data: InMemoryDataset, folder: Path, settings: dict[str, Any], spec: dict[str, Any], progress: Progress
):
    from onerec_hf.workflows.training import train

    chooses = {"load_best_model_at_end": True, "metric_for_best_model": METRIC, "greater_is_better": True}
    train(
        data,
        callbacks=[progress],
        output_dir=str(folder),
        overwrite=True,
        baselines=False,
        seed=spec["seed"],
        semantic_id_seed=spec["seed"],
        eval_exclude_seen=spec["exclude_seen"],
        eval_top_k=[TOP_K],
        report_to="none",
        disable_tqdm=True,
        save_total_limit=1,
        feature_worth=False,
        **{**chooses, **of_features(data), **settings},
    )


def of_features(data: InMemoryDataset) -> dict[str, Any]:
    """Settings of models that read features, the same for all families; a family may have its own."""
    return {} if data.features is None else {"feature_dropout": FEATURE_DROPOUT}


def _save_beside(
    folder: Path, data: InMemoryDataset, items: Any, exclude_seen: bool, reads_features: bool = True
) -> None:
    """Data options and titles beside the model, for later commands and the server's answers; `train` saves a generator's."""
    from onerec_hf.data.item_fields import save_items_table
    from onerec_hf.workflows.data_options import save_data_options

    save_data_options(folder, data, exclude_seen, reads_features)
    if data.items is not None:
        save_items_table(folder, data.items, items)


def peak_gib() -> float:
    """Peak resident memory of this process so far, in GiB. (Where there is no /proc, `ru_maxrss`: it begins at the parent's peak.)"""
    status = Path("/proc/self/status")
    if not status.is_file():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) / 2**20


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: a killed comparison leaves no run behind that writes into its folder."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
