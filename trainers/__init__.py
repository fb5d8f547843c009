"""Trainers and their training arguments."""

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

_PUBLIC = {
    "BatchOutOfMemoryError": "faults",
    "Budget": "budget",
    "BudgetCallback": "budget",
    "CheckpointError": "checkpoints",
    "InterruptCallback": "callbacks",
    "LostRankError": "faults",
    "NonFiniteError": "faults",
    "PlateauDecayCallback": "plateau",
    "RouterBalanceCallback": "callbacks",
    "RunProgress": "progress",
    "OneRecTrainingArguments": "onerec_config",
    "OneRecDPOConfig": "onerec_dpo_config",
    "OneRecDPOTrainer": "onerec_dpo_trainer",
    "OneRecGRPOConfig": "onerec_grpo_config",
    "OneRecGRPOTrainer": "onerec_grpo_trainer",
    "OneRecTrainer": "onerec_trainer",
    "RewardTrainer": "reward_trainer",
    "RewardTrainingArguments": "reward_config",
    "OneRecPreferenceCollator": "preference_collators",
    "Seq2SeqPreferenceCollator": "preference_collators",
    "Seq2SeqDPOConfig": "seq2seq_dpo_config",
    "Seq2SeqDPOTrainer": "seq2seq_dpo_trainer",
    "SequentialTrainer": "sequential_trainer",
    "SequentialTrainingArguments": "sequential_config",
    "SessionHeadArguments": "session_head_config",
    "StepFaults": "faults",
    "AtomicCheckpointMixin": "checkpoints",
    "AveragedWeights": "weight_average",
    "fit_sequential": "sequential_trainer",
    "fit_session_head": "session_head",
    "newest_checkpoint": "checkpoints",
    "pick_sessions": "session_head",
    "shard": "sharding",
    "unsharded_model": "sharding",
    "WeightAverage": "weight_average",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from onerec_hf.trainers.budget import Budget, BudgetCallback
    from onerec_hf.trainers.callbacks import InterruptCallback, RouterBalanceCallback
    from onerec_hf.trainers.checkpoints import AtomicCheckpointMixin, CheckpointError, newest_checkpoint
    from onerec_hf.trainers.faults import BatchOutOfMemoryError, LostRankError, NonFiniteError, StepFaults
    from onerec_hf.trainers.onerec_config import OneRecTrainingArguments
    from onerec_hf.trainers.onerec_dpo_config import OneRecDPOConfig
    from onerec_hf.trainers.onerec_dpo_trainer import OneRecDPOTrainer
    from onerec_hf.trainers.onerec_grpo_config import OneRecGRPOConfig
    from onerec_hf.trainers.onerec_grpo_trainer import OneRecGRPOTrainer
    from onerec_hf.trainers.onerec_trainer import OneRecTrainer
    from onerec_hf.trainers.plateau import PlateauDecayCallback
    from onerec_hf.trainers.preference_collators import OneRecPreferenceCollator, Seq2SeqPreferenceCollator
    from onerec_hf.trainers.progress import RunProgress
    from onerec_hf.trainers.reward_config import RewardTrainingArguments
    from onerec_hf.trainers.reward_trainer import RewardTrainer
    from onerec_hf.trainers.seq2seq_dpo_config import Seq2SeqDPOConfig
    from onerec_hf.trainers.seq2seq_dpo_trainer import Seq2SeqDPOTrainer
    from onerec_hf.trainers.sequential_config import SequentialTrainingArguments
    from onerec_hf.trainers.sequential_trainer import SequentialTrainer, fit_sequential
    from onerec_hf.trainers.session_head import fit_session_head, pick_sessions
    from onerec_hf.trainers.session_head_config import SessionHeadArguments
    from onerec_hf.trainers.sharding import shard, unsharded_model
    from onerec_hf.trainers.weight_average import AveragedWeights, WeightAverage
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
