"""Interactions, items, positive feedback, sessions, splits and named sources: from a table to training examples."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onerec_hf.data.collators import OneRecDataCollator, PackedDataCollator
    from onerec_hf.data.feedback import PositiveFeedback
    from onerec_hf.data.impressions import load_impressions
    from onerec_hf.data.interactions import ItemTable, canonical_ids, read_interactions, read_items
    from onerec_hf.data.kuairand_feedback import SessionFeedback, label_matrix, load_kuairand_feedback
    from onerec_hf.data.packing import PackedDataset
    from onerec_hf.data.prefixes import prefix_examples
    from onerec_hf.data.prepare import prepare_log
    from onerec_hf.data.prepare_buckets import ExampleSettings
    from onerec_hf.data.prepared import PreparedFolder
    from onerec_hf.data.recbole import read_recbole, write_recbole
    from onerec_hf.data.reward_collator import RewardDataCollator
    from onerec_hf.data.sequences import UserSequences
    from onerec_hf.data.session_feedback import feedback_windows
    from onerec_hf.data.sessions import SessionCriteria, find_sessions, session_examples
    from onerec_hf.data.sources import SOURCES, RecommendationData, load_files, load_source
    from onerec_hf.data.splits import LeaveOneOutSplit, Split, TemporalSplit, leave_one_out, temporal_split
    from onerec_hf.data.streaming import ExampleStream
    from onerec_hf.data.tables import DataError
    from onerec_hf.data.watch_time import WatchTimeScale
    from onerec_hf.data.windows import window_examples

# name -> module: importing the room costs nothing until something in it is used.
_PUBLIC = {
    "SOURCES": "sources",
    "DataError": "tables",
    "ExampleSettings": "prepare_buckets",
    "ExampleStream": "streaming",
    "ItemTable": "interactions",
    "LeaveOneOutSplit": "splits",
    "OneRecDataCollator": "collators",
    "PackedDataCollator": "collators",
    "PackedDataset": "packing",
    "PositiveFeedback": "feedback",
    "PreparedFolder": "prepared",
    "RecommendationData": "sources",
    "SessionCriteria": "sessions",
    "RewardDataCollator": "reward_collator",
    "SessionFeedback": "kuairand_feedback",
    "Split": "splits",
    "TemporalSplit": "splits",
    "UserSequences": "sequences",
    "WatchTimeScale": "watch_time",
    "canonical_ids": "interactions",
    "feedback_windows": "session_feedback",
    "find_sessions": "sessions",
    "label_matrix": "kuairand_feedback",
    "leave_one_out": "splits",
    "load_files": "sources",
    "load_impressions": "impressions",
    "load_kuairand_feedback": "kuairand_feedback",
    "load_source": "sources",
    "prefix_examples": "prefixes",
    "prepare_log": "prepare",
    "read_interactions": "interactions",
    "read_items": "interactions",
    "read_recbole": "recbole",
    "session_examples": "sessions",
    "temporal_split": "splits",
    "window_examples": "windows",
    "write_recbole": "recbole",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'onerec_hf.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onerec_hf.data.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
