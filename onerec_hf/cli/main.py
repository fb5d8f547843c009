"""Entry point of `onerec-hf`: finds the command and imports only what it needs (`--help` works without torch)."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings

from onerec_hf.workflows.distributed import is_first, leave, say
from onerec_hf.workflows.errors import RunComplete

COMMANDS = {
    "quickstart": "train, evaluate and save a first model from ratings, with baselines",
    "prepare": "convert raw logs of any size to sharded training examples, with bounded memory",
    "semantic-ids": "fit: balanced, unique semantic IDs from item embeddings; report: compare quantizers",
    "train": "train a generator on interactions",
    "plan": "compute memory per GPU, communication and time per step of a model from its config",
    "reward": "train a reward model that scores sessions, from impressions with feedback",
    "align": "align a trained generator with preferences, from reward models or given pairs",
    "session-head": "train a session head on a saved generator, for sessions in one pass",
    "add-items": "add new items to a saved model, without training",
    "update": "count new interactions into a saved model, without training",
    "evaluate": "rank the full catalogue for held-out items, with popularity and item-kNN as baselines",
    "compare": "tune and compare model families on your table, with costs and a report",
    "export": "export a trained generator as ONNX graphs and compare them with the model",
    "serve": "serve a saved model over HTTP: batching, per-request constraints, metrics, reload",
    "demo": "open a page in the browser: pick a history, see generated sessions",
    "recommend": "recommend items for histories or the users of a table; rank given items; similar items",
}

USAGE = "\n".join(
    [
        "usage: onerec-hf COMMAND [options]        onerec-hf COMMAND --help",
        "",
        "OneRec for Hugging Face: generative recommendation with semantic IDs.",
        "",
        *(f"  {name:<14}{text}" for name, text in COMMANDS.items()),
        "",
        "Every command takes --config FILE.yaml for its options. ONEREC_HF_DEBUG=1 shows tracebacks.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command and returns its exit status: 0, 2 for an error that the user can fix (one message on stderr), 130 after Ctrl-C.

    Example:
        >>> main(["--version"])
        onerec-hf ...
        0
    """
    if argv is None:  # a process of its own
        speak_utf8()
        argv = sys.argv[1:]
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader of the output (`| head`) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def speak_utf8() -> None:
    """
    Sets stdin, stdout and stderr to UTF-8, whatever the locale: ids and titles are in every script, and files are UTF-8 too. A byte order mark
    at the beginning of stdin is passed over.
    """
    for stream, encoding in ((sys.stdin, "utf-8-sig"), (sys.stdout, "utf-8"), (sys.stderr, "utf-8")):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may hold bytes that are not UTF-8; they are written as they came.
            errors = (
                "strict" if stream is sys.stdin else "surrogateescape" if stream is sys.stdout else "backslashreplace"
            )
            stream.reconfigure(encoding=encoding, errors=errors)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, flush=True)
        return 0 if argv else 2
    if argv[0] == "--version":
        from onerec_hf import __version__

        print(f"onerec-hf {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"onerec-hf: unknown command {argv[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"onerec_hf.cli.{argv[0].replace('-', '_')}")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # TRL's trainers still call transformers' old names for activation checkpointing; no option changes that.
            old = r"`(is_gradient_checkpointing|gradient_checkpointing_\w+able)` is deprecated"
            warnings.filterwarnings("ignore", message=old, category=FutureWarning)
            command.main(argv[1:])
            sys.stdout.flush()
            leave()
    except SystemExit as exit:  # --help
        return int(exit.code or 0)
    except RunComplete as complete:
        say(str(complete))
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"\nonerec-hf: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, KeyError, TypeError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if os.environ.get("ONEREC_HF_DEBUG"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"onerec-hf {argv[0]}: {message}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # Trackers of --report_to that are not installed, by transformers' callbacks.
        if "to be installed" not in str(error) or os.environ.get("ONEREC_HF_DEBUG"):
            raise
        print(f"onerec-hf {argv[0]}: --report_to: {error}", file=sys.stderr)
        return 2
    return 0


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Our warnings as one line, without the source line that they come from; only the first rank prints them."""
    ours = os.path.abspath(filename).startswith(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if ours and not is_first():
        return
    text = f"onerec-hf: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


if __name__ == "__main__":
    sys.exit(main())
