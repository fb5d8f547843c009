"""
Fuzzing of every file that onerec_hf parses: `python benchmarks/robustness/fuzz.py [--inputs N] [--parser NAME ...]`.

Rows `fuzz/<parser>`: inputs given. A failure (a crash, a hang, too much memory, a message that does not name the file) is printed with its
input, which is kept in --keep, and the exit status is 1. With --minutes they share that time; the rows say how many inputs each one really had.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/robustness/fuzz.py`

from benchmarks.harness import finish, parser, say
from benchmarks.robustness.fuzzing import Report, fuzz
from benchmarks.robustness.parsers import PARSERS
from onerec_hf.evaluation.results import result_row


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--inputs", type=int, help="inputs per parser; 100,000 when not given, 100 with --quick")
    arguments.add_argument("--parser", nargs="+", choices=PARSERS, metavar="NAME", help="only these parsers")
    arguments.add_argument("--seed", type=int, default=0, help="of the mutations")
    arguments.add_argument("--minutes", type=float, help="stop after about so long")
    arguments.add_argument("--keep", help="folder for the inputs of failures")
    args = arguments.parse_args()
    prepare()
    inputs = args.inputs or (100 if args.quick else 100_000)
    reports, started = [], time.monotonic()
    names = args.parser or list(PARSERS)
    for number, name in enumerate(names):
        deadline = None
        if args.minutes is not None:  # what one parser leaves over is for those after it
            left = started + 60 * args.minutes - time.monotonic()
            deadline = time.monotonic() + left / (len(names) - number)
        reports.append(fuzz(PARSERS[name], inputs, args.seed, deadline=deadline))
        say(str(reports[-1]))
        show(reports[-1], args.keep)
    found = sum(len(report.failures) for report in reports)
    finish([row(report) for report in reports], args.json, seed=args.seed, failures=found)
    total = sum(report.inputs for report in reports)
    print(f"{total:,} inputs for {len(reports)} parsers, {found} failures")
    return 1 if found else 0


def row(report: Report) -> dict:
    """The result row of a parser: inputs given."""
    return result_row(f"fuzz/{report.parser}", report.inputs, "inputs")


def prepare() -> None:
    """One thread: what forks must not leave threads behind that hold locks. And the slow imports, once instead of in each fork."""
    import datasets  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow
    import torch
    import transformers
    import trl.scripts.utils  # noqa: F401

    import onerec_hf
    from onerec_hf.cli import align, plan, train  # noqa: F401

    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    onerec_hf.register_auto_classes()


def show(report: Report, keep: str | None) -> None:
    """Prints failures, and keeps their inputs."""
    for number, failure in enumerate(report.failures):
        say(f"  FAILED {failure.reason}\n    {failure.where}\n    on {failure.content[:120]!r}")
        if keep is not None:
            Path(keep).mkdir(parents=True, exist_ok=True)
            Path(keep, f"{report.parser}-{number}").write_bytes(failure.content)


if __name__ == "__main__":
    sys.exit(main())
