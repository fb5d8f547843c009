"""
Short-term and positive feedback as pathways apart against one history whose interactions say whether they were positive, paired over users.

    OPTIONS="--dataset kuairand-pure --data_dir ../shared/data/kuairand_pure --features auto
             --baselines false --use_cpu true --budget 6m-cpu --keep_checkpoints true"
    OMP_NUM_THREADS=1 onerec-hf train $OPTIONS --output_dir runs/flagged
    OMP_NUM_THREADS=1 onerec-hf train $OPTIONS --pathways short_term=20 positive=256 --output_dir runs/pathways
    python benchmarks/quality/pathways.py --dataset kuairand-pure --data_dir ../shared/data/kuairand_pure \
        --models runs/flagged runs/pathways --json benchmarks/results/pathways.json

Folders are compared with the first one; a row is named by its folder. With --quick two small models are trained here. Rows:

    NAME/FOLDER/SPLIT/ndcg@10          validation and test users; the spread is a standard error to both sides
    NAME/FOLDER/SPLIT/gain             NDCG@10 beyond the first folder's; `standard_error` over the users
    NAME/FOLDER/steps, epochs          of the training up to the kept checkpoint, where the folder has its checkpoints
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/pathways.py`

from benchmarks.harness import dataset_options, finish, one_thread, parser, say

VARIANTS = {"flagged": {}, "pathways": {"pathways": ["short_term=20", "positive=256"], "train_on": "windows"}}
QUICK_USERS = 300


def main() -> None:
    options = parser(__doc__)
    dataset_options(options)
    options.set_defaults(dataset="kuairand-pure")
    options.add_argument(
        "--models", nargs="+", default=[], metavar="FOLDER", help="the first is what others are compared with"
    )
    options = options.parse_args()
    one_thread()
    name = options.dataset.replace("_", "-")
    if not options.quick:
        finish(rows_of([Path(folder) for folder in options.models], name, options.data_dir), options.json)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = [trained(Path(scratch, variant), name, options.data_dir, variant) for variant in VARIANTS]
        finish(rows_of(folders, name, options.data_dir, QUICK_USERS), options.json)


def trained(folder: Path, name: str, data_dir: str | None, variant: str) -> Path:
    """A small model of a few steps."""
    from onerec_hf.workflows import train

    train(
        dataset=name, data_dir=data_dir, interaction_features=["time"], history_feedback="all", max_history=20, output_dir=str(folder), max_steps=3,
        hidden_size=16, encoder_layers=1, baselines=False, use_cpu=True, report_to="none", disable_tqdm=True, validation_users=50,
        item_head_evidence=False, keep_checkpoints=True, **VARIANTS[variant],
    )  # fmt: skip
    return folder


def rows_of(folders: list[Path], name: str, data_dir: str | None, users: int | None = None) -> list[dict[str, Any]]:
    """The rows of trained models, on the data with their own options."""
    from onerec_hf.evaluation.results import result_row

    rows, first = [], {}
    for folder in folders:
        for split, values in ranked(folder, data_dir, users).items():
            place, error = f"{name}/{folder.name}/{split}", values.std(ddof=1) / len(values) ** 0.5
            spread = [values.mean() - error, values.mean() + error]
            rows.append(result_row(f"{place}/ndcg@10", float(values.mean()), "share", spread=spread))
            gains = values - first.setdefault(split, values)
            if folder != folders[0]:
                against = f"{name}/{folders[0].name}/{split}/ndcg@10"
                rows.append(result_row(f"{place}/gain", float(gains.mean()), "ndcg@10", against=against))
                rows.append(
                    result_row(f"{place}/standard_error", float(gains.std(ddof=1) / len(gains) ** 0.5), "ndcg@10")
                )
        for state in folder.glob("checkpoints/*/trainer_state.json"):
            reached = json.loads(state.read_text())
            rows.append(result_row(f"{name}/{folder.name}/steps", reached["global_step"], "steps"))
            rows.append(result_row(f"{name}/{folder.name}/epochs", reached["epoch"], "epochs"))
        say("; ".join(f"{row['name']} {row['value']:.4f}" for row in rows[-8:]))
    return rows


def ranked(folder: Path, data_dir: str | None, users: int | None) -> dict[str, np.ndarray]:
    """NDCG@10 of each validation and test user."""
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments
    from onerec_hf.workflows import load_dataset
    from onerec_hf.workflows.artefact import load_model, load_processor
    from onerec_hf.workflows.features import per_user

    given: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    data, found = load_dataset(**given, model=str(folder)), {}
    model, processor = load_model("--models", str(folder)), load_processor("--models", str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        args = OneRecTrainingArguments(
            scratch, per_device_eval_batch_size=256, eval_top_k=[10], eval_num_beams=30, report_to="none", use_cpu=True, disable_tqdm=True
        )  # fmt: skip
        trainer = OneRecTrainer(model, args, processing_class=processor)
        for split in ("validation", "test"):
            examples = getattr(data, split)
            examples = examples if users is None else examples.select(range(users))
            found[split] = per_user(trainer, examples)["ndcg@10"]
    return found


if __name__ == "__main__":
    main()
