"""
One short training of each trainer, for the tests that compare its curve over layouts of ranks; also the script that every rank runs:
`python -m tests.trainers.curves LAYOUT START OUT`, alone or under torchrun.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoProcessor
from transformers.distributed import DistributedConfig

import onerec_hf  # noqa: F401 - registers the Auto classes
from onerec_hf import OneRecForSessionReward, OneRecProcessor, OneRecRewardConfig, RewardItems
from onerec_hf.trainers import (
    OneRecDPOConfig,
    OneRecDPOTrainer,
    OneRecGRPOConfig,
    OneRecGRPOTrainer,
    OneRecTrainer,
    OneRecTrainingArguments,
    RewardTrainer,
    RewardTrainingArguments,
    Seq2SeqDPOConfig,
    Seq2SeqDPOTrainer,
)
from onerec_hf.workflows.distributed import leave
from tests.conftest import make_catalogue, make_model
from tests.rounding import distance

KINDS = ("ntp", "items", "adapter", "reward", "seq2seq_dpo", "onerec_dpo", "onerec_grpo")


@dataclass
class Layout:
    """How many ranks there are, how they share a model, batches per step, and which trainers are run so."""

    ranks: int = 2
    sizes: dict[str, int] = field(default_factory=dict)
    accumulate: int = 1
    kinds: tuple[str, ...] = KINDS


LAYOUTS = {
    "one": Layout(ranks=1),
    "ddp": Layout(),
    "ddp_accumulated": Layout(accumulate=2, kinds=("ntp", "onerec_grpo")),
    "fsdp": Layout(sizes={"fsdp_size": 2}),
    "fsdp_ep": Layout(sizes={"fsdp_size": 2, "ep_size": 2}),
    "fsdp4_ep2": Layout(4, {"fsdp_size": 4, "ep_size": 2}, kinds=("ntp", "onerec_dpo")),
    "hsdp_ep": Layout(4, {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}, kinds=("ntp",)),
}
BATCH = 8


def make_start(folder: Path) -> None:
    """The generator and the reward model that every training starts from."""
    catalogue = make_catalogue(60, (8, 8, 8))
    # 60 items in 3 * 8 codes: a vocabulary of 64, which two ranks can share evenly.
    make_model(catalogue, session_length=3).save_pretrained(folder / "generator")
    with_scores = make_model(catalogue, session_length=3, item_head={"num_items": 60, "score_codes": True})
    with_scores.generation_config.item_score_weight = 2.0
    with_scores.save_pretrained(folder / "items")
    for name in ("generator", "items"):
        OneRecProcessor.from_catalogue(catalogue, max_history=6).save_pretrained(folder / name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "initializer_range": 0.2, "dropout_rate": 0.0}
    config = OneRecRewardConfig(num_items=60, objectives=["vtr", "ltr"], base_rates=[0.4, 0.1], **sizes)
    reward = OneRecForSessionReward(config)
    reward.set_items(RewardItems(catalogue.item_ids))
    reward.save_pretrained(folder / "reward")


def rows(count: int = 48) -> list[dict]:
    """Histories and sessions of unequal lengths, so that no two ranks hold the same number of tokens."""
    return [
        {
            "history": [f"m{(i * 7 + j * 3) % 60}" for j in range(1 + i % 6)],
            "session": [f"m{(i * 5 + 11 * j + 1) % 60}" for j in range(1 + i % 3)],
            "chosen": [f"m{(i + 7 + j) % 60}" for j in range(1 + i % 2)],
            "rejected": [f"m{(i + 31 + j) % 60}" for j in range(2 - i % 2)],
            "labels": [float(i % 2), None if i % 5 == 0 else i % 7 / 7],
        }
        for i in range(count)
    ]


def prefers_high(histories, sessions):
    return [sum(int(item[1:]) for item in session) / len(session) for session in sessions]


def make_trainer(kind: str, layout: str, start: Path, out: Path, **settings):
    """The trainer, its global batch the same in every layout."""
    ranks, accumulate = LAYOUTS[layout].ranks, LAYOUTS[layout].accumulate
    sizes = {name: size for name, size in LAYOUTS[layout].sizes.items() if name != "ep_size" or kind != "reward"}
    loading = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": BATCH // ranks // accumulate,
        "gradient_accumulation_steps": accumulate,
        "per_device_eval_batch_size": BATCH // ranks,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 1,
        **settings,
    }
    columns = {
        "ntp": ["history", "session"],
        "items": ["history", "session"],
        "adapter": ["history", "session"],
        "reward": ["history", "session", "labels"],
        "seq2seq_dpo": ["history", "chosen", "rejected"],
        "onerec_dpo": ["history", "session"],
        "onerec_grpo": ["history", "session"],
    }
    data = Dataset.from_list(rows()).select_columns(columns[kind])
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(start / "reward", **loading)
        return RewardTrainer(model, RewardTrainingArguments(**settings), data, data.select(range(13)))
    generator = start / ("items" if kind == "items" else "generator")
    model = AutoModelForSeq2SeqLM.from_pretrained(generator, **loading)
    processor = AutoProcessor.from_pretrained(generator)
    if kind == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if kind in ("ntp", "items", "adapter"):
        arguments = OneRecTrainingArguments(eval_top_k=[5], eval_num_beams=8, **settings)
        return OneRecTrainer(model, arguments, data, data.select(range(13)), processor)
    settings |= {"bf16": False, "activation_checkpointing": False, "beta": 0.5}
    if kind == "onerec_grpo":
        batches = ranks * accumulate
        settings |= {
            "num_generations": 4,
            "num_iterations": 2,
            "ntp_batch_size": BATCH // batches,
            "rollout_length": 2,
        }
        return OneRecGRPOTrainer(model, prefers_high, OneRecGRPOConfig(**settings), data, processing_class=processor)
    if kind == "seq2seq_dpo":
        return Seq2SeqDPOTrainer(
            model,
            args=Seq2SeqDPOConfig(**settings),
            train_dataset=data,
            processing_class=processor,
        )
    arguments = OneRecDPOConfig(dpo_ratio=0.3, num_candidates=6, candidate_length=2, **settings)
    return OneRecDPOTrainer(model, prefers_high, args=arguments, train_dataset=data, processing_class=processor)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def main(layout: str, start: str, out: str) -> None:
    for kind in LAYOUTS[layout].kinds:
        folder = Path(out, kind)
        trainer = make_trainer(kind, layout, Path(start), folder)
        before = {name: _local(parameter).detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        found = {name: [entry[name] for entry in logs] for name in ("loss", "grad_norm")}
        found["held"] = sum(_local(parameter).numel() for parameter in trainer.model.parameters())
        after = {name: _local(parameter).detach() for name, parameter in trainer.model.named_parameters()}
        found["moved"] = distance(before, after)
        found["experts"] = [
            len(_local(parameter)) for name, parameter in trainer.model.named_parameters() if "gate_up_proj" in name
        ]
        if trainer.eval_dataset is not None:
            found["eval"] = trainer.evaluate()
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            (folder / "curve.json").write_text(json.dumps(found))
    del trainer
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
