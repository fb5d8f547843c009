"""
Model families of a comparison: YAML files under spaces/, or in a folder of the user, read with clear errors.

    title: SASRec                # in the report
    extends: gru4rec             # a family of the same folder, whose keys these override; settings, space and first one by one
    kind: sequential             # ranking (popularity, item_knn), sequential (SASRec, HSTU, GRU4Rec, ACVAE) or onerec
    needs_content: true          # left out where the table has neither item texts nor embeddings
    data: {session_length: 1}    # options about data in place of the comparison's, for kind onerec
    settings: {NAME: VALUE}      # those that no trial changes: of the kind's workflow (onerec: options of `onerec-hf train`)
    space: {NAME: [VALUES]}      # values to choose from; those that are mappings set several settings together
                                 # or {low: 0.0001, high: 0.01, log: true}, or {low: 64, high: 256, step: 64}
    first: {NAME: VALUE}         # the first trial; drawn by the sampler where it is not given

`content` as an item embedding is what the table gives: embeddings, else texts, else (kind onerec) behaviour. `codebook_sizes: auto` are three
codebooks that fit the number of items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from onerec_hf.modeling.files import short

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SPACES = Path(__file__).with_name("spaces")
KINDS = ("ranking", "sequential", "onerec")
_KEYS = ("title", "extends", "kind", "needs_content", "data", "settings", "space", "first")
_MERGED = ("settings", "space", "first")


@dataclass(frozen=True)
class Family:
    """
    One YAML file; the module's docstring has the fields.

    Example:
        >>> load_families(["sasrec_text"])[0].settings
        {'architecture': 'sasrec', 'average_weights': True, 'features': 'content'}
    """

    name: str
    title: str
    kind: str
    needs_content: bool = False
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)

    def distributions(self) -> dict[str, BaseDistribution]:
        """The search space for Optuna. Values that are mappings or lists stand in it as JSON."""
        return {name: _distribution(values) for name, values in self.space.items()}

    def first_params(self) -> dict[str, Any] | None:
        """`first` as Optuna takes it; None without one."""
        return {name: _choice(value) for name, value in self.first.items()} or None

    def drawn(self, params: dict[str, Any]) -> dict[str, Any]:
        """
        The settings that parameters of a trial set.

        Example:
            >>> family = Family("mine", "Mine", "onerec", space={"size": [{"hidden_size": 8, "encoder_layers": 1}], "dropout_rate": [0.1]})
            >>> family.drawn({"size": '{"hidden_size": 8, "encoder_layers": 1}', "dropout_rate": 0.1})
            {'hidden_size': 8, 'encoder_layers': 1, 'dropout_rate': 0.1}
        """
        found: dict[str, Any] = {}
        for name, value in params.items():
            value = json.loads(value) if isinstance(value, str) and value[:1] in ("{", "[") else value
            found |= value if isinstance(value, dict) else {name: value}
        return found

    def content(self) -> dict[str, Any]:
        """What makes results of two families comparable: everything but the title."""
        return {name: value for name, value in vars(self).items() if name != "title"}


def load_families(names: Sequence[str] | None = None, folder: str | Path | None = None) -> list[Family]:
    """
    The families of a folder.

    Args:
        names: in the order of the result; all by default.
        folder: of YAML files; the package's by default.

    Raises:
        ValueError: no such folder or family, or a file with unknown, missing or wrong keys.

    Example:
        >>> [family.name for family in load_families()]
        ['acvae', 'gru4rec', 'hstu', 'item_knn', 'onerec', 'onerec_head', 'popularity', 'sasrec', 'sasrec_text', 'sasrec_text_evidence', 'tiger']
    """
    folder = SPACES if folder is None else Path(folder)
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if not known:
        raise ValueError(f"--spaces {folder}: there is no such folder, or it holds no .yaml file")
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"--families {name}: unknown family. Choose from {', '.join(known)}, or add {folder}/{name}.yaml"
            )
    return [_family(folder, name, _read(folder, name)) for name in dict.fromkeys(names or known)]


def _read(folder: Path, name: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    path = folder / f"{name}.yaml"
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder / f'{below[-1]}.yaml' if below else path}: {error.strerror}: {path.name}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: no YAML: {short(error, 300)}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: a family is a mapping. Known keys: {', '.join(_KEYS)}")
    if unknown := [key for key in read if key not in _KEYS]:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}. Known keys: {', '.join(_KEYS)}")
    for key in ("data", *_MERGED):
        if not isinstance(read.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must be a mapping, got {short(read[key], 60)!r}")
    base = read.pop("extends", None)
    if base is None:
        return read
    if base in (name, *below):
        raise ValueError(f"{path}: extends {base}, which extends this family. Remove one of them")
    inherited = _read(folder, base, (*below, name))
    merged = {key: {**inherited.get(key, {}), **read.get(key, {})} for key in _MERGED}
    return {**inherited, **read, **merged}


def _family(folder: Path, name: str, read: dict[str, Any]) -> Family:
    path = folder / f"{name}.yaml"
    if missing := [key for key in ("title", "kind") if key not in read]:
        raise ValueError(f"{path}: key {missing[0]!r} is missing. Add it, or name a base with extends")
    if read["kind"] not in KINDS:
        raise ValueError(f"{path}: unknown kind {read['kind']!r}. Use one of: {', '.join(KINDS)}")
    family = Family(name, **read)
    from optuna.distributions import CategoricalDistribution

    for setting, values in family.space.items():
        try:
            distribution = _distribution(values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: space of {setting}: {short(error)}. Use a list of values, or {{low: ..., high: ..., log: ..., step: ...}}"
            ) from None
        if setting in family.first:
            value = _choice(family.first[setting])
            known = not isinstance(distribution, CategoricalDistribution) or value in distribution.choices
            if not known or not distribution._contains(distribution.to_internal_repr(value)):
                raise ValueError(f"{path}: first value {value!r} of {setting} is not in its space. Add it there")
    if extra := [setting for setting in family.first if setting not in family.space]:
        raise ValueError(f"{path}: first sets {extra[0]!r}, which is not in the space. Move it to settings")
    return family


def _distribution(values: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, list):
        return CategoricalDistribution([_choice(value) for value in values])
    if not isinstance(values, dict) or not {"low", "high"} <= set(values) <= {"low", "high", "log", "step"}:
        raise ValueError(f"got {short(values, 60)!r}")
    whole = all(isinstance(values[end], int) for end in ("low", "high"))
    return (IntDistribution if whole else FloatDistribution)(**values)


def _choice(value: Any) -> Any:
    """A value as Optuna stores it."""
    return json.dumps(value) if isinstance(value, dict | list) else value
