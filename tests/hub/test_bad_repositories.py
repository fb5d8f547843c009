"""Repositories that are incomplete, mixed up, too new or hostile: one clear message, and nothing of theirs is run."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoProcessor

from onerec_hf import OneRecForConditionalGeneration, OneRecForSessionReward, OneRecModel, OneRecRewardConfig
from tests.conftest import make_catalogue, make_model

REPO = "tester/onerec-movies"
LOADERS = (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration, OneRecModel)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def saved(model, processor, tmp_path):
    """The folder of a model and its processor; tests spoil it."""
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def bomb(tmp_path):
    """(content of a pickle, path of the file that it makes when it is read)."""
    trace = tmp_path / "exploded"
    content = pickle.dumps(Bomb(trace))
    pickle.loads(content)
    assert trace.exists()
    trace.unlink()
    return content, trace


@pytest.fixture(params=["folder", "hub"])
def repo(request, saved, hub):
    """A function that gives the spoiled folder's name, or that of a repository with its files."""

    def published() -> str:
        if request.param == "folder":
            return str(saved)
        hub.commit_files(
            REPO, {str(file.relative_to(saved)): file.read_bytes() for file in saved.rglob("*") if file.is_file()}
        )
        return REPO

    return published


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_without_a_catalogue_it_loads_and_says_what_is_missing(repo, saved):
    (saved / "catalogue.safetensors").unlink()
    name = repo()
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(name), AutoProcessor.from_pretrained(name)
    with pytest.raises(ValueError, match=r"no item catalogue: .* holds no catalogue.safetensors"):
        processor([["m1"]])
    processor.set_catalogue(make_catalogue())
    inputs = processor([["m1"]])
    with pytest.raises(ValueError, match="this model has no item catalogue"):
        model.recommend(**inputs)
    model.set_catalogue(processor.catalogue)
    assert model.recommend(**inputs, num_beams=2) is not None


def test_another_models_catalogue_is_refused(repo, saved):
    make_catalogue(seed=9).save(saved / "catalogue.safetensors")
    name = repo()
    for loader in LOADERS[:2]:
        with pytest.raises(ValueError, match=rf"^{name}: this model was trained with the catalogue"):
            loader.from_pretrained(name)


def test_a_catalogue_of_other_codebooks_is_refused(repo, saved):
    make_catalogue(codebook_sizes=(7, 7, 7)).save(saved / "catalogue.safetensors")
    name = repo()
    for loader in (AutoModelForSeq2SeqLM, AutoProcessor):
        with pytest.raises(ValueError, match=f"^{name}: .*; they belong to different models"):
            loader.from_pretrained(name)


def test_a_newer_format_asks_for_an_upgrade(repo, saved):
    # A newer version's config may well hold what today's would not take; the version is what is said.
    edit(saved / "config.json", format_version=9, codebook_sizes={"a": 4}, auto_map={"AutoConfig": "new_onerec.New"})
    name = repo()
    for load in (
        AutoConfig.from_pretrained,
        AutoModelForSeq2SeqLM.from_pretrained,
        OneRecForConditionalGeneration.from_pretrained,
        lambda name: AutoConfig.from_pretrained(name, trust_remote_code=True),
    ):
        with pytest.raises(
            ValueError, match=r"format version 9, .* reads up to version 3: upgrade it \(pip install -U"
        ):
            load(name)


def test_a_newer_reward_model_too(tmp_path):
    model = OneRecForSessionReward(OneRecRewardConfig(num_items=2, hidden_size=8, num_attention_heads=2))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    edit(tmp_path / "config.json", format_version=7)
    with pytest.raises(ValueError, match="format version 7"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_newer_catalogue_asks_for_an_upgrade(repo, saved):
    path = saved / "catalogue.safetensors"
    content = path.read_bytes()
    assert content.count(b'"version":"2"') == 1
    path.write_bytes(content.replace(b'"version":"2"', b'"version":"9"'))
    name = repo()
    for loader in (AutoModelForSeq2SeqLM, AutoProcessor):
        with pytest.raises(ValueError, match=f"^{name}: .* is of catalogue version 9, this onerec_hf reads version 2"):
            loader.from_pretrained(name)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_and_not_read(repo, saved, bomb, pickled):
    content, trace = bomb
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(content)
    if pickled.endswith(".json"):
        (saved / "pytorch_model.bin").rename(saved / "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
        (saved / pickled).write_text(json.dumps(index))
    name = repo()
    for loader in LOADERS:
        with pytest.raises(ValueError, match=rf"holds pickled weights \({pickled}\).*OneRec loads safetensors only"):
            loader.from_pretrained(name)
        with pytest.raises(ValueError, match="safetensors only"):
            loader.from_pretrained(name, use_safetensors=False)
    assert not trace.exists()


def test_a_pickle_beside_safetensors_is_not_read(repo, saved, bomb):
    content, trace = bomb
    for name in ("pytorch_model.bin", "training_args.bin", "catalogue.pkl", "optimizer.pt"):
        (saved / name).write_bytes(content)
    name = repo()
    assert AutoModelForSeq2SeqLM.from_pretrained(name).catalogue is not None
    assert AutoProcessor.from_pretrained(name).catalogue is not None
    assert not trace.exists()


@pytest.mark.parametrize(
    "shard", ["model-1.bin", "../outside.safetensors", "/tmp/outside.safetensors", "a\\b.safetensors"]
)
def test_an_index_names_safetensors_beside_it_only(repo, saved, bomb, shard):
    content, trace = bomb
    weights = load_file(saved / "model.safetensors")
    save_file(weights, saved.parent / "outside.safetensors")
    (saved / "model.safetensors").unlink()
    (saved / "model-1.bin").write_bytes(content)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    name = repo()
    for loader in LOADERS:
        with pytest.raises(ValueError, match="only safetensors files beside it are loaded"):
            loader.from_pretrained(name)
    assert not trace.exists()


def test_a_config_names_no_weights(repo, saved, bomb):
    content, trace = bomb
    (saved / "adapter_model.bin").write_bytes(content)  # the one pickle that the library takes by that name
    edit(saved / "config.json", transformers_weights="adapter_model.bin")
    name = repo()
    for loader in LOADERS:
        with pytest.raises(ValueError, match=r"names the weights file 'adapter_model.bin'"):
            loader.from_pretrained(name)
    assert not trace.exists()


@pytest.mark.parametrize("spelled", ["{}", "_{}", "_{}_internal"])
def test_a_config_chooses_no_kernel_and_no_quantization(repo, saved, model, spelled):
    """They would be imported from the Hub, or from a package that is not there: only the caller names them."""
    edit(
        saved / "config.json",
        **{
            spelled.format("attn_implementation"): "someone/some-kernel@main:fn",
            spelled.format("experts_implementation"): "deepgemm",
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "fusion_config": {"rms_norm": True},
        },
    )
    name = repo()
    assert AutoConfig.from_pretrained(name)._attn_implementation is None
    for loader in LOADERS:
        loaded = loader.from_pretrained(name)
        assert loaded.config._attn_implementation == model.config._attn_implementation
        assert loaded.config._experts_implementation == model.config._experts_implementation
        assert not hasattr(loaded.config, "quantization_config")
        assert not hasattr(loaded.config, "fusion_config")
        assert loader.from_pretrained(name, attn_implementation="eager").config._attn_implementation == "eager"


def test_a_quantized_checkpoint_needs_the_callers_word(repo, saved, monkeypatch):
    import transformers.modeling_utils

    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(saved / "config.json", quantization_config=quantization)
    tensors = load_file(saved / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name].view("uint8").reshape(-1, 1)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    name = repo()
    for loader in LOADERS[:2]:
        with pytest.raises(ValueError, match=f"^{name}: its weights were saved quantized .bitsandbytes.*pass quantiz"):
            loader.from_pretrained(name)

    class Reached(Exception):
        pass

    def quantizer(config, given, *args, **kwargs):
        raise Reached(config.quantization_config, given)

    monkeypatch.setattr(transformers.modeling_utils, "get_hf_quantizer", quantizer)
    given = "a configuration"
    for loader in LOADERS[:2]:
        with pytest.raises(Reached) as reached:
            loader.from_pretrained(name, quantization_config=given)
        assert reached.value.args == (quantization, given)


def test_a_pickled_adapter_is_refused(repo, model, processor, saved, hub, bomb, tmp_path):
    from peft import LoraConfig, get_peft_model

    content, trace = bomb
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(make_model(make_catalogue()), LoraConfig(target_modules=["q_proj"], r=2))
    shutil.rmtree(saved)
    adapted.save_pretrained(saved)
    edit(saved / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    name = repo()
    for loader in LOADERS[:2]:  # a good one loads, with the base model's catalogue
        assert loader.from_pretrained(name).catalogue.hash == model.catalogue.hash
    (saved / "adapter_model.safetensors").rename(tmp_path / "kept")
    (saved / "adapter_model.bin").write_bytes(content)
    if name == REPO:
        hub.commit_files(REPO, {"adapter_model.safetensors": None, "adapter_model.bin": content})
    for load in (*(loader.from_pretrained for loader in LOADERS[:2]), model.load_adapter):
        with pytest.raises(ValueError, match=r"pickled weights \(adapter_model.bin\)"):
            load(name)
    assert not trace.exists()


def test_no_weights_at_all(repo, saved):
    (saved / "model.safetensors").unlink()
    name = repo()
    with pytest.raises(OSError, match=r"holds no weights: no file named model.safetensors or"):
        AutoModelForSeq2SeqLM.from_pretrained(name)


@pytest.mark.parametrize("entry", ["../evil.Evil", "{outside}/evil.Evil", "tester/other--evil.Evil", "evil.Evil"])
def test_code_that_the_config_names_is_not_run_by_the_package(repo, saved, entry):
    trace = saved.parent / "ran"
    source = f"open({str(trace)!r}, 'w')\nclass Evil: pass\n"
    for folder in (saved, saved.parent):
        (folder / "evil.py").write_text(source)
    entry = entry.format(outside=saved.parent)
    for name in ("config.json", "processor_config.json"):
        edit(saved / name, auto_map=dict.fromkeys(["AutoConfig", "AutoModelForSeq2SeqLM", "AutoProcessor"], entry))
    edit(saved / "tokenizer_config.json", auto_map={"AutoTokenizer": [entry, None]})
    name = repo()
    for trust in (None, True):
        AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=trust)
        AutoProcessor.from_pretrained(name, trust_remote_code=trust)
    assert not trace.exists()


def test_paths_out_of_the_repository_are_refused_by_the_client(hub, tmp_path):
    hub.commit_files(REPO, {"config.json": "{}", "../../../escaped.txt": "out"})
    with pytest.raises(ValueError, match=r"\.\."):
        hf_hub_download(REPO, "../../../escaped.txt")
    for options in ({}, {"local_dir": tmp_path / "copy"}):
        with pytest.raises(ValueError, match=r"\.\."):
            snapshot_download(REPO, **options)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_the_remote_code_path_refuses_to_climb(tmp_path, saved):
    """Without the package, with the user's trust: the library itself does not follow `..`."""
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    edit(saved / "config.json", auto_map={"AutoConfig": "../evil.Evil"})
    code = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    done = subprocess.run(
        [sys.executable, "-c", code, saved], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "ValueError" in done.stderr
    assert not (tmp_path / "ran").exists()
