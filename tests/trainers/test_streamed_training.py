"""OneRecTrainer on a stream of shards: epochs, resuming in the middle of one, ranks."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from onerec_hf.data import ExampleStream
from onerec_hf.trainers import OneRecTrainer
from tests.conftest import make_model
from tests.ranks import torchrun
from tests.trainers.test_onerec_trainer import CATALOGUE, PROCESSOR, arguments, examples, losses


def write_shards(folder, shards=4, count=50):
    folder.mkdir(exist_ok=True)
    data = examples(count)
    files = [folder / f"{shard}.parquet" for shard in range(shards)]
    for shard, file in enumerate(files):
        pq.write_table(data.select(range(shard, count, shards)).with_format("arrow")[:], file)
    return files


def streaming_trainer(folder, files, seed=0, callbacks=None, **settings):
    model = make_model(CATALOGUE, seed=seed, initializer_range=0.05, dropout_rate=0.1)
    stream = ExampleStream(files, seed=5, buffer_size=20)
    defaults = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    return OneRecTrainer(
        model,
        arguments(folder, **{**defaults, **settings}),
        train_dataset=stream,
        processing_class=PROCESSOR,
        callbacks=callbacks,
    )


def assert_resumes_exactly(tmp_path, files, checkpoints, steps, **settings):
    whole = streaming_trainer(tmp_path / "whole", files, **settings)
    whole.train()
    assert whole.state.global_step == steps
    for step in checkpoints:
        resumed = streaming_trainer(tmp_path / f"from-{step}", files, seed=9, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole)
        for first, second in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
            assert torch.equal(first, second)


def test_resumes_in_the_middle_of_an_epoch_exactly(tmp_path):
    # 50 examples in batches of 8: epochs of 7 steps. In the first epoch, at its end, in the second.
    assert_resumes_exactly(tmp_path, write_shards(tmp_path / "shards"), checkpoints=(3, 7, 10), steps=14)


def test_resumes_exactly_with_accumulation(tmp_path):
    # 7 batches an epoch: steps of 3, 3 and 1 batches.
    files = write_shards(tmp_path / "shards")
    assert_resumes_exactly(tmp_path, files, checkpoints=(2, 4), steps=6, gradient_accumulation_steps=3)


@pytest.mark.slow
def test_resumes_exactly_with_workers(tmp_path):
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    # Two workers with 25 examples each: 4 batches each.
    files = write_shards(tmp_path / "shards")
    assert_resumes_exactly(tmp_path, files, checkpoints=(3, 11), steps=16, **settings)


def test_what_was_trained_on_is_not_read_again(tmp_path, monkeypatch):
    files = write_shards(tmp_path / "shards")
    streaming_trainer(tmp_path / "whole", files, num_train_epochs=1).train()
    resumed = streaming_trainer(tmp_path / "again", files, num_train_epochs=1)
    collated = []
    collator = resumed.data_collator
    resumed.data_collator = lambda rows: collated.append(len(rows)) or collator(rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert collated == [8, 2]


def test_prefixes_stream_too(tmp_path):
    from tests.trainers.test_packed_training import PREFIXES
    from tests.trainers.test_packed_training import make_trainer as packed_trainer

    file = tmp_path / "0.parquet"
    pq.write_table(PREFIXES.with_format("arrow")[:], file)
    trainer = packed_trainer(tmp_path / "run", ExampleStream([file]), max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2
    with pytest.raises(
        ValueError, match=r"packing needs a datasets.Dataset, whose sizes are known; got ExampleStream"
    ):
        packed_trainer(tmp_path / "run", ExampleStream([file]), packing=True)


RANKS = """
import json, sys
from pathlib import Path
from onerec_hf.workflows.distributed import leave
from tests.trainers.test_streamed_training import streaming_trainer

folder = Path(sys.argv[1])
trainer = streaming_trainer(folder / "run", sorted((folder / "shards").iterdir()), save_strategy="no", num_train_epochs=1)
seen, collator = [], trainer.data_collator

def collate(rows):
    seen.extend(row["user_id"] for row in rows)
    return collator(rows)

trainer.data_collator = collate
trainer.train()
weights = sum(float(parameter.double().sum()) for parameter in trainer.model.parameters())
(folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps([seen, trainer.state.global_step, weights]))
del trainer
leave()
"""


@pytest.mark.slow
def test_two_ranks_read_other_shards_and_together_everything(tmp_path):
    files = write_shards(tmp_path / "shards", count=49)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    shards = [set(pq.read_table(file)["user_id"].to_pylist()) for file in files]
    (first, steps, weights), (second, others, same) = (
        json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)
    )
    assert sorted({*first, *second}) == list(range(49))
    assert not {*first} & {*second}
    assert all(shard <= {*first} or shard <= {*second} for shard in shards)
    # 25 and 24 examples: the shorter part begins again, so nobody waits for a batch that does not come.
    assert len(first) == len(second) == 25
    assert (steps, weights) == (others, same) == (4, weights)
