"""`train --lifelong`: windows that hold what is older than max_history, vectors of all items, and what does not go with it."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf import OneRecProcessor
from onerec_hf.data import ExampleSettings, OneRecDataCollator, prepare_log
from onerec_hf.workflows import chosen_settings, load_in_memory, train
from onerec_hf.workflows.settings import ModelSettings, sizes_of_lifelong

USERS, LENGTH = 12, 30
# Held-out histories are longer than what the pathway reads.
pytestmark = pytest.mark.filterwarnings("ignore:left out the oldest:UserWarning")


def table():
    rng = np.random.default_rng(0)
    rows = [(user, int(rng.integers(12)), time) for user in range(USERS) for time in range(LENGTH)]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


SMALL = {
    "interactions": table(),
    "min_item_interactions": 1,
    "session_length": 1,
    "max_history": 4,
    "lifelong": ["longest=20", "items=5", "queries=4", "layers=1"],
    "codebook_sizes": [4, 4, 4],
    "hidden_size": 16,
    "item_head_evidence": False,
    "baselines": False,
    "use_cpu": True,
    "report_to": "none",
    "max_steps": 2,
    "disable_tqdm": True,
}


def test_windows_hold_what_is_older():
    data = load_in_memory(interactions=table(), min_item_interactions=1, session_length=1, max_history=4)
    older = data.with_older(10)
    assert max(map(len, data.train["history"])) == 4
    assert sorted(map(len, older.train["history"]))[-USERS:] == [14] * USERS
    for before, after in zip(data.train, older.train, strict=True):
        assert after["history"][-4:] == before["history"]
    assert older.max_history == 4
    with pytest.raises(ValueError, match="train on windows"):
        data.on_prefixes().with_older(10)


def test_windows_that_no_memory_holds_are_refused(monkeypatch):
    data = load_in_memory(interactions=table(), min_item_interactions=1, session_length=1, max_history=4)
    older = data.with_older(10)
    monkeypatch.setattr("onerec_hf.workflows.dataset.os.sysconf", lambda name: 1)
    held = sum(map(len, older.train["history"]))
    with pytest.raises(
        ValueError, match=f"histories of all windows hold {held:,} items.*lower longest, raise --stride"
    ):
        data.with_older(10)


def test_a_trained_model_reads_them(tmp_path):
    result = train(output_dir=str(tmp_path / "model"), **SMALL)
    processor = OneRecProcessor.from_pretrained(tmp_path / "model")
    assert (processor.max_history, processor.lifelong.longest, processor.lifelong.items) == (4, 20, 5)
    assert np.abs(processor.lifelong.vectors.astype(float)).sum(1).min() > 0
    config = result.trainer.model.config.lifelong
    assert (config.items, config.queries, config.layers) == (5, 4, 1)
    batch = result.trainer.get_train_dataloader().collate_fn(result.trainer.train_dataset.to_list())
    # Sizes of clusters add up to the interactions between the latest 24 and the latest 4 ones.
    sizes = batch["lifelong_ids"][..., 0].sum(1)
    lengths = np.array([len(history) for history in result.trainer.train_dataset["history"]])
    assert sizes.tolist() == (np.minimum(lengths, 24) - np.minimum(lengths, 4)).tolist()
    assert sizes.max() == 20
    # Held-out users are read whole too.
    held_out = load_in_memory(
        **{name: SMALL[name] for name in ("interactions", "min_item_interactions", "session_length", "max_history")}
    )
    test = OneRecDataCollator(processor)(held_out.test.to_list())
    assert test["lifelong_ids"][..., 0].sum(1).tolist() == [20] * USERS


def test_training_goes_on_from_it(tmp_path):
    train(output_dir=str(tmp_path / "first"), **SMALL)
    more = {name: SMALL[name] for name in ("baselines", "use_cpu", "report_to", "disable_tqdm")}
    rows = table()
    newer = rows.assign(timestamp=rows["timestamp"] + LENGTH)
    both = pd.concat([rows, newer], ignore_index=True)
    result = train(
        interactions=both, model=str(tmp_path / "first"), max_steps=1, output_dir=str(tmp_path / "second"), **more
    )
    assert max(map(len, result.trainer.train_dataset["history"])) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "prefixes", "encoder_is_causal": True}, "train on windows"),
        ({"packing": True}, "leave out --packing"),
        ({"lifelong": ["longest"]}, "write longest=100000"),
        ({"lifelong": ["longer=5"]}, "choose among longest, items, queries, layers"),
        ({"lifelong": ["items=0"]}, "at least 1"),
        ({"lifelong": []}, "at least 1"),
        ({"lifelong": ["queries=3"], "encoder_pools_items": False}, "queries=3 must be a multiple of the 4 tokens"),
    ],
)
def test_what_does_not_go_with_it(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(output_dir=str(tmp_path / "model"), **{**SMALL, **options})
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.slow
def test_a_refit_compresses_by_the_same_embeddings(tmp_path):
    items = pd.DataFrame(
        {"item_id": range(12), "title": [f"{'red' if item % 2 else 'blue'} {item}" for item in range(12)]}
    )
    lifelong = ["longest=30", *SMALL["lifelong"][1:]]
    options = {**SMALL, "lifelong": lifelong, "items": items, "embedding": "text", "embedding_dim": 7}
    vectors = []
    for refit in (False, True):
        train(output_dir=str(tmp_path / str(refit)), refit=refit, **options)
        vectors.append(OneRecProcessor.from_pretrained(tmp_path / str(refit)).lifelong.vectors)
    assert np.array_equal(*vectors)


def test_it_is_off_by_default():
    assert ModelSettings().config([4, 4, 4], 1).lifelong is None
    assert sizes_of_lifelong(None) is None
    options = {name: SMALL[name] for name in ("interactions", "min_item_interactions")}
    chosen = {row.option: row.value for row in chosen_settings(**options)}
    assert chosen["train_on"] == "prefixes"
    assert chosen["packing"]
    chosen = {row.option: row.value for row in chosen_settings(lifelong=["longest=9"], **options)}
    assert chosen["train_on"] == "windows"
    assert not chosen["packing"]


def test_a_prepared_folder_has_the_older_interactions_in_its_examples(tmp_path):
    table().to_csv(tmp_path / "log.csv", index=False)
    settings = ExampleSettings(min_item_interactions=1, session_length=1, max_history=24)
    prepare_log(tmp_path / "log.csv", tmp_path / "prepared", settings=settings, num_shards=2)
    given = {
        name: value
        for name, value in SMALL.items()
        if name not in ("interactions", "min_item_interactions", "session_length", "max_history")
    }
    result = train(prepared=str(tmp_path / "prepared"), output_dir=str(tmp_path / "model"), **given)
    processor = OneRecProcessor.from_pretrained(tmp_path / "model")
    assert processor.max_history == 4
    examples = list(result.trainer.train_dataset)
    longest = [example for example in examples if len(example["history"]) == 24]
    assert OneRecDataCollator(processor)(longest)["lifelong_ids"][..., 0].sum(1).tolist() == [20] * len(longest)
    with pytest.raises(ValueError, match="prepare with a larger --max_history"):
        train(
            prepared=str(tmp_path / "prepared"),
            output_dir=str(tmp_path / "other"),
            **{**given, "lifelong": ["longest=24"]},
        )
