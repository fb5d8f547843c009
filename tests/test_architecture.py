"""The structure of the repository: rooms, arrows between and inside them, sizes, names, and imports of modeling/."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import onerec_hf

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {room: ROOT / room for room in ("modeling", "trainers", "hub_cards")}
ROOMS |= {
    room: ROOT / "onerec_hf" / room
    for room in ("semantic_ids", "data", "planning", "serving", "evaluation", "baselines", "workflows", "cli")
}
# Rooms that a room may import from; imports for type checking count.
ARROWS = {
    "modeling": set(),
    "semantic_ids": {"modeling"},
    "data": {"modeling"},
    "planning": {"modeling"},
    "serving": {"modeling"},
    "evaluation": {"modeling", "semantic_ids", "data"},
    "baselines": {"modeling", "semantic_ids", "data", "evaluation"},
    "hub_cards": {"modeling", "semantic_ids", "data", "evaluation", "baselines"},
    "trainers": {"modeling", "semantic_ids", "data", "evaluation", "baselines", "hub_cards"},
    "workflows": set(ROOMS) - {"cli"},
    "cli": set(ROOMS),
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "onerec_hf" else ("onerec_hf", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for folder in ROOMS.values() for file in folder.rglob("*.py")}
FILES |= {module_name(file): file for file in (ROOT / "onerec_hf").glob("*.py")}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def imports(name: str):
    """(module, imported names, level) of every import statement of a module, inside functions too."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*above, *filter(None, [node.module])]), [alias.name for alias in node.names], node.level


# What the packages export, by the file that defines it.
EXPORTS = {
    (name, exported): module
    for name, file in FILES.items()
    if file.name == "__init__.py"
    for module, names, _ in imports(name)
    for exported in names
}


def imported_files(name: str):
    """The files that a module imports; of a package, those that define the imported names."""
    for module, names, _ in imports(name):
        for imported in names or [""]:
            target = f"{module}.{imported}"
            target = target if target in FILES else EXPORTS.get((module, imported), module)
            if target in FILES and target != name:
                yield target


GRAPH = {name: sorted(set(imported_files(name))) for name in FILES}


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def circle_through(start: str) -> list[str] | None:
    """A shortest way from a file back to itself."""
    ways, waiting = {start: [start]}, [start]
    for name in waiting:
        for target in GRAPH[name]:
            if target == start:
                return [*ways[name], start]
            if target not in ways:
                ways[target] = [*ways[name], target]
                waiting.append(target)
    return None


@pytest.mark.parametrize("name", sorted(name for name in FILES if room_of(name) == "modeling"))
def test_modeling_travels_alone(name):
    allowed = {
        "torch",
        "transformers",
        "huggingface_hub",
        "numpy",
        "safetensors",
        "__future__",
        *sys.stdlib_module_names,
    }
    for module, _, level in imports(name):
        if level:
            assert level == 1, f"{name}: only siblings are copied to the Hub"
            assert module.count(".") <= 2, f"{name}: {module} is not a sibling"
        else:
            assert module.split(".")[0] in allowed, f"{name} imports {module}"


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_run_one_way(room):
    for name in (name for name in FILES if room_of(name) == room):
        for module, _, _ in imports(name):
            assert room_of(module) in ARROWS[room] | {room, None}, f"{name} imports {module}"
            assert module.split(".")[0] not in ROOMS, f"{name} imports {module} by its folder"
        for target in GRAPH[name]:
            assert room_of(target) in ARROWS[room] | {room, None}, f"{name} imports {target}"


def test_no_circle_between_files():
    circles = {frozenset(way): way for way in map(circle_through, FILES) if way is not None}
    assert not circles, "\n".join(" -> ".join(way) for way in circles.values())


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
        "import sys; from onerec_hf.cli.main import main\n"
        "status = main(['--help']); assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(status)"
    )
    before = os.times()
    done = run("-c", code)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    # Of the processor: the machine is shared.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


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
    assert json.loads(done.stdout) == wanted, done.stderr


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_the_model_is_read_in_one_sitting():
    # The model of the paper and what it needs: 24, of which two for the Hub. Beside it, unknown to it: item scores, evidence, diversity; and five files
    # of features. Two for sessions in one pass: the session head, and what a generator has beside its weights. One for item vectors of low rank.
    assert len(list(ROOMS["modeling"].glob("*.py"))) <= 42
    assert sum(lines(ROOMS["modeling"] / name) for name in ("modeling_onerec.py", "layers_onerec.py")) <= 1200


def test_files_are_short():
    assert {name: lines(file) for name, file in FILES.items() if lines(file) > 700} == {}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300


def test_result_files_are_small():
    assert sum(file.stat().st_size for file in (ROOT / "benchmarks" / "results").rglob("*.*")) <= 500_000


def test_no_test_changes_the_import_path():
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                changed = ast.unparse(node)
                assert node.attr != "syspath_prepend", file
                assert changed not in ("sys.path.insert", "sys.path.append", "sys.path.extend"), file
            if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
                targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
                assert not any(ast.unparse(target).startswith("sys.path") for target in targets), file
