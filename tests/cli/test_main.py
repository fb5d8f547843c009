"""The entry point and the parser: help, unknown things, YAML files, what a crash looks like."""

import os
import subprocess
import sys

import pytest

import onerec_hf.cli.evaluate
from onerec_hf import __version__
from onerec_hf.cli.arguments import parse
from onerec_hf.cli.main import COMMANDS
from onerec_hf.trainers import OneRecTrainingArguments
from onerec_hf.workflows.settings import DataSettings, SemanticIDSettings
from tests.cli.commands import onerec, refused, succeeded


def test_usage_names_every_command():
    done = succeeded(onerec("--help"))
    assert done.out == onerec("-h").out
    for name, text in COMMANDS.items():
        assert f"  {name} " in done.out
        assert text in done.out
    nothing = onerec()
    assert (nothing.status, nothing.out) == (2, done.out)


def test_version():
    assert succeeded(onerec("--version")).out == f"onerec-hf {__version__}\n"


def test_an_unknown_command():
    done = onerec("trane")
    assert (done.status, done.out) == (2, "")
    assert done.err == f"onerec-hf: unknown command 'trane'; there are {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("quickstart", ["--max_steps", "--interactions", "--overwrite"]),
        ("semantic-ids fit", ["--codebook_sizes", "--embeddings", "--overwrite"]),
        (
            "train",
            ["--interactions", "--semantic_ids", "--hidden_size", "--learning_rate", "--resume_from_checkpoint"],
        ),
        ("evaluate", ["--model", "--split", "--json"]),
        ("recommend", ["--model", "--session_length", "--unknown"]),
    ],
)
def test_every_command_lists_its_options(command, options):
    done = succeeded(onerec(*command.split(), "--help"))
    assert done.out.startswith(f"usage: onerec-hf {command} ")
    for option in options:
        assert f"\n  {option}" in done.out


@pytest.mark.parametrize("command", ["quickstart", "semantic-ids fit", "train", "evaluate", "recommend"])
def test_unknown_options_are_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    required = ["--output_dir", "out"] if command == "train" else []
    refused(onerec(*command.split(), *required, "--wat", "1"), "unknown option --wat", f"onerec-hf {command} --help")
    (tmp_path / "run.yaml").write_text("wat: 1\n")
    done = onerec(*command.split(), *required, "--config", "run.yaml")
    refused(done, "run.yaml: unknown option --wat", f"onerec-hf {command} --help")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_slip_of_the_pen_gets_a_hint():
    refused(onerec("recommend", "--modle", "x"), "unknown option --modle (did you mean --model?)")
    refused(onerec("recommend", "--session", "3"), "unknown option --session")  # no guessing from beginnings
    refused(onerec("recommend", "model"), "unknown option model")
    refused(onerec("recommend", "--top_k", "ten"), "--top_k", "invalid int value: 'ten'")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: [", ["no YAML", 'in "run.yaml", line 1']),
        ("- model", ["run.yaml", "YAML mapping"]),
        ("", ["run.yaml", "YAML mapping"]),
        ("top_k: ten", ["--top_k", "invalid int value: 'ten'"]),
        ("top_k: 2.5", ["--top_k", "invalid int value: '2.5'"]),
        ("exclude_seen: perhaps", ["--exclude_seen"]),
        ("session-lenght: 3", ["unknown option --session-lenght (did you mean --session-length?)"]),
    ],
)
def test_yaml_files_that_do_not_fit(tmp_path, monkeypatch, text, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    refused(onerec("recommend", "--config", "run.yaml"), *named)
    refused(onerec("recommend", "--config=run.yaml"), *named)


def test_a_yaml_file_that_is_not_there(tmp_path):
    refused(
        onerec("recommend", "--config", tmp_path / "run.yaml"), f"--config {tmp_path / 'run.yaml'}", "no such file"
    )
    refused(onerec("recommend", "--config"), "--config needs a YAML file")


def test_yaml_values_are_what_the_command_line_would_make_of_them(tmp_path):
    """One value where a list may stand, numbers in quotes, YAML's `no`, dictionaries, nulls, hyphens."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "codebook_sizes: 16\npositive: rating>=4\nlearning_rate: 1e-3\nmax_steps: '7'\nsave_strategy: no\neval-top-k: [1, 2]\n"
        "eval_exclude_seen: false\ndataset: null\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0.1}\n"
        "interactions: my clicks.csv\nstride: -1\n"
    )
    dataclasses = (DataSettings, SemanticIDSettings, OneRecTrainingArguments)
    argv = ["--config", str(file), "--stride", "4", f"--output_dir={tmp_path}"]
    data, ids, training = parse(dataclasses, argv, "train", required=["--output_dir"])
    assert (data.positive, data.dataset, data.interactions, data.stride) == (["rating>=4"], None, "my clicks.csv", 4)
    assert ids.codebook_sizes == [16]
    assert (training.learning_rate, training.max_steps, training.save_strategy) == (1e-3, 7, "no")
    assert (training.eval_top_k, training.eval_exclude_seen) == ([1, 2], False)
    assert training.lr_scheduler_kwargs == {"min_lr": 0.1}
    command_line = ["--codebook_sizes", "8", "9", "--eval_exclude_seen", "true", "--positive", "like>=1", "click>=1"]
    data, ids, training = parse(dataclasses, argv + command_line, "train")
    assert ids.codebook_sizes == [8, 9]
    assert training.eval_exclude_seen is True
    assert data.positive == ["like>=1", "click>=1"]


def raising(error):
    def command(argv):
        raise error

    return command


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(onerec_hf.cli.evaluate, "main", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        onerec("evaluate")


@pytest.mark.parametrize(
    "error", [ValueError("mend it"), KeyError("mend it"), OSError("mend it"), ImportError("mend it")]
)
def test_what_can_be_mended_is_one_line_unless_debugging(monkeypatch, error):
    monkeypatch.setattr(onerec_hf.cli.evaluate, "main", raising(error))
    done = onerec("evaluate")
    assert (done.status, done.err) == (2, "onerec-hf evaluate: mend it\n")
    monkeypatch.setenv("ONEREC_HF_DEBUG", "1")
    with pytest.raises(type(error), match="mend it"):
        onerec("evaluate")


def test_ctrl_c_anywhere(monkeypatch):
    monkeypatch.setattr(onerec_hf.cli.evaluate, "main", raising(KeyboardInterrupt()))
    done = onerec("evaluate")
    assert (done.status, done.err) == (130, "\nonerec-hf: interrupted.\n")


@pytest.mark.filterwarnings("default:.*exact duplicates")  # as at a command line
def test_warnings_speak_to_people(data, tmp_path):
    """Repeated rows are counted in a plain line, without the place in the code that found them."""
    table = tmp_path / "twice.csv"
    table.write_text(data.interactions.read_text() + data.interactions.read_text().split("\n", 1)[1])
    done = succeeded(
        onerec(
            "semantic-ids", "fit", "--interactions", table, "--codebook_sizes", 8, 8, "--output_dir", tmp_path / "o"
        )
    )
    (line,) = [line for line in done.err.splitlines() if "exact duplicates" in line]
    assert line.startswith("onerec-hf: interactions: dropped 360 of 720 rows")
    assert "UserWarning" not in done.err


@pytest.mark.parametrize(
    "locale", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_utf8_whatever_the_locale(locale, mark):
    text = "import sys; from onerec_hf.cli.main import speak_utf8; speak_utf8(); line = sys.stdin.read(); print(line, end=''); sys.exit(line)"
    done = subprocess.run(
        [sys.executable, "-c", text],
        input=mark + "商品, Café".encode(),
        capture_output=True,
        env={**os.environ, **locale},
        check=False,
    )
    assert done.stdout.decode() == done.stderr.decode().strip() == "商品, Café"


def test_a_file_name_that_is_not_utf8_is_printed_as_it_came():
    text = (
        "import os; from onerec_hf.cli.main import speak_utf8; speak_utf8(); print(os.fsdecode(b'caf\\xe9'), end='')"
    )
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, check=True).stdout == b"caf\xe9"


def test_help_into_a_closed_pipe():
    reader, writer = os.pipe()
    command = [sys.executable, "-c", "from onerec_hf.cli.main import main; import sys; sys.exit(main())", "--help"]
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(reader)
    os.close(writer)
    assert (process.communicate()[1], process.returncode) == (b"", 0)


def test_the_home_folder_in_a_file_and_on_the_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "options.yaml").write_text("interactions: ~/log.csv\npositive: ['a~b>=4']\n")
    (data,) = parse(
        (DataSettings,),
        ["--config", str(tmp_path / "options.yaml"), "--items=~/items.csv", "--data_dir", "~/x"],
        "train",
    )
    assert (data.interactions, data.items) == (f"{tmp_path}/log.csv", f"{tmp_path}/items.csv")
    assert (data.data_dir, data.positive) == (f"{tmp_path}/x", ["a~b>=4"])


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    def refuse(argv):
        raise RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`.")

    monkeypatch.setattr(onerec_hf.cli.evaluate, "main", refuse)
    refused(onerec("evaluate"), "--report_to: WandbCallback requires wandb to be installed")
