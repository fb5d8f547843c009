"""`--fsdp_size` and `--ep_size`: what the command line shards trains and saves what one process does."""

import pytest
from transformers import AutoModelForSeq2SeqLM

from onerec_hf.cli.arguments import parse
from onerec_hf.trainers import OneRecTrainingArguments
from onerec_hf.workflows.sharding import ShardingSettings
from tests.cli.commands import CODES, TINY, onerec, succeeded
from tests.cli.test_ranks import on_ranks
from tests.rounding import BACKWARD, assert_close

# Half of a batch for each of two ranks, in the order of the examples.
RUN = ["--max_steps", "3", "--num_train_epochs", "1", "--save_strategy", "no", "--logging_steps", "1"]
RUN += ["--dropout_rate", "0", "--train_sampling_strategy", "sequential", "--optim", "sgd", "--learning_rate", "0.5"]


def checked(*options):
    sharding, args = parse((ShardingSettings, OneRecTrainingArguments), options, "train")
    sharding.check(args)


@pytest.mark.slow
def test_sharded_ranks_train_and_save_the_model_of_one_process(data, tmp_path):
    options = ["train", *data.options, *CODES, *TINY, *RUN]
    batch = "--per_device_train_batch_size"
    succeeded(onerec(*options, batch, "8", "--output_dir", tmp_path / "alone"))
    shards = ["--fsdp_size", "2", "--ep_size", "2"]
    done = succeeded(on_ranks(2, *options, *shards, batch, "4", "--output_dir", tmp_path / "ranks"))
    assert done.err.count(f"saved to {tmp_path / 'ranks'}") == 1
    alone, ranks = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name) for name in ("alone", "ranks"))
    assert_close(ranks.state_dict(), alone.state_dict(), terms=3 * BACKWARD)


@pytest.mark.slow
def test_processes_that_nobody_joins_are_refused(data, tmp_path):
    """Without an accelerator and --use_cpu, transformers would let each of them train alone into the same folder."""
    done = on_ranks(2, "train", *data.options, *CODES, "--output_dir", tmp_path / "out")
    assert done.status != 0
    assert "add --use_cpu true" in done.err
    assert not (tmp_path / "out").exists()


def test_sizes_that_are_not_those_of_the_launch_are_refused(tmp_path, monkeypatch):
    run = ["--output_dir", str(tmp_path), "--save_strategy", "no"]
    checked(*run)
    with pytest.raises(ValueError, match=r"--fsdp_size 2: .* runs in 1; start it with torchrun --nproc-per-node 2"):
        checked(*run, "--fsdp_size", "2")
    with pytest.raises(ValueError, match="--ep_size 2: fsdp_size"):
        checked(*run, "--ep_size", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cannot save or resume the optimizer of a sharded model"):
        checked("--output_dir", str(tmp_path), "--fsdp_size", "2")
    with pytest.raises(ValueError, match=r"--fsdp_size 2 --dp_replicate_size 2: .* must be the number of ranks"):
        checked(*run, "--fsdp_size", "2", "--dp_replicate_size", "2")
