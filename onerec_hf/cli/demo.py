"""`onerec-hf demo`: a saved model as a page in the browser."""

from __future__ import annotations

from dataclasses import dataclass, field

from onerec_hf.cli.arguments import parse
from onerec_hf.workflows.artefact import load_model, load_processor
from onerec_hf.workflows.distributed import say


@dataclass
class DemoArguments:
    """Which model, and where it is served."""

    model: str = field(default="", metadata={"help": "Saved OneRec model: folder or Hub id."})
    items: str | None = field(
        default=None, metadata={"help": "Your items: item_id and the column of --title_column; else ids are shown."}
    )
    title_column: str = field(default="title", metadata={"help": "Column of --items that is shown."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 lets others in."})
    port: int = field(default=7860, metadata={"help": "Port."})


def main(argv: list[str]) -> None:
    (args,) = parse((DemoArguments,), argv, "demo", required=["--model"])
    if not 0 < args.port < 65536:
        raise ValueError(f"--port {args.port}: give a number from 1 to 65535")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ImportError('the demo needs gradio: pip install "onerec-hf[demo]"') from None
    from onerec_hf.cli.demo_app import Recommender, build_app

    processor, model = load_processor("--model", args.model), load_model("--model", args.model)
    titles = None if args.items is None else titles_of(args.items, args.title_column)
    app = build_app(Recommender(model, processor, titles), name=args.model.rstrip("/").split("/")[-1])
    say(f"http://{args.host}:{args.port}  (Ctrl-C ends it)")
    app.launch(server_name=args.host, server_port=args.port, quiet=True, show_error=True)


def titles_of(items: str, column: str) -> dict:
    """
    Item id -> title.

    Raises:
        ValueError: no such column.
    """
    from onerec_hf.data import read_items

    table = read_items(items)
    if column not in table.frame:
        raise ValueError(
            f"--items {items}: no column {column!r} among {list(table.frame.columns)}; name another with --title_column"
        )
    return dict(zip(table.item_ids.tolist(), table.frame[column].astype(str), strict=True))
