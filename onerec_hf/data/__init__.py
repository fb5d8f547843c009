"""From tables of interactions and items to training examples: reading, feedback, sessions, splits, collators, named datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

_PUBLIC = {
    "SOURCES": "sources",
    "DataError": "columns",
    "DatasetFeatures": "feature_tables",
    "ExampleSettings": "shards.buckets",
    "ExampleStream": "shards.stream",
    "ItemTable": "interactions",
    "LeaveOneOutSplit": "splits",
    "OneRecDataCollator": "collators",
    "PackedDataCollator": "collators",
    "PackedDataset": "packing",
    "PositiveFeedback": "positives",
    "PreparedFolder": "shards.read",
    "RecommendationData": "sources",
    "SessionCriteria": "sessions",
    "RewardDataCollator": "feedback.collator",
    "SessionFeedback": "feedback.kuairand",
    "Split": "splits",
    "TemporalSplit": "splits",
    "UserSequences": "sequences",
    "UserTable": "users",
    "WatchTimeScale": "feedback.watch_time",
    "canonical_ids": "columns",
    "duration_rewards": "feedback.duration_rewards",
    "feedback_windows": "feedback.windows",
    "find_sessions": "sessions",
    "label_matrix": "feedback.kuairand",
    "leave_one_out": "splits",
    "load_files": "sources",
    "load_impressions": "feedback.impressions",
    "load_kuairand_feedback": "feedback.kuairand",
    "logged_samples": "feedback.duration_rewards",
    "load_source": "sources",
    "prefix_examples": "prefixes",
    "prepare_log": "shards.write",
    "read_interactions": "interactions",
    "read_items": "interactions",
    "positive_histories": "events",
    "read_recbole": "recbole",
    "read_users": "users",
    "session_examples": "sessions",
    "temporal_split": "splits",
    "given_split": "splits",
    "GivenSplit": "splits",
    "Ties": "ties",
    "window_examples": "windows",
    "write_recbole": "recbole",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from onerec_hf.data.collators import OneRecDataCollator, PackedDataCollator
    from onerec_hf.data.columns import DataError, canonical_ids
    from onerec_hf.data.events import positive_histories
    from onerec_hf.data.feature_tables import DatasetFeatures
    from onerec_hf.data.feedback.collator import RewardDataCollator
    from onerec_hf.data.feedback.duration_rewards import duration_rewards, logged_samples
    from onerec_hf.data.feedback.impressions import load_impressions
    from onerec_hf.data.feedback.kuairand import SessionFeedback, label_matrix, load_kuairand_feedback
    from onerec_hf.data.feedback.watch_time import WatchTimeScale
    from onerec_hf.data.feedback.windows import feedback_windows
    from onerec_hf.data.interactions import ItemTable, read_interactions, read_items
    from onerec_hf.data.packing import PackedDataset
    from onerec_hf.data.positives import PositiveFeedback
    from onerec_hf.data.prefixes import prefix_examples
    from onerec_hf.data.recbole import read_recbole, write_recbole
    from onerec_hf.data.sequences import UserSequences
    from onerec_hf.data.sessions import SessionCriteria, find_sessions, session_examples
    from onerec_hf.data.shards.buckets import ExampleSettings
    from onerec_hf.data.shards.read import PreparedFolder
    from onerec_hf.data.shards.stream import ExampleStream
    from onerec_hf.data.shards.write import prepare_log
    from onerec_hf.data.sources import SOURCES, RecommendationData, load_files, load_source
    from onerec_hf.data.splits import (
        GivenSplit,
        LeaveOneOutSplit,
        Split,
        TemporalSplit,
        given_split,
        leave_one_out,
        temporal_split,
    )
    from onerec_hf.data.ties import Ties
    from onerec_hf.data.users import UserTable, read_users
    from onerec_hf.data.windows import window_examples
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
