"""Packages of the build; all metadata stands in pyproject.toml.

The repository keeps `modeling/`, `trainers/` and `hub_cards/` at its top level, and `package_dir` maps them into the one
import namespace `onerec_hf`. (`onerec_hf/modeling` etc. are symlinks for tools that run in a checkout; the build does
not depend on them.)
"""

from setuptools import setup

ROOMS = ("modeling", "trainers", "hub_cards")
INNER = (
    "baselines",
    "cli",
    "data",
    "data.feedback",
    "data.shards",
    "evaluation",
    "planning",
    "semantic_ids",
    "semantic_ids.formats",
    "serving",
    "workflows",
)

setup(
    packages=["onerec_hf", *(f"onerec_hf.{name}" for name in (*INNER, *ROOMS))],
    package_dir={f"onerec_hf.{room}": room for room in ROOMS},
    package_data={
        "onerec_hf": ["py.typed"],
        "onerec_hf.hub_cards": ["templates/*.jinja"],
        "onerec_hf.evaluation": ["modules/*/*.py"],
    },
)
