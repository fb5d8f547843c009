"""Preference alignment as the benchmarks run it: what their trainers share."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

from benchmarks.harness import one_thread


def align_on(model, reward, examples, processor, seed: int, settings: dict[str, Any], **more) -> None:
    """
    Goes on training `model`, in place, on examples ([`OneRecDPOTrainer`], OneRec paper, section 3.3).

    Args:
        reward: as `reward_funcs` of the trainer.
        settings: of [`OneRecDPOConfig`].
        more: other arguments of the trainer.
    """
    from onerec_hf.trainers import OneRecDPOConfig, OneRecDPOTrainer

    with tempfile.TemporaryDirectory() as scratch:
        shared = {"per_device_train_batch_size": 64, "lr_scheduler_type": "constant", "draw_batch_size": 64}
        args = OneRecDPOConfig(
            scratch,
            bf16=False,
            activation_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            **{**shared, **settings},
        )
        OneRecDPOTrainer(model, reward, args=args, train_dataset=examples, processing_class=processor, **more).train()


def quiet() -> None:
    """One thread, and no logs or bars of the libraries."""
    one_thread()
    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
