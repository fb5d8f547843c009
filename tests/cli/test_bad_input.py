"""Input that a person can mend: one message, exit status 2, and nothing half-written, whatever was wrong."""

import json
import shutil

import numpy as np
import pytest

from tests.cli.commands import (
    CODES,
    NUM_ITEMS,
    TINY,
    contents,
    interaction_rows,
    item_rows,
    onerec,
    refused,
    succeeded,
    write_csv,
)


def rename_user_column(folder):
    rows = interaction_rows()
    rows[0][0] = "person"
    return ["--interactions", write_csv(folder / "x.csv", rows)]


def null_item(folder):
    rows = interaction_rows()
    rows[4][1] = ""
    return ["--interactions", write_csv(folder / "x.csv", rows)]


def null_user(folder):
    rows = interaction_rows()
    rows[1][0] = rows[9][0] = ""
    return ["--interactions", write_csv(folder / "x.csv", rows)]


def mixed_items(folder):
    """JSON lines, where "7" and 7 differ."""
    header, *rows = interaction_rows()
    rows[5][1] = 7
    path = folder / "x.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows))
    return ["--interactions", path]


def words_for_times(folder):
    rows = interaction_rows()
    rows[3][2] = "yesterday"
    return ["--interactions", write_csv(folder / "x.csv", rows)]


def header_only(folder):
    return ["--interactions", write_csv(folder / "x.csv", interaction_rows()[:1])]


def short_users(folder):
    header, *rows = interaction_rows()
    return [
        "--interactions",
        write_csv(folder / "x.csv", [header, *([f"u{i}", row[1], i] for i, row in enumerate(rows))]),
    ]


def absent_file(folder):
    return ["--interactions", folder / "absent.csv"]


def with_items(folder, rows, embeddings=None):
    options = ["--interactions", write_csv(folder / "x.csv", interaction_rows())]
    options += ["--items", write_csv(folder / "items.csv", rows)]
    if embeddings is not None:
        np.save(folder / "vectors.npy", embeddings)
        options += ["--embeddings", folder / "vectors.npy"]
    return options


def item_without_row(folder):
    return with_items(folder, [row for row in item_rows() if row[0] not in ("m3", "m9")])


def item_twice(folder):
    return with_items(folder, [*item_rows(), ["m3", "again", "garden"]])


def nan_embedding(folder):
    vectors = np.ones((NUM_ITEMS, 4), dtype=np.float32)
    vectors[11, 2] = np.nan
    return with_items(folder, item_rows(), vectors)


def item_without_embedding(folder):
    return with_items(folder, item_rows(), np.ones((NUM_ITEMS - 1, 4), dtype=np.float32))


def embeddings_without_items(folder):
    np.save(folder / "vectors.npy", np.ones((NUM_ITEMS, 4)))
    options = ["--interactions", write_csv(folder / "x.csv", interaction_rows())]
    return [*options, "--embeddings", folder / "vectors.npy"]


def embeddings_that_are_pickled(folder):
    options = with_items(folder, item_rows())
    np.save(folder / "vectors.npy", np.array([{"a": 1}] * NUM_ITEMS), allow_pickle=True)
    return [*options, "--embeddings", folder / "vectors.npy"]


def two_sources(folder):
    return ["--interactions", write_csv(folder / "x.csv", interaction_rows()), "--dataset", "movielens"]


def no_source(folder):
    return []


def unknown_source(folder):
    return ["--dataset", "netflix"]


def source_without_folder(folder):
    return ["--dataset", "amazon-beauty", "--data_dir", folder]


# What is wrong, and what the message has to name: the column or option, how many or where, an example, and the cure.
TABLES = [
    (rename_user_column, ["no column 'user_id'", "person, item_id, timestamp", "--user_column"]),
    (null_item, ["column 'item_id'", "1 of 360", "row 3", "Drop these rows"]),
    (null_user, ["column 'user_id'", "2 of 360", "row 0", "Drop these rows"]),
    (mixed_items, ["column 'item_id'", "mixed types", "359 str, 1 int", "row 5, 7", "Convert"]),
    (words_for_times, ["column 'timestamp'", "1 of 360", "'yesterday'", "Use numbers"]),
    (header_only, ["x.csv", "no rows"]),
    (short_users, ["none of 360 users", "Add data"]),
    (absent_file, ["absent.csv", "no such file"]),
    (item_without_row, ["2 of 40 interacted items", "'m3'", "'m9'", "Add their rows"]),
    (item_twice, ["column 'item_id'", "1 of 41 rows", "'m3'", "one row per item"]),
    (nan_embedding, ["1 of 40 rows", "NaN", "'m11'", "Embed these items again"]),
    (item_without_embedding, ["39 rows for 40 items"]),
    (embeddings_without_items, ["--embeddings", "--items"]),
    (embeddings_that_are_pickled, ["vectors.npy", "cannot be read as .npy"]),
    (two_sources, ["--dataset", "--interactions"]),
    (no_source, ["--dataset", "--interactions"]),
    (unknown_source, ["'netflix'", "movielens, movielens-small, amazon-beauty, amazon-sports, kuairand-pure"]),
    (source_without_folder, ["sequences.parquet"]),
]


@pytest.mark.parametrize("command", ["semantic-ids fit", "train"])
@pytest.mark.parametrize(("damage", "named"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_tables(tmp_path, command, damage, named):
    options = damage(tmp_path)
    size = TINY if command == "train" else []
    refused(onerec(*command.split(), *options, *CODES, *size, "--output_dir", tmp_path / "new" / "out"), *named)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [TABLES[0], TABLES[3], TABLES[8], TABLES[10]],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tables_in_the_quickstart(tmp_path, damage, named):
    refused(onerec("quickstart", *damage(tmp_path), "--output_dir", tmp_path / "out"), *named)
    assert not (tmp_path / "out").exists()


OPTIONS = [
    (["--codebook_sizes", 64, 64, 64], ["40 items cannot fill 64", "at most 40"]),
    (["--codebook_sizes", 8, 41], ["40 items cannot fill 41", "at most 40"]),
    (["--codebook_sizes", 8, 0], ["--codebook_sizes", "[8, 0]"]),
    (["--codebook_sizes", 2, 2], ["20 items share the prefix", "last level has only 2 codes", "larger last codebook"]),
    (["--embedding", "given"], ["--embedding given", "--items"]),
    (["--embedding", "text+magic"], ["--embedding text+magic", "'magic'"]),
    (["--positive", "rating>=4"], ["'rating'", "user_id, item_id, timestamp"]),
    (["--positive", "rating 4"], ["'rating 4'", "column>=number"]),
    (["--min_item_interactions", 1000], ["--min_item_interactions 1000"]),
    (["--min_item_interactions", 0], ["--min_item_interactions", "at least 1; got 0"]),
    (["--session_length", 0], ["--session_length", "at least 1; got 0"]),
    (["--max_history", 0], ["--max_history", "at least 1; got 0"]),
    (["--stride", 0], ["--stride", "at least 1; got 0"]),
    (["--data_dir", "."], ["--data_dir", "--dataset"]),
]
MODEL_OPTIONS = [
    (["--num_attention_heads", 3], ["model options", "head_dim=5 must be even"]),
    (["--num_experts_per_tok", 5], ["model options", "num_experts_per_tok=5", "num_experts=2"]),
    (["--attn_implementation", "magic"], ["magic"]),
    (["--eval_num_beams", 3], ["eval_num_beams=3", "10 or more"]),
    (["--early_stopping_patience", 2], ["--early_stopping_patience", "--eval_strategy", "--metric_for_best_model"]),
    (["--optim", "magic"], ["magic"]),
]


def names_of(value):
    return "_".join(map(str, value)).replace("--", "") if value and str(value[0]).startswith("--") else ""


@pytest.mark.parametrize(("options", "named"), OPTIONS, ids=names_of)
def test_options_of_semantic_ids(data, tmp_path, options, named):
    refused(onerec("semantic-ids", "fit", *data.options, *CODES, *options, "--output_dir", tmp_path / "out"), *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "named"), [*OPTIONS[:2], *OPTIONS[-1:], *MODEL_OPTIONS], ids=names_of)
def test_options_of_train(data, tmp_path, options, named):
    refused(onerec("train", *data.options, *CODES, *TINY, *options, "--output_dir", tmp_path / "out"), *named)
    assert not (tmp_path / "out").exists()


def test_train_wants_one_origin(data, semantic_ids, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = ["--model", trained.folder, "--semantic_ids", semantic_ids.folder]
    refused(
        onerec("train", *data.options, *both, *TINY, "--output_dir", "out"), "--model", "--semantic_ids", "not both"
    )
    assert contents(tmp_path) == {}


COMMANDS = {
    "semantic-ids fit": [*CODES],
    "train": [*CODES, *TINY],
    "quickstart": ["--max_steps", "2"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_holds_something_is_left_alone(data, tmp_path, command):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    done = onerec(*command.split(), *data.options, *COMMANDS[command], "--output_dir", folder)
    refused(done, f"{folder} exists already", "--overwrite", "name another folder")
    assert contents(folder) == {"thesis.txt": b"years of work"}
    file = folder / "thesis.txt"
    refused(onerec(*command.split(), *data.options, *COMMANDS[command], "--output_dir", file), "is a file")


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input_does_not_cost_the_earlier_results(trained, tmp_path, command):
    """--overwrite replaces results by results, never by an error."""
    folder = tmp_path / "out"
    shutil.copytree(trained.folder, folder)
    done = onerec(*command.split(), *null_item(tmp_path), *COMMANDS[command], "--output_dir", folder, "--overwrite")
    refused(done, "column 'item_id'")
    assert contents(folder) == contents(trained.folder)


@pytest.mark.parametrize("command", ["semantic-ids fit", "train"])
def test_overwrite_replaces_what_a_run_wrote_and_nothing_else(data, trained, tmp_path, command):
    folder = tmp_path / "out"
    shutil.copytree(trained.folder, folder)
    (folder / "thesis.txt").write_text("years of work")
    (folder / "checkpoints" / "checkpoint-900").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-900" / "trainer_state.json").write_text("{}")
    sizes = ["--codebook_sizes", 6, 6, 6]
    size = TINY if command == "train" else []
    succeeded(onerec(*command.split(), *data.options, *sizes, *size, "--output_dir", folder, "--overwrite"))
    kept, before = contents(folder), contents(trained.folder)
    assert kept.pop("thesis.txt") == b"years of work"
    fresh = tmp_path / "fresh"
    succeeded(onerec(*command.split(), *data.options, *sizes, *size, "--output_dir", fresh))
    assert kept.keys() == contents(fresh).keys()  # nothing of the earlier run, its checkpoints least of all
    assert kept["catalogue.safetensors"] != before["catalogue.safetensors"]


def cut(name, size):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    damage.__name__ = f"{name}_cut_to_{size}"
    return damage


def without(name):
    def damage(folder):
        (folder / name).unlink()

    damage.__name__ = f"without_{name}"
    return damage


def another_models_catalogue(folder):
    shutil.copy(folder.parent / "other" / "catalogue.safetensors", folder)


def codebooks_of_another_size(folder):
    shutil.copy(folder.parent / "small" / "catalogue.safetensors", folder)


ARTEFACTS = [
    (cut("model.safetensors", 5000), ["weights are damaged or cut short", "train anew"]),
    (cut("model.safetensors", 4), ["weights are damaged or cut short", "train anew"]),
    (
        cut("catalogue.safetensors", 1000),
        ["catalogue.safetensors is damaged or cut short", "copy or download it again"],
    ),
    (cut("catalogue.safetensors", 0), ["catalogue.safetensors is damaged or cut short", "copy or download it again"]),
    (cut("config.json", 40), ["config.json", "not a valid JSON"]),
    (without("model.safetensors"), ["no file named model.safetensors"]),
    (without("catalogue.safetensors"), ["no item catalogue", "catalogue.safetensors"]),
    (without("config.json"), ["holds no model", "config.json"]),
    (another_models_catalogue, ["was trained with the catalogue", "saved with the model"]),
    (codebooks_of_another_size, ["codebooks of [8, 8, 8]", "[6, 6, 6]", "different models"]),
    (shutil.rmtree, ["there is no such folder"]),
]


@pytest.fixture(scope="session")
def other_ids(data, tmp_path_factory):
    """Folders `other` (same codebook sizes, other codes) and `small` (other codebook sizes)."""
    folder = tmp_path_factory.mktemp("other")
    behaviour = ["--interactions", data.interactions]
    succeeded(onerec("semantic-ids", "fit", *behaviour, *CODES, "--output_dir", folder / "other"))
    sizes = ["--codebook_sizes", 6, 6, 6]
    succeeded(onerec("semantic-ids", "fit", *behaviour, *sizes, "--output_dir", folder / "small"))
    return folder


@pytest.mark.parametrize(("damage", "named"), ARTEFACTS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("command", ["evaluate", "recommend", "train"])
def test_artefacts(data, trained, other_ids, tmp_path, command, damage, named):
    shutil.copytree(other_ids, tmp_path, dirs_exist_ok=True)
    model = tmp_path / "model"
    shutil.copytree(trained.folder, model)
    damage(model)
    options = {
        "evaluate": ["--interactions", data.interactions, "--json", tmp_path / "rows.json"],
        "recommend": [],
        "train": ["--interactions", data.interactions, *TINY, "--output_dir", tmp_path / "out"],
    }
    done = onerec(command, "--model", model, *options[command], stdin='["m1"]\n')
    refused(done, f"--model {model}", *named)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "rows.json").exists()


def unknown_item(folder):
    rows = [*interaction_rows(), *([f"new{i}", "gadget", i] for i in range(9))]
    return ["--interactions", write_csv(folder / "x.csv", rows)]


def integer_items(folder):
    header, *rows = interaction_rows()
    return [
        "--interactions",
        write_csv(folder / "x.csv", [header, *([u, i.removeprefix("m"), t] for u, i, t in rows)]),
    ]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            unknown_item,
            ["1 of 41 items of the data", "catalogue of 40 items", "['gadget']", "--min_item_interactions"],
        ),
        (integer_items, ["of type str", "got 0", "pass the data"]),
    ],
)
@pytest.mark.parametrize("origin", ["--model", "--semantic_ids"])
def test_a_catalogue_that_lacks_items_of_the_data(trained, semantic_ids, tmp_path, origin, damage, named):
    folder = trained.folder if origin == "--model" else semantic_ids.folder
    options = damage(tmp_path)
    done = onerec("train", *options, origin, folder, *TINY, "--output_dir", tmp_path / "out")
    refused(done, f"{origin} {folder}", *named)
    assert not (tmp_path / "out").exists()
    if origin == "--model":
        refused(onerec("evaluate", *options, "--model", folder), f"{origin} {folder}", *named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--split", "train"], ["--split", "test or validation", "'train'"]),
        (["--top_k", 0], ["--top_k 0", "at least 1"]),
        (["--top_k", 5, 60], ["--top_k 5 60", "--num_beams 50"]),
        (["--batch_size", 0], ["--batch_size 0"]),
        (["--json", "/no/such/folder/rows.json"], ["--json /no/such/folder/rows.json", "there is no folder"]),
    ],
    ids=names_of,
)
def test_options_of_evaluate(data, trained, options, named):
    refused(onerec("evaluate", "--model", trained.folder, "--interactions", data.interactions, *options), *named)


def test_evaluate_wants_a_model(data):
    refused(onerec("evaluate", "--interactions", data.interactions), "--model")


@pytest.mark.parametrize("steps", [0, -3])
def test_the_quickstart_wants_a_step(data, tmp_path, steps):
    done = onerec("quickstart", *data.options, "--max_steps", steps, "--output_dir", tmp_path / "out")
    refused(done, "--max_steps", f"got {steps}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["learning_rate", "hidden_size", "max_history", "num_train_epochs"])
def test_an_option_without_a_value(data, tmp_path, option):
    (tmp_path / "options.yaml").write_text(f"{option}: null\n")
    done = onerec("train", *data.options, "--config", tmp_path / "options.yaml", "--output_dir", tmp_path / "out")
    refused(done, f"argument --{option}: null is no value for it; leave the option out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--stride", 10**21, "argument --stride: 1000000000000000000000 is out of range"),
        ("--max_steps", 10**30, "argument --max_steps"),
        ("--stride", 2**40, "--stride must be at most 2,147,483,648"),
        ("--max_history", 2**32, "--max_history must be at most"),
        ("--session_length", 10**9, "--session_length must be at most 1,000; got 1000000000"),
    ],
)
def test_numbers_beyond_all_use(data, tmp_path, option, value, message):
    done = onerec("train", *data.options, *CODES, *TINY, option, value, "--output_dir", tmp_path / "out")
    refused(done, message)
    assert not (tmp_path / "out").exists()


def test_equal_titles_are_told_apart_by_behaviour(data, tmp_path):
    items = write_csv(tmp_path / "same.csv", [["item_id", "title"], *([f"m{i}", "same"] for i in range(NUM_ITEMS))])
    options = ["--interactions", data.interactions, "--items", items, "--output_dir", tmp_path / "out"]
    succeeded(onerec("train", *options, *CODES, *TINY))
