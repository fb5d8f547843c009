"""Commands under torchrun: the artefacts and answers of one process, written and printed once."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from onerec_hf import ItemCatalogue
from onerec_hf.workflows.preferences import PAIRS_NAME
from tests.cli.commands import CODES, TINY, Done, contents, onerec, succeeded
from tests.cli.test_align import QUICK, reward  # noqa: F401 (a fixture)
from tests.ranks import torchrun

pytestmark = pytest.mark.slow


def on_ranks(size: int, *argv, stdin: str = "") -> Done:
    """`torchrun --nproc-per-node SIZE -m onerec_hf.cli.main ARGV...`"""
    done = torchrun("-m", "onerec_hf.cli.main", *argv, ranks=size, input=stdin)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def shared(data, tmp_path_factory):
    """What two ranks trained, with semantic IDs of their own: `folder`, `done`."""
    folder = tmp_path_factory.mktemp("ranks") / "shop"
    done = succeeded(on_ranks(2, "train", *data.options, *CODES, *TINY, "--output_dir", folder))
    return folder, done


def results(folder: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())["rows"]}


def test_training_writes_one_artefact_and_says_things_once(shared, trained):
    folder, done = shared
    assert set(contents(folder)) == set(contents(trained.folder))
    assert done.err.count(f"saved to {folder}") == 1
    assert done.err.count(" parameters, ") == 1
    # A table with a line a model, and the verdict.
    printed = [run.out.split("\n\n")[:2] for run in (done, trained.done)]
    assert [len(table.splitlines()) for table, _ in printed] == [4, 4]
    assert all(verdict.startswith("NDCG@10 of OneRec is ") for _, verdict in printed)
    assert done.out.count("NDCG@10 of OneRec is ") == 1
    alike = [ItemCatalogue.load(path / "catalogue.safetensors").hash for path in (folder, trained.folder)]
    assert alike[0] == alike[1]
    mine, theirs = results(trained.folder), results(folder)
    assert mine.keys() == theirs.keys()
    assert all(theirs[name] == mine[name] for name in mine if name.startswith(("popularity", "item_knn")))


def test_fitted_ids_are_those_of_one_process(data, semantic_ids, tmp_path):
    done = succeeded(on_ranks(3, "semantic-ids", "fit", *data.options, *CODES, "--output_dir", tmp_path / "ids"))
    assert done.out == semantic_ids.done.out
    assert set(contents(tmp_path / "ids")) == set(contents(semantic_ids.folder))
    alike = [
        ItemCatalogue.load(path / "catalogue.safetensors").hash for path in (tmp_path / "ids", semantic_ids.folder)
    ]
    assert alike[0] == alike[1]


def test_evaluation_is_that_of_one_process(data, trained, tmp_path):
    """30 users in batches of 4 over 3 ranks: some ranks have no users at the end."""
    options = ["evaluate", "--model", trained.folder, *data.options, "--batch_size", "4"]
    alone = succeeded(onerec(*options, "--json", tmp_path / "alone.json"))
    done = succeeded(on_ranks(3, *options, "--json", tmp_path / "ranks.json"))
    assert done.out == alone.out
    rows = [json.loads((tmp_path / name).read_text())["rows"] for name in ("alone.json", "ranks.json")]
    assert rows[0] == rows[1]
    assert "3/3" in done.err  # batches of a rank: the users are shared


def test_recommendations_come_once_in_the_order_of_the_requests(trained):
    """Batches of 2 over 3 ranks: 11 requests leave some ranks without one at the end; a user without a known item among them."""
    requests = [{"user_id": user, "history": [f"m{user}", f"m{3 * user}"]} for user in range(10)]
    requests.insert(4, {"user_id": "new", "history": ["never-seen"]})
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    options = ["recommend", "--model", trained.folder, "--top_k", "3", "--batch_size", "2", "--unknown", "skip"]
    alone = succeeded(onerec(*options, stdin=lines))
    done = succeeded(on_ranks(3, *options, stdin=lines))
    assert done.out == alone.out
    assert len(done.out.splitlines()) == 11
    assert done.err.count("left out 1 items that are not in the catalogue") == 1


def test_alignment_draws_the_pairs_of_one_process_and_writes_one_table(data, trained, reward, tmp_path):  # noqa: F811 (the fixture)
    options = ["align", "--model", trained.folder, "--reward", reward, "--max_examples", 41, *data.options, *QUICK]
    options += ["--candidates", "sample", "--per_device_train_batch_size", 4, "--evaluate", "false", "--output_dir"]
    succeeded(onerec(*options, tmp_path / "alone"))
    done = succeeded(on_ranks(2, *options, tmp_path / "shared"))
    assert done.err.count(f"saved to {tmp_path / 'shared'}") == 1
    assert set(contents(tmp_path / "shared")) == set(contents(tmp_path / "alone"))
    mine, theirs = (Dataset.from_parquet(str(tmp_path / run / PAIRS_NAME)).to_list() for run in ("alone", "shared"))
    assert theirs == mine
    assert len({pair["row"] for pair in theirs}) == len(theirs) > 3


def test_a_folder_that_is_not_empty_is_refused(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = on_ranks(2, "train", *data.options, *CODES, *TINY, "--output_dir", tmp_path)
    assert done.status != 0
    assert "exists already and is not empty" in done.err
    assert contents(tmp_path) == {"notes.txt": b"mine"}
