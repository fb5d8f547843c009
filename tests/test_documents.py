"""Documents do what they say: code blocks, commands, options, links, tables, pictures, examples and recipes are run or checked."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch

from onerec_hf.cli.main import COMMANDS
from onerec_hf.cli.main import main as onerec_hf_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md"))]
CLI_PAGE = ROOT / "docs" / "reference" / "cli.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SIZES = sorted((ROOT / "recipes" / "scale").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
SUBCOMMANDS = {"semantic-ids": ["fit", "report"]}  # the command's first word -> those of its second

_SMALL_MODEL = "--hidden_size 16 --intermediate_size 16 --moe_intermediate_size 16 --num_experts 4 --decoder_layers 1"
# What a page's command gets on top, so that it ends in seconds on the little tables of `workplace`.
CHEAPER = {
    "quickstart": ["--interactions", "interactions.csv", "--items", "items.csv", "--max_steps", "2"],
    "semantic-ids fit": ["--codebook_sizes", "8", "8", "8"],
    "semantic-ids report": ["--codebook_sizes", "8", "8", "8"],
    "train": f"--codebook_sizes 8 8 8 --max_steps 2 --eval_num_beams 10 {_SMALL_MODEL}".split(),
    "evaluate": ["--num_beams", "10"],
    "recommend": ["--num_beams", "10"],
    "plan": [],
}
# The same for calls of the workflows: what a page writes, what is run.
CHEAPER_PYTHON = {'output_dir="my-python-model"': 'output_dir="my-python-model", max_steps=2, hidden_size=16'}


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def slow_if(slow: bool, path: Path):
    return pytest.param(path, id=page_id(path), marks=pytest.mark.slow if slow else ())


@dataclass
class Block:
    """A fenced block: its language, the line of its first line in the page, its text."""

    language: str
    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], text.count("\n", 0, match.start()) + 2, match[2]) for match in found]


def command_lines(code: str) -> list[str]:
    """The lines of a shell block: continued ones joined, comments and empty ones left out."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    films = [*range(1, 22), 260, 1196, 1210]
    pd.DataFrame(
        {
            "user_id": [user for user in range(60) for _ in range(8)],
            "item_id": [films[(user + step) % len(films)] for user in range(60) for step in range(8)],
            "timestamp": [step for _ in range(60) for step in range(8)],
            "rating": [3 if (user + step) % 5 == 0 else 5 for user in range(60) for step in range(8)],
        }
    ).to_csv("interactions.csv", index=False)
    kinds = ["crime", "comedy", "drama", "horror"]
    titles = [f"{kinds[i % 4]} {i}" for i in range(len(films))]
    pd.DataFrame({"item_id": films, "title": titles, "genres": [kinds[i % 4] for i in range(len(films))]}).to_csv(
        "items.csv", index=False
    )
    pd.DataFrame({"user_id": range(60), "age": [20 + user % 40 for user in range(60)]}).to_csv(
        "users.csv", index=False
    )
    Path("histories.jsonl").write_text('{"user_id": 1, "history": [1, 2, 999]}\n[260, 1196]\n')
    return tmp_path


def run_python(page: Path, block: Block, namespace: dict, capsys) -> None:
    """Runs a block; what its lines `print(...)  # text` announce has to be printed, in that order."""
    capsys.readouterr()
    code = block.code
    for written, run in CHEAPER_PYTHON.items():
        code = code.replace(written, run)
    # Empty lines in front: tracebacks then name the page's own lines.
    exec(compile("\n" * (block.line - 1) + code, page_id(page), "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    rest = iter(printed)
    for announced in re.findall(r"^ *print\(.*\)  # (.*)$", block.code, re.MULTILINE):
        assert announced in rest, f"{page_id(page)}:{block.line}: announced {announced!r}, printed {printed}"


def run_shell(page: Path, block: Block, monkeypatch, capsys) -> None:
    """Runs the `onerec-hf` lines of a block in this process; other commands (make, pip) are checked elsewhere."""
    for line in command_lines(block.code):
        words = shlex.split(line, comments=True)
        if words[:1] == ["echo"] and "|" in words:
            pipe = words.index("|")
            monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(words[1:pipe]) + "\n"))
            words = words[pipe + 1 :]
        if words[:1] != ["onerec-hf"] or words[1] == "compare":  # hours; tests/workflows/compare has it small
            continue
        name = " ".join(words[1 : 2 + (words[1] in SUBCOMMANDS)])
        capsys.readouterr()
        status = onerec_hf_command([*words[1:], *CHEAPER[name]])
        out, err = capsys.readouterr()
        assert status == 0, f"{page_id(page)}:{block.line}: {line}\n{err[-2000:]}"
        if name == "recommend" and "--output_file" not in words:
            answers = [json.loads(text) for text in out.splitlines()]
            assert answers, line
            assert all(answer.get("items") or answer.get("sessions") for answer in answers), line


def trains(page: Path) -> bool:
    """Whether a page's blocks train models, and so take more than a few seconds."""
    return bool(
        re.search(
            r"workflows import .*train|^onerec-hf train|trainer.train\(\)", page.read_text(encoding="utf-8"), re.M
        )
    )


@pytest.mark.parametrize("page", [slow_if(trains(page), page) for page in PAGES])
def test_every_block_runs_top_to_bottom(page, workplace, monkeypatch, capsys):
    namespace = {"__name__": "__page__"}
    for block in blocks(page):
        try:
            if block.language == "python":
                run_python(page, block, namespace, capsys)
            elif block.language == "bash":
                run_shell(page, block, monkeypatch, capsys)
            elif block.language == "yaml" and (named := re.match(r"# ([\w.-]+\.yaml)\n", block.code)):
                Path(named[1]).write_text(block.code)
        except Exception as error:
            error.add_note(f"in the {block.language} block at {page_id(page)}:{block.line}")
            raise


@cache
def help_of(command: str) -> str:
    """What `onerec-hf COMMAND --help` prints."""
    out, stdout = io.StringIO(), sys.stdout
    sys.stdout = out
    try:
        onerec_hf_command([*command.split(), "--help"])
    except SystemExit:
        pass
    finally:
        sys.stdout = stdout
    return out.getvalue()


@cache
def options_of(command: str) -> frozenset[str]:
    """The long options of a command."""
    return frozenset(re.findall(r"--\w[\w-]*", help_of(command))) | {"--config"}


def defaults_of(command: str) -> dict[str, str]:
    """Long option -> its default, as the help prints it."""
    entries = re.split(r"^  (--\w+) ", help_of(command), flags=re.MULTILINE)
    told = {option: " ".join(text.split()) for option, text in zip(entries[1::2], entries[2::2], strict=True)}
    return {option: found[1] for option, text in told.items() if (found := re.search(r"\(default: (.*?)\)", text))}


COMMAND_NAMES = [
    " ".join([name, *second])
    for name in COMMANDS
    for second in ([[word] for word in SUBCOMMANDS.get(name, [])] or [[]])
]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=page_id(path)) for path in [*PAGES, ROOT / "CHANGELOG.md", *RECIPES, *SIZES, *EXAMPLES]],
)
def test_commands_have_the_options_that_pages_name(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for match in re.finditer(r"onerec-hf ((?:semantic-ids )?[a-z-]+)((?: [^\n`|#]*)?)", text):
        words = match[1].split()
        if words[0] not in COMMANDS or words[1:] not in ([], *([word] for word in SUBCOMMANDS.get(words[0], []))):
            continue
        name = match[1] if match[1] not in SUBCOMMANDS else f"{match[1]} {SUBCOMMANDS[match[1]][0]}"
        unknown = set(re.findall(r"(?<!\S)--\w[\w-]*", match[2])) - options_of(name)
        assert not unknown, f"{page_id(path)}: onerec-hf {name} has no {sorted(unknown)}"
    everywhere = frozenset().union(*map(options_of, COMMAND_NAMES))
    sections = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    for heading, section in zip(["", *sections[1::2]], sections[::2], strict=True):
        named = set(re.findall(r"`(--\w[\w-]*)", section)) - {"--help", "--quick"}  # --quick is the benchmarks'
        if heading == "Options about data":
            known = options_of("semantic-ids fit") & options_of("train") & options_of("evaluate")
        else:
            known = options_of(heading) if heading in COMMAND_NAMES else everywhere
        assert named <= known, f"{page_id(path)}, {heading or 'top'}: no such option {sorted(named - known)}"


def test_cli_page_has_a_section_for_every_command():
    headings = re.findall(r"^## (.*)$", CLI_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(COMMAND_NAMES) <= set(headings)


def test_cli_page_has_the_defaults_of_the_parser():
    """In a table of options, the second cell holds one default for each option of the first."""
    sections = re.split(r"^## (.*)\n", CLI_PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    compared = 0
    for heading, section in zip(sections[1::2], sections[2::2], strict=True):
        command = "train" if heading == "Options about data" else heading
        if command not in COMMAND_NAMES:
            continue
        defaults = defaults_of(command)
        for options, cell in re.findall(r"^\| (`--.*?) \| (.*?) \|", section, re.MULTILINE):
            names, told = re.findall(r"`(--\w+)`", options), cell.replace("2,000,000", "2000000").split(", ")
            for name, value in zip(names, told, strict=False):
                literal = re.fullmatch(r"`([\w-]+)`|(true|false|[\d. ]+)", value) if len(names) == len(told) else None
                if literal:
                    default = defaults[name].lower()
                    numbers = (
                        [[float(part) for part in text.split()] for text in (value, default)]
                        if value[0].isdigit()
                        else None
                    )
                    same = numbers[0] == numbers[1] if numbers else (literal[1] or literal[2]) == default
                    assert same, f"{heading}: {name} is {default}, told {value}"
                    compared += 1
    assert compared > 40


def test_make_targets_and_extras_that_pages_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("dependencies]")[1], re.M))
    for page in PAGES:
        for block in blocks(page):
            for line in command_lines(block.code) if block.language == "bash" else ():
                where = f"{page_id(page)}:{block.line}: {line}"
                words = shlex.split(line, comments=True)
                if words[0] == "make":
                    assert set(words[1:]) <= targets, where
                if words[:2] == ["pip", "install"]:
                    assert set(re.findall(r"\[(\w+)\]", line)) <= extras, where
                    assert all((ROOT / name).exists() for name in re.findall(r"-c (\S+)", line)), where


@pytest.mark.parametrize("page", [pytest.param(page, id=page_id(page)) for page in LINKED])
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page_id(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize(("page", "most"), [("README.md", 1300), ("docs/benchmarks.md", 900)])
def test_pages_that_grow_by_themselves_stay_short(page, most):
    assert len((ROOT / page).read_text(encoding="utf-8").split()) <= most


@pytest.mark.parametrize("page", [pytest.param(page, id=page_id(page)) for page in PAGES])
def test_tables_have_at_most_eight_rows(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"^(?:\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = table.splitlines()
        assert len(rows) <= 8, f"{page_id(page)}: {len(rows)} rows under {header}"


@pytest.mark.parametrize("page", [pytest.param(page, id=page_id(page)) for page in PAGES])
def test_pictures_have_a_description_and_files_that_pages_name_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for description, target in re.findall(r"!\[(.*?)\]\((.*?)\)", text):
        assert len(description.split()) >= 5, (
            f"{page_id(page)}: {target} needs a description for those who cannot see it"
        )
    named = re.findall(r"`((?:benchmarks|docs|examples|modeling|onerec_hf|recipes|tests|trainers)/[\w./-]+)`", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page_id(page)}: no such file {missing}"


def test_pictures_are_those_of_the_script():
    pictures = runpy.run_path(str(ROOT / "docs" / "images" / "make.py"))["PICTURES"]
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert files == {name: draw().svg() for name, draw in pictures.items()}, "python docs/images/make.py"
    shown = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"images/{name}.svg" in shown for name in pictures)


def run_example(name: str, monkeypatch, capsys, *argv: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, "--output_dir", "out", *argv])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
def test_example_train_on_your_table(workplace, monkeypatch, capsys):
    out = run_example("train_on_your_table.py", monkeypatch, capsys, "--max_steps", "100")
    model, popularity = map(float, re.search(r"recall@10: ([\d.]+) \(popularity: ([\d.]+)\)", out).groups())
    assert model > popularity
    assert re.search(r"comes the session \['film\d+', 'film\d+', 'film\d+'\]", out)
    for name in ("model", "catalogue", "codebooks"):
        assert (Path("out") / f"{name}.safetensors").is_file()


@pytest.mark.slow
def test_example_train_on_your_table_takes_files(workplace, monkeypatch, capsys):
    files = ["--interactions", "interactions.csv", "--items", "items.csv", "--max_steps", "2"]
    out = run_example("train_on_your_table.py", monkeypatch, capsys, *files)
    assert re.search(r"comes the session \[\d+, \d+, \d+\]", out)


@pytest.mark.slow
def test_example_plain_trainer(workplace, monkeypatch, capsys):
    out = run_example("plain_trainer.py", monkeypatch, capsys)
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", out)]  # three of each run
    assert losses[2] < losses[0] / 2
    assert losses[5] < losses[3]
    assert re.search(r"^after 0, 1, 2, 3: \[\d+, \d+\]$", out, re.MULTILINE)
    assert re.search(r"^after 0, 2, 4, 6: \[\d+, \d+\]$", out, re.MULTILINE)


@pytest.mark.slow
def test_example_fine_tune(workplace, monkeypatch, capsys):
    out = run_example("fine_tune.py", monkeypatch, capsys)
    found = re.findall(
        r"^(.*?): +new users ([\d.]+), their new films ([\d.]+), old users ([\d.]+)$", out, re.MULTILINE
    )
    recall = {name: tuple(map(float, numbers)) for name, *numbers in found}
    before, after = recall["grown catalogue, no training"], recall["with the adapter"]
    assert after[0] > before[0] + 0.3
    assert after[1] > before[1] + 0.3
    assert after[2] > before[2] - 0.1  # old users are still served
    for name in ("loaded on top of the base", "merged"):
        assert recall[name] == pytest.approx(after, abs=0.005)
    assert (Path("out") / "adapter" / "adapter_model.safetensors").is_file()
    assert not (Path("out") / "adapter" / "model.safetensors").exists()


def test_every_example_is_run_here():
    elsewhere = {"serve_with_ray.py"}  # tests/serving/test_ray_serve.py
    assert {path.name for path in EXAMPLES} - elsewhere == {
        "train_on_your_table.py",
        "plain_trainer.py",
        "fine_tune.py",
    }


@pytest.mark.parametrize("recipe", [pytest.param(recipe, id=recipe.name) for recipe in RECIPES])
def test_recipes_parse(recipe, tmp_path):
    """The command that a recipe's own comment names for it takes all of its options."""
    from onerec_hf.cli.arguments import parse
    from onerec_hf.trainers import OneRecDPOConfig, OneRecTrainingArguments, RewardTrainingArguments
    from onerec_hf.workflows.alignment import AlignSettings
    from onerec_hf.workflows.reward_data import RewardDataSettings
    from onerec_hf.workflows.reward_training import RewardModelSettings
    from onerec_hf.workflows.settings import DataSettings, ModelSettings, SemanticIDSettings
    from onerec_hf.workflows.training import TrainSettings

    classes = {
        "train": (DataSettings, SemanticIDSettings, ModelSettings, TrainSettings, OneRecTrainingArguments),
        "reward": (RewardDataSettings, RewardModelSettings, RewardTrainingArguments),
        "align": (AlignSettings, DataSettings, OneRecDPOConfig),
    }
    text = recipe.read_text(encoding="utf-8")
    command = re.findall(rf"onerec-hf (\w+) +--config recipes/{recipe.name}", text)[0]
    parsed = parse(
        classes[command], ["--config", str(recipe), "--output_dir", "runs/mine", "--max_steps", "2"], command
    )
    options = {name: value for part in parsed for name, value in vars(part).items()}
    assert options["max_steps"] == 2
    # Settings only: the command names the data, the folder and other models.
    assert options["output_dir"] == "runs/mine"
    assert not [name for name in ("dataset", "data_dir", "interactions", "model", "reward") if options.get(name)]
    assert isinstance(options["learning_rate"], float)
    if command == "train":
        data, ids, model, *_ = parsed
        config = model.config(ids.codebook_sizes, data.session_length, num_items=12_101)
        assert config.hidden_size == model.hidden_size


@pytest.mark.parametrize("recipe", [pytest.param(recipe, id=recipe.name) for recipe in SIZES])
def test_recipes_of_sizes_can_be_planned_and_hold_the_model_of_their_name(recipe, capsys):
    assert f"onerec-hf plan --config recipes/scale/{recipe.name} --gpus 8" in recipe.read_text(encoding="utf-8")
    assert onerec_hf_command(["plan", "--config", str(recipe), "--gpus", "8"]) == 0
    parameters = int(re.match(r"([\d,]+) parameters", capsys.readouterr().out)[1].replace(",", ""))
    assert parameters / 1e9 == pytest.approx(float(recipe.stem.rstrip("b")), rel=0.05)


@pytest.mark.parametrize("recipe", [pytest.param(recipe, id=recipe.name) for recipe in LAUNCHES])
def test_recipes_for_accelerate_say_their_command_and_name_parts_of_the_model(recipe):
    from accelerate.commands.config.config_args import load_config_from_file

    from onerec_hf import OneRecConfig, OneRecForConditionalGeneration

    text, settings = recipe.read_text(encoding="utf-8"), load_config_from_file(str(recipe))
    commands = re.findall(rf"#     accelerate launch --config_file recipes/accelerate/{recipe.name} (.*)", text)
    assert commands
    for command in commands:
        before, _, after = command.partition("--module onerec_hf.cli.main train ")
        unknown = set(re.findall(r"--\w+", before)) - {"--num_machines", "--num_processes"}
        assert not unknown | set(re.findall(r"--\w+", after)) - options_of("train")
        assert (ROOT / re.search(r"--config (\S+)", after)[1]).is_file()
    assert "Not run" in text or recipe.name == "ddp.yaml"  # which tests/planning/test_launch.py runs
    with torch.device("meta"):
        model = OneRecForConditionalGeneration(OneRecConfig(encoder_layers=1, decoder_layers=1))
    classes = {type(module).__name__ for module in model.modules()}
    named = settings.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap", "")
    named += "," + settings.deepspeed_config.get("deepspeed_moe_layer_cls_names", "")
    assert {name for name in named.split(",") if name} <= classes


def test_the_table_of_alignment_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "alignment.json").read_text(encoding="utf-8"))["rows"]
    values = {row["name"]: row["value"] for row in results}
    page = (ROOT / "docs" / "explanation" / "alignment.md").read_text(encoding="utf-8")
    variants = ("sasrec", "onerec", "ntp_only", "dpo", "s_dpo", "ipa_2_percent", "ipa")
    page = page[page.index("| KuaiRand-Pure, three seeds |") :]
    rows = [row for row in re.findall(r"^\| (.*) \|$", page, re.MULTILINE) if row.count(" | ") == 6][1:]
    for variant, row in zip(variants, rows, strict=True):
        _, watch_time, views, likes, observed, recall, items = row.split(" | ")
        told = {"heldout/swt_mean": watch_time, "heldout/vtr_mean": views, "heldout/ltr_mean": likes}
        for metric, text in {**told, "observed/vtr": observed, "recall@10": recall, "distinct_items": items}.items():
            shown = [float(part) for part in text.split(" ± ")]
            exact = [values[f"{variant}/{metric}"], values[f"{variant}/{metric}/std"]]
            digits = len(text.split(" ")[0].partition(".")[2])
            assert shown == [round(value, digits) for value in exact[: len(shown)]], f"{variant}/{metric}"


def test_the_table_of_rollouts_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "policy.json").read_text(encoding="utf-8"))["rows"]
    values = {row["name"]: row["value"] for row in results}
    page = (ROOT / "docs" / "explanation" / "alignment.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in re.findall(r"^\| (width .*) \|$", page, re.MULTILINE)]
    for size, (_, *told) in zip(("d256", "d256_dense", "d64"), rows, strict=True):
        names = [f"{size}/x{items}/speedup_over_{peer}" for peer in ("trl", "shared") for items in (1, 5)]
        assert told == [f"{values[name]:.1f}" for name in names]
    shares = re.findall(r"(\d+) %", page[page.index("Rollouts are a small part of a step") :])[:2]
    assert shares == [f"{100 * values[f'd256/x5/rollouts_share{how}']:.0f}" for how in ("", "_without_ntp")]


def test_these_recipes_are_there():
    assert [recipe.name for recipe in SIZES] == ["0.1b.yaml", "0.3b.yaml", "10b.yaml", "1b.yaml", "3b.yaml"]
    assert [path.stem for path in LAUNCHES] == ["ddp", "deepspeed_zero3", "distributed", "fsdp2"]
    beauty = ["amazon_beauty.yaml", "amazon_beauty_gpu.yaml", "amazon_beauty_items.yaml"]
    kuairand = ["kuairand.yaml", "kuairand_align.yaml", "kuairand_items.yaml", "kuairand_reward.yaml"]
    assert [recipe.name for recipe in RECIPES] == [*beauty, "auto.yaml", *kuairand, "movielens.yaml"]
