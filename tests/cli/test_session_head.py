"""`onerec-hf session-head`, and `recommend --session_decoding parallel` with what it trained."""

import json

import pytest

from onerec_hf.modeling.session_head import SESSION_HEAD_NAME
from onerec_hf.workflows import load_dataset, train, train_session_head
from tests.cli.commands import contents, onerec, refused, succeeded
from tests.workflows.conftest import TINY

SMALL = ["--epochs", "1", "--width", "8", "--candidates", "15"]


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A generator with an item head, trained for three steps on sessions of three."""
    folder = tmp_path_factory.mktemp("headed") / "shop"
    train(
        interactions=str(data.interactions), items=str(data.items), session_length=3, item_head=True,
        output_dir=folder, **TINY,
    )  # fmt: skip
    return folder


@pytest.fixture
def histories(tmp_path):
    path = tmp_path / "histories.jsonl"
    path.write_text('["m1", "m2"]\n', encoding="utf-8")
    return path


def test_from_a_model_to_sessions_in_one_pass(folder, data, histories, tmp_path):
    ask = ["recommend", "--model", folder, "--histories", histories, "--session_length", "3", "--top_k", "4"]
    parallel = [*ask, "--session_decoding", "parallel"]
    assert "onerec-hf session-head" in refused(onerec(*parallel))
    before = contents(folder)
    done = succeeded(onerec("session-head", "--model", folder, *data.options, *SMALL))
    assert "session head saved" in done.out
    after = contents(folder)
    assert after.keys() - before.keys() == {SESSION_HEAD_NAME}
    assert {name: after[name] for name in before} == before
    (line,) = succeeded(onerec(*parallel)).out.splitlines()
    found = json.loads(line)["sessions"]
    assert len({session[0] for session in found}) == len(found) == 4
    assert all(len(set(session)) == 3 and not {"m1", "m2"} & set(session) for session in found)
    assert json.loads(succeeded(onerec(*ask)).out)["sessions"] != found  # beam search is the default
    # Into another folder, in Python, with the data as an object.
    dataset = load_dataset(interactions=str(data.interactions), items=str(data.items), session_length=3)
    result = train_session_head(dataset, model=str(folder), output_dir=tmp_path / "copy", epochs=1, alpha=0.3)
    assert result.metrics["alpha"] == 0.3
    copy = contents(tmp_path / "copy")
    assert copy["model.safetensors"] == before["model.safetensors"]
    assert copy[SESSION_HEAD_NAME] != after[SESSION_HEAD_NAME]
    with pytest.raises(FileExistsError):
        train_session_head(dataset, model=str(folder), output_dir=tmp_path / "copy")
    # Weights that are trained on do not keep the head of the former ones.
    more = {name: TINY[name] for name in ("preset", "disable_tqdm", "use_cpu", "report_to", "verdict_sasrec")}
    train(dataset, model=str(folder), output_dir=tmp_path / "on", max_steps=1, **more)
    assert SESSION_HEAD_NAME not in contents(tmp_path / "on")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--session_decoding", "nar"], "--session_decoding must be beam or parallel; got 'nar'"),
        (["--session_decoding", "parallel", "--candidates", "c.txt"], "leave out --session_decoding parallel"),
    ],
)
def test_recommend_refuses(folder, histories, options, reason):
    assert reason in refused(onerec("recommend", "--model", folder, "--histories", histories, *options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max_examples", "1"], "--max_examples must be at least 2; got 1"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--reward", "nowhere"], "--reward nowhere"),
    ],
)
def test_session_head_refuses_before_it_trains(folder, data, options, reason):
    assert reason in refused(onerec("session-head", "--model", folder, *data.options, *options))


def test_a_model_without_an_item_head_is_refused(trained, data):
    assert "reads the candidates of an item head" in refused(
        onerec("session-head", "--model", trained.folder, *data.options)
    )
