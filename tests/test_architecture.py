"""What the house promises: names, arrows between rooms, imports of modeling/, a command line that answers at once."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import onerec_hf

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"modeling": ROOT / "modeling", "trainers": ROOT / "trainers", "hub_cards": ROOT / "hub_cards"}
ROOMS |= {
    name: ROOT / "onerec_hf" / name for name in ("data", "semantic_ids", "evaluation", "planning", "serving", "cli")
}
# Which rooms a room may import from.
ARROWS = {
    "modeling": set(),
    "semantic_ids": {"modeling"},
    "data": {"modeling"},
    "evaluation": {"modeling"},
    "planning": {"modeling"},
    "trainers": {"modeling", "semantic_ids", "data", "evaluation", "hub_cards"},
    "hub_cards": {"modeling", "semantic_ids", "data", "evaluation"},
    "serving": {"modeling"},
    "cli": set(ROOMS),
}


def imports(file: Path):
    """(module, level) of every import statement of a file, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("file", sorted(ROOMS["modeling"].glob("*.py")), ids=lambda file: file.name)
def test_modeling_travels_alone(file):
    allowed = {"torch", "transformers", "huggingface_hub", "numpy", "safetensors", "__future__"} | set(
        sys.stdlib_module_names
    )
    for module, level in imports(file):
        if level:
            assert level == 1, f"{file.name}: only siblings travel along, not {'.' * level}{module}"
            assert "." not in module
        else:
            assert module.split(".")[0] in allowed, f"{file.name} imports {module}"


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_run_one_way(room):
    for file in ROOMS[room].rglob("*.py"):
        for module, _ in imports(file):
            parts = module.split(".")
            if parts[0] == "onerec_hf" and len(parts) > 1 and parts[1] in ROOMS:
                assert parts[1] in ARROWS[room] | {room}, f"{file.relative_to(ROOT)} imports {module}"
            assert parts[0] not in ("modeling", "trainers", "hub_cards"), f"{file} imports {module} by its folder"


def test_public_classes_know_their_import_name():
    for name in onerec_hf.__all__:
        value = getattr(onerec_hf, name)
        if inspect.isclass(value):
            assert value.__module__.startswith("onerec_hf."), (name, value.__module__)


def test_every_file_says_what_it_is():
    for folder in (*ROOMS.values(), ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"):
        for file in folder.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not text.strip() or ast.get_docstring(ast.parse(text)), file


def run(*command, **kwargs):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, **kwargs)


def test_help_needs_neither_torch_nor_transformers_and_is_quick():
    code = (
        "import sys; sys.argv = ['onerec-hf', '--help']\n"
        "from onerec_hf.cli.main import main\n"
        "status = main(); assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(status)"
    )
    before = os.times()
    done = run("-c", code)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    # Of the processor: the machine is shared.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_import_registers_the_auto_classes():
    code = (
        "import onerec_hf; from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM\n"
        "config = AutoConfig.for_model('onerec', codebook_sizes=[4, 4], hidden_size=16, num_experts=2, encoder_layers=1)\n"
        "print(type(AutoModel.from_config(config)).__name__, type(AutoModelForSeq2SeqLM.from_config(config)).__name__)"
    )
    done = run("-c", code)
    assert done.stdout.split() == ["OneRecModel", "OneRecForConditionalGeneration"], done.stderr
    assert done.stderr == ""


def test_saved_folder_loads_in_a_fresh_process(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    wanted = processor.batch_decode(model.recommend(**processor([["m1", "m2"]]), num_beams=4, num_return_sequences=4))
    code = (
        "import sys, json, onerec_hf\n"
        "from transformers import AutoModelForSeq2SeqLM, AutoProcessor\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "out = model.recommend(**processor([['m1', 'm2']]), num_beams=4, num_return_sequences=4)\n"
        "print(json.dumps(processor.batch_decode(out)))"
    )
    done = run("-c", code, str(tmp_path))
    import json

    assert json.loads(done.stdout) == wanted, done.stderr
