"""`onerec-hf session-head`: trains a session head on a saved generator, for sessions in one pass."""

from __future__ import annotations

from onerec_hf.cli.arguments import parse_given
from onerec_hf.trainers.session_head_config import SessionHeadArguments
from onerec_hf.workflows.session_head import SessionHeadSettings, train_session_head
from onerec_hf.workflows.settings import DataSettings


def main(argv: list[str]) -> None:
    kinds = (SessionHeadSettings, DataSettings, SessionHeadArguments)
    given = parse_given(kinds, argv, "session-head", required=("--model",))
    result = train_session_head(**given)
    found = result.metrics
    what = "reward of a session" if given.get("reward") else "share of a session's items"
    print(
        f"{result.folder}: session head saved. {found['covered']:.1%} of the sessions' items are candidates; held-out {what} {found['heldout']:.4f} "
        f"at alpha {found['alpha']:g}."
    )
