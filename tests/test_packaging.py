"""Wheel and sdist: one top-level package, everything in it, and an import from a bare virtual environment."""

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind, source, out):
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=source)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What git tracks, without the symlinks: a checkout where they became something else has to build as well."""
    folder = tmp_path_factory.mktemp("source")
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if not (ROOT / name).is_symlink() and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    for kind in ("sdist", "wheel"):  # a process each, as build frontends do
        build(kind, source, out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_holds_one_package_with_templates_and_marker(distributions):
    names = zipfile.ZipFile(distributions[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"onerec_hf"}
    for wanted in (
        "onerec_hf/py.typed",
        "onerec_hf/modeling/modeling_onerec.py",
        "onerec_hf/trainers/onerec_trainer.py",
        "onerec_hf/hub_cards/templates/generator.md.jinja",
        "onerec_hf/evaluation/modules/recall_at_k/recall_at_k.py",
        "onerec_hf/cli/main.py",
    ):
        assert wanted in names
    modules = [p for room in ("modeling", "trainers", "hub_cards") for p in (ROOT / room).glob("*.py")]
    modules += [p for p in (ROOT / "onerec_hf").rglob("*.py") if not p.is_symlink()]
    modules += (ROOT / "hub_cards" / "templates").iterdir()
    packaged = {name.rsplit("/", 1)[-1] for name in names}
    assert {path.name for path in modules} <= packaged


def test_sdist_builds_the_same_wheel(distributions, tmp_path):
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    build("wheel", folder, tmp_path)
    (again,) = tmp_path.glob("*.whl")
    again_names, wheel_names = (
        sorted(name for name in zipfile.ZipFile(file).namelist() if name.endswith((".py", ".jinja", ".typed")))
        for file in (again, wheel)
    )
    assert again_names == wheel_names


def test_wheel_installs_into_a_bare_environment(distributions, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", distributions[0])
    # Without any dependency the command still answers; with this environment's packages behind it the package imports.
    assert "quickstart" in run(tmp_path / "venv" / "bin" / "onerec-hf", "--help", cwd=tmp_path)
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys; sys.path.append({site!r}); import onerec_hf; from transformers import AutoConfig\n"
        "from onerec_hf.evaluation import metric_path; import onerec_hf.trainers.onerec_trainer, onerec_hf.hub_cards\n"
        "print(onerec_hf.__file__, type(AutoConfig.for_model('onerec')).__module__)"
    )
    file, module = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert module == "onerec_hf.modeling.configuration_onerec"
