"""
A OneRec model is a transformers model: it trains with the plain `Trainer` and takes PEFT adapters.

    python examples/plain_trainer.py

First all weights are trained. Then LoRA on the attention adapts a copy to another audience, and is merged.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, Trainer, TrainingArguments, set_seed

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.data import OneRecDataCollator
from onerec_hf.semantic_ids import fit_semantic_ids
from onerec_hf.trainers import RouterBalanceCallback

ITEMS = 48


def examples(step: int, count: int = 512) -> Dataset:
    """Histories of four items, each `step` positions after the one before it on a ring, and the two items that follow."""
    starts = np.random.default_rng(step).integers(0, ITEMS, count)
    walks = [[int(start + step * i) % ITEMS for i in range(6)] for start in starts]
    return Dataset.from_dict({"history": [walk[:4] for walk in walks], "session": [walk[4:] for walk in walks]})


def arguments(output_dir: str, max_steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir,
        max_steps=max_steps,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        logging_steps=max(1, max_steps // 3),
        save_strategy="no",
        remove_unused_columns=False,  # the collator turns `history` and `session` into what the model takes
        label_names=["labels"],
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/plain-trainer")
    parser.add_argument("--max_steps", type=int, default=120)
    args = parser.parse_args()
    set_seed(0)

    angles = 2 * np.pi * np.arange(ITEMS) / ITEMS
    fitted = fit_semantic_ids(np.arange(ITEMS), np.stack([np.cos(angles), np.sin(angles)], axis=1), [8, 8, 8])
    processor = OneRecProcessor.from_catalogue(fitted.catalogue)
    config = OneRecConfig(
        codebook_sizes=[8, 8, 8],
        session_length=2,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_experts=4,
    )
    model = OneRecForConditionalGeneration(config)
    model.set_catalogue(fitted.catalogue)
    collator = OneRecDataCollator(processor)

    # All weights. The callback balances the experts, which OneRecTrainer would do by itself.
    Trainer(
        model,
        arguments(args.output_dir, args.max_steps),
        train_dataset=examples(step=1),
        data_collator=collator,
        callbacks=[RouterBalanceCallback()],
    ).train()
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    history = processor([[0, 1, 2, 3]])
    print(f"after 0, 1, 2, 3: {processor.decode(model.eval().recommend(**history)[0])}")

    # LoRA on the attention, from the saved folder. No RouterBalanceCallback here: the router is frozen, and so is its bias.
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapted: Any = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(args.output_dir), lora)
    adapted.print_trainable_parameters()
    Trainer(
        adapted, arguments(args.output_dir, args.max_steps), train_dataset=examples(step=2), data_collator=collator
    ).train()
    merged = adapted.merge_and_unload()
    folder = f"{args.output_dir}/lora-merged"
    merged.save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded, processor = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    print(f"after 0, 2, 4, 6: {processor.decode(loaded.recommend(**processor([[0, 2, 4, 6]]))[0])}")


if __name__ == "__main__":
    main()
