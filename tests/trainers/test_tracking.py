"""What a tracker is told (`report_to`), under the names of the field."""

import pytest
from tensorboard.backend.event_processing import event_accumulator

from tests.trainers import test_onerec_dpo, test_onerec_trainer


def tags(folder):
    """Scalar name -> values, of all event files below a folder."""
    found: dict[str, list[float]] = {}
    for path in sorted({event.parent for event in folder.rglob("events.out.tfevents*")}):
        accumulator = event_accumulator.EventAccumulator(str(path))
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in accumulator.Scalars(tag))
    return found


def test_training_and_ranking(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = test_onerec_trainer.make_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    metrics = trainer.evaluate()
    found = tags(tmp_path / "events")
    assert len(found["train/loss"]) == 6
    assert len(found["train/router/max_violation"]) == 6
    assert found["eval/recall@10"] == [pytest.approx(metrics["eval_recall@10"])]
    assert {"eval/ndcg@5", "eval/coverage@10", "eval/invalid_id_rate"} <= found.keys()


def test_alignment(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = test_onerec_dpo.make_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    found = tags(tmp_path / "events")
    assert {"train/loss/ntp", "train/loss/dpo", "train/rewards/accuracies", "train/rewards/margins"} <= found.keys()
    assert len(found["train/pairs/count"]) == 2
    assert all(
        c > r for c, r in zip(found["train/pairs/chosen_reward"], found["train/pairs/rejected_reward"], strict=True)
    )
