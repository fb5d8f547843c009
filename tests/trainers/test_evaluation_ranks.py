"""Evaluation shared by several ranks: every user once, the numbers of one process."""

import numpy as np
import pytest
import torch

from onerec_hf.trainers import RewardTrainer
from tests.ranks import on_ranks
from tests.rounding import close
from tests.trainers import test_onerec_trainer as generator_runs
from tests.trainers import test_reward_trainer as reward_runs

# Fewer users than ranks, one more than whole batches of 4, and a last batch that some ranks have no part in.
COUNTS = (2, 9, 20)


def _judged(trainer, dataset):
    """Metrics, predictions and labels."""
    done = trainer.predict(dataset)
    ignored = ("runtime", "per_second", "time")
    metrics = {name: value for name, value in done.metrics.items() if not name.endswith(ignored)}
    return metrics, np.asarray(done.predictions), np.maximum(np.asarray(done.label_ids), -1)


def rank_users(folder, **settings):
    found = []
    for count in COUNTS:
        trainer = generator_runs.make_trainer(folder, per_device_eval_batch_size=4, **settings)
        torch.manual_seed(
            trainer.args.process_index
        )  # as after a training, where the ranks' own random numbers differ
        found.append(_judged(trainer, generator_runs.examples(count, seed=count)))
    return found


def judge_sessions(folder):
    found = []
    for count in COUNTS:
        args = reward_runs.arguments(folder, per_device_eval_batch_size=4, use_cpu=True)
        trainer = RewardTrainer(reward_runs.make_model(), args)
        found.append(_judged(trainer, reward_runs.synthetic(count, seed=count)))
    return found


def read_in_training(folder):
    """The rows that this rank reads in the second epoch, ordered by length."""
    trainer = generator_runs.make_trainer(folder, train_sampling_strategy="group_by_length")
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)
    torch.manual_seed(trainer.args.process_index)
    return [row[row > 0].tolist() for batch in loader for row in batch["input_ids"]]


def all_runs(folder):
    with pytest.raises(ValueError, match="some users would count twice"):
        generator_runs.make_trainer(folder).evaluate(generator_runs.examples(5).to_iterable_dataset())
    return {
        "plain": rank_users(folder),
        "by length": rank_users(folder, train_sampling_strategy="group_by_length"),
        "reward": judge_sessions(folder),
    }, read_in_training(folder)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_user_is_judged_once(tmp_path, size):
    alone = {"ranked": rank_users(tmp_path), "reward": judge_sessions(tmp_path)}
    found = on_ranks(size, all_runs, str(tmp_path), timeout=300)
    read = [row for _, rows in found for row in rows]
    wanted = read_in_training(tmp_path)
    assert set(map(tuple, read)) == set(map(tuple, wanted))  # the last batches of three ranks are filled up
    if size == 2:
        assert sorted(read) == sorted(wanted)
    for shared, _ in found:
        wrong = []
        for kind, runs in shared.items():
            for count, one, several in zip(COUNTS, alone.get(kind, alone["ranked"]), runs, strict=True):
                rows = [np.concatenate(run[1:], axis=1) for run in (one, several)]
                if kind != "plain" and rows[0].shape == rows[1].shape:  # every row once; their order is the sampler's
                    rows = [table[np.lexsort(table.T[::-1])] for table in rows]
                if rows[0].shape != rows[1].shape or rows[1] != close(rows[0]):
                    wrong.append((kind, count, "rows"))
                wrong += [
                    (kind, count, name, value, several[0].get(name))
                    for name, value in one[0].items()
                    if several[0].get(name) != close(value)
                ]
        assert not wrong
