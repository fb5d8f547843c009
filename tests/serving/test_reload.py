"""Models change while requests come: none is lost, each is answered by the model that it names, and what cannot serve does not get in."""

import json
import os
import shutil
import threading

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from onerec_hf import ItemCatalogue, OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.serving import models
from tests.serving.running import Running

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def link(tmp_path, folder):
    """A link to the model's folder: what a server is given where models change."""
    link = tmp_path / "current"
    link.symlink_to(folder)
    return link


def turn(link, folder):
    """Points the link to another folder, in one step."""
    fresh = link.with_name("next")
    fresh.symlink_to(folder)
    os.replace(fresh, link)


def best(folder, history):
    model = OneRecForConditionalGeneration.from_pretrained(folder).eval()
    processor = OneRecProcessor.from_pretrained(folder)
    out = model.recommend(
        **processor([history]), session_length=1, num_beams=50, num_return_sequences=5, exclude=[history]
    )
    return [session[0] for session in processor.batch_decode(out)]


def test_reloads_under_load_lose_nothing(link, folder, save):
    """Three models in turn, one with a smaller catalogue of other codes, under six clients."""
    history = ["m1", "m2"]
    folders = [folder, save(seed=1), save(seed=2, num_items=30)]
    expected = [best(each, history) for each in folders]
    assert len(set(map(tuple, expected))) == 3
    answers, failures, stop = [], [], threading.Event()
    with Running(link, token=TOKEN, max_batch_size=4) as server:

        def client():
            while not stop.is_set():
                response = server.post({"history": history, "top_k": 5})
                if response.status_code == 200:
                    answers.append(response.json())
                else:
                    failures.append(response.text)

        clients = [threading.Thread(target=client) for _ in range(6)]
        versions = [server.service.model.version]
        for each in clients:
            each.start()
        try:
            for number in (1, 2, 0, 1):
                turn(link, folders[number])
                response = server.post(b"", "/reload")
                assert response.json() == {
                    "reloaded": True,
                    "model": response.json()["model"],
                    "previous": versions[-1],
                }
                versions.append(response.json()["model"])
                now = len(answers)
                server.wait_until(lambda now=now: len(answers) > now + 12)
                assert server.post({"history": history}).json()["model"] == versions[-1]
        finally:
            stop.set()
            for each in clients:
                each.join()
        assert server.get("/ready").json()["model"] == versions[-1]
        assert server.metric('onerec_model_reloads_total{result="taken"}') == 4
        assert server.metric(f'onerec_model_info{{version="{versions[-1]}"}}') == 1
        assert not server.service._users or set(server.service._users) == {server.service.model}
    assert failures == []
    assert versions[0] == versions[3]
    assert versions[1] == versions[4]
    of_version = dict(zip(versions[:3], expected, strict=True))
    assert {answer["model"] for answer in answers} == set(of_version)
    for answer in answers:
        assert answer["items"] == of_version[answer["model"]]


def test_requests_that_wait_are_answered_by_the_model_that_took_them(link, folder, save):
    """The new catalogue lacks an item of the old one's answer: rows of one must not be read by the other."""
    from concurrent.futures import ThreadPoolExecutor

    other = save(seed=2, num_items=30)
    with Running(link, token=TOKEN) as server:
        server.hold()
        with ThreadPoolExecutor(3) as pool:
            early = [pool.submit(server.post, {"history": ["m39"], "top_k": 5}) for _ in range(2)]
            server.wait_until(lambda: server.service.in_flight == 2)
            server.wait_until(lambda: server.service.batcher.computing)
            before = server.service.model
            turn(link, other)
            assert server.post(b"", "/reload").json()["reloaded"]
            late = pool.submit(server.post, {"history": ["m1"], "top_k": 5})
            server.wait_until(lambda: server.service.batcher.queue_length)
            assert before.model.get_decoder().layers[0].mlp.experts.packed is not None
            server.release()
            for response in early:
                assert response.result().json()["model"] == before.version
                assert response.result().json()["items"] == best(folder, ["m39"])
            assert late.result().json()["items"] == best(other, ["m1"])
        assert server.service.model is not before
        # Nobody waits for the former model any more: what it held is given back.
        assert before.model.get_decoder().layers[0].mlp.experts.packed is None
        assert server.post({"history": ["m39"]}).status_code == 422


def _start_of(content, name):
    """Where a tensor's bytes begin in a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return 8 + size + json.loads(content[8 : 8 + size])[name]["data_offsets"][0]


def damaged(folder, tmp_path, how):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    if how == "not numbers":
        tensors = load_file(weights)
        name = max(tensors, key=lambda name: tensors[name].numel())
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "a weight is missing":
        tensors = load_file(weights)
        del tensors[next(name for name in tensors if name.endswith("q_proj.weight"))]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "pickle":
        weights.rename(broken / "pytorch_model.bin")
    elif how == "no catalogue":
        (broken / "catalogue.safetensors").unlink()
    elif how == "no config":
        (broken / "config.json").unlink()
    elif how == "damaged config":
        (broken / "config.json").write_text('{"model_type": ')
    elif how == "swapped codes":
        with safe_open(broken / "catalogue.safetensors", "np") as file:
            arrays, metadata = {name: file.get_tensor(name).copy() for name in file.keys()}, file.metadata()  # noqa: SIM118
        arrays["codes"][[3, 4]] = arrays["codes"][[4, 3]]
        save_arrays(arrays, broken / "catalogue.safetensors", metadata=metadata)
    elif how == "retired items restored":
        path = broken / "catalogue.safetensors"
        ItemCatalogue.load(path).retire(["m3"]).save(path)
        content = bytearray(path.read_bytes())
        content[content.index(0, _start_of(content, "active"))] = 1
        path.write_bytes(content)
    elif how == "a pipe":
        os.mkfifo(broken / "extra.safetensors")
    elif how == "a device":
        (broken / "extra.safetensors").symlink_to("/dev/zero")
    elif how == "a folder":
        (broken / "extra.safetensors").mkdir()
    elif how == "another model":
        (broken / "config.json").write_text('{"model_type": "t5"}')
    return broken


@pytest.mark.parametrize(
    ("how", "fragment"),
    [
        ("not numbers", "values that are not numbers"),
        ("a weight is missing", "1 of the weights are not in its files"),
        ("cut short", ""),
        ("no weights", "safetensors"),
        ("pickle", "safetensors"),
        ("no catalogue", "catalogue"),
        ("swapped codes", "does not match its hash"),
        ("retired items restored", "its hash"),
        ("a pipe", "extra.safetensors is not a regular file"),
        ("a device", "extra.safetensors is not a regular file"),
        ("a folder", "extra.safetensors is not a regular file"),
        ("no config", "config.json"),
        ("damaged config", "config.json is damaged"),
        ("another model", "type 't5', not a OneRec generator"),
    ],
)
def test_a_broken_model_does_not_get_in(shared, folder, tmp_path, how, fragment):
    link, server = shared
    version = server.service.model.version
    refused = server.metric('onerec_model_reloads_total{result="refused"}')
    turn(link, damaged(folder, tmp_path, how))
    response = server.post(b"", "/reload")
    assert response.status_code == 409, response.text
    assert fragment in response.json()["detail"]
    assert response.json()["detail"].endswith(f"version {version} is still served")
    assert server.metric('onerec_model_reloads_total{result="refused"}') == refused + 1
    assert server.post({"history": ["m1"]}).json()["model"] == version
    turn(link, folder)
    assert server.post(b"", "/reload").json() == {"reloaded": False, "model": version, "previous": version}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, folder):
    link = tmp_path_factory.mktemp("shared") / "current"
    link.symlink_to(folder)
    with Running(link, token=TOKEN) as server:
        yield link, server


def test_a_folder_that_changes_while_it_is_read(link, folder, save, tmp_path, monkeypatch):
    moving = tmp_path / "moving"
    shutil.copytree(folder, moving)
    original = models.version_of

    def slow(path):
        version = original(path)
        (moving / "config.json").write_text((moving / "config.json").read_text() + "\n")
        return version

    monkeypatch.setattr(models, "version_of", slow)
    with pytest.raises(ValueError, match="changed while they were read"):
        models.ServedModel.load(str(moving))


@pytest.mark.parametrize("put_back", [False, True])
def test_a_folder_that_is_renamed_while_it_is_read(folder, save, tmp_path, put_back):
    """Half of one model and half of another would fit together; so would one whose version is the other's."""
    served, aside = tmp_path / "served", tmp_path / "aside"
    shutil.copytree(folder, served)
    shutil.copytree(save(seed=1), tmp_path / "other")

    def load(path, load_items):
        os.rename(served, aside)
        os.rename(tmp_path / "other", served)
        found = models.load_generator(path, load_items)
        if put_back:
            os.rename(served, tmp_path / "other")
            os.rename(aside, served)
        return found

    with pytest.raises(ValueError, match="changed while they were read"):
        models.ServedModel.load(str(served), load_recommender=load)


def test_files_that_others_write_into_the_folder_do_not_matter(folder, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(folder, tmp_path / "written")
    os.rename(tmp_path / "written", served)

    def load(path, load_items):
        (served / "results.json").write_text("{}")
        return models.load_generator(path, load_items)

    assert models.ServedModel.load(str(served), load_recommender=load) is not None


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(OSError, match="no such folder"):
        models.ServedModel.load(str(tmp_path / "models" / "current"))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_nothing_is_read_from_the_folder_any_more(folder, tmp_path):
    """Files that are copied over in place, not renamed, would else kill the process at its next access."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    with Running(copied) as server:
        before = server.post({"history": ["m1", "m2"]}).json()
        mapped = []
        with open("/proc/self/maps") as maps:
            for line in maps:
                if str(copied) in line:
                    mapped.append(range(*(int(end, 16) for end in line.split()[0].split("-"))))
        served = server.service.model
        catalogue = served.catalogue
        assert served.model.catalogue is catalogue
        arrays = [catalogue.codes, catalogue.active, catalogue._keys, catalogue._id_order, catalogue._code_order]
        places = [array.ctypes.data for array in arrays]
        places += [tensor.data_ptr() for tensor in (*served.model.parameters(), *served.model.buffers())]
        assert not [place for place in places if any(place in part for part in mapped)]
        for name in ("model.safetensors", "catalogue.safetensors"):
            os.truncate(copied / name, 10)
        assert server.post({"history": ["m1", "m2"]}).json() == before
