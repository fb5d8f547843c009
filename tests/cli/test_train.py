"""`onerec-hf train`: the artefact that it leaves, its options, and Ctrl-C."""

import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

import onerec_hf.workflows.training
from onerec_hf.trainers import OneRecTrainer
from onerec_hf.workflows.run_folder import LOCK, UNFINISHED_RUN
from tests.cli.commands import CODES, TINY, codes, contents, interaction_rows, onerec, refused, succeeded, write_csv

HISTORIES = [["m1", "m2", "m3"], ["m39"], ["m8", "m6"]]
FILES = {
    "README.md",
    "catalogue.safetensors",
    "codebooks.safetensors",
    "config.json",
    "data_options.json",
    "expert_load.png",
    "generation_config.json",
    "item_encoder.safetensors",
    "items.parquet",
    "model.safetensors",
    "processor_config.json",
    "results.json",
    "semantic_ids.html",
    "semantic_ids.json",
    "tokenizer_config.json",
    "trained_on.json",
    "training_report.html",
    "training_report.png",
    # the code that travels along
    *(f"code/{file.name}" for file in (Path(__file__).parents[2] / "modeling").glob("[a-z]*.py")),
}
TOP = {name.split("/")[0] for name in FILES}


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def values(folder):
    return {row["name"]: row["value"] for row in rows_of(folder) if row["name"] != "seconds"}


def parameters(folder):
    return dict(AutoModelForSeq2SeqLM.from_pretrained(folder).named_parameters())


def test_the_artefact_is_whole_and_holds_no_pickle(trained):
    assert contents(trained.folder).keys() == FILES
    assert [path.name for path in trained.folder.glob("*/")] == ["code"]  # neither checkpoints nor logs


def test_the_artefact_recommends_what_the_trained_model_does(trained):
    processor = AutoProcessor.from_pretrained(trained.folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(trained.folder).eval()
    live = trained.trainer
    options = {"num_beams": 8, "num_return_sequences": 4, "session_length": 2, "return_dict_in_generate": True}
    found = model.recommend(**processor(HISTORIES), **options)
    wanted = live.model.eval().recommend(**live.processing_class(HISTORIES), **options)
    assert processor.batch_decode(found) == live.processing_class.batch_decode(wanted)
    assert torch.equal(found.sequences_scores, wanted.sequences_scores)
    best = found.sequences_scores.view(3, 4)[:, 0].tolist()
    assert len(set(best)) == 3  # the histories are read


def test_it_trained_as_many_steps_as_it_was_told(trained):
    assert trained.trainer.state.global_step == 3
    assert len([entry for entry in trained.trainer.state.log_history if "loss" in entry]) == 3


def test_results_have_the_schema_of_a_benchmark(trained):
    results = json.loads((trained.folder / "results.json").read_text())
    assert results.keys() >= {"machine", "versions", "date", "command", "rows", "seed", "dataset", "protocol"}
    command = shlex.split(results["command"])
    assert command[:2] == ["onerec-hf", "train"]
    assert command[-2:] == ["--output_dir", str(trained.folder)]
    metrics = [f"{metric}@{k}" for k in (5, 10) for metric in ("recall", "ndcg", "mrr", "coverage")]
    rows = {row["name"]: row for row in results["rows"]}
    models = ("onerec", "popularity", "item_knn")
    assert rows.keys() == {f"{m}/{metric}" for m in models for metric in metrics} | {"invalid_id_rate", "seconds"}
    for name, row in rows.items():
        assert row.keys() == {"name", "value", "unit", "against", "spread"}
        assert row["unit"] == ("s" if name == "seconds" else "share")
        assert row["against"] == (name.replace("onerec", "popularity") if name.startswith("onerec/") else None)
        assert name == "seconds" or 0 <= row["value"] <= 1
    assert rows["invalid_id_rate"]["value"] == 0
    assert "30 users" in results["protocol"]
    assert "Positive feedback: every interaction; items with fewer than 5" in results["protocol"]


def test_stdout_is_the_table_and_the_verdict(trained):
    """`onerec-hf train ... > table.txt`: progress, logs and losses go to stderr."""
    table, verdict = trained.done.out.rstrip("\n").split("\n\n")
    assert verdict == json.loads((trained.folder / "results.json").read_text())["verdict"]
    lines = table.splitlines()
    assert [line.split()[0] for line in lines] == ["recall@5", "popularity", "item_knn", "onerec"]
    column = lines[0].split().index("recall@10")
    for line in lines[1:]:
        name, *numbers = line.split()
        assert numbers[column] == f"{values(trained.folder)[f'{name}/recall@10']:.4f}"
    assert re.search(r"epoch \S+ of \d+, loss [\d.]+, about \S+ left", trained.done.err)
    assert "{'loss'" not in trained.done.err
    assert "it/s]" not in trained.done.err  # no bar in a pipe
    assert f"saved to {trained.folder}" in trained.done.err


def test_the_card_in_the_folder_runs(trained):
    card = (trained.folder / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    scope = {}
    exec(snippet, scope)
    ((*items,),) = scope["sessions"]
    assert len(set(items)) == 5
    assert set(items) <= {f"m{i}" for i in range(40)}


def test_own_names_of_columns(trained, data, tmp_path):
    rows = interaction_rows()[1:]
    table = tmp_path / "clicks.tsv"
    table.write_text("\n".join("\t".join(map(str, row)) for row in [["who", "what", "when"], *rows]))
    items = tmp_path / "items.csv"
    items.write_text(data.items.read_text().replace("item_id", "what"))
    columns = ["--user_column", "who", "--item_column", "what", "--timestamp_column", "when"]
    folder = tmp_path / "out"
    files = ["--interactions", table, "--items", items]
    succeeded(onerec("train", *files, *columns, *CODES, *TINY, "--output_dir", folder))
    assert codes(folder) == codes(trained.folder)
    assert values(folder) == values(trained.folder)


@pytest.mark.parametrize("model", ["new", "saved"])
def test_session_weights_reach_the_loss(trained, data, tmp_path, model):
    options = CODES if model == "new" else ["--model", trained.folder]
    weights = ["--session_loss_weights", "4", "1", "1.5", "--logging_steps", 1, "--output_dir"]
    done = succeeded(onerec("train", *data.options, *options, *TINY, *weights, tmp_path / "weighted"))
    plain = succeeded(onerec("train", *data.options, *options, *TINY, "--output_dir", tmp_path / "plain"))
    assert first_loss(done) != first_loss(plain)


def first_loss(done):
    return float(re.search(r"loss ([\d.]+)", done.err)[1])


def test_an_item_head_and_the_weight_of_its_scores(data, tmp_path):
    """Both are saved; `evaluate` takes the saved weight, or another one."""
    folder = tmp_path / "out"
    head = [
        "--item_head",
        "true",
        "--item_head_dropout",
        0.2,
        "--item_head_loss_weight",
        0.5,
        "--item_head_codes",
        "true",
    ]
    weight = ["--item_score_weight", 8, "--output_dir", folder]
    done = succeeded(onerec("train", *data.options, *CODES, *TINY, *head, *weight))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    found = model.config.item_head
    assert (found.num_items, found.dropout, found.loss_weight, found.score_codes) == (40, 0.2, 0.5, True)
    assert model.generation_config.item_score_weight == 8
    evaluate = ["evaluate", "--model", folder, "--interactions", data.interactions]
    assert succeeded(onerec(*evaluate)).out == done.out.split("\n\n")[0] + "\n"
    assert succeeded(onerec(*evaluate, "--item_score_weight", 0)).out != done.out
    again = ["--model", folder, "--learning_rate", 0, "--output_dir", tmp_path / "again"]
    succeeded(onerec("train", *data.options, *TINY, *again))
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").generation_config.item_score_weight == 8


def test_options_of_the_item_head_that_do_not_fit(data, tmp_path):
    train = ["train", *data.options, *CODES, *TINY, "--output_dir", tmp_path / "out"]
    refused(onerec(*train, "--item_score_weight", 8), "--item_score_weight 8 needs item scores: add --item_head true")
    refused(onerec(*train, "--item_head", "true", "--item_head_dropout", 1), "model options", "dropout=1.0")
    refused(onerec(*train, "--item_embeddings", "true"), "--item_embeddings is called --item_head now")
    (tmp_path / "old.yaml").write_text("item_loss_weight: 1.0\n")
    renamed = onerec(*train, "--config", tmp_path / "old.yaml")
    refused(renamed, "old.yaml: --item_loss_weight is called --item_head_loss_weight now")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["new", "saved"])
def test_session_weights_that_weigh_nothing_are_refused(trained, data, tmp_path, model):
    options = CODES if model == "new" else ["--model", trained.folder]
    weights = ["--session_loss_weights", "0", "0"]
    done = onerec("train", *data.options, *options, *TINY, *weights, "--output_dir", tmp_path / "out")
    refused(done, "session_loss_weights=[0.0, 0.0] must be a number for each item of a session")
    assert not (tmp_path / "out").exists()


def test_positive_feedback_is_what_the_rule_says(data, tmp_path):
    """A rule over a rating column keeps exactly the rows that the synthetic table has."""
    header, *rows = interaction_rows()
    disliked = [[user, f"m{int(item[1:]) // 2}", time + 50, 1] for user, item, time in rows]
    mixed = [[*header, "rating"], *([*row, 5] for row in rows), *disliked]
    options = ["--interactions", write_csv(tmp_path / "clicks.csv", mixed), "--positive", "rating>=4"]
    for folder, source in (("a", ["--interactions", data.interactions]), ("b", options)):
        succeeded(onerec("train", *source, *CODES, *TINY, "--output_dir", tmp_path / folder))
    assert values(tmp_path / "a") == values(tmp_path / "b")
    assert codes(tmp_path / "a") == codes(tmp_path / "b")
    assert "Positive feedback: rating &gt;= 4;" in (tmp_path / "b" / "README.md").read_text()


def test_a_yaml_file_below_the_command_line(data, trained, tmp_path):
    names = iter(TINY)
    settings = {name.removeprefix("--"): value for name, value in zip(names, names, strict=True)}
    lines = [f"{name}: {value}" for name, value in settings.items() if name != "max_steps"]
    lines += [f"interactions: {data.interactions}", f"items: {data.items}", "codebook_sizes: [8, 8, 8]"]
    lines += ["max_steps: 1", "save_strategy: no", "learning_rate: 2e-4", f"output_dir: {tmp_path / 'from-file'}"]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(lines))
    folder = tmp_path / "out"
    succeeded(onerec("train", "--config", file, "--max_steps", 3, "--output_dir", folder))
    assert not (tmp_path / "from-file").exists()
    assert values(folder) == values(trained.folder)
    for name, value in parameters(trained.folder).items():
        assert torch.equal(parameters(folder)[name], value)


def test_going_on_from_a_model(trained, data, tmp_path):
    """With a learning rate of nothing the weights are the old ones; ids, sizes and codebooks are the old ones anyway."""
    folder = tmp_path / "out"
    size = [*TINY, "--hidden_size", 64]  # of new models
    succeeded(
        onerec(
            "train", "--model", trained.folder, "--interactions", data.interactions, *size, "--learning_rate", 0,
            "--output_dir", folder,
        )
    )  # fmt: skip
    assert contents(folder).keys() == FILES
    assert codes(folder) == codes(trained.folder)
    before, after = parameters(trained.folder), parameters(folder)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(before) > 10


def test_going_on_in_the_models_own_folder(trained, data, tmp_path):
    folder = tmp_path / "shop"
    shutil.copytree(trained.folder, folder)
    before = parameters(folder)
    succeeded(
        onerec(
            "train", "--model", folder, "--interactions", data.interactions, *TINY, "--output_dir", folder, "--overwrite"
        )
    )  # fmt: skip
    assert contents(folder).keys() == FILES
    assert codes(folder) == codes(trained.folder)
    assert any(not torch.equal(value, before[name]) for name, value in parameters(folder).items())


def test_evaluations_during_training_do_not_decide_about_the_last_one(trained, data, tmp_path):
    folder = tmp_path / "out"
    succeeded(onerec("train", *data.options, *CODES, *TINY, "--no_predict_with_generate", "--output_dir", folder))
    assert values(folder) == values(trained.folder)


def test_seen_items_count_for_everyone_or_no_one(trained, data, tmp_path):
    folder = tmp_path / "out"
    succeeded(onerec("train", *data.options, *CODES, *TINY, "--no_eval_exclude_seen", "--output_dir", folder))
    without, with_seen = values(trained.folder), values(folder)
    for model in ("onerec", "item_knn", "popularity"):  # what they saw takes the places of what they will see
        assert with_seen[f"{model}/recall@10"] < without[f"{model}/recall@10"]
    assert "seen items included" in (folder / "README.md").read_text()
    assert "seen items excluded" in (trained.folder / "README.md").read_text()


def test_early_stopping(data, tmp_path, monkeypatch):
    """Nothing gets better with a learning rate of nothing: the second of ten evaluations is the last."""
    folder = tmp_path / "out"
    options = ["--max_steps", 10, "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "no"]
    options += ["--metric_for_best_model", "recall@10", "--early_stopping_patience", 1, "--learning_rate", 0]
    options += ["--router_bias_update_rate", 0, "--dropout_rate", 0]
    warnings = []
    monkeypatch.setattr("transformers.trainer_callback.logger.warning", warnings.append)
    evaluated, log = [], OneRecTrainer.log

    def count(self, logs, *args, **kwargs):
        evaluated.extend(name for name in logs if name == "eval_recall@10")
        return log(self, logs, *args, **kwargs)

    monkeypatch.setattr(OneRecTrainer, "log", count)
    succeeded(onerec("train", *data.options, *CODES, *TINY, *options, "--output_dir", folder))
    assert len(evaluated) == 2
    assert not [text for text in warnings if "did not find" in text]  # in the test results, where it is not looked for


def test_checkpoints_can_be_kept(data, tmp_path):
    folder = tmp_path / "out"
    options = ["--keep_checkpoints", "--save_steps", 2]
    succeeded(onerec("train", *data.options, *CODES, *TINY, *options, "--output_dir", folder))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["checkpoint-2", "checkpoint-3"]
    assert {path.name for path in folder.iterdir()} == TOP | {"checkpoints"}


def test_the_hub_gets_the_artefact_and_not_the_checkpoints(data, tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, private=None, exist_ok=False):
            assert exist_ok
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            assert {"checkpoints/**", UNFINISHED_RUN, LOCK} <= set(ignore_patterns)
            uploads.append((repo_id, contents(folder_path)))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    succeeded(onerec("train", *data.options, *CODES, *TINY, "--push_to_hub", "--output_dir", tmp_path / "shop"))
    ((repo_id, files),) = uploads
    assert repo_id == "me/shop"
    assert {name for name in files if not name.startswith("checkpoints")} - {UNFINISHED_RUN, LOCK} == FILES
    assert b"AutoModelForSeq2SeqLM.from_pretrained('me/shop')" in files["README.md"]
    assert str(tmp_path).encode() not in files["README.md"].split(b"## The run")[0]


def press_ctrl_c(monkeypatch, *steps):
    """A real SIGINT while the model computes these steps (counted from 1; twice for two)."""
    step = OneRecTrainer.training_step
    count = iter(range(1, 1000))

    def training_step(self, *args, **kwargs):
        number = next(count)
        for _ in range(steps.count(number)):
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(OneRecTrainer, "training_step", training_step)


def resume(done):
    """Runs the command line that the message names."""
    (line,) = [line for line in done.err.splitlines() if line.startswith("  onerec-hf train ")]
    return onerec(*shlex.split(line)[1:])


@pytest.mark.parametrize("origin", ["new", "--model", "--semantic_ids"])
def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(data, trained, semantic_ids, tmp_path, monkeypatch, origin):
    ids = {
        "new": CODES,
        "--model": ["--model", trained.folder],
        "--semantic_ids": ["--semantic_ids", semantic_ids.folder],
    }
    command = ["train", *data.options, *ids[origin], *TINY, "--max_steps", 4, "--save_strategy", "no", "--output_dir"]
    folder, whole = tmp_path / "my run", tmp_path / "whole"
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 2)
        done = onerec(*command, folder)
    assert done.status == 130
    assert done.out == ""
    assert signal.getsignal(signal.SIGINT) is before
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    assert f"onerec-hf: interrupted. The checkpoint {checkpoint} is kept; resume with:" in done.err
    assert f"--resume_from_checkpoint '{checkpoint}'" in done.err
    assert AutoProcessor.from_pretrained(checkpoint).catalogue is not None
    succeeded(resume(done))
    succeeded(onerec(*command, whole))
    assert contents(folder).keys() == FILES
    assert codes(folder) == codes(whole)
    assert values(folder) == values(whole)
    after, wanted = parameters(folder), parameters(whole)
    assert all(torch.equal(after[name], value) for name, value in wanted.items())


def test_going_on_needs_nothing_but_the_data_and_the_checkpoint(data, tmp_path, monkeypatch):
    """Sizes come from the checkpoint, and the run may end in another folder, which gets the codebooks too."""
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 1)
        assert onerec("train", *data.options, *CODES, *TINY, "--output_dir", tmp_path / "a").status == 130
    checkpoint = tmp_path / "a" / "checkpoints" / "checkpoint-1"
    command = ["train", "--interactions", data.interactions, "--resume_from_checkpoint", checkpoint]
    command += ["--max_steps", 2, "--disable_tqdm", "true"]
    succeeded(onerec(*command, "--output_dir", tmp_path / "b"))
    assert contents(tmp_path / "b").keys() == FILES
    assert codes(tmp_path / "b") == codes(tmp_path / "a")
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "b").config.hidden_size == 16
    again = onerec(*command, "--output_dir", tmp_path / "b")  # somebody else's results now
    assert again.status == 2
    assert "exists already" in again.message


def test_a_second_ctrl_c_stops_at_once(data, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 11, 11)
        options = ["--max_steps", 12, "--save_steps", 1, "--output_dir", folder]
        done = onerec("train", *data.options, *CODES, *TINY, *options)
    assert done.status == 130
    assert f"The checkpoint {folder / 'checkpoints' / 'checkpoint-10'} is kept" in done.err  # not 9, the last by name
    succeeded(resume(done))
    assert contents(folder).keys() == FILES


def test_with_nothing_to_go_on_with_nothing_is_left(data, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 2, 2)
        done = onerec("train", *data.options, *CODES, *TINY, "--output_dir", folder)
    assert done.status == 130
    assert "onerec-hf: interrupted. Nothing is kept; start again." in done.err
    assert not folder.exists()


def test_ctrl_c_before_training_leaves_earlier_results(data, trained, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(trained.folder, folder)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(onerec_hf.workflows.training, "fit_catalogue", interrupted)
    done = onerec("train", *data.options, *CODES, *TINY, "--output_dir", folder, "--overwrite")
    assert done.status == 130
    assert done.err.splitlines()[-1] == "onerec-hf: interrupted."
    assert contents(folder) == contents(trained.folder)


@pytest.fixture
def heard():
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_in_the_last_evaluation_loses_nothing(data, trained, tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def prediction_step(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        time.sleep(10)  # Python comes to the handler soon, not at once
        raise AssertionError("Ctrl-C was not heard")

    with monkeypatch.context() as patch:
        patch.setattr(OneRecTrainer, "prediction_step", prediction_step)
        done = onerec("train", *data.options, *CODES, *TINY, "--output_dir", folder)
    assert done.status == 130
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).config.hidden_size == 16
    succeeded(resume(done))
    assert contents(folder).keys() == FILES
    assert values(folder) == values(trained.folder)


@pytest.mark.parametrize("damage", ["absent", "no_state", "cut"])
def test_a_checkpoint_that_is_none(data, tmp_path, monkeypatch, damage):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 1)
        assert onerec("train", *data.options, *CODES, *TINY, "--output_dir", folder).status == 130
    checkpoint = folder / "checkpoints" / "checkpoint-1"
    if damage == "absent":
        checkpoint = folder / "checkpoints" / "checkpoint-7"
    elif damage == "no_state":
        (checkpoint / "trainer_state.json").unlink()
    else:
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:3000])
    before = contents(folder)
    done = onerec(
        "train", *data.options, *CODES, *TINY, "--output_dir", folder, "--resume_from_checkpoint", checkpoint
    )
    assert done.status == 2
    assert f"--resume_from_checkpoint {checkpoint}" in done.message
    assert ("damaged or cut short" if damage == "cut" else "no complete checkpoint") in done.message
    assert contents(folder) == before


def test_training_on_packed_prefixes(data, tmp_path, monkeypatch):
    trainers = []
    original = onerec_hf.workflows.training.rank_beside_baselines
    monkeypatch.setattr(
        onerec_hf.workflows.training,
        "rank_beside_baselines",
        lambda trainer, *args: trainers.append(trainer) or original(trainer, *args),
    )
    options = ["--train_on", "prefixes", "--encoder_is_causal", "true", "--packing", "true", "--max_history", "8"]
    folder = tmp_path / "out"
    succeeded(onerec("train", *data.options, *CODES, *TINY, *options, "--output_dir", folder))
    packed = trainers[0].train_dataset
    assert packed.items == 64
    # 30 users of 10 training items: 9 targets each, the first chunk to 8 items of history, another for the ninth target.
    assert sorted(len(example["sessions"]) for row in packed for example in row["examples"]) == [1] * 30 + [8] * 30
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).config.encoder_is_causal
    protocol = json.loads((folder / "results.json").read_text())["protocol"]
    assert (
        "read as 60 histories, each once for all its sessions; beyond 8 items a session reads the latest 5 to 8"
        in protocol
    )


def test_prefixes_need_a_causal_encoder(data, trained, tmp_path):
    options = ["--train_on", "prefixes", "--output_dir", tmp_path / "out"]
    refused(onerec("train", *data.options, *CODES, *TINY, *options), "--train_on prefixes needs --encoder_is_causal")
    tuned = onerec("train", *data.options, "--model", trained.folder, *options)
    refused(tuned, "training on prefixes needs a causal encoder")
    refused(
        onerec("train", *data.options, "--train_on", "pairs", "--output_dir", tmp_path / "out"), "--train_on pairs"
    )
    assert not (tmp_path / "out").exists()


def test_a_table_alone_is_enough(data, tmp_path, monkeypatch):
    """Everything else is chosen: a dry run prints what a training prints, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    planned = succeeded(onerec("train", "--interactions", data.interactions, "--max_steps", 2, "--dry_run"))
    lines = planned.out.splitlines()
    assert lines[0].split()[:2] == ["--train_on", "prefixes"]
    assert [line for line in lines if re.match(r"--codebook_sizes +16 16 16 +40 items", line)]
    assert not list(tmp_path.iterdir())
    done = succeeded(onerec("train", "--interactions", data.interactions, "--max_steps", 2, "--disable_tqdm", "true"))
    assert planned.out in done.err
    assert set(lines) <= set(done.err.splitlines())
    assert AutoModelForSeq2SeqLM.from_pretrained("onerec-model").config.encoder_attention == "pointwise"
    settings = json.loads(Path("onerec-model/results.json").read_text())["settings"]
    assert [f"--{row['option']}" for row in settings] == [line.split()[0] for line in lines]


def test_a_recipe_goes_with_any_table(data, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "amazon_beauty_items.yaml"
    options = ["--config", recipe, "--interactions", data.interactions, *CODES, "--dry_run"]
    assert succeeded(onerec("train", *options)).out == ""  # its preset is the paper's: it lists what differs
    options = [*options[:-1], "--max_steps", 1, "--hidden_size", 16, "--disable_tqdm", "true"]
    succeeded(onerec("train", *options, "--output_dir", tmp_path / "out"))
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config
    assert (config.encoder_attention, config.hidden_size, config.num_experts) == ("pointwise", 16, 1)
