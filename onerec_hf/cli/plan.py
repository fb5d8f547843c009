"""`onerec-hf plan`: memory per GPU and communication per step of a model, from its config alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.cli.arguments import parse
from onerec_hf.workflows.settings import ModelSettings

if TYPE_CHECKING:
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.planning import Gpu

# Options with another name in `train`, so that recipes for `train` work.
SAME_AS = {"per_device_train_batch_size": "batch", "activation_checkpointing": "checkpointing"}


@dataclass
class PlanArguments:
    """GPUs, batch and strategies."""

    gpus: int = field(default=1, metadata={"help": "Number of GPUs of all machines."})
    gpus_per_node: int = field(default=8, metadata={"help": "Number of GPUs of one machine."})
    batch: int = field(default=64, metadata={"help": "Examples per GPU and step."})
    max_history: int = field(default=50, metadata={"help": "Items of a history; batches are padded to it."})
    session_length: int = field(default=5, metadata={"help": "Items of a session."})
    num_items: int | None = field(default=None, metadata={"help": "Items of the catalogue, for a new item head."})
    codebook_sizes: list[int] = field(
        default_factory=lambda: [256, 256, 256], metadata={"help": "Codes per level, for a new model."}
    )
    dtype: str = field(
        default="mixed",
        metadata={
            "help": "float32; mixed (--bf16 of train: float32 weights, bfloat16 products); bfloat16 (everything)."
        },
    )
    checkpointing: bool = field(default=False, metadata={"help": "Gradient checkpointing of every layer."})
    strategy: list[str] | None = field(
        default=None, metadata={"help": "ddp, fsdp, fsdp+ep, hsdp, hsdp+ep, zero3. Default: all that are possible."}
    )
    ep_size: int | None = field(
        default=None, metadata={"help": "GPUs that share the experts. Default: as many of one machine as possible."}
    )
    gpu: str = field(default="h100", metadata={"help": "GPU whose published peaks are used: h100, a100."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GiB of one GPU. Default: 80."})
    tflops: float | None = field(default=None, metadata={"help": "Peak of matrix products in TFLOP/s, for any dtype."})
    memory_gb_s: float | None = field(default=None, metadata={"help": "Bandwidth of the GPU's memory in GB/s."})
    node_gb_s: float | None = field(default=None, metadata={"help": "GB/s that a GPU sends inside a machine."})
    network_gb_s: float | None = field(default=None, metadata={"help": "GB/s that a GPU sends to other machines."})
    json: str | None = field(default=None, metadata={"help": "JSON file to write the plans to, in bytes and seconds."})


def main(argv: list[str]) -> None:
    source, argv = config_option(argv)
    model_args, args = parse((ModelSettings, PlanArguments), argv, "plan")
    if source is not None and model_args.model is not None:
        raise ValueError("--config and --model both name a model: pass one of them")
    from onerec_hf.evaluation.results import table
    from onerec_hf.planning import HEADER, STRATEGIES, Batch, best, layouts, make_plans, summary
    from onerec_hf.planning import table as rows
    from onerec_hf.workflows.distributed import say

    for name in ("batch", "max_history", "session_length", "num_items"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    source = source or model_args.model
    config = (
        load_config(source) if source else model_args.config(args.codebook_sizes, args.session_length, args.num_items)
    )
    # The session length of a saved model, unless the option is given.
    given = any(text.split("=")[0] == "--session_length" for text in argv)
    batch = Batch(args.batch, args.max_history, args.session_length if given or not source else config.session_length)
    plans = make_plans(
        config,
        layouts(config, args.gpus, args.strategy or STRATEGIES, args.gpus_per_node, args.ep_size),
        batch,
        dtype=args.dtype,
        checkpointing=args.checkpointing,
        gpu=chosen_gpu(args),
        gpus_per_node=args.gpus_per_node,
    )
    if not plans:
        raise ValueError(
            f"none of {', '.join(args.strategy or STRATEGIES)} is possible on {args.gpus} GPUs with this model"
        )
    choice = best(plans)
    print(summary(config, batch))
    print(f"{plans[0].flops:.3g} FLOPs per GPU and step; {args.dtype}; {args.gpus} x {chosen_gpu(args).name}\n")
    print(table(rows(plans), list(HEADER)))
    for plan in plans:
        if plan.problem:
            say(f"{plan.layout.strategy}: {plan.problem}")
    print(f"\n{advice(choice, args.checkpointing)}")
    if args.json:
        write_json(Path(args.json), config, plans, choice)


def config_option(argv: list[str]) -> tuple[str | None, list[str]]:
    """
    The model that `--config` names (config.json, folder, Hub id), or None, and the other arguments. A YAML file is an option file, as in every
    command; of a recipe for `train`, options without effect on a plan are left out.
    """
    argv = [part for text in argv for part in (text.split("=", 1) if text.startswith("--config=") else [text])]
    if "--config" not in argv[:-1]:
        return None, argv
    at = argv.index("--config")
    value, rest = argv[at + 1], argv[:at] + argv[at + 2 :]
    if Path(value).suffix not in (".yaml", ".yml"):
        return value, rest
    return None, recipe_options(value) + rest


def recipe_options(file: str) -> list[str]:
    """
    The options of a recipe as arguments.

    Raises:
        ValueError: not a YAML mapping, or an option that neither `plan` nor `train` has.
    """
    from onerec_hf.cli.parser import read_options

    options = read_options(file)
    known = {option.name for part in (ModelSettings, PlanArguments) for option in fields(part)}
    argv, others = [], []
    for name, value in options.items():
        if name in SAME_AS:
            name = SAME_AS[name]
        elif name == "bf16":
            name, value = "dtype", "mixed" if value else "float32"
        if name not in known:
            others.append(name)
        elif value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if others:
        check_train_options(file, others)
    return argv


def check_train_options(file: str, names: list[str]) -> None:
    """
    Raises:
        ValueError: an option that `train` does not have.
    """
    from onerec_hf.cli.parser import RENAMED
    from onerec_hf.modeling.files import short
    from onerec_hf.trainers import OneRecTrainingArguments
    from onerec_hf.workflows.settings import DataSettings, SemanticIDSettings
    from onerec_hf.workflows.training import TrainSettings

    parts: tuple[Any, ...] = (DataSettings, SemanticIDSettings, TrainSettings, OneRecTrainingArguments)
    known = {option.name for part in parts for option in fields(part)}
    unknown = [name for name in names if name not in known]
    if unknown and unknown[0] in RENAMED:
        raise ValueError(f"--config {file}: {unknown[0]} is called {RENAMED[unknown[0]]} now")
    if unknown:
        raise ValueError(f"--config {file}: unknown option {short(unknown[0])}, neither of plan nor of train")


def load_config(source: str) -> OneRecConfig:
    """
    Raises:
        ValueError: no config, or the config of another model.
    """
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.modeling.configuration_onerec_v2 import OneRecV2Config
    from onerec_hf.modeling.files import UNEXPECTED, short
    from onerec_hf.modeling.hub import reading_config

    if Path(source).is_absolute() and not Path(source).exists():
        raise ValueError(f"--config {source}: no such file or folder")
    try:
        if Path(source).is_file():
            values = json.loads(Path(source).read_text(encoding="utf-8"))
        else:
            values, _ = OneRecConfig.get_config_dict(source)
    except (OSError, *UNEXPECTED) as error:
        raise ValueError(
            f"--config {source}: cannot read a model's config: {short(str(error).split(chr(10))[0])}"
        ) from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    kinds = {each.model_type: each for each in (OneRecConfig, OneRecV2Config)}
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"--config {source}: not the config of a OneRec generator (model_type: {kind!s:.80})")
    with reading_config(source):
        return kinds[kind].from_dict(values)


def chosen_gpu(args: PlanArguments) -> Gpu:
    """The GPU of the options."""
    from onerec_hf.planning import GPUS

    if args.gpu not in GPUS:
        raise ValueError(
            f"--gpu {args.gpu}: choose among {', '.join(GPUS)}, and change the numbers with --tflops etc."
        )
    changed = {
        "memory": args.gpu_memory,
        "bfloat16": args.tflops,
        "float32": args.tflops,
        "memory_bandwidth": args.memory_gb_s,
        "node_bandwidth": args.node_gb_s,
        "network_bandwidth": args.network_gb_s,
    }
    changed = {name: value for name, value in changed.items() if value is not None}
    if changed and min(changed.values()) <= 0:
        raise ValueError("--gpu_memory, --tflops and the bandwidths must be above 0")
    return replace(GPUS[args.gpu], **changed)


def advice(choice: Any, checkpointing: bool) -> str:
    if choice is None:
        cures = (
            "a smaller --batch or more --gpus"
            if checkpointing
            else "--checkpointing true, a smaller --batch or more --gpus"
        )
        return f"Nothing fits: try {cures}."
    return f"Start with {choice.layout.strategy}: the simplest strategy that fits, with a lower bound of time close to the fastest."


def write_json(file: Path, config: OneRecConfig, plans: list[Any], choice: Any) -> None:
    from onerec_hf.planning import active_parameters, count_parameters

    content = {
        "parameters": count_parameters(config),
        "active_parameters": active_parameters(config),
        "choice": choice and choice.layout.strategy,
        "plans": [plan.as_dict() for plan in plans],
    }
    scratch = file.with_name(f"{file.name}.tmp")
    scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    scratch.replace(file)
