"""What is saved takes its place whole: killed at any moment, on a full and on a read-only disk."""

import os
import shutil

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from onerec_hf import OneRecProcessor
from onerec_hf.evaluation.results import result_row, write_results
from onerec_hf.modeling.files import replacing, replacing_files
from tests.conftest import make_catalogue, make_model
from tests.mounts import fill, set_read_only, small_disk
from tests.trainers.test_checkpoints import killed_at
from tests.trainers.test_reward_trainer import make_model as make_reward_model


def make(seed):
    catalogue = make_catalogue(seed=seed)
    return make_model(catalogue, seed=seed), OneRecProcessor.from_catalogue(catalogue, max_history=5 + seed)


def load(folder):
    """Model and processor, None for what does not load or has no catalogue."""
    found = []
    for kind in (AutoModelForSeq2SeqLM, AutoProcessor):
        try:
            thing = kind.from_pretrained(folder)
        except (OSError, ValueError):
            thing = None
        found.append(thing if thing is not None and thing.catalogue is not None else None)
    return found


def weights(model):
    return torch.cat([value.float().flatten() for value in model.state_dict().values()])


# These folders hold a model alone; what is read with it makes a processor from its catalogue, and says so.
ALONE = pytest.mark.filterwarnings("ignore:.* holds a catalogue but no processor")


@ALONE
@pytest.mark.slow
@pytest.mark.parametrize("shards", [None, "20KB"], ids=["whole", "sharded"])
def test_a_kill_at_every_file_operation_leaves_the_old_or_the_new_or_nothing(tmp_path, shards):
    (old, _), (new, _) = make(0), make(1)
    folder, seen = tmp_path / "model", []
    settings = {} if shards is None else {"max_shard_size": shards}
    for at in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        old.save_pretrained(folder, **settings)
        alive = not killed_at(at, lambda: new.save_pretrained(folder, **settings), folder)
        found, _ = load(folder)
        seen.append(
            "nothing"
            if found is None
            else "old"
            if torch.equal(weights(found), weights(old)) and found.catalogue.hash == old.catalogue.hash
            else "new"
            if torch.equal(weights(found), weights(new)) and found.catalogue.hash == new.catalogue.hash
            else "half"
        )
        if alive:
            break
    assert len(seen) > 15
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert "half" not in seen
    assert "nothing" in seen


@pytest.mark.slow
def test_a_killed_processor(tmp_path):
    (_, old), (_, new) = make(0), make(1)
    folder, seen = tmp_path / "processor", set()
    for at in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        old.save_pretrained(folder)
        alive = not killed_at(at, lambda: new.save_pretrained(folder), folder)
        _, found = load(folder)
        seen.add(None if found is None else (found.max_history, found.catalogue.hash))
        if alive:
            break
    assert seen == {None, (5, old.catalogue.hash), (6, new.catalogue.hash)}


@ALONE
def test_whole_weights_give_way_to_shards_and_back(tmp_path):
    (old, _), (new, _) = make(0), make(1)
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(weights(load(tmp_path)[0]), weights(new))
    old.save_pretrained(tmp_path)
    assert list(tmp_path.glob("model-*")) == []
    assert torch.equal(weights(load(tmp_path)[0]), weights(old))


def test_what_a_killed_save_has_left_is_gone_after_the_next(tmp_path):
    model, _ = make(0)
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "thesis.txt").write_text("years of work")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / ".unfinished").exists()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


SAVES = {
    "model": lambda: (make(1)[0], "config.json"),
    "processor": lambda: (make(1)[1], "processor_config.json"),
    "reward": lambda: (make_reward_model(), "config.json"),
}


@pytest.mark.parametrize("kind", SAVES)
def test_a_full_or_read_only_disk(tmp_path, kind):
    saved, name = SAVES[kind]()
    with small_disk(tmp_path / "disk", "4m") as disk:
        folder = disk / "here"
        folder.mkdir()
        (folder / name).write_text("{}")
        for leave in (0, 8_000, 60_000):
            fill(disk, leave)
            with pytest.raises(OSError, match=rf"cannot write {folder}: No space left on device; make room there"):
                saved.save_pretrained(folder)
            assert os.listdir(folder) == [name]
            with pytest.raises(OSError, match="No space left on device"):
                saved.save_pretrained(disk / "new")
            assert not (disk / "new").exists() or os.listdir(disk / "new") == []
            (disk / "filling").unlink()
        set_read_only(disk)
        with pytest.raises(OSError, match="Read-only file system; it is mounted read-only: name a folder"):
            saved.save_pretrained(folder)
        set_read_only(disk, False)
        saved.save_pretrained(folder)
        assert len(os.listdir(folder)) > 2


def test_files_on_a_full_or_read_only_disk(tmp_path):
    rows = [result_row(f"row/{number}", number, "s") for number in range(200)]
    with small_disk(tmp_path / "disk", "1m") as disk:
        path = disk / "results.json"
        write_results(path, rows[:1])
        before = path.read_bytes()
        fill(disk, 4096)
        with pytest.raises(OSError, match=rf"cannot write {path}: No space left on device; make room there"):
            write_results(path, rows)
        with pytest.raises(OSError, match=r"cannot write .*catalogue.safetensors: No space left on device"):
            make_catalogue(200, (8, 8, 8)).save(disk / "catalogue.safetensors")
        assert sorted(os.listdir(disk)) == ["filling", "results.json"]
        assert path.read_bytes() == before
        set_read_only(disk)
        with pytest.raises(OSError, match="Read-only file system"):
            write_results(path, rows)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        open(tmp_path / "absent").close()
    with pytest.raises(RuntimeError, match="mine"), replacing_files(tmp_path / "new", last="x"):
        raise RuntimeError("mine")
    assert os.listdir(tmp_path) == []
