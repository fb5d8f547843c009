"""
What features are worth: OneRec and SASRec with and without them, paired over test users, and a SASRec without one group of them at a time.

    python benchmarks/quality/features.py --dataset kuairand-pure --data_dir ../shared/data/kuairand_pure \
        --with runs/with-0 runs/with-1 runs/with-2 --without runs/without-0 runs/without-1 runs/without-2 --json benchmarks/results/features.json

The folders hold models that `onerec-hf train --dataset NAME` saved, one per seed, with `--features auto` and without; with --quick they are trained here. Rows:

    NAME/ndcg@10_with_over_without     OneRec: ratio of the means over seeds; spread: of single seeds
    NAME/MODEL/VARIANT/METRIC          test users; MODEL: onerec (with, without), sasrec (none, all, all-user, all-item, all-interaction, all-feedback)
    NAME/MODEL/VARIANT/gain            NDCG@10 beyond the model without features, mean over seeds; `standard_error` over the users
    NAME/onerec/VARIANT/over_sasrec    NDCG@10 beyond the SASRec with the same features and seeds, and its `over_sasrec_error` over the users

all-feedback reads the features, but positive interactions only. Other rows stay in the file, such as those of another data set.

    python benchmarks/quality/features.py --dataset kuairand-pure --data_dir ../shared/data/kuairand_pure --with runs/with-0 --seeds 0 \
        --drop user item interaction feedback onehot_feat0 --output_dir runs --json benchmarks/results/features.json

trains OneRecs without one group or one column (`time` is one) at a time, into OUTPUT_DIR/all-NAME-SEED, where it goes on after a stop, and measures these alone:

    NAME/onerec/all-DROPPED/METRIC     test users
    NAME/onerec/all-DROPPED/lost       NDCG@10 of the OneRec with everything and the same seed, minus that; `standard_error` over the users
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/features.py`

from benchmarks.harness import dataset_options, finish, one_thread, parser, say

AUTO = ["auto"]
GROUPS = {"user": "user_features", "item": "item_features", "interaction": "interaction_features"}
METRICS = ("ndcg@10", "recall@10")
QUICK_USERS = 400


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.set_defaults(dataset="kuairand-pure")
    options.add_argument("--with", dest="models", nargs="+", default=[], metavar="FOLDER", help="OneRec with features")
    options.add_argument("--without", nargs="+", default=[], metavar="FOLDER", help="OneRec without, as many")
    options.add_argument(
        "--seeds", type=int, nargs="*", default=[0], help="of the SASRecs, or of the models of --drop"
    )
    options.add_argument(
        "--drop", nargs="+", default=[], metavar="NAME", help=f"{', '.join(GROUPS)}, feedback or a column"
    )
    options.add_argument("--output_dir", default="runs", help="folder of the models of --drop")
    return options.parse_args()


def main() -> None:
    options = arguments()
    if options.drop and len(options.models) != len(options.seeds) and not options.quick:
        raise SystemExit("name as many folders --with as --seeds: models without a feature are compared seed by seed")
    if not options.drop and len(options.models) != len(options.without):
        raise SystemExit("name as many folders --with as --without features: they are compared seed by seed")
    one_thread()
    named = {"dataset": options.dataset.replace("_", "-"), "data_dir": options.data_dir}
    bench = Bench({name: value for name, value in named.items() if value is not None}, options.quick)
    if options.drop:
        rows = bench.dropped(options.drop, options.models, options.seeds, Path(options.output_dir))
    else:
        rows = bench.onerec(options.models, options.without) + bench.sasrec(options.seeds) + bench.over_sasrec()
    before = json.loads(Path(options.json).read_text()) if options.json and Path(options.json).is_file() else {}
    measured = {row["name"] for row in rows}
    others = [row for row in before.get("rows", ()) if row["name"] not in measured]
    finish([*others, *rows], options.json)


class Bench:
    """A data set with and without features; its test users are the same."""

    def __init__(self, named: dict[str, Any], quick: bool):
        self.named, self.name, self.quick = named, named["dataset"], quick
        self.loaded: dict[str, Any] = {}
        #: Per model and variant the metrics of the test users, one entry per seed.
        self.found: dict[str, dict[str, list[dict[str, np.ndarray]]]] = {}

    def data(self, groups: tuple[str, ...], everything: bool):
        """The data set with these groups of features, as far as it has them, and histories of all interactions."""
        from onerec_hf.workflows import load_in_memory

        key = f"{groups} {everything}"
        if key not in self.loaded:
            plain = load_in_memory(**self.named)
            has = {"user": plain.source.users is not None, "item": plain.source.items is not None, "interaction": True}
            names: dict[str, Any] = {GROUPS[group]: AUTO for group in groups if has[group]}
            length = 20 if everything else 10
            feedback: dict[str, Any] = (
                {"history_feedback": "all"} if everything and plain.source.positive.rules else {}
            )
            self.loaded[key] = load_in_memory(**self.named, **names, **feedback, max_history=length)
        return self.loaded[key]

    def onerec(self, models: list[str], without: list[str]) -> list[dict[str, Any]]:
        """Rows of saved models; with --quick of models that are trained for a few steps."""
        from onerec_hf.evaluation.results import result_row

        found: dict[str, list[dict[str, np.ndarray]]] = {"with": [], "without": []}
        if self.quick:
            for kind, groups in (("with", tuple(GROUPS)), ("without", ())):
                found[kind].append(self._trained(self.data(groups, kind == "with")))
        for kind, folders in (("with", models), ("without", without)):
            found[kind] += [self._of_folder(folder) for folder in folders]
        if not found["with"]:
            return []
        ratios = [
            a["ndcg@10"].mean() / b["ndcg@10"].mean() for a, b in zip(found["with"], found["without"], strict=True)
        ]
        means = {kind: np.mean([each["ndcg@10"].mean() for each in some]) for kind, some in found.items()}
        ratio = result_row(
            f"{self.name}/ndcg@10_with_over_without", float(means["with"] / means["without"]), "ratio",
            against=f"{self.name}/onerec/without/ndcg@10", spread=[min(ratios), max(ratios)],
        )  # fmt: skip
        return [ratio, *self._rows("onerec", found, "without")]

    def dropped(self, names: list[str], models: list[str], seeds: list[int], into: Path) -> list[dict[str, Any]]:
        """Rows of OneRecs without one group or column at a time, trained here where `into` does not hold them."""
        from onerec_hf.evaluation.results import result_row
        from onerec_hf.workflows import load_in_memory, train

        chosen, rows = (
            {name: self._without(name) for name in names},
            [],
        )  # all names are checked before the first training
        whole = [self._of_folder(folder) for folder in models]
        if self.quick:
            seeds, whole = [0], [self._trained(self.data(tuple(GROUPS), True))]
        for name, options in chosen.items():
            found = []
            for seed in seeds:
                folder = into / f"all-{name}-{seed}"
                if self.quick:
                    found.append(self._trained(load_in_memory(**self.named, **options, max_history=20)))
                    continue
                if not (folder / "results.json").is_file():
                    quiet = {"report_to": "none", "baselines": False, "feature_worth": False, "overwrite": True}
                    train(**self.named, **options, **quiet, seed=seed, output_dir=str(folder))
                found.append(self._of_folder(str(folder)))
            say(f"onerec/all-{name}: " + ", ".join(f"{each['ndcg@10'].mean():.4f}" for each in found))
            rows += self._rows("onerec", {f"all-{name}": found}, f"all-{name}")
            lost, error = _paired(whole, found)
            row, against = f"{self.name}/onerec/all-{name}", f"{self.name}/onerec/with"
            rows.append(result_row(f"{row}/lost", lost, "ndcg@10", against=against))
            rows.append(result_row(f"{row}/standard_error", error, "ndcg@10"))
        return rows

    def _without(self, name: str) -> dict[str, Any]:
        """Data options: all features by name, without a group or a column, and all feedback, if it is not that which is dropped."""
        from onerec_hf.workflows.dataset import named_features

        data = self.data(tuple(GROUPS), True)
        options: dict[str, Any] = named_features(data.features.schema)
        if data.settings.history_feedback == "all" and name != "feedback":
            options["history_feedback"] = "all"
        if name in GROUPS:
            del options[GROUPS[name]]
        elif name != "feedback":
            columns = {column for of in GROUPS.values() for column in options[of]}
            if name not in columns:
                raise SystemExit(f"--drop {name}: choose {', '.join([*GROUPS, 'feedback', *sorted(columns)])}")
            options |= {of: [column for column in options[of] if column != name] for of in GROUPS.values()}
        return {option: value for option, value in options.items() if value}

    def _of_folder(self, folder: str) -> dict[str, np.ndarray]:
        """Metrics per test user of a saved model, on the data with the model's own options."""
        from onerec_hf.workflows import load_dataset
        from onerec_hf.workflows.artefact import load_model, load_processor

        data = load_dataset(**{name: self.named[name] for name in ("data_dir",) if name in self.named}, model=folder)
        return self._ranked(load_model("--model", folder), load_processor("--model", folder), data)

    def _trained(self, data) -> dict[str, np.ndarray]:
        from onerec_hf.trainers import OneRecTrainingArguments
        from onerec_hf.workflows.settings import ModelSettings, SemanticIDSettings
        from onerec_hf.workflows.training import train_generator

        small = ModelSettings(
            hidden_size=16, encoder_layers=1, decoder_layers=1, num_experts=1, item_head=True, item_score_weight=1.0
        )
        with tempfile.TemporaryDirectory() as folder:
            args = OneRecTrainingArguments(
                folder, max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
            )
            trainer = train_generator(data, Path(folder), SemanticIDSettings(codebook_sizes=[16] * 3), small, args)
        return self._ranked(trainer.model, trainer.processing_class, data)

    def _ranked(self, model, processor, data) -> dict[str, np.ndarray]:
        from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments
        from onerec_hf.workflows.features import per_user

        with tempfile.TemporaryDirectory() as scratch:
            args = OneRecTrainingArguments(
                scratch, per_device_eval_batch_size=256, eval_top_k=[10], eval_num_beams=30, report_to="none", use_cpu=True,
                disable_tqdm=True,
            )  # fmt: skip
            trainer = OneRecTrainer(model, args, processing_class=processor)
            return per_user(trainer, self._users(data))

    def _users(self, data):
        return data.test.select(range(min(QUICK_USERS, len(data.test)))) if self.quick else data.test

    def sasrec(self, seeds: list[int]) -> list[dict[str, Any]]:
        """Rows of SASRecs of width 64 that are trained here."""
        every = tuple(GROUPS)
        variants: dict[str, tuple[tuple[str, ...], bool]] = {"none": ((), False), "all": (every, True)}
        variants |= {f"all-{left}": (tuple(group for group in every if group != left), True) for left in every}
        variants |= {"all-feedback": (every, False)}
        found: dict[str, list[dict[str, np.ndarray]]] = {}
        for name, (groups, everything) in variants.items():
            data = self.data(groups, everything)
            found[name] = [self._fitted(data, seed) for seed in seeds]
            say(f"sasrec/{name}: " + ", ".join(f"{each['ndcg@10'].mean():.4f}" for each in found[name]))
        return self._rows("sasrec", found, "none") if seeds else []

    def over_sasrec(self) -> list[dict[str, Any]]:
        """Rows of OneRec's differences to SASRec, where both have as many seeds."""
        from onerec_hf.evaluation.results import result_row

        rows = []
        for mine, its in (("with", "all"), ("without", "none")):
            pair = self.found.get("onerec", {}).get(mine, []), self.found.get("sasrec", {}).get(its, [])
            if pair[0] and len(pair[0]) == len(pair[1]):
                gain, error = _paired(*pair)
                name, against = f"{self.name}/onerec/{mine}/over_sasrec", f"{self.name}/sasrec/{its}"
                rows.append(result_row(name, gain, "ndcg@10", against=against))
                rows.append(result_row(f"{name}_error", error, "ndcg@10"))
        return rows

    def _fitted(self, data, seed: int) -> dict[str, np.ndarray]:
        from onerec_hf.evaluation.metrics import ndcg_at_k, recall_at_k
        from onerec_hf.trainers import fit_sequential
        from onerec_hf.workflows.dataset import sample

        model = fit_sequential(
            data.train_sequences, sample(data.validation, 50 if self.quick else 3000), item_ids=data.item_ids.tolist(), coded=data.features,
            feature_dim=16, feature_dropout=0.2, hidden_size=64, dropout_rate=0.3, max_history=data.max_history, label_smoothing_factor=0.1,
            average_weights=True, num_train_epochs=0.02 if self.quick else 60, early_stopping_patience=4, per_device_train_batch_size=128, eval_top_k=[10],
            seed=seed, use_cpu=True,
        )  # fmt: skip
        users = self._users(data)
        ranked = model.rank_examples(users, 10)
        target = np.searchsorted(data.item_ids, [session[0] for session in users["session"]])[:, None]
        metrics = {"ndcg@10": ndcg_at_k, "recall@10": recall_at_k}
        return {name: np.asarray(metric(ranked, target, 10, per_row=True)) for name, metric in metrics.items()}

    def _rows(self, model: str, found: dict[str, list[dict[str, np.ndarray]]], base: str) -> list[dict[str, Any]]:
        from onerec_hf.evaluation.results import result_row

        rows = []
        self.found[model] = found
        for variant, seeds in found.items():
            for metric in METRICS:
                values = [each[metric].mean() for each in seeds]
                spread = [min(values), max(values)]
                rows.append(
                    result_row(
                        f"{self.name}/{model}/{variant}/{metric}", float(np.mean(values)), "share", spread=spread
                    )
                )
            if variant != base:
                gain, error = _paired(seeds, found[base])
                against, name = f"{self.name}/{model}/{base}", f"{self.name}/{model}/{variant}"
                rows.append(result_row(f"{name}/gain", gain, "ndcg@10", against=against))
                rows.append(result_row(f"{name}/standard_error", error, "ndcg@10"))
        return rows


def _paired(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> tuple[float, float]:
    """NDCG@10 of models beyond that of others, seed by seed, and its standard error over the users."""
    gains = np.mean([a["ndcg@10"] - b["ndcg@10"] for a, b in zip(ours, theirs, strict=True)], axis=0)
    return gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5


if __name__ == "__main__":
    main()
