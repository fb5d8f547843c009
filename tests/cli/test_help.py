"""`--help` in groups: complete, true to the parser, and quick."""

import resource
import subprocess
import sys

import pytest

from onerec_hf.cli.help import MORE, groups_of, trainer_groups
from onerec_hf.cli.parser import CommandParser
from onerec_hf.cli.train import KINDS
from onerec_hf.trainers import OneRecTrainingArguments
from tests.cli.commands import onerec, succeeded


def test_train_lists_every_option_of_its_parser():
    done = succeeded(onerec("train", "--help")).out
    parser = CommandParser((*KINDS, OneRecTrainingArguments), "onerec-hf train")
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    spelled = [
        option for option in options if option != "--help" and not option.startswith("--no_") and "-" not in option[2:]
    ]
    words = done.replace(",", " ").split()
    assert len(spelled) > 150
    assert not [option for option in spelled if option not in words]
    heads = [line for line in done.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert len(heads) >= 8
    assert done.index("--interactions TEXT") < done.index("--hidden_size INT") < done.index("--max_steps INT")
    assert "--adam_beta1 NUMBER" not in done
    assert "--adam_beta1 NUMBER" in succeeded(onerec("train", "--help_all")).out


def test_the_options_read_from_source_are_those_of_the_class():
    read = {option.name: option for group in trainer_groups() for option in group.options}
    real = {option.name: option for group in groups_of([OneRecTrainingArguments]) for option in group.options}
    assert read.keys() == real.keys()
    for name, option in read.items():
        if option.default is not None:
            assert option.shown_default == real[name].shown_default, name
        assert option.help in ("", real[name].help), name
        if "str" not in option.type.split(" | "):  # of several types the parser keeps one, in the class itself
            assert option.metavar == real[name].metavar, name
    assert read["learning_rate"].default == 2e-4
    assert sum(option.help == "" for option in read.values()) < 5
    assert [group.title for group in trainer_groups()][-1] == MORE == groups_of([OneRecTrainingArguments])[-1].title


@pytest.mark.parametrize("entry", ["onerec_hf", "onerec_hf.cli.main"])
def test_the_help_of_train_is_quick(entry):
    """CPU time of the whole process: imports of torch and transformers alone would take longer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", entry, "train", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("usage: onerec-hf train ")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(
    ("command", "option"), [("align", "--dpo_ratio NUMBER"), ("demo", "--port INT"), ("reward", "--pooling TEXT")]
)
def test_other_commands_are_in_groups_too(command, option):
    done = succeeded(onerec(command, "-h")).out
    assert f"\n  {option}" in done
    assert done.startswith(f"usage: onerec-hf {command} ")
    assert "`" not in done.split("\n\n")[1].splitlines()[0]
