#!/usr/bin/env python3
"""
Builds wheel and sdist into dist/ and checks both in new virtual environments for Python 3.10 to 3.13. Uploads nothing.

    python3 .ci/release.py                   # wheel with all dependencies, sdist, on each Python found here
    python3 .ci/release.py --bare            # without dependencies: installation, import, command line; gigabytes and minutes less
    python3 .ci/release.py --environment .venv   # the same, but on that environment's Python with its packages
    python3 .ci/release.py --python 3.12

A Python that is not on this machine is reported as "not checked". On one that is older than `requires-python`, pip must refuse the package. The exit
status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

BARE = """
import sys, onerec_hf
assert onerec_hf.__version__ == sys.argv[1] and "site-packages" in onerec_hf.__file__, onerec_hf.__file__
import importlib.metadata
assert importlib.metadata.version("onerec-hf") == sys.argv[1]
"""

FULL = """
import tempfile, onerec_hf, numpy as np
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, pipeline
from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
codes = np.stack([np.arange(20) // 5, np.arange(20) % 5], axis=1)
catalogue = ItemCatalogue([f"i{n}" for n in range(20)], codes, codebook_sizes=[4, 5])
config = OneRecConfig(codebook_sizes=[4, 5], hidden_size=16, num_experts=2, encoder_layers=1, decoder_layers=1, session_length=2)
model = OneRecForConditionalGeneration(config).eval()
model.set_catalogue(catalogue)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    OneRecProcessor.from_catalogue(catalogue).save_pretrained(folder)
    loaded, processor = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor([["i1", "i2"]], return_tensors="pt")
    sessions = [processor.batch_decode(each.recommend(**inputs, num_beams=4)) for each in (model, loaded)]
    assert sessions[0] == sessions[1] and len(sessions[0]) == 1, sessions
    pipeline("generative-recommendation", model=loaded, processor=processor)
import onerec_hf.cli.train, onerec_hf.cli.align, onerec_hf.planning, onerec_hf.workflows
"""


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))[:200]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def find_python(version: str) -> str | None:
    """An interpreter of this version: on the path, of pyenv, or of uv."""
    found = shutil.which(f"python{version}")
    managed = [
        *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
        *Path.home().glob(f".local/share/uv/python/cpython-{version}.*/bin/python3"),
    ]
    for candidate in ([found] if found else []) + sorted(map(str, managed), reverse=True):
        asked = subprocess.run([candidate, "--version"], capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.startswith(f"Python {version}."):
            return candidate
    return None


def read(file: str, pattern: str) -> str:
    """The first group of a pattern in a file of the source."""
    found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{file}: no line {pattern}")
    return found[1]


def version_of_the_source() -> str:
    return read("onerec_hf/__init__.py", r'^__version__ = "([^"]+)"')


def oldest_python() -> str:
    return read("pyproject.toml", r'^requires-python = ">=([\d.]+)"')


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist of what git has committed, in dist/, with their metadata checked."""
    run(sys.executable, "-m", "venv", folder / "build")
    python = folder / "build" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "build", "twine")
    source = folder / "source"
    source.mkdir()
    run("git", "archive", "-o", folder / "source.tar", "HEAD", cwd=ROOT)
    run("tar", "-xf", folder / "source.tar", "-C", source)
    shutil.rmtree(DIST, ignore_errors=True)
    run(python, "-m", "build", "--outdir", DIST, source)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(python, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def check(interpreter: str, distribution: Path, version: str, folder: Path, options: argparse.Namespace) -> str:
    """
    Installs and tries one distribution.

    Returns:
        How deep the check went.

    Raises:
        RuntimeError, AssertionError: what failed.
    """
    run(interpreter, "-m", "venv", folder)
    name = run(interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    if PYTHONS.index(name) < PYTHONS.index(oldest_python()):
        install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", distribution]
        refused = subprocess.run([str(part) for part in install], capture_output=True, text=True)
        assert refused.returncode, "pip installed it on a Python that is not supported"
        assert "requires a different Python" in refused.stderr, refused.stderr
        return f"as unsupported: pip refuses it, Python {oldest_python()} is required"
    python, command = folder / "bin" / "python", folder / "bin" / "onerec-hf"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)
    inside = {"cwd": folder, "env": environment}
    (site,) = folder.glob("lib/python*/site-packages")
    shared = options.environment and Path(options.environment).resolve() / site.relative_to(folder)
    # The wheel brings its dependencies. The sdist is the same package: it is built and installed without them.
    installed = distribution.suffix == ".whl" and not (options.bare or options.environment)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    install += ["-c", options.constraints] if installed else ["--no-deps"]
    run(*install, distribution)
    run(python, "-c", BARE, version, **inside)
    ours = ["-x", r"site-packages/(?!onerec_hf/)"]
    run(python, "-W", "error::SyntaxWarning", "-m", "compileall", "-q", "-f", *ours, folder / "lib")
    assert "quickstart" in run(command, "--help", **inside)
    for program in ([command], [python, "-m", "onerec_hf"]):
        assert run(*program, "--version", **inside) == f"onerec-hf {version}\n"
    if installed:
        run(python, "-m", "pip", "check", **inside)
    elif shared and shared.is_dir():
        (site / "shared.pth").write_text(str(shared))
    else:
        return "without dependencies"
    run(python, "-c", FULL, **inside)
    return "with dependencies" if installed else f"with the packages of {options.environment}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bare", action="store_true", help="without dependencies")
    parser.add_argument("--environment", help="virtual environment whose packages are the dependencies")
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS, help="versions to check")
    parser.add_argument(
        "--constraints", default=str(ROOT / "constraints.txt"), help="pip constraints of the dependencies"
    )
    options = parser.parse_args()
    version = version_of_the_source()
    if f"## [{version}]" not in (ROOT / "CHANGELOG.md").read_text():
        raise SystemExit(f"CHANGELOG.md: no section for {version}. Write it before the release.")
    changed = run("git", "status", "--porcelain", cwd=ROOT).strip()
    if changed:
        print(f"Built from the last commit, without these changes:\n{changed}\n")
    rows, failed = [], False
    with tempfile.TemporaryDirectory(prefix="onerec-hf-release-") as scratch:
        distributions = build(Path(scratch))
        print("Built:", *(file.relative_to(ROOT) for file in distributions))
        for name in options.python:
            interpreter = find_python(name)
            for distribution in distributions:
                kind = "wheel" if distribution.suffix == ".whl" else "sdist"
                if interpreter is None:
                    rows.append((name, kind, "not checked: no such Python on this machine"))
                    continue
                folder, started = Path(scratch) / f"{kind}-{name}", time.monotonic()
                try:
                    depth = check(interpreter, distribution, version, folder, options)
                    result = f"passed {depth}, {time.monotonic() - started:.0f} s"
                except (RuntimeError, AssertionError) as error:
                    print(f"Python {name}, {kind}: {error}", file=sys.stderr)
                    result, failed = "FAILED", True
                rows.append((name, kind, result))
                print(f"Python {name}  {kind}  {result}", flush=True)
                shutil.rmtree(folder, ignore_errors=True)
    print(f"\nonerec-hf {version}")
    for name, kind, result in rows:
        print(f"  Python {name:<5} {kind:<6} {result}")
    print("\nNothing was uploaded. RELEASE.md has the next steps.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
