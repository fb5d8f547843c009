"""What a run was started with: kept in its checkpoints, and compared with the options of the call that resumes it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.workflows.artefact import saved_config
from onerec_hf.workflows.data_options import option_words
from onerec_hf.workflows.dataset import InMemoryDataset, ShardedDataset
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.settings import FEATURE_OPTIONS, gather, given_options

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from onerec_hf.trainers.callbacks import RunRecordCallback

# Where and whether, not what: never compared, and never kept.
_OF_THE_CALL = {"output_dir", "resume_from_checkpoint", "overwrite", "config", "dry_run", "push_to_hub"}
# What may change in the middle of a run: its length, its batches, its evaluations, and the machine. All else is in the checkpoint already or would
# make two halves of different trainings.
_MAY_CHANGE = {
    *("num_train_epochs", "max_steps", "budget", "early_stopping_patience", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "max_grad_norm", "stop_at_nonfinite"),
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "auto_find_batch_size",
        "activation_checkpointing",
    ),
    *("ep_size", "gradient_checkpointing", "gradient_checkpointing_kwargs", "attn_implementation"),
    *("draw_batch_size", "rollout_batch_size"),
    *(
        "predict_with_generate",
        "batch_eval_metrics",
        "validation_users",
        "baselines",
        "verdict_sasrec",
        "feature_worth",
        "evaluate",
    ),
    *(
        "item_score_weight",
        "decoder_weight",
        "refit",
        "keep_checkpoints",
        "save_items",
        "report_to",
        "run_name",
        "project",
    ),
    *(
        "disable_tqdm",
        "use_cpu",
        "bf16",
        "fp16",
        "tf32",
        "bf16_full_eval",
        "fp16_full_eval",
        "trackio_space_id",
        "seed_workers",
    ),
    *(
        "full_determinism",
        "skip_memory_metrics",
        "restore_callback_states_from_checkpoint",
        "ignore_data_skip",
        "debug",
    ),
    *("per_device_eval_batch_size", "accelerator_config", "parallelism_config", "deepspeed", "use_liger_kernel"),
}
_MAY_CHANGE_PREFIXES = ("eval_", "logging_", "log_", "save_", "dataloader_", "torch_", "ddp_", "fsdp", "hub_")


@dataclass
class RunRecord:
    """
    The options of a run, as JSON.

    Args:
        options: those that the caller gave or the preset chose; others had their defaults.
        chosen: the names of those that the preset chose.
        data: the options of the data, and `fingerprint`, which changes with the interactions.
        changes: what later calls changed: `{"step", "options": {name: [before, now]}}`.
        complete: whether `options` holds every option that is no default; false for checkpoints of earlier versions.
    """

    options: dict[str, Any] = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True

    @classmethod
    def of(cls, given: Mapping[str, Any], chosen: Mapping[str, Any], data: Mapping[str, Any]) -> RunRecord:
        """The record of a new run."""
        kept = _as_json({**chosen, **given})
        return cls(kept, [name for name in chosen if name not in given], _as_json(data))

    @classmethod
    def read(cls, checkpoint: str | os.PathLike) -> RunRecord:
        """The record in a checkpoint; for one of an earlier version what its configs tell."""
        from transformers import TrainerState

        from onerec_hf.trainers.callbacks import RunRecordCallback

        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        saved = cast("dict", state.stateful_callbacks).get(RunRecordCallback.__name__)
        if saved is not None:
            return cls(**saved["args"]["record"])
        config = saved_config(str(checkpoint), "config.json")
        options = {name: config[name] for name in _SIZES if name in config}
        return cls(
            options, data={name: config[name] for name in ("session_length",) if name in config}, complete=False
        )

    def callback(self) -> RunRecordCallback:
        """Keeps the record in the checkpoints of a trainer."""
        from onerec_hf.trainers.callbacks import RunRecordCallback

        return RunRecordCallback(vars(self))

    @classmethod
    def of_checkpoint(cls, args: TrainingArguments) -> RunRecord | None:
        """The record of the run that training arguments resume; None for a new run."""
        return None if args.resume_from_checkpoint is None else cls.read(args.resume_from_checkpoint)

    def completed(self, kinds: Sequence[type], given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """
        The single options of a call that resumes the run, with those that the first call gave and this one does not.

        Args:
            kinds: the dataclasses of the options.
            given: what the call gives, also by settings objects.
        """
        known = {each.name for kind in kinds for each in fields(kind)} - given.keys() - set(self.chosen)
        if not self.complete:
            return dict(options)
        return {**{name: value for name, value in self.options.items() if name in known}, **options}

    def check(
        self,
        checkpoint: str | os.PathLike,
        given: Mapping[str, Any],
        data: Mapping[str, Any],
        kinds: Sequence[type],
        ends: tuple[int, float] = (-1, 0.0),
    ) -> None:
        """
        Compares a call that resumes the run with it, and takes over what may change, which is said and kept in `changes`.

        Args:
            given: the options that the call gives.
            data: options and fingerprint of its data.
            kinds: the dataclasses of the options, for their defaults.
            ends: `max_steps` and `num_train_epochs` of the call.

        Raises:
            ValueError: options or data that differ, and a run that would end before the checkpoint.
        """
        from transformers import TrainerState

        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        defaults = {each.name: _default(each) for kind in kinds for each in fields(kind)}
        changed: dict[str, list[Any]] = {}
        for name, now in _as_json(given).items():
            if name in self.options or (self.complete and name in defaults):
                before = self.options[name] if name in self.options else defaults[name]
                if before != now:
                    changed[name] = [before, now]
        refused = {name: pair for name, pair in changed.items() if not _may_change(name)}
        now_data = _as_json(data)
        refused |= {
            name: [before, now_data.get(name)]  # data without features has no options of them
            for name, before in self.data.items()
            if name != "fingerprint" and (name in now_data or name in FEATURE_OPTIONS) and now_data.get(name) != before
        }
        if refused:
            raise ValueError(
                f"--resume_from_checkpoint {os.fspath(checkpoint)}: the run was started with other options ({_spelled(refused)}). Leave them out "
                "to resume it, or train with them from the start into another --output_dir"
            )
        fingerprints = self.data.get("fingerprint"), now_data.get("fingerprint")
        if None not in fingerprints and fingerprints[0] != fingerprints[1]:
            raise ValueError(
                f"--resume_from_checkpoint {os.fspath(checkpoint)}: the run was started with other interactions. Pass the same table to resume "
                "it, or train further on this one with --model into another --output_dir"
            )
        steps, epochs = ends
        if 0 < steps < state.global_step or (steps <= 0 < epochs < (state.epoch or 0)):
            asked = f"--max_steps {steps}" if steps > 0 else f"--num_train_epochs {epochs:g}"
            raise ValueError(
                f"{asked}: the checkpoint {os.fspath(checkpoint)} is at step {state.global_step:,} already, after {state.epoch:.2f} epochs. Ask for more, "
                "or resume from an earlier checkpoint"
            )
        if changed:
            say(f"resumed with other options: {_spelled(changed)}")
            self.options |= {name: now for name, (_, now) in changed.items()}
            self.changes.append({"step": state.global_step, "options": changed})


def as_before(
    kinds: Sequence[type], now: tuple[Any, ...], settings: Sequence[object], options: dict[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any], RunRecord | None]:
    """
    The settings of a call: where it resumes a run, with those that the first call gave and this one does not. And what this call gives, and the
    run's record; None for a new run.

    Args:
        kinds: the dataclasses of the settings, the training arguments last.
        now: the settings as [`gather`] makes them of this call, with the checkpoint to resume from.
        settings, options: of the call.
    """
    given, before = given_options(kinds, settings, options), RunRecord.of_checkpoint(now[-1])
    if before is None:
        return now, given, None
    *others, args = gather(kinds, settings, before.completed(kinds, given, options))
    args = copy.copy(args)
    args.resume_from_checkpoint = now[-1].resume_from_checkpoint
    return (*others, args), given, before


def record_of(
    before: RunRecord | None,
    checkpoint: str | None,
    given: Mapping[str, Any],
    data: Mapping[str, Any],
    kinds: Sequence[type],
    args: TrainingArguments,
    chosen: Mapping[str, Any] | None = None,
) -> RunRecord:
    """
    What a run is started with, or was started with `before`, if this call resumes it.

    Args:
        before, checkpoint: the record and the checkpoint to resume from; None for a new run.
        given, data, kinds: as for [`RunRecord.check`].
        args: the final training arguments.
        chosen: what the preset chose.

    Raises:
        ValueError: as [`RunRecord.check`].
    """
    if before is None or checkpoint is None:
        return RunRecord.of(given, chosen or {}, data)
    before.check(checkpoint, given, data, kinds, (args.max_steps, args.num_train_epochs))
    return before


_SIZES = (
    *("codebook_sizes", "hidden_size", "encoder_layers", "decoder_layers", "num_attention_heads", "intermediate_size"),
    *(
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        "dropout_rate",
        "initializer_range",
    ),
    *(
        "encoder_is_causal",
        "encoder_attention",
        "encoder_pools_items",
        "encoder_scales_embeddings",
        "decoder_scales_embeddings",
        "cross_attention_rope",
    ),
)


def of_data(data: Any) -> dict[str, Any]:
    """
    What a run must find again where it is resumed: the options of its data, and a fingerprint of the interactions where they can be read again.
    """
    return {**data.options, "fingerprint": fingerprint(data)}


def fingerprint(data: Any) -> str | None:
    """Changes with users, items and their order in the interactions; None for a dataset of the caller's own class."""
    digest = hashlib.sha256()
    if isinstance(data, InMemoryDataset):
        from pandas.util import hash_array

        sequences = data.sequences
        hashes: Any = hash_array
        for array in (sequences.user_ids, sequences.item_ids):
            digest.update(hashes(np.asarray(array)).tobytes())
        digest.update(np.asarray(sequences.offsets).tobytes())
    elif isinstance(data, ShardedDataset):
        manifest = {name: value for name, value in data.folder.manifest.items() if name in ("counts", "settings")}
        digest.update(json.dumps(manifest, sort_keys=True, default=str).encode())
    else:
        return None
    return digest.hexdigest()[:16]


def _may_change(name: str) -> bool:
    return name in _MAY_CHANGE or name.startswith(_MAY_CHANGE_PREFIXES)


def _default(each: Field) -> Any:
    factory: Any = each.default_factory
    value = each.default if factory is MISSING else factory()
    return None if value is MISSING else _as_json({"value": value}).get("value")


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of options that are neither secret nor about this call alone."""
    kept = {}
    for name, value in values.items():
        if name in _OF_THE_CALL or name.endswith("token"):
            continue
        try:
            kept[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return kept


def _spelled(changed: Mapping[str, list[Any]]) -> str:
    def one(name: str, value: Any) -> str:
        return " ".join(option_words({name: value})[1:]) or "none"

    return ", ".join(f"--{name} {one(name, now)}, not {one(name, before)}" for name, (before, now) in changed.items())
