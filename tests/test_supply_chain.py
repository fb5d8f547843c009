"""What the source may not do with what others wrote: unpickle it, run it, load it as YAML with tags, or trust a repository's code unasked."""

import ast
import pickle
import re
from pathlib import Path

import pytest

from tests.unpickling import heard_unpickling

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for room in ("modeling", "trainers", "hub_cards", "onerec_hf", "benchmarks", "examples")
    for path in sorted((ROOT / room).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
    and path.name != "execute.py"  # runs the notebooks beside it, and is not installed
]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "rdata"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"read_pickle", "to_pickle", "unsafe_load", "full_load", "load_checkpoint_in_model"}


def offences(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"import {name.name}" for name in node.names if name.name.split(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(f"from {node.module} import")
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            value = getattr(keyword.value, "value", None)
            if keyword.arg in ("allow_pickle", "trust_remote_code") and value is not False:
                if keyword.arg == "trust_remote_code" and not isinstance(keyword.value, ast.Constant):
                    continue  # what the caller asked for
                found.append(f"{keyword.arg}={value}")
            if keyword.arg == "weights_only" and value is not True:
                found.append(f"weights_only={value}")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg for keyword in node.keywords}
            name = called.rsplit(".", 1)[-1]
            if called in CALLS or name in METHODS or called in ("os.system", "os.popen"):
                found.append(called)
            if called in ("yaml.load", "yaml.load_all"):
                found.append(called)
            if called == "torch.load" and "weights_only" not in keywords:
                found.append("torch.load without weights_only=True")
        if isinstance(node, ast.FunctionDef):  # a default of True
            named = [*node.args.args, *node.args.kwonlyargs]
            defaults = [
                *[None] * (len(node.args.args) - len(node.args.defaults)),
                *node.args.defaults,
                *node.args.kw_defaults,
            ]
            for argument, default in zip(named, defaults, strict=True):
                if argument.arg == "trust_remote_code" and getattr(default, "value", False) is not False:
                    found.append("trust_remote_code on by default")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_unpickles_and_runs_nothing(path):
    assert offences(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "AutoModel.from_pretrained(repo, trust_remote_code=True)",
        "def load(repo, trust_remote_code=True): pass",
    ],
)
def test_what_the_source_may_not_do_is_seen(line):
    assert offences(ast.parse(line))


def test_there_are_sources():
    assert len(SOURCES) > 100
    assert any(path.name == "catalogue.py" for path in SOURCES)


def test_weights_are_written_as_safetensors_only():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"safe_serialization\s*=\s*False", text), path


def test_unpickling_is_heard():
    with heard_unpickling() as heard:
        pickle.loads(pickle.dumps(Path("x")))
    assert any("pathlib" in line for line in heard)
