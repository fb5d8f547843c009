"""Wheel, sdist and container: complete, with one version, importable from a bare virtual environment, and a server that starts."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import onerec_hf

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("modeling", "trainers", "hub_cards")
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


def packaged_files():
    """What belongs into the package, by its path there: every tracked file of it and of the rooms beside it."""
    tracked = [Path(name) for name in filter(None, run("git", "ls-files", "-z", cwd=ROOT).split("\0"))]
    tracked = [path for path in tracked if (ROOT / path).is_file()]
    rooms = {Path("onerec_hf", path) for path in tracked if path.parts[0] in ROOMS}
    return {str(path) for path in rooms | {path for path in tracked if path.parts[0] == "onerec_hf"}}


def test_the_wheel_holds_the_whole_package_and_nothing_else(distributions):
    names = {name for name in zipfile.ZipFile(distributions[0]).namelist() if ".dist-info/" not in name}
    assert names == packaged_files()


def test_the_sdist_holds_the_sources(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    wanted = {Path(name) for name in packaged_files()}
    wanted = {Path(*path.parts[1:]) if path.parts[1] in ROOMS else path for path in wanted}
    assert wanted | {Path(name) for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE")} <= names


def test_the_version_is_written_once(distributions):
    wheel, sdist = distributions
    assert wheel.name == f"onerec_hf-{onerec_hf.__version__}-py3-none-any.whl"
    assert sdist.name == f"onerec_hf-{onerec_hf.__version__}.tar.gz"
    metadata = zipfile.ZipFile(wheel).read(f"onerec_hf-{onerec_hf.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {onerec_hf.__version__}\n" in metadata
    assert f"## [{onerec_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name in ("pyproject.toml", "setup.py", "CITATION.cff"):
        assert onerec_hf.__version__ not in (ROOT / name).read_text(encoding="utf-8"), name


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


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An empty virtual environment."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=True)
    return folder


def add_dependencies(environment):
    """Makes this environment's packages importable in another one, behind its own."""
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))


def test_wheel_installs_into_a_bare_environment(distributions, bare, tmp_path):
    python = bare / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", distributions[0])
    # The command line answers without any dependency; with this environment's packages the package imports.
    assert "quickstart" in run(bare / "bin" / "onerec-hf", "--help", cwd=tmp_path)
    assert run(python, "-m", "onerec_hf", "--version", cwd=tmp_path) == f"onerec-hf {onerec_hf.__version__}\n"
    add_dependencies(bare)
    code = (
        "import onerec_hf; from transformers import AutoConfig\n"
        "from onerec_hf.evaluation import metric_path; import onerec_hf.trainers.onerec_trainer, onerec_hf.hub_cards\n"
        "print(onerec_hf.__file__, type(AutoConfig.for_model('onerec')).__module__)"
    )
    file, module = run(python, "-c", code, cwd=tmp_path, env=environment()).split()
    assert Path(file).is_relative_to(bare)
    assert module == "onerec_hf.modeling.configuration_onerec"


def environment(**changes):
    """Without the checkout on the path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changes


def instructions():
    """The Dockerfile as pairs of instruction and arguments."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_container_starts_a_server(distributions, bare, model, processor, tmp_path):
    """The Dockerfile's steps without docker: COPY, RUN of pip, ENTRYPOINT with CMD, HEALTHCHECK. Dependencies are there, as no network is."""
    steps = instructions()
    found = dict(steps)
    assert found["FROM"] == "python:3.11-slim"
    names = [name for name, _ in steps]
    assert int(found["USER"]) > 0
    assert names.index("USER") < names.index("ENTRYPOINT")
    source, target = found["COPY"].split()
    assert source == "dist/*.whl"
    (tmp_path / target).mkdir()
    shutil.copy(distributions[0], tmp_path / target)

    path = f"{bare / 'bin'}:{os.environ['PATH']}"
    offline = environment(PATH=path, PIP_NO_INDEX="1", PIP_NO_DEPS="1", PIP_FORCE_REINSTALL="1")
    (pip,) = [command for name, command in steps if name == "RUN" and command.startswith("pip ")]
    run("sh", "-c", pip, cwd=tmp_path, env=offline)
    add_dependencies(bare)

    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.rglob("*"):
        file.chmod(0o444)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def here(command):
        return [part.replace("8000", str(port)).replace("/model", str(folder)) for part in json.loads(command)]

    settings = dict(pair.split("=") for pair in found["ENV"].split()) | {"HOME": str(tmp_path)}
    settings |= {"PATH": path, "ONEREC_HF_TOKEN": "secret-of-this-test"}
    command = [*here(found["ENTRYPOINT"]), *here(found["CMD"])]
    health = here(found["HEALTHCHECK"].split(" CMD ")[1])
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(**settings), stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            for _ in range(120):
                healthy = subprocess.run(health, env=environment(PATH=path), capture_output=True).returncode == 0
                if healthy or server.poll() is not None:
                    break
                time.sleep(0.5)
            server.terminate()
            _, output = server.communicate(timeout=60)
        finally:
            server.kill()
    assert healthy, output
    assert server.returncode == 0, output


def test_every_supported_python_can_install_the_pinned_dependencies():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = metadata["requires-python"].removeprefix(">=")
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    for name in (line.split("==")[0] for line in pinned):
        required = importlib.metadata.metadata(name)["Requires-Python"]
        assert SpecifierSet(required).contains(oldest), f"{name} needs Python {required}"
    named = [line.rsplit(" ", 1)[-1] for line in metadata["classifiers"] if " :: 3." in line]
    assert named[0] == oldest


def test_the_release_script_reads_the_version_and_reports_a_missing_python():
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.version_of_the_source() == onerec_hf.__version__
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert run(script.find_python(here), "--version").startswith(f"Python {here}.")
    assert script.find_python("3.99") is None
    assert script.oldest_python() in script.PYTHONS
