"""`onerec-hf serve`: serves a saved model over HTTP."""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass, field, fields

from onerec_hf.cli.arguments import ShownItemArguments, parse
from onerec_hf.workflows.artefact import check_dtype, naming, recommender_of
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.settings import DtypeSettings


@dataclass
class ServeArguments(DtypeSettings, ShownItemArguments):
    """The model, the address and the limits."""

    model: str = field(
        default="",
        metadata={"help": "A saved OneRec, SASRec, HSTU, GRU4Rec, ACVAE, popularity or item-kNN: folder or Hub id."},
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on. Any address except loopback needs a token."},
    )
    port: int = field(default=8000, metadata={"help": "Port; 0 takes a free one."})
    token: str | None = field(
        default=None,
        metadata={
            "help": "Token that requests must carry. The process list shows it to all users of the machine: prefer the environment variable ONEREC_HF_TOKEN, or --token_file."
        },
    )
    token_file: str | None = field(default=None, metadata={"help": "File whose first line is the token."})
    unknown: str = field(
        default="skip",
        metadata={"help": "Default for ids that are not in the catalogue: skip (counted) or error (422)."},
    )
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 for torch's default."})
    drain_timeout: float = field(default=30.0, metadata={"help": "Seconds to answer accepted requests on shutdown."})
    max_batch_size: int = field(default=32, metadata={"help": "Largest number of histories per batch."})
    max_wait_ms: float = field(
        default=2.0, metadata={"help": "Milliseconds that the first history of a batch waits for others."}
    )
    max_queue: int = field(
        default=512, metadata={"help": "Largest number of waiting histories; further requests get 503."}
    )
    timeout: float = field(default=30.0, metadata={"help": "Seconds until a request gets 504."})
    reload_timeout: float = field(
        default=300.0, metadata={"help": "Seconds until a reload that has not loaded its model is given up."}
    )
    max_histories: int = field(default=64, metadata={"help": "Largest number of histories per request."})
    max_history_items: int = field(default=2000, metadata={"help": "Largest number of items per history."})
    max_list_items: int = field(default=10000, metadata={"help": "Largest number of items per exclude or allow list."})
    max_top_k: int = field(default=100, metadata={"help": "Largest top_k of a request."})
    max_beams: int = field(default=128, metadata={"help": "Largest num_beams of a request."})
    max_session_length: int = field(default=10, metadata={"help": "Largest session_length of a request."})
    max_body_bytes: int = field(default=1 << 20, metadata={"help": "Largest size of a request in bytes."})


def main(argv: list[str]) -> None:
    (args,) = parse((ServeArguments,), argv, "serve", required=["--model"])
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f'serving needs {error.name}: pip install "onerec-hf[serve]"') from None
    from onerec_hf.serving.access import TOKEN_VARIABLE, is_loopback, read_token
    from onerec_hf.serving.app import create_app
    from onerec_hf.serving.models import ServedModel
    from onerec_hf.serving.server import listen, serve
    from onerec_hf.serving.service import RecommendationService
    from onerec_hf.serving.settings import ServingSettings

    token = read_token(args.token, args.token_file)
    args.token = None
    if args.unknown not in ("error", "skip"):
        raise ValueError(f"--unknown is error or skip, not {args.unknown!r}")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: pass a number from 0 to 65535")
    if not 0 <= args.threads <= 1024:
        raise ValueError(f"--threads {args.threads}: pass a number from 0 to 1024")
    if not 0 <= args.drain_timeout <= 86_400:
        raise ValueError(f"--drain_timeout {args.drain_timeout:g}: pass 0 to 86400 seconds")
    settings = ServingSettings(**{each.name: getattr(args, each.name) for each in fields(ServingSettings)})
    if token is None and not is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} accepts other machines, so requests must carry a token: set {TOKEN_VARIABLE}, or pass --token_file; "
            "`openssl rand -hex 16` makes one"
        )

    check_dtype(args.dtype, args.model)
    # Decided once: a folder that is missing for a moment is not looked for on the Hub.
    repo = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model

    loads = functools.partial(recommender_of, dtype=args.dtype)

    def load(version=None):
        return ServedModel.load(repo, version, load_items=args.load, load_recommender=loads)

    with listen(args.host, args.port) as bound:
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
        with naming("--model", args.model):
            model = load()
        assert model is not None
        logging.basicConfig(stream=sys.stderr, format="onerec-hf serve: %(message)s")
        logging.getLogger("onerec_hf.serving").setLevel(logging.INFO)
        service = RecommendationService(
            model,
            settings,
            load=load,
            unknown=args.unknown,
        )
        host, port = bound.getsockname()[:2]
        say(
            f"model {model.version}: {model.catalogue}\nhttp://{f'[{host}]' if ':' in host else host}:{port}  "
            f"({'with a token' if token else 'no token'}; Ctrl-C ends it, SIGHUP reloads the model)"
        )
        serve(create_app(service, token), service, bound, args.drain_timeout)
        say("stopped")
        if service.is_loading:  # in a thread that may never end, or end in the middle of native code
            sys.stderr.flush()
            os._exit(0)
