"""
Experiments of the quality benchmark: YAML files under experiments/, read with clear errors.

    description: SASRec          # the row's text in tables
    extends: small               # another experiment whose recipe and settings these extend (instead of kind and recipe)
    kind: sequential             # ranking (nothing is trained), sequential (SASRec, HSTU, GRU4Rec, ACVAE) or onerec
    recipe: amazon_beauty.yaml   # under recipes/: how the data is cut, and the sizes of a generator
    settings: {...}              # of that kind, over the recipe's: options of `onerec-hf train` for onerec
    alignment: {...}             # train on by preference alignment, with these settings over alignment.DEFAULTS
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).with_name("experiments")
KINDS = ("ranking", "sequential", "onerec")
_KEYS = ("description", "extends", "kind", "recipe", "settings", "alignment")


@dataclass(frozen=True)
class Experiment:
    """One YAML file; see the module's docstring for the fields."""

    name: str
    description: str
    kind: str
    recipe: str
    settings: dict[str, Any]
    alignment: dict[str, Any] | None = None


def names() -> list[str]:
    """All experiments, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.rglob("*.yaml"))


def load(name: str, folder: Path = FOLDER) -> Experiment:
    """
    The experiment of a file under `folder`.

    Raises:
        ValueError: there is no such file, or it has unknown, missing or wrong keys.

    Example:
        >>> load("small_kmeans").settings["quantizer"]
        'kmeans'
    """
    path = next(folder.rglob(f"{name}.yaml"), None)
    if path is None:
        raise ValueError(
            f"{folder} has no experiment {name!r}. Add {name}.yaml or choose one of: {', '.join(names())}"
        )
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(read, dict) or "description" not in read:
        raise ValueError(f"{path}: an experiment is a mapping with a description. Known keys: {', '.join(_KEYS)}")
    unknown = [key for key in read if key not in _KEYS]
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}. Known keys: {', '.join(_KEYS)}")
    if "extends" in read:
        base = load(read["extends"], folder)
        read = {"kind": base.kind, "recipe": base.recipe, **read}
        read["settings"] = {**base.settings, **read.get("settings", {})}
    missing = [key for key in ("kind", "recipe", "settings") if key not in read]
    if missing:
        raise ValueError(f"{path}: key {missing[0]!r} is missing. Add it, or name a base with extends")
    if read["kind"] not in KINDS:
        raise ValueError(f"{path}: unknown kind {read['kind']!r}. Use one of: {', '.join(KINDS)}")
    return Experiment(
        name,
        read["description"],
        read["kind"],
        read["recipe"],
        read["settings"],
        read.get("alignment"),
    )
