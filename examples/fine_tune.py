"""
A catalogue grows and its audience changes: a trained OneRec model is adapted by LoRA, with transformers' Trainer and PEFT.

    python examples/fine_tune.py

A model is trained on 240 films. Then 60 new films are added: `extend_catalogue` assigns them semantic IDs from the existing codes, so the model
can recommend them at once. An adapter on attention and experts is trained on a few sessions of new users. The
numbers are recall@10 on users held out from both. The films are made up: points on a circle, and users walk around it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, Trainer, TrainingArguments, set_seed

from onerec_hf import GenerativeRecommendationPipeline, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.data import OneRecDataCollator
from onerec_hf.semantic_ids import extend_catalogue, fit_semantic_ids
from onerec_hf.trainers import RouterBalanceCallback

OLD, NEW = 240, 60
CODEBOOKS = [12, 12, 12]
FILMS = [f"film{i}" for i in range(OLD + NEW)]
ANGLES = np.random.default_rng(0).uniform(0, 2 * np.pi, OLD + NEW)
EMBEDDINGS = np.stack([wave(k * ANGLES) for k in (1, 2, 4) for wave in (np.cos, np.sin)], axis=1)


def users(count: int, films: int, step: float, seed: int) -> Dataset:
    """Histories of five films and the next one; each film is about `step` from the one before it."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(0, 2 * np.pi, count)
    seen: list[np.ndarray] = []
    for _ in range(6):
        gaps = np.abs(np.angle(np.exp(1j * (ANGLES[None, :films] - place[:, None]))))
        for earlier in seen:  # no film twice
            gaps[np.arange(count), earlier] = np.inf
        seen.append(gaps.argmin(axis=1))
        place = ANGLES[seen[-1]] + step + rng.normal(0, 0.03, count)
    walks = [[FILMS[film] for film in walk] for walk in np.stack(seen, axis=1)]
    return Dataset.from_dict({"history": [walk[:5] for walk in walks], "session": [walk[5:] for walk in walks]})


def recall_at_10(model, processor, held_out: Dataset) -> dict[str, float]:
    """The share of users whose next film is among the ten recommended ones: of all users, and of those whose next film is a new one."""
    recommender = GenerativeRecommendationPipeline(model=model, processor=processor, top_k=10, num_beams=20)
    hits, is_new = [], []
    for (wanted,), answer in zip(held_out["session"], recommender(held_out, batch_size=128), strict=True):
        hits.append(wanted in [each["item"] for each in answer])
        is_new.append(FILMS.index(wanted) >= OLD)
    return {"all": float(np.mean(hits)), "new": float(np.mean(np.array(hits)[is_new])) if any(is_new) else 0.0}


def train(
    model, processor, rows: Dataset, output_dir: str, max_steps: int, learning_rate: float, callbacks=None
) -> float:
    """Trains with transformers' Trainer and returns the seconds."""
    arguments = TrainingArguments(
        output_dir,
        max_steps=max_steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=64,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator turns `history` and `session` into what the model takes
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    started = time.perf_counter()
    collator = OneRecDataCollator(processor)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks).train()
    return time.perf_counter() - started


def show(name: str, recall: dict[str, float], old: dict[str, float]) -> None:
    print(f"{name:34} new users {recall['all']:.3f}, their new films {recall['new']:.3f}, old users {old['all']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/fine-tune")
    parser.add_argument("--max_steps", type=int, default=200, help="of the base model, and of the adapter")
    args = parser.parse_args()
    set_seed(0)
    torch.set_num_threads(1)  # the model is tiny: on a busy machine a second thread costs far more than it gains
    base_folder, adapter_folder = f"{args.output_dir}/base", f"{args.output_dir}/adapter"

    # What one has: a model of the old films, saved.
    fitted = fit_semantic_ids(FILMS[:OLD], EMBEDDINGS[:OLD], CODEBOOKS)
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=20)
    config = OneRecConfig(
        codebook_sizes=CODEBOOKS,
        session_length=1,
        hidden_size=48,
        intermediate_size=96,
        moe_intermediate_size=48,
        encoder_layers=1,
        decoder_layers=2,
        num_experts=4,
        dropout_rate=0.0,
    )
    model = OneRecForConditionalGeneration(config)
    model.set_catalogue(fitted.catalogue)
    rows = users(4000, OLD, step=0.3, seed=1)
    seconds = train(model, processor, rows, args.output_dir, args.max_steps, 5e-3, [RouterBalanceCallback()])
    model.save_pretrained(base_folder)
    processor.save_pretrained(base_folder)
    print(f"base: {model.num_parameters():,} parameters, {len(rows):,} users, {seconds:.0f} s")

    # The catalogue grows. No training: the new films get codes beside the old ones that they resemble.
    grown = extend_catalogue(fitted.catalogue, fitted.quantizer, FILMS[OLD:], EMBEDDINGS[OLD:])
    base: Any = AutoModelForSeq2SeqLM.from_pretrained(base_folder)
    base.set_catalogue(grown)
    processor.set_catalogue(grown)
    new_users, old_users = users(1000, OLD + NEW, step=0.5, seed=2), users(1000, OLD, step=0.3, seed=3)
    show("grown catalogue, no training:", *(recall_at_10(base, processor, each) for each in (new_users, old_users)))

    # New users watch new films, and walk faster. The adapter learns from a few of them, and from as many old ones: without those it
    # forgets how they walk. The base model's weights stay as they are.
    few = concatenate_datasets([users(500, OLD + NEW, step=0.5, seed=4), users(500, OLD, step=0.3, seed=5)])
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],  # packed weights of all experts
    )
    adapted: Any = get_peft_model(base, lora)
    seconds = train(adapted, processor, few, args.output_dir, args.max_steps, 5e-3)
    adapted.eval()
    trainable, total = adapted.get_nb_trainable_parameters()
    print(f"adapter: {trainable:,} of {total:,} parameters, {len(few):,} users, {seconds:.0f} s")
    show("with the adapter:", *(recall_at_10(adapted, processor, each) for each in (new_users, old_users)))

    # Saved beside its processor, an adapter brings the grown catalogue. It loads on top of the base model, or is merged into it.
    adapted.save_pretrained(adapter_folder)
    processor.save_pretrained(adapter_folder)
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(adapter_folder).eval()
    loaded_processor = AutoProcessor.from_pretrained(adapter_folder)
    merged: Any = adapted.merge_and_unload()
    for name, one in (("loaded on top of the base:", loaded), ("merged:", merged)):
        show(name, *(recall_at_10(one, loaded_processor, each) for each in (new_users, old_users)))
    merged.save_pretrained(f"{args.output_dir}/merged")
    processor.save_pretrained(f"{args.output_dir}/merged")


if __name__ == "__main__":
    main()
