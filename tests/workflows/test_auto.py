"""Settings from the data: what is counted, which option follows from it, and that what the caller gives stays."""

import json

import numpy as np
import pandas as pd
import pytest

from onerec_hf import OneRecForConditionalGeneration
from onerec_hf.data import ExampleSettings, prepare_log
from onerec_hf.workflows import DataSettings, ModelSettings, chosen_settings, load_dataset, load_in_memory, train
from onerec_hf.workflows.auto import Statistics, choose, codebook_size

QUICK = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
LARGE = Statistics(
    users=22_363, items=12_101, interactions=198_502, per_user=(4.0, 19.0), per_item=(8.0, 50.0), memory=2**34
)


def chosen(found=LARGE, saved=None, **given):
    return {row.option: row.value for row in choose(found, given, saved)}


def sequences(*users):
    """A table of users' items, a second between them."""
    rows = [(user, item, step) for user, items in enumerate(users) for step, item in enumerate(items)]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


def walks(users, items, length=6, seed=0):
    """A table of random walks; every item is there."""
    rng = np.random.default_rng(seed)
    starts = np.arange(users) * length % items
    return sequences(*((start + np.arange(length) * rng.integers(1, 3)) % items for start in starts))


def test_statistics_count_training_interactions():
    table = sequences([1, 2, 1, 3, 2], [2, 2, 2, 1, 3], [3, 1])
    data = load_in_memory(interactions=table, min_item_interactions=1)
    found = Statistics.of(data, use_cpu=True)
    assert (found.users, found.items, found.interactions) == (3, 3, 12)
    # Training holds [1, 2, 1], [2, 2, 2] and [3, 1]: three of the five targets stand in their own history.
    assert found.repeats == pytest.approx(3 / 5)
    assert found.per_user == (3.0, pytest.approx(3.0))
    assert found.per_item[0] == 3.0
    assert (found.texts, found.embeddings, found.accelerator, found.tied_targets) == (0, False, False, 0.0)
    assert found.memory > 2**28


def test_users_with_one_interaction_shorten_no_history():
    """Nine of ten users have one; the others' histories decide how much is read."""
    longer = [list(range(start, start + 26)) for start in range(10)]
    data = load_in_memory(interactions=sequences(*longer, *[[1]] * 90), min_item_interactions=1)
    found = Statistics.of(data, use_cpu=True)
    assert (found.users, found.per_user) == (100, (24.0, 24.0))
    assert chosen(found)["max_history"] == 30


@pytest.mark.parametrize("max_history", [4, 5, 10, 30])
def test_items_read_are_those_of_the_prefixes(max_history):
    data = load_in_memory(interactions=walks(20, 60, length=24), min_item_interactions=1, max_history=max_history)
    read = sum(map(len, data.on_prefixes().train["history"]))
    assert Statistics.of(data, use_cpu=True).items_read(max_history) == read


def test_statistics_of_items(tables):
    items = tables["items"]
    assert Statistics.of(load_dataset(**tables), use_cpu=True).texts == len(items)
    given = load_dataset(**tables, embeddings=np.eye(len(items), dtype=np.float32))
    assert Statistics.of(given, use_cpu=True).embeddings
    same = items.assign(title="lamp", genre="indoor")
    assert Statistics.of(load_dataset(interactions=tables["interactions"], items=same), use_cpu=True).texts == 1


def tied(order):
    """Users with a first item and then five at once, in this order of ids, of whom every second has a later last one."""
    rows = [(user, 9, 0) for user in range(10)]
    rows += [(user, item, 1) for user in range(10) for item in order]
    rows += [(user, 8, 2) for user in range(0, 10, 2)]
    return load_in_memory(
        interactions=pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]), min_item_interactions=1
    )


@pytest.mark.parametrize(
    ("order", "ties"), [([1, 2, 3, 4, 5], "shuffle"), ([5, 4, 3, 2, 1], "shuffle"), ([3, 5, 1, 4, 2], "file")]
)
def test_ties_are_shuffled_where_the_table_sorted_them_by_item(order, ties):
    data = tied(order)
    found = Statistics.of(data, use_cpu=True)
    assert found.tied_targets == 0.5
    assert chosen(found)["ties"] == ties
    assert chosen(Statistics(**{**vars(found), "tied_targets": 0.009}))["ties"] == "file"


def test_shuffled_ties_keep_the_order_of_times():
    data = tied([1, 2, 3, 4, 5])
    shuffled = data.with_shuffled_ties()
    assert shuffled.settings.ties == "shuffle"
    assert "Rows of a user with equal times are in random order." in shuffled.protocol
    orders = set()
    for before, after in zip(data.sequences.lists(), shuffled.sequences.lists(), strict=True):
        assert (after[0], sorted(after[1:6]), list(after[6:])) == (9, [1, 2, 3, 4, 5], list(before[6:]))
        orders.add(tuple(after[1:6]))
    assert len(orders) > 5
    again = load_in_memory(interactions=data.source.interactions, min_item_interactions=1, ties="shuffle")
    assert again.test[:] == shuffled.test[:] != data.test[:]
    assert again.protocol == shuffled.protocol


def test_cut_gives_the_examples_of_another_reading(tables):
    wanted = load_in_memory(**tables, session_length=1, max_history=4)
    cut = load_in_memory(**tables).cut(session_length=1, max_history=4)
    assert cut.train[:] == wanted.train[:]
    assert cut.test[:] == wanted.test[:]
    assert (cut.protocol, cut.settings) == (wanted.protocol, wanted.settings)


def test_rules_follow_the_data():
    options = chosen()
    assert (options["max_history"], options["session_length"], options["train_on"]) == (20, 5, "prefixes")
    assert (options["codebook_sizes"], options["hidden_size"], options["intermediate_size"]) == ([256] * 3, 128, 256)
    assert (options["dropout_rate"], options["label_smoothing_factor"]) == (0.45, 0.2)
    assert (options["packing_length"], options["per_device_train_batch_size"]) == (64, 8)
    assert options["eval_exclude_seen"]
    dense = Statistics(**{**vars(LARGE), "items": 2_000, "repeats": 0.3, "per_user": (30.0, 300.0)})
    options = chosen(dense)
    assert (options["max_history"], options["codebook_sizes"], options["hidden_size"]) == (50, [32] * 3, 64)
    assert (options["dropout_rate"], options["label_smoothing_factor"]) == (0.2, 0.0)
    assert not options["eval_exclude_seen"]


def test_codebooks_grow_with_the_catalogue():
    assert [codebook_size(n) for n in (5, 16, 799, 1600, 9000, 12_801, 10**7)] == [5, 16, 16, 32, 128, 256, 256]


def test_reasons_hold_the_number():
    reasons = {row.option: row.reason for row in choose(LARGE)}
    assert reasons["max_history"] == "95 % of histories hold at most 19 training interactions"
    longer = {row.option: row.reason for row in choose(Statistics(**{**vars(LARGE), "per_user": (30.0, 300.0)}))}
    assert longer["max_history"].endswith("at most 300 training interactions, of which the latest 50 are read")
    assert reasons["codebook_sizes"] == "12,101 items, about 47 to a code"
    assert reasons["dropout_rate"] == "16 interactions per item"
    assert all(reasons.values())


def test_the_item_head_fits_into_memory():
    assert chosen()["item_head"]
    huge = Statistics(**{**vars(LARGE), "items": 900_000, "interactions": 9_000_000})
    assert chosen(huge)["item_head"]
    for without in ({"memory": 2**30}, {"items": 1_100_000}):
        options = chosen(Statistics(**{**vars(huge), **without}))
        assert not options["item_head"]
        assert not options.keys() & {"item_head_codes", "item_head_dropout", "item_score_weight"}


def test_what_is_given_stays_and_the_rest_fits_it():
    options = chosen(hidden_size=96, encoder_is_causal=False, packing=False, item_head=False, eval_top_k=[20, 40])
    assert (options["hidden_size"], options["intermediate_size"]) == (96, 192)
    assert options["train_on"] == "windows"
    assert "packing_length" not in options
    assert options["per_device_train_batch_size"] == 128
    assert "item_score_weight" not in options
    assert (options["metric_for_best_model"], options["eval_num_beams"]) == ("ndcg@40", 40)
    assert [row.reason for row in choose(LARGE, {"hidden_size": 96}) if row.option == "hidden_size"] == ["given"]


@pytest.mark.parametrize(
    ("given", "strategy"),
    [
        ({}, "epoch"),
        ({"save_strategy": "steps", "save_steps": 7}, "steps"),
        ({"save_strategy": "no"}, None),
        ({"eval_strategy": "no"}, None),
        ({"eval_strategy": "steps", "save_strategy": "epoch"}, None),
        ({"predict_with_generate": False}, None),
    ],
    ids=str,
)
def test_the_end_by_validation_leaves_the_callers_strategy(given, strategy):
    options = chosen(**given)
    assert options.get("decay_on_plateau") == (None if strategy is None else 2)
    assert options["lr_scheduler_type"] == ("cosine" if strategy is None else "constant_with_warmup")
    if strategy is not None:
        assert options["eval_strategy"] == options["save_strategy"] == strategy
        assert options.get("eval_steps") == given.get("save_steps")


@pytest.mark.parametrize(
    "given",
    [{"lr_scheduler_type": "linear"}, {"early_stopping_patience": 7}, {"decay_on_plateau": None}, {"model": "m"}],
    ids=str,
)
def test_a_schedule_of_the_caller_ends_by_early_stopping(given):
    options = chosen(saved={} if "model" in given else None, **given)
    assert options["early_stopping_patience"] == given.get("early_stopping_patience", 3)
    assert options.get("decay_on_plateau") is None
    assert options["lr_scheduler_type"] == given.get("lr_scheduler_type", "cosine")
    assert options["num_train_epochs"] == (3 if "model" in given else 10)


@pytest.mark.parametrize("given", [{"fsdp_size": 2}, {"fsdp": "full_shard"}, {"deepspeed": "zero.json"}, {}], ids=str)
def test_sharded_weights_are_not_averaged(given, monkeypatch):
    """By any option, or by `accelerate launch`."""
    assert chosen()["average_weights"] is True
    if not given:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "average_weights" not in chosen(**given)


def test_small_sets_get_more_epochs_and_evaluations_after_many_steps():
    small = Statistics(
        users=120, items=60, interactions=1440, per_item=(20, 30), per_user=(10, 10), lengths=np.full(120, 10)
    )
    options = {row.option: row.value for row in choose(small)}
    steps = small.items_read(options["max_history"]) // options["packing_length"]
    assert options["num_train_epochs"] == -(-3000 // steps) > 10
    assert (options["eval_strategy"], options["eval_steps"], options["save_steps"]) == ("steps", 100, 100)
    assert options["decay_on_plateau"] == 2


def test_a_saved_model_keeps_its_sizes():
    head = chosen(
        saved={"encoder_is_causal": True, "session_length": 3, "item_head": {"num_items": 9}}, model="runs/mine"
    )
    assert head["session_share"] == chosen()["session_share"] < 1
    options = chosen(saved={"encoder_is_causal": False, "max_history": 7, "session_length": 3}, model="runs/mine")
    assert (options["train_on"], options["max_history"], options["session_length"]) == ("windows", 7, 3)
    assert not options.keys() & {"hidden_size", "item_head", "codebook_sizes", "item_score_weight"}
    assert options["learning_rate"] < chosen()["learning_rate"]


@pytest.mark.parametrize(("users", "items"), [(10, 10), (60, 60), (30, 2)])
def test_semantic_ids_of_small_catalogues(users, items, tmp_path):
    """Three levels of the chosen codebook hold every item, on its own code."""
    data = load_dataset(interactions=walks(users, items), min_item_interactions=1)
    assert len(data.item_ids) == items
    result = train(data, output_dir=tmp_path / "out", **QUICK)
    catalogue = result.processor.catalogue
    assert catalogue.codebook_sizes == [codebook_size(items)] * 3
    assert len(np.unique(catalogue.codes, axis=0)) == items
    assert 0 <= result.metrics["onerec/recall@10"] <= 1


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory):
    return train(**tables, output_dir=tmp_path_factory.mktemp("auto") / "mine", **QUICK)


def test_train_without_options_is_the_chosen_model(trained, tables):
    config, rows = trained.model.config, chosen_settings(**tables, **QUICK)
    options = {row.option: row.value for row in rows}
    assert (config.hidden_size, config.encoder_layers, config.decoder_layers) == (64, 2, 1)
    assert (config.encoder_is_causal, config.encoder_attention, config.session_length) == (True, "pointwise", 5)
    assert config.item_head.num_items == 40
    assert trained.processor.max_history == options["max_history"] == 10
    assert trained.trainer.args.learning_rate == options["learning_rate"]
    assert trained.trainer.args.eval_exclude_seen == options["eval_exclude_seen"]
    saved = OneRecForConditionalGeneration.from_pretrained(trained.folder)
    assert saved.generation_config.item_score_weight == options["item_score_weight"]


def test_results_and_card_hold_the_choices(trained, tables):
    rows = chosen_settings(**tables, **QUICK)
    results = json.loads((trained.folder / "results.json").read_text())
    assert results["settings"] == json.loads(json.dumps([row._asdict() for row in rows]))
    card = (trained.folder / "README.md").read_text()
    assert "| codebook\\_sizes | 16 16 16 | 40 items, about 2 to a code |" in card


def test_choices_are_printed_before_the_training(tables, tmp_path, capsys):
    with pytest.raises(ValueError, match="--codebook_sizes must hold positive numbers"):
        train(**tables, output_dir=tmp_path / "out", codebook_sizes=[0], **QUICK)
    said = capsys.readouterr().err
    assert "--hidden_size" in said
    assert "--codebook_sizes               0" in said
    assert not (tmp_path / "out").exists()


def test_options_of_the_data_that_were_given_stay(tables):
    data = load_dataset(**tables, max_history=3)
    rows = {row.option: row for row in chosen_settings(data)}
    assert (rows["max_history"].value, rows["max_history"].reason) == (3, "given")
    assert rows["session_length"].value == 5


def test_settings_objects_are_given_as_a_whole(files):
    rows = {row.option: row for row in chosen_settings(DataSettings(**files), ModelSettings(hidden_size=32))}
    assert (rows["session_length"].value, rows["num_experts"].value, rows["hidden_size"].value) == (5, 24, 32)
    assert {rows[name].reason for name in ("session_length", "num_experts", "encoder_is_causal")} == {"given"}
    assert rows["train_on"].value == "windows"  # the encoder of ModelSettings is fully visible


def test_a_prepared_folder_keeps_its_examples(files, tmp_path):
    prepare_log(files["interactions"], tmp_path / "ready", settings=ExampleSettings(max_history=7), num_shards=2)
    rows = {row.option: row.value for row in chosen_settings(prepared=str(tmp_path / "ready"))}
    assert not rows.keys() & {"max_history", "session_length", "ties", "train_on"}
    assert (rows["packing"], rows["hidden_size"]) == (False, 64)
    result = train(prepared=str(tmp_path / "ready"), output_dir=tmp_path / "out", **QUICK)
    assert (result.processor.max_history, result.model.config.session_length) == (7, 5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (sequences(*[[7] * 6] * 3), "1 item is left, and a ranking needs at least two"),
        (sequences(*[[item] for item in range(5)] * 5), "none of 25 users has 3 items"),
        (sequences(*[[1, 2], [2, 1], [1, 1]] * 3), "none of 9 users has 3 items"),
        (sequences(*[[1, 2, 3], [3, 1, 2]] * 3), "none of 6 users has two items left for training"),
    ],
    ids=["one item", "one interaction", "no validation users", "nothing to train on"],
)
def test_tables_that_nothing_can_be_learned_from(table, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(interactions=table, output_dir=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_items_with_one_text_get_their_codes_from_behaviour(tables, tmp_path):
    same = tables["items"].assign(title="lamp", genre="indoor")
    result = train(interactions=tables["interactions"], items=same, output_dir=tmp_path / "out", **QUICK)
    settings = json.loads((result.folder / "results.json").read_text())["settings"]
    row = next(row for row in settings if row["option"] == "embedding")
    assert (row["value"], row["reason"]) == ("behaviour", "no texts that tell the items apart")


def test_users_with_one_interaction_are_no_obstacle(tables, tmp_path):
    more = pd.DataFrame({"user_id": ["x", "y"], "item_id": ["m1", "m2"], "timestamp": [1, 2]})
    table = pd.concat([tables["interactions"], more], ignore_index=True)
    result = train(interactions=table, output_dir=tmp_path / "out", **QUICK)
    assert (
        "2 users with fewer are used for training"
        in json.loads((result.folder / "results.json").read_text())["protocol"]
    )
