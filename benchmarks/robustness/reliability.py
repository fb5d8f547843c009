"""
Kills (SIGKILL) training, alignment, semantic-ID fitting, saving and pushing at random moments, resumes, and compares bit by bit.

    python benchmarks/robustness/reliability.py [--quick] [--json FILE] [--kills N] [--phases train align ...] [--seed S] [--join FILE ...]

A kill is survived if (1) no half-written artefact loads, (2) every checkpoint under its final name is complete, and (3) the same command, started
again (a training with `--resume_from_checkpoint last`), ends in the weights, catalogue and codebooks of an uninterrupted run, bit by bit. One
process on the CPU; tiny models, so that most of the time is spent in checkpoints, saves and uploads.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/robustness/reliability.py`

PHASES = ("train", "align", "fit", "save", "push")
KILLS, QUICK_KILLS = 20, 1
_ONE = ["--num_attention_heads", "2", "--encoder_layers", "1", "--decoder_layers", "1", "--num_experts", "2"]
_SIZES = ["--hidden_size", "16", "--intermediate_size", "16", "--moe_intermediate_size", "8", *_ONE]
_CODES = ["--codebook_sizes", "8", "8", "8"]
_QUIET = ["--disable_tqdm", "true", "--use_cpu", "true", "--report_to", "none", "--logging_steps", "5"]
_SAVING = ["--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2"]


# -- what is compared ----------------------------------------------------------------------------
def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder's safetensors files, by file and name."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {f"{path.name}:{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    return found


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, and the same tensors bit by bit."""
    import torch

    names = [{path.name for path in folder.iterdir() if path.is_file()} for folder in (one, other)]
    first, second = tensors(one), tensors(other)
    return (
        names[0] == names[1]
        and first.keys() == second.keys()
        and all(
            value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
        )
    )


def usable(folder: Path, classes: tuple[str, ...] = ("AutoModelForSeq2SeqLM", "AutoProcessor")) -> dict[str, Any]:
    """What of a folder loads and can be used: a model, a processor with its catalogue."""
    import transformers

    loaded = {}
    for name in classes:
        with contextlib.suppress(OSError, ValueError, KeyError):
            thing = getattr(transformers, name).from_pretrained(str(folder))
            if name != "AutoProcessor" or thing.catalogue is not None:
                loaded[name] = thing
    return loaded


def whole_checkpoints(folder: Path) -> None:
    """Raises where a checkpoint has its own name and is not whole."""
    import torch

    for path in folder.glob("checkpoints/checkpoint-*"):
        assert set(usable(path)) == {"AutoModelForSeq2SeqLM", "AutoProcessor"}, f"{path} does not load"
        for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
            assert (path / name).is_file(), f"{path} lacks {name}"
        torch.load(path / "optimizer.pt", weights_only=True)


# -- the phases: work that is killed, what may be left, and what it must come to -----------------
def command(started: Callable[[], Any], argv: list[str]) -> int:
    """`onerec-hf ARGV...`, from its beginning on."""
    from onerec_hf.cli.main import main

    started()
    status = main(argv)
    assert status == 0, f"onerec-hf {' '.join(argv)} ended with {status}"
    return status


def inspect_training(started, folder: str, expected: str) -> bool:
    """After a kill: what loads from the run's folder is the model that it ends in, and nothing else."""
    whole_checkpoints(Path(folder))
    model = usable(Path(folder)).get("AutoModelForSeq2SeqLM")
    return model is None or _equal_weights(model, usable(Path(expected))["AutoModelForSeq2SeqLM"])


def inspect_fit(started, folder: str, expected: str) -> bool:
    """After a kill: a processor that can be used has all of its semantic IDs beside it."""
    return "AutoProcessor" not in usable(Path(folder), ("AutoProcessor",)) or _holds(Path(folder), Path(expected))


def inspect_save(started, folder: str, *versions: str) -> bool:
    """After a kill: what loads is one version of model and catalogue, whole."""
    found = usable(Path(folder))
    model, processor = found.get("AutoModelForSeq2SeqLM"), found.get("AutoProcessor")
    for version in versions:
        whole = usable(Path(version))
        catalogue = whole["AutoProcessor"].catalogue.hash
        if (model is None or _equal_weights(model, whole["AutoModelForSeq2SeqLM"])) and (
            model is None or model.catalogue is None or model.catalogue.hash == catalogue
        ):
            return processor is None or processor.catalogue.hash in {
                usable(Path(one))["AutoProcessor"].catalogue.hash for one in versions
            }
    return False


def compare(started, folder: str, expected: str) -> bool:
    """Whether what a run has come to equals what it should."""
    return same(Path(folder), Path(expected))


def _equal_weights(one, other) -> bool:
    import torch

    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def _holds(folder: Path, expected: Path) -> bool:
    found = tensors(folder)
    import torch

    return all(name in found and torch.equal(value, found[name]) for name, value in tensors(expected).items())


def save(started, source: str, folder: str) -> None:
    """Saves model and processor of `source` into `folder`, over what stands there."""
    found = usable(Path(source))
    started()
    found["AutoModelForSeq2SeqLM"].save_pretrained(folder)
    found["AutoProcessor"].save_pretrained(folder)


def push(started, folder: str, repo: str) -> None:
    """Uploads a folder, as `onerec-hf train --push_to_hub` does."""
    from huggingface_hub import HfApi

    started()
    HfApi().create_repo(repo, exist_ok=True)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)


def fetch(started, repo: str, folder: str) -> list[str]:
    """The files of the repository's main, downloaded past every cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = HfApi().list_repo_files(repo)
    except RepositoryNotFoundError:
        return []
    if files:
        snapshot_download(repo, local_dir=folder)
        shutil.rmtree(Path(folder) / ".cache")
    return files


def make_models(started, folder: str) -> None:
    """Two generators and processors of one shape, `old` and `new`, with other weights and items; and a reward model, `judge`."""
    import torch

    from onerec_hf import OneRecForSessionReward, OneRecProcessor, OneRecRewardConfig, RewardItems
    from tests.conftest import make_catalogue, make_model

    for seed, name in enumerate(("old", "new")):
        catalogue = make_catalogue(seed=seed)
        make_model(catalogue, seed=seed).save_pretrained(f"{folder}/{name}")
        OneRecProcessor.from_catalogue(catalogue, max_history=5 + seed).save_pretrained(f"{folder}/{name}")
    torch.manual_seed(0)
    judge: Any = OneRecForSessionReward(
        OneRecRewardConfig(
            num_items=40, hidden_size=8, intermediate_size=8, num_attention_heads=2, initializer_range=0.5
        )
    )
    judge.set_items(RewardItems([f"m{i}" for i in range(40)]))
    with torch.no_grad():
        for tower in judge.towers:
            tower.out_proj.weight.normal_(0, 0.5)
    judge.save_pretrained(f"{folder}/judge")


# -- trials --------------------------------------------------------------------------------------
class Trials:
    """Everything that the phases need, made once in `root`, and one kill after the other."""

    def __init__(self, root: Path, seed: int):
        from tests.cli.commands import interaction_rows, item_rows, write_csv

        self.root, self.rng = root, random.Random(seed)
        self.data = ["--interactions", str(write_csv(root / "clicks.csv", interaction_rows()))]
        self.data += ["--items", str(write_csv(root / "products.csv", item_rows()))]
        self.call(make_models, str(root))

    def call(self, work: Callable, *args: Any, kill_after: float | None = None) -> tuple[Any, float]:
        from benchmarks.robustness.kills import run

        return run(work, *args, folder=self.root / "process", kill_after=kill_after)

    def argv(self, phase: str, folder: Path) -> list[str]:
        out = ["--output_dir", str(folder)]
        if phase == "train":
            return ["train", *self.data, *_CODES, *_SIZES, *_QUIET, *_SAVING, "--max_steps", "10", *out]
        if phase == "align":
            some = ["--num_candidates", "6", "--dpo_ratio", "0.2", "--max_examples", "64", "--evaluate", "false"]
            some += ["--bf16", "false", "--learning_rate", "0.01", "--num_train_epochs", "2"]
            models = ["--model", str(self.root / "train-expected"), "--reward", str(self.root / "judge")]
            return ["align", *models, *some, *self.data, *_QUIET, *_SAVING, *out]
        return ["semantic-ids", "fit", *self.data, *_CODES, *out]

    def killed(self, work: Callable, *args: Any, seconds: float) -> float:
        """Kills `work` at a random moment of the `seconds` that it takes; where it was quicker, another one."""
        while True:
            after = self.rng.uniform(0, seconds)
            result, _ = self.call(work, *args, kill_after=after)
            if result is None:
                return after
            seconds = after

    def run_command(self, phase: str, kills: int) -> int:
        expected = self.root / f"{phase}-expected"
        if not expected.exists():
            self.call(command, self.argv(phase, expected))
        seconds = self.call(command, self.argv(phase, self.root / f"{phase}-timed"))[1]
        inspect = inspect_fit if phase == "fit" else inspect_training
        again = [] if phase == "fit" else ["--resume_from_checkpoint", "last"]
        survived = 0
        for number in range(kills):
            folder = self.root / f"{phase}-{number}"
            after = self.killed_once(phase, folder, seconds)
            clean, _ = self.call(inspect, str(folder), str(expected))
            self.call(command, [*self.argv(phase, folder), *again])
            equal, _ = self.call(compare, str(folder), str(expected))
            survived += self.count(phase, number, after, clean, equal)
            shutil.rmtree(folder)
        return survived

    def killed_once(self, phase: str, folder: Path, seconds: float) -> float:
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            after = self.rng.uniform(0, seconds)
            if self.call(command, self.argv(phase, folder), kill_after=after)[0] is None:
                return after

    def run_save(self, kills: int) -> int:
        old, new, folder = (str(self.root / name) for name in ("old", "new", "saved"))
        shutil.copytree(old, folder)
        seconds, survived = self.call(save, new, folder)[1], 0
        for number in range(kills):
            shutil.rmtree(folder)
            shutil.copytree(old, folder)
            after = self.killed(save, new, folder, seconds=seconds)
            clean, _ = self.call(inspect_save, folder, old, new)
            self.call(save, new, folder)
            equal, _ = self.call(compare, folder, new)
            survived += self.count("save", number, after, clean, equal)
        return survived

    def run_push(self, kills: int) -> int:
        old, new = str(self.root / "old"), str(self.root / "new")
        self.call(push, old, "tester/timed")
        seconds, survived = self.call(push, new, "tester/timed")[1], 0
        for number in range(kills):
            repo, got = f"tester/killed-{number}", str(self.root / f"fetched-{number}")
            self.call(push, old, repo)
            after = self.killed(push, new, repo, seconds=seconds)
            self.call(fetch, repo, got)
            clean = any(self.call(compare, got, version)[0] for version in (old, new))
            shutil.rmtree(got)
            self.call(push, new, repo)
            self.call(fetch, repo, got)
            equal, _ = self.call(compare, got, new)
            survived += self.count("push", number, after, clean, equal)
        return survived

    def count(self, phase: str, number: int, after: float, clean: bool, equal: bool) -> bool:
        from benchmarks.harness import say

        fine = bool(clean and equal)
        if not fine:
            say(f"{phase} {number}, killed after {after:.3f} s: half-written {not clean}, other result {not equal}")
        return fine


def serve_hub(root: Path) -> int:
    """The tests' Hub in a separate process; returns its process id. Call it before the client is imported, which reads the address then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pid = os.fork()
    if pid == 0:
        from http.server import ThreadingHTTPServer

        from tests.hub.hub_server import Handler, Hub

        hub = Hub(root)
        hub.endpoint = f"http://127.0.0.1:{port}"
        ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": hub})).serve_forever()
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_TOKEN": "hf_write",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(root / "home"),
    }
    return pid


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "hub").mkdir()
        server = serve_hub(root / "hub")
        try:
            _main(root)
        finally:
            os.kill(server, 9)
            os.waitpid(server, 0)


def _main(root: Path) -> None:
    from benchmarks.harness import finish, one_thread, parser, say

    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, help=f"per phase; {KILLS}, with --quick {QUICK_KILLS}")
    arguments.add_argument("--phases", nargs="*", default=list(PHASES), choices=PHASES)
    arguments.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments.add_argument(
        "--join", nargs="+", default=[], metavar="FILE", help="results whose rows join these: other phases', fuzz.py's"
    )
    args = arguments.parse_args()
    kills = args.kills or (QUICK_KILLS if args.quick else KILLS)

    import onerec_hf
    from onerec_hf.evaluation.results import result_row

    one_thread()  # also imports what the forked processes need: nothing is computed here, so that forks are safe
    onerec_hf.register_auto_classes()
    import onerec_hf.cli.align
    import onerec_hf.cli.semantic_ids
    import onerec_hf.cli.train
    import onerec_hf.trainers.onerec_dpo_trainer
    import onerec_hf.trainers.onerec_trainer

    gc.collect()
    gc.freeze()  # else each fork's first collections walk through, and copy, all that was imported
    trials, rows = Trials(root, args.seed), []
    for phase in args.phases:
        if phase == "align" and not (root / "train-expected").exists():
            trials.call(command, trials.argv("train", root / "train-expected"))
        own = {"save": trials.run_save, "push": trials.run_push}.get(phase)
        survived = trials.run_command(phase, kills) if own is None else own(kills)
        say(f"{phase}: {survived} of {kills} survived")
        rows.append(result_row(f"kill9/{phase}", survived, f"of {kills}"))
    for file in args.join:
        rows += json.loads(Path(file).read_text())["rows"]
    finish(rows, args.json, seed=args.seed, kills=kills)


if __name__ == "__main__":
    main()
