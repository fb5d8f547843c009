"""Packages of the build. All metadata is in pyproject.toml.

The repository keeps `modeling/`, `trainers/` and `hub_cards/` at its top level, and `package_dir` maps them into the package `onerec_hf`. The symlinks
`onerec_hf/modeling` etc. serve tools that run in a checkout; the build does not depend on them.
"""

from setuptools import find_packages, setup

ROOMS = ("modeling", "trainers", "hub_cards")

setup(
    packages=sorted({*find_packages(include=["onerec_hf", "onerec_hf.*"]), *(f"onerec_hf.{room}" for room in ROOMS)}),
    package_dir={f"onerec_hf.{room}": room for room in ROOMS},
    package_data={
        "onerec_hf": ["py.typed"],
        "onerec_hf.hub_cards": ["templates/*.jinja"],
        "onerec_hf.evaluation": ["modules/*/*.py"],
        "onerec_hf.workflows.compare": ["spaces/*.yaml", "templates/*.jinja"],
    },
)
