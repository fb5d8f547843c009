"""Every trainer evaluates all held-out examples once: neither batch size, nor drop_last, nor the number of ranks changes a metric."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from onerec_hf import OneRecProcessor
from onerec_hf.trainers import OneRecDPOConfig, OneRecDPOTrainer, RewardTrainer, SequentialTrainer
from tests.conftest import make_catalogue, make_model
from tests.ranks import on_ranks
from tests.rounding import close
from tests.trainers import preference_runs as dpo
from tests.trainers import test_onerec_trainer as generator
from tests.trainers import test_reward_trainer as reward
from tests.trainers import test_sequential_trainer as sequential

COUNT = 11
CATALOGUE = make_catalogue(12, (3, 3, 3))


def ranked_users():
    """Users with unequal histories and sessions; the fourth, "whale", has every item."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(COUNT):
        items = rng.permutation(12)
        length = 12 if user == 3 else int(rng.integers(1, 6))
        targets = items[:1] if user == 3 else items[length : length + 1 + user % 2]
        rows.append((f"u{user}" if user != 3 else "whale", items[:length], targets))
    return rows


def named(rows):
    return Dataset.from_list(
        [
            {"user_id": user, "history": [f"m{i}" for i in history], "session": [f"m{i}" for i in targets]}
            for user, history, targets in rows
        ]
    )


def rank_generator(folder, **settings):
    args = generator.arguments(folder, eval_top_k=[3, 10], eval_num_beams=12, **settings)
    processor = OneRecProcessor.from_catalogue(CATALOGUE, max_history=5)
    return generator.OneRecTrainer(make_model(CATALOGUE), args, processing_class=processor), named(ranked_users())


def rank_sequence(folder, **settings):
    args = sequential.arguments(folder, eval_top_k=[3, 10], save_strategy="no", **settings)
    model = sequential.make([f"m{i}" for i in range(12)], initializer_range=0.5)
    return SequentialTrainer(model, args), named(ranked_users())


def predict_rewards(folder, **settings):
    model = reward.make_model()
    with torch.no_grad():  # a new model predicts base rates for all
        for parameter in model.towers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return RewardTrainer(model, reward.arguments(folder, use_cpu=True, **settings)), reward.synthetic(COUNT, seed=1)


def prefer(folder, loss="sigmoid", **settings):
    rows = dpo.item_pairs(COUNT)
    if loss == "s_dpo":
        rows = rows.map(lambda row: {"rejected": [row["rejected"], [f"m{len(row['history'])}"]]})
    args = dpo.arguments(folder, loss_type=[loss], **settings)
    other = make_model(dpo.CATALOGUE, seed=1)
    trainer = dpo.Seq2SeqDPOTrainer(
        make_model(dpo.CATALOGUE), ref_model=other, args=args, train_dataset=rows, processing_class=dpo.PROCESSOR
    )
    return trainer, rows


def align(folder, **settings):
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    rows = dpo.item_pairs(COUNT).map(lambda row: {"session": row["chosen"]})
    other = make_model(dpo.CATALOGUE, seed=1)
    trainer = OneRecDPOTrainer(
        make_model(dpo.CATALOGUE),
        args=OneRecDPOConfig(str(folder), **quiet, **settings),
        train_dataset=rows,
        processing_class=dpo.PROCESSOR,
        ref_model=other,
    )
    return trainer, rows


TRAINERS = {
    "generator": rank_generator,
    "sequence model": rank_sequence,
    "reward": predict_rewards,
    "dpo": prefer,
    "s_dpo": lambda folder, **settings: prefer(folder, "s_dpo", **settings),
    "alignment": align,
}


def metrics_of(kind, folder, size, **settings):
    trainer, rows = TRAINERS[kind](folder, per_device_eval_batch_size=size, dataloader_drop_last=True, **settings)
    found = trainer.evaluate(rows)
    ignored = ("runtime", "per_second", "time", "epoch", "num_tokens")
    return {name: value for name, value in found.items() if not name.endswith(ignored)}


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_batch_size_changes_no_metric(tmp_path, kind):
    whole = metrics_of(kind, tmp_path, COUNT)
    assert len(whole) >= 3
    for size in (1, 4, 7, 50):
        assert metrics_of(kind, tmp_path, size) == close(whole), f"batches of {size}"


def every_kind(folder):
    return {kind: metrics_of(kind, folder, 4) for kind in TRAINERS}


@pytest.mark.slow
def test_the_number_of_ranks_changes_no_metric(tmp_path):
    """Two ranks with batches of 4: the last of 11 examples fill three quarters of one rank's batch, and none of the other's."""
    wanted = {kind: metrics_of(kind, tmp_path, COUNT) for kind in TRAINERS}
    for found in on_ranks(2, every_kind, str(tmp_path), timeout=300):
        for kind, metrics in found.items():
            assert metrics == close(wanted[kind]), kind


@pytest.mark.parametrize("kind", ["generator", "sequence model"])
def test_a_user_with_every_item_is_named_and_left_out(tmp_path, kind, monkeypatch):
    said = []
    monkeypatch.setattr("onerec_hf.trainers.ranking_evaluation.logger.warning", said.append)
    trainer, rows = TRAINERS[kind](tmp_path)
    found, others = trainer.evaluate(rows), rows.filter(lambda row: row["user_id"] != "whale")
    trainer.evaluate(rows)  # said once
    (text,) = said
    assert "1 of 11 users cannot be ranked" in text
    assert "'whale'" in text
    assert "--eval_exclude_seen false" in text
    assert found["eval_unranked_users"] == 1
    assert (trainer.predict(rows).predictions[3] == -1).all()
    alone = trainer.evaluate(others)
    assert len(said) == 1
    assert "eval_unranked_users" not in alone
    metrics = [name for name in alone if "@" in name]
    assert len(metrics) == 8
    assert [found[name] for name in metrics] == close([alone[name] for name in metrics])
    with pytest.raises(ValueError, match="none of 1 held-out users can be ranked"):
        trainer.evaluate(rows.select([3]))
    trainer, _ = TRAINERS[kind](tmp_path, eval_exclude_seen=False)
    assert "eval_unranked_users" not in trainer.evaluate(rows)


def test_places_that_cannot_be_filled_are_no_invalid_ids(tmp_path):
    trainer, rows = rank_generator(tmp_path)
    found = trainer.predict(rows)
    left = [12 - len(row) for row in rows["history"]]
    assert [(ranked != -1).sum() for ranked in found.predictions] == [min(count, 10) for count in left]
    assert found.metrics["test_invalid_id_rate"] == 0
    taken = {tuple(codes) for codes in CATALOGUE.codes.tolist()}
    free = next(codes for codes in np.ndindex(3, 3, 3) if codes not in taken)
    offsets = trainer.processing_class.tokenizer.level_offsets
    tokens = [trainer.model.config.bos_token_id, *(code + offset for code, offset in zip(free, offsets, strict=True))]
    trainer.model.recommend = lambda ids, *args, num_return_sequences, **kwargs: ids.new_tensor([tokens]).repeat(
        len(ids) * num_return_sequences, 1
    )
    found = trainer.predict(rows)
    assert found.metrics["test_invalid_id_rate"] == 1
    assert found.metrics["test_unranked_users"] == 1  # the others have candidates, and the model found none
