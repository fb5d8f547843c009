"""What the tests of policy optimisation share: a catalogue, a trainer, its rollouts, and log-probabilities by hand."""

import numpy as np
import torch
from datasets import Dataset

from onerec_hf import (
    OneRecProcessor,
    OneRecV2Config,
    OneRecV2ForConditionalGeneration,
)
from onerec_hf.trainers import OneRecGRPOConfig, OneRecGRPOTrainer
from tests.conftest import make_catalogue, make_model

CATALOGUE = make_catalogue(20, (4, 4, 4), seed=1)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=3)
CODES = {item: tuple(codes) for item, codes in zip(CATALOGUE.item_ids, CATALOGUE.codes.tolist(), strict=True)}
LIKED = {f"m{i}" for i in range(5)}


def likes(histories, sessions):
    """How many items of a session are among the first five."""
    assert len(histories) == len(sessions)
    return [float(sum(item in LIKED for item in session)) for session in sessions]


def examples(count=24, **columns):
    rng = np.random.default_rng(0)
    names = np.array(CATALOGUE.item_ids)
    rows = []
    for row in range(count):
        history, session = rng.choice(names, 2 + row % 4, replace=False).tolist(), rng.choice(names, 2, replace=False)
        rows.append({"history": history, "session": session.tolist(), **{n: v[row] for n, v in columns.items()}})
    return Dataset.from_list(rows)


def make_trainer(folder, rewards=likes, dataset=None, model=None, peft_config=None, processor=PROCESSOR, **settings):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_generations": 8,
        "learning_rate": 3e-3,
        "ntp_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    eval_dataset = settings.pop("eval_dataset", None)
    return OneRecGRPOTrainer(
        make_model(CATALOGUE, seed=1) if model is None else model,
        rewards,
        args=OneRecGRPOConfig(str(folder), **{**defaults, **settings}),
        train_dataset=examples() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rollouts_of(trainer, rows=None):
    """The batch of one step, as TRL hands it to the loss."""
    rows = list(examples(2)) if rows is None else rows
    count = trainer.num_generations
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as training sets it
    return trainer._generate_and_score_completions([row for row in rows for _ in range(count)])


def by_hand(model, history, session, temperature=1.0, constrained=True, exclude_seen=True, inputs=None):
    """(codes,) log-probabilities of a session's codes: a plain forward of one row, and the legal next codes looked up item by item."""
    inputs = PROCESSOR([history], [session]) if inputs is None else inputs
    logits = model(**inputs).logits[0] / temperature
    offsets, found = model.config.level_offsets, []
    left = {item for item in CODES if not (exclude_seen and item in history)}
    for place, item in enumerate(session):
        for level in range(3):
            scores = logits[place * 4 + level]
            token = CODES[item][level] + offsets[level]
            if constrained:
                below = {CODES[each][level] for each in left if CODES[each][:level] == CODES[item][:level]}
                tokens = sorted(code + offsets[level] for code in below)
                scores, token = scores[tokens], tokens.index(token)
            found.append(scores.log_softmax(-1)[token])
        left.discard(item)
    return torch.stack(found)


def make_lazy(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "decoder_layers": 2}
    model = OneRecV2ForConditionalGeneration(
        OneRecV2Config(codebook_sizes=CATALOGUE.codebook_sizes, session_length=2, **sizes, **config)
    )
    model.set_catalogue(CATALOGUE)
    return model
