"""How trainers read an [`~onerec_hf.data.ExampleStream`]: each rank its part, a resumed epoch from where it was."""

from __future__ import annotations

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from onerec_hf.data.shards.stream import BatchStream, ExampleStream


def stream_dataloader(stream: ExampleStream, args: TrainingArguments, collator) -> DataLoader:
    """
    A data loader of this rank's batches. The stream is dealt out already: accelerate only moves batches to the device.

    Example:
        >>> loader = stream_dataloader(PreparedFolder("prepared").train(), args, collator)  # doctest: +SKIP
    """
    if stream.seed is None:
        stream.seed = args.seed if args.data_seed is None else args.data_seed
    batches = stream.batches(
        args.train_batch_size, collator, args.process_index, args.world_size, args.dataloader_num_workers
    )
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        # Its own numbers: how often workers are started must not decide what dropout draws.
        generator=torch.Generator().manual_seed(stream.seed),
    )
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


class StreamPositionCallback(TrainerCallback):
    """
    Tells a stream how many batches of the epoch that begins were trained on before: those Trainer takes and throws away, and they need not
    be read for that.

    Example:
        >>> StreamPositionCallback().on_epoch_begin(None, None, None, train_dataloader=None)
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = getattr(train_dataloader, "dataset", None)
        if isinstance(batches, BatchStream):
            accumulated = args.gradient_accumulation_steps
            steps_of_epoch = -(-len(batches) // accumulated)
            batches.skip(0 if args.ignore_data_skip else state.global_step % steps_of_epoch * accumulated)
