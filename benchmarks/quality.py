"""
Quality at a fixed budget: trains OneRec by a recipe for so many CPU minutes and ranks the whole catalogue for every test user, beside
popularity and item-kNN on the same split.

    python benchmarks/quality.py --dataset amazon-beauty --data_dir ../shared/data/amazon_beauty --json benchmarks/results/quality.json
"""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from _harness import cpu_seconds, finish, parser, say

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def arguments():
    options = parser(__doc__)
    options.add_argument("--dataset", default="amazon-beauty", help="a recipe's name, '-' or '_' inside")
    options.add_argument("--data_dir", help="folder of the data set's files; ../shared/data/NAME when not given")
    options.add_argument(
        "--cpu_minutes", type=float, default=30, help="training budget: user + system time, all threads"
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument(
        "--split", default="test", choices=("test", "validation"), help="validation to choose settings"
    )
    options.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings over the recipe's")
    return options.parse_args()


def budget_trainer():
    """The trainer whose learning rate and end follow the CPU time that was spent."""
    import torch
    from transformers import TrainerCallback

    from onerec_hf.trainers import OneRecTrainer

    class StopAtBudget(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_step_end(self, args, state, control, **kwargs):
            if self.trainer.spent() >= 1:
                control.should_training_stop = True

    class BudgetTrainer(OneRecTrainer):
        """Warm-up by steps, then a cosine down to zero over the budget."""

        def __init__(self, *args, cpu_budget: float, **kwargs):
            self.started, self.cpu_budget = cpu_seconds(), cpu_budget
            super().__init__(*args, **kwargs)
            self.add_callback(StopAtBudget(self))

        def spent(self) -> float:
            return (cpu_seconds() - self.started) / self.cpu_budget

        def create_scheduler(self, num_training_steps, optimizer=None):
            warmup = max(1, int(self.args.warmup_steps))

            def factor(step: int) -> float:
                return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.spent())))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or cast(Any, self.optimizer), factor)
            return self.lr_scheduler

    return BudgetTrainer


def run(options, seed: int, minutes: float, limit: list[str]) -> tuple[dict[str, float], str]:
    """Metrics named `model/metric` for one seed, and the sentence about the split."""
    from transformers import set_seed

    from onerec_hf.cli.arguments import DataArguments, ModelArguments, SemanticIDArguments, parse
    from onerec_hf.cli.steps import fit_catalogue, new_model, prepare_data
    from onerec_hf.cli.train import TrainArguments, evaluate_beside_baselines, on_prefixes
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainingArguments

    recipe = RECIPES / f"{options.dataset.replace('-', '_')}.yaml"
    folder = options.data_dir or f"../shared/data/{options.dataset.replace('-', '_')}"
    over = [
        part for setting in [*options.set, *limit] for part in (f"--{setting.split('=')[0]}", setting.split("=")[1])
    ]
    data_args, id_args, model_args, run_args, training_args = parse(
        (DataArguments, SemanticIDArguments, ModelArguments, TrainArguments, OneRecTrainingArguments),
        ["--config", str(recipe), "--data_dir", folder, *over],
        "train",
    )
    set_seed(seed)
    data = prepare_data(data_args)
    if options.quick:
        users = {name: getattr(data.split, name).select(range(300)) for name in ("validation", "test")}
        data = replace(data, split=replace(data.split, **users))
    if run_args.train_on == "prefixes":
        data = on_prefixes(data, data_args)
    id_args.semantic_id_seed = training_args.seed = seed
    fitted = fit_catalogue(data, id_args)
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=data_args.max_history)
    model = new_model(model_args, processor, data_args.session_length)
    say(f"{model.num_parameters():,} parameters, {len(data.split.train):,} examples, {minutes:g} CPU minutes")
    with tempfile.TemporaryDirectory() as scratch:
        training_args.output_dir = scratch
        training_args.num_train_epochs, training_args.max_steps = 10_000, -1
        training_args.save_strategy = "no"
        training_args.disable_tqdm = True
        trainer = budget_trainer()(
            model, training_args, train_dataset=data.split.train, processing_class=processor, cpu_budget=60 * minutes
        )
        trainer.train()
        say(f"{trainer.state.global_step} steps, {trainer.state.epoch:.2f} epochs")
        rows = evaluate_beside_baselines(trainer, data, options.split)
    return {row["name"]: row["value"] for row in rows}, data.split.description


def main() -> None:
    options = arguments()
    minutes, limit = (
        (0.1, ["hidden_size=32", "decoder_layers=1", "kmeans_iterations=4"])
        if options.quick
        else (options.cpu_minutes, [])
    )
    measured = []
    for seed in options.seeds:
        values, protocol = run(options, seed, minutes, limit)
        measured.append(values)
    from onerec_hf.evaluation.results import result_row

    rows = []
    for model in ("popularity", "item_knn", "onerec"):
        for metric in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
            values = [run[f"{model}/{metric}"] for run in measured]
            name = f"{options.dataset}/{model}/{metric}"
            rows.append(result_row(name, statistics.mean(values), "share", spread=[min(values), max(values)]))
    rows.append(result_row(f"{options.dataset}/illegal_share", max(r["illegal_share"] for r in measured), "share"))
    finish(rows, options.json, seeds=options.seeds, cpu_minutes=minutes, split=options.split, protocol=protocol)


if __name__ == "__main__":
    main()
