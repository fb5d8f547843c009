"""Samples of another policy: their old probability is the current one, alone and beside drawn ones."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from onerec_hf.trainers import NonFiniteError
from tests.conftest import make_model
from tests.rounding import close
from tests.trainers.grpo import CATALOGUE, PROCESSOR, by_hand, examples, make_lazy, make_trainer, rollouts_of


def test_logged_samples_need_no_reward_and_have_the_current_probability_as_old(tmp_path):
    dataset = examples(24, advantage=[1.0, -1.0, 0.0] * 8)
    rows = [row for row in dataset if not set(row["history"]) & set(row["session"])]
    settings = {"dataset": Dataset.from_list(rows), "loss_type": "gbpo", "ntp_weight": 0.0, "max_steps": 6}
    trainer = make_trainer(tmp_path, None, per_device_train_batch_size=4, num_generations=2, **settings)
    model = make_model(CATALOGUE, seed=1)
    batch = rollouts_of(trainer, rows[:4])
    assert batch["advantages"].flatten().tolist() == [row["advantage"] for row in rows[:4]]
    loss, wanted = trainer._compute_loss(trainer.model, batch), 0.0
    for row in rows[:4]:
        pi = by_hand(model, row["history"], row["session"]).exp().detach()
        ratio = {1: torch.ones_like(pi), 0: torch.zeros_like(pi), -1: pi / torch.maximum(pi, 1 - pi)}[row["advantage"]]
        wanted = wanted - float(ratio.mean()) * row["advantage"] / 4
    assert loss.item() == close(wanted, scale=1.0)
    trainer.train()
    changes = {1.0: [], -1.0: []}
    for row in rows:
        if row["advantage"]:
            before, after = (
                by_hand(each, row["history"], row["session"]).sum().item() for each in (model, trainer.model)
            )
            changes[row["advantage"]].append(after - before)
    assert np.mean(changes[1.0]) > 0.3 > np.mean(changes[-1.0])


def test_logged_and_drawn_samples_share_a_batch(tmp_path):
    rows = list(examples(2, advantage=[None, 0.7]))
    rows[1]["session"] = ["m19", "m18"]
    trainer = make_trainer(tmp_path, dataset=examples(24, advantage=[None, 0.7] * 12), num_iterations=2)
    batch = rollouts_of(trainer, rows)
    assert batch["off_policy"].tolist() == [[False] * 8, [True] * 8]
    assert batch["advantages"][1].tolist() == close([0.7] * 8)
    assert trainer._metrics["train"]["rollouts/left_out"] == [0.0]
    assert PROCESSOR.batch_decode(batch["completion_ids"][1]) == [["m19", "m18"]] * 8
    assert math.isfinite(trainer._compute_loss(trainer.model, batch).item())


def test_logged_samples_that_the_policy_cannot_draw_are_counted(tmp_path):
    rows = [{"history": ["m1"], "session": ["m1", "m2"], "advantage": 1.0}]
    rows += [{"history": ["m1"], "session": ["m3", "m3"], "advantage": 1.0}]
    rows += [{"history": ["m1"], "session": ["m2", "m3"], "advantage": 1.0}]
    trainer = make_trainer(
        tmp_path, None, dataset=Dataset.from_list(rows), per_device_train_batch_size=3, num_generations=3
    )
    batch = rollouts_of(trainer, rows)
    assert batch["tool_mask"].sum(-1).flatten().tolist() == [0, 0, 6]
    assert trainer._metrics["train"]["rollouts/left_out"] == close([2 / 3])


@pytest.mark.parametrize("constrained", [True, False])
def test_logged_samples_of_unequal_length_have_a_finite_loss_on_a_lazy_decoder(tmp_path, constrained):
    rows = [{"history": ["m1"], "session": ["m2", "m3"][: 1 + place % 2], "advantage": 1.0} for place in range(4)]
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "ntp_weight": 0.0, "loss_type": "gbpo"}
    settings |= {} if constrained else {"constrained": False, "rollouts": "sample"}
    trainer = make_trainer(tmp_path, None, Dataset.from_list(rows * 4), make_lazy(), **settings)
    loss = trainer._compute_loss(trainer.model, rollouts_of(trainer, rows[:2]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(bool(each.grad.isfinite().all()) for each in trainer.model.parameters() if each.grad is not None)


def test_a_nonfinite_loss_stops_with_its_sessions(tmp_path):
    model = make_model(CATALOGUE, seed=1)
    trainer = make_trainer(tmp_path, model=model, ntp_weight=0.0)
    model.model.decoder.norm.register_forward_hook(
        lambda module, args, out: out * math.nan if out.requires_grad else out
    )
    with pytest.raises(NonFiniteError, match="the examples are in") as raised:
        trainer.train()
    written = [json.loads(line) for line in Path(raised.value.path).read_text().splitlines()]
    histories = examples()["history"][:]
    assert len(written) == 16
    for row in written:
        assert row["history"] in histories
        assert len(set(row["session"]) - set(row["history"])) == 2
