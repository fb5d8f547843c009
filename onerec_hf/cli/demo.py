"""`onerec-hf demo`: a saved model as a page in the browser."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onerec_hf.cli.arguments import ShownItemArguments, parse
from onerec_hf.workflows.artefact import check_dtype, load_model, load_processor, naming
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.settings import DtypeSettings

if TYPE_CHECKING:
    from onerec_hf.data.item_fields import ItemFields
    from onerec_hf.modeling.catalogue import ItemCatalogue


@dataclass
class DemoArguments(DtypeSettings, ShownItemArguments):
    """The model, and the page's address."""

    model: str = field(default="", metadata={"help": "Saved OneRec model: folder or Hub id."})
    title_column: str = field(
        default="title", metadata={"help": "Column with the name of an item; items without one show their id."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 accepts other machines."})
    port: int = field(default=7860, metadata={"help": "Port."})

    def load(self, repo: str | os.PathLike, catalogue: ItemCatalogue) -> ItemFields | None:
        """
        Fields by item id; None without a table.

        Raises:
            ValueError: a table that is damaged, belongs to another catalogue, or (of `--items`) has no column `--title_column`.
        """
        items = super().load(repo, catalogue)
        if self.items is not None and items is not None and self.title_column not in items.columns:
            raise ValueError(
                f"--items {self.items}: no column {self.title_column!r} among {items.columns}; name another with --title_column"
            )
        return items


def main(argv: list[str]) -> None:
    (args,) = parse((DemoArguments,), argv, "demo", required=["--model"])
    if not 0 < args.port < 65536:
        raise ValueError(f"--port {args.port}: pass a number from 1 to 65535")
    check_dtype(args.dtype, args.model)
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ImportError('the demo needs gradio: pip install "onerec-hf[demo]"') from None
    from onerec_hf.cli.demo_app import DemoRecommender, build_app

    processor, model = load_processor("--model", args.model), load_model("--model", args.model, dtype=args.dtype)
    assert processor.catalogue is not None
    with naming("--model", args.model):
        items = args.load(args.model, processor.catalogue)
    app = build_app(
        DemoRecommender(model, processor, items, args.title_column), name=args.model.rstrip("/").split("/")[-1]
    )
    say(f"http://{args.host}:{args.port}  (Ctrl-C ends it)")
    app.launch(server_name=args.host, server_port=args.port, quiet=True, show_error=True)
