"""Options of a command in groups, with types and defaults: for `--help` and the site's reference. Read without importing torch."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.util import find_spec
from inspect import get_annotations
from pathlib import Path
from typing import Any, get_origin

_METAVARS = {"int": "INT", "float": "NUMBER", "bool": "BOOL", "dict": "JSON"}
MORE = "More options of transformers.TrainingArguments"
#: Options of `transformers.TrainingArguments` that `--help` describes; it names the others.
COMMON = frozenset(
    (
        *(
            "output_dir",
            "resume_from_checkpoint",
            "num_train_epochs",
            "max_steps",
            "learning_rate",
            "lr_scheduler_type",
        ),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "warmup_steps"),
        *(
            "weight_decay",
            "max_grad_norm",
            "optim",
            "bf16",
            "activation_checkpointing",
            "torch_compile",
            "seed",
            "use_cpu",
        ),
        *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end"),
        *("metric_for_best_model", "logging_steps", "report_to", "disable_tqdm"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
    )
)


@dataclass(frozen=True)
class Option:
    """
    One option.

    Example:
        >>> Option("stride", "int", 1, "Step.").spelled
        '--stride INT'
        >>> Option("baselines", "bool", True, "Rank baselines.").spelled
        '--baselines BOOL, --no_baselines'
    """

    name: str
    type: str
    default: Any
    help: str

    @property
    def spelled(self) -> str:
        """As on the command line."""
        text = f"--{self.name} {self.metavar}"
        return f"{text}, --no_{self.name}" if self.type == "bool" and self.default is True else text

    @property
    def metavar(self) -> str:
        """What its value is."""
        kinds = [part.strip() for part in self.type.split("|")]
        listed = next((kind for kind in kinds if kind.startswith("list")), None)
        if listed is not None and "str" not in kinds:  # one text where both are taken
            return f"{_METAVARS.get(listed[5:-1], 'TEXT')} ..."
        return next((_METAVARS[kind] for kind in kinds if kind in _METAVARS and "str" not in kinds), "TEXT")

    @property
    def shown_default(self) -> str:
        """As on the command line; empty for none."""
        if self.default in (None, "", []):
            return ""
        if isinstance(self.default, list):
            return " ".join(map(str, self.default))
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


@dataclass(frozen=True)
class Group:
    """Options that belong together."""

    title: str
    options: list[Option]


def groups_of(kinds: Iterable[type]) -> list[Group]:
    """
    The options of dataclasses: a group for each class that defines some, derived classes first, titled by the first line of its docstring.
    Those of transformers come last, in two groups: the common ones, and the others.

    Example:
        >>> from onerec_hf.workflows import DataSettings
        >>> [group.title for group in groups_of([DataSettings])]
        ['The interactions, and their items', 'Columns, and how interactions become training examples']
    """
    groups: dict[type, list[Option]] = {}
    theirs: dict[str, Option] = {}
    for kind in kinds:
        mine: dict[type, list[Option]] = {base: [] for base in kind.__mro__}
        for each in fields(kind):
            if not each.init:
                continue
            owner = next(base for base in kind.__mro__ if each.name in get_annotations(base))
            default = each.default if each.default_factory is MISSING else each.default_factory()
            named = (
                each.type.__name__ if isinstance(each.type, type) and get_origin(each.type) is None else str(each.type)
            )
            told = each.metadata.get("help", "")
            option = Option(each.name, named, None if default is MISSING else _plain(default), _one_line(told))
            if owner.__module__.startswith("transformers."):
                theirs.setdefault(option.name, option)
            else:
                mine[owner].append(option)
        groups |= {owner: options for owner, options in mine.items() if options and owner not in groups}
    titled = [Group(_title(owner), options) for owner, options in groups.items()]
    return titled + (_of_transformers(theirs.values()) if theirs else [])


def _title(kind: type) -> str:
    """The first sentence of a docstring, without markup."""
    return re.sub(r"[`\[\]]", "", re.split(r"\.\s|\.$", _one_line(kind.__doc__))[0])


def _of_transformers(options: Iterable[Option]) -> list[Group]:
    options = list(options)
    return [
        Group("The trainer (transformers.TrainingArguments)", [each for each in options if each.name in COMMON]),
        Group(MORE, [each for each in options if each.name not in COMMON]),
    ]


def trainer_groups() -> list[Group]:
    """
    The options of [`~onerec_hf.trainers.OneRecTrainingArguments`]: those that this package defines, the common ones of transformers, and the
    others. They are read from the source, since the import takes seconds.

    Example:
        >>> [group.options[0].name for group in trainer_groups()][0]
        'predict_with_generate'
    """
    own = _source_options("onerec_hf.trainers", "onerec_config.py", "OneRecTrainingArguments")
    base = _source_options("transformers", "training_args.py", "TrainingArguments")
    base |= _source_options("transformers", "training_args_seq2seq.py", "Seq2SeqTrainingArguments")
    others = [option for name, option in base.items() if name not in own]
    return [Group("Ranking, packing and losses of the trainer", list(own.values())), *_of_transformers(others)]


@cache
def _source_options(package: str, file: str, name: str) -> dict[str, Option]:
    """The fields of a dataclass, from its source."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8"))
    kind = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    found = {}
    for node in kind.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            continue
        given = {}
        if isinstance(node.value, ast.Call):
            given = {word.arg: word.value for word in node.value.keywords}
            if "init" in given:
                continue
        default = given.get("default", node.value if not given else None)
        if (factory := given.get("default_factory")) is not None:
            default = factory.body if isinstance(factory, ast.Lambda) else None
        metadata = given.get("metadata")
        told = ""
        if isinstance(metadata, ast.Dict):
            told = next(
                (
                    _literal(value)
                    for key, value in zip(metadata.keys, metadata.values, strict=True)
                    if _literal(key) == "help"
                ),
                "",
            )
        found[node.target.id] = Option(
            node.target.id, ast.unparse(node.annotation), _literal(default), _one_line(told)
        )
    return found


def _literal(node: ast.AST | None) -> Any:
    """A value in source; the last name, in small letters, of what is no literal (`IntervalStrategy.STEPS`)."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)  # type: ignore[arg-type]
    except ValueError:
        return ast.unparse(node).split(".")[-1].lower() if isinstance(node, ast.Attribute) else None


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _one_line(text: Any) -> str:
    return " ".join(str(text or "").split())


def asks_help(argv: Sequence[str]) -> bool:
    """
    Whether the options ask for help.

    Example:
        >>> asks_help(["--max_steps", "3", "-h"]), asks_help(["--max_steps", "3"])
        (True, False)
    """
    return any(word in ("-h", "--help", "--help_all") for word in argv)


def help_text(
    prog: str, groups: Sequence[Group], about: str = "", required: Sequence[str] = (), everything: bool = False
) -> str:
    """
    The help of a command.

    Args:
        about: what it does.
        required: options without which it does not run.
        everything: describe the rarer options of transformers too, which are else a list of names.

    Example:
        >>> groups = [Group("Data", [Option("stride", "int", 1, "Step.")]), Group(MORE, [Option("fp16", "bool", False, "")])]
        >>> print(help_text("train", groups, "Trains."))
        usage: onerec-hf train [options]
        <BLANKLINE>
        Trains.
        <BLANKLINE>
        Data:
          --stride INT            Step. (default: 1)
        <BLANKLINE>
        More options of transformers.TrainingArguments (onerec-hf train --help_all describes them):
          --fp16
        <BLANKLINE>
        --config FILE.yaml reads options from a file; those on the command line override it.
    """
    width = max(60, min(120, shutil.get_terminal_size().columns))
    usage = " ".join([f"usage: onerec-hf {prog}", *(f"{option} ..." for option in required), "[options]"])
    lines = [usage, *(["", *textwrap.wrap(about, width)] if about else [])]
    for group in groups:
        if group.title == MORE and not everything:
            lines += ["", f"{group.title} (onerec-hf {prog} --help_all describes them):"]
            names = " ".join(f"--{option.name}" for option in group.options)
            lines += textwrap.wrap(names, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            continue
        lines += ["", f"{group.title}:"]
        for option in group.options:
            default = f" (default: {option.shown_default})" if option.shown_default else ""
            told = textwrap.wrap(option.help + default, width - 26, break_on_hyphens=False)
            spelled = f"  {option.spelled}"
            beside = told.pop(0) if told and len(spelled) < 25 else ""
            lines.append(f"{spelled:<26}{beside}".rstrip())
            lines += [" " * 26 + line for line in told]
    lines += ["", "--config FILE.yaml reads options from a file; those on the command line override it."]
    return "\n".join(lines)


def markdown(groups: Sequence[Group], names: Sequence[str] = ()) -> str:
    """
    The same groups as tables of Markdown.

    Args:
        names: only these options, if any are named.

    Example:
        >>> print(markdown([Group("Data", [Option("stride", "int", 1, "Step | of windows.")])]))
        ### Data
        <BLANKLINE>
        | option | type | default | |
        |---|---|---|---|
        | `--stride` | INT | `1` | Step \\| of windows. |
    """
    parts = []
    for group in groups:
        rows = [option for option in group.options if not names or option.name in names]
        if rows:
            parts += [f"### {group.title}", "", "| option | type | default | |", "|---|---|---|---|"]
            for option in rows:
                default = f"`{option.shown_default}`" if option.shown_default else ""
                told = re.sub(r"([|<>*_`\[\]])", r"\\\1", option.help)
                parts.append(f"| `--{option.name}` | {option.metavar} | {default} | {told} |")
            parts.append("")
    return "\n".join(parts).rstrip()
