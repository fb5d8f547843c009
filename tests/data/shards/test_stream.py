"""Streams of sharded examples: every example once, dealt over ranks and workers, reproducible, and passed over where it was read before."""

import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from onerec_hf.data import ExampleStream


def write_shards(folder, sizes):
    """Shards of examples whose sessions are 0, 1, 2, ..."""
    files, start = [], 0
    for number, size in enumerate(sizes):
        numbers = range(start, start + size)
        table = pa.table({"history": [[n, n] for n in numbers], "session": [[n] for n in numbers]})
        files.append(folder / f"{number}.parquet")
        pq.write_table(table, files[-1], row_group_size=3)
        start += size
    return files


def collate(examples):
    assert all(example["history"] == 2 * example["session"] for example in examples)
    return {"numbers": [example["session"][0] for example in examples]}


def epoch_of(stream, rank=0, world_size=1, workers=0, batch_size=4, epoch=0, skip=0):
    batches = stream.batches(batch_size, collate, rank, world_size, workers)
    batches.set_epoch(epoch)
    batches.skip(skip)
    read = list(DataLoader(batches, batch_size=None, num_workers=workers))
    assert len(read) == len(batches)
    return read


def numbers(batches):
    return [number for batch in batches for number in batch["numbers"]]


def test_an_epoch_is_every_example_once_in_an_order_of_its_own(tmp_path):
    files = write_shards(tmp_path, [7, 6, 7])
    stream = ExampleStream(files, seed=3, buffer_size=5)
    first, again, second = (numbers(epoch_of(stream, epoch=epoch)) for epoch in (0, 0, 1))
    assert sorted(first) == sorted(second) == list(range(20)) == sorted(e["session"][0] for e in stream)
    assert first == again
    assert first != second
    assert first != list(range(20))
    assert numbers(epoch_of(ExampleStream(files, seed=4, buffer_size=5))) != first
    assert len(stream) == 20


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 0)])
def test_ranks_read_other_shards_and_together_everything(tmp_path, world_size, workers):
    sizes = [5, 6, 5, 5, 6, 5, 5, 5]
    stream = ExampleStream(write_shards(tmp_path, sizes))
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    for epoch in (0, 1):
        parts = [numbers(epoch_of(stream, rank, world_size, workers, epoch=epoch)) for rank in range(world_size)]
        shards = [{shard_of[number] for number in part} for part in parts]
        assert sorted(shard for part in shards for shard in part) == list(range(8))
        assert sorted({number for part in parts for number in part}) == list(range(42))
        # The same number of examples for all; whoever has fewer sees its first ones again.
        assert {len(part) for part in parts} == {stream.longest_part(world_size)}
        for part in parts:
            repeated = len(part) - len(set(part))
            assert part[len(part) - repeated :] == part[:repeated]


def test_workers_share_a_rank(tmp_path):
    stream = ExampleStream(write_shards(tmp_path, [6, 6, 6, 6]))
    parts = [epoch_of(stream, rank, 2, workers=2) for rank in range(2)]
    assert sorted(number for part in parts for number in numbers(part)) == list(range(24))
    for part, rank in zip(parts, range(2), strict=True):
        for skip in (1, 2, 3):
            passed = epoch_of(stream, rank, 2, workers=2, skip=skip)
            assert passed[:skip] == [{}] * skip
            assert passed[skip:] == part[skip:]


@pytest.mark.parametrize("shards", [4, 3])
def test_batches_that_were_read_before_are_passed_over(tmp_path, shards):
    stream = ExampleStream(write_shards(tmp_path, [7] * shards), buffer_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = epoch_of(stream, rank=1, world_size=2, epoch=5)
        for skip in range(len(whole) + 1):
            passed = epoch_of(stream, rank=1, world_size=2, epoch=5, skip=skip)
            assert passed == [{}] * skip + whole[skip:]


def test_the_epoch_after_a_resumed_one_is_whole(tmp_path):
    batches = ExampleStream(write_shards(tmp_path, [8])).batches(4, collate, 0, 1, 0)
    batches.skip(1)
    assert [bool(batch) for batch in batches] == [False, True]
    batches.skip(0)
    batches.set_epoch(1)
    assert sorted(numbers(batches)) == list(range(8))


def test_shards_that_do_not_divide_are_told_and_read_all_the_same(tmp_path):
    stream = ExampleStream(write_shards(tmp_path, [5, 5, 5]))
    message = r"3 training shards are not divisible by 2 ranks x 2 data loader workers = 4 readers: .* --num_shards 4"
    with pytest.warns(UserWarning, match=message):
        stream.batches(4, collate, rank=0, world_size=2, workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream.batches(4, collate, rank=1, world_size=2, workers=2)  # one rank says it
        stream.batches(4, collate, rank=0, world_size=3, workers=0)
    with pytest.warns(
        UserWarning, match="3 training shards are not divisible by 2 ranks x 1 data loader worker = 2 readers"
    ):
        parts = [numbers(epoch_of(stream, rank, world_size=2)) for rank in range(2)]
    assert sorted({*parts[0], *parts[1]}) == list(range(15))
    assert [len(part) for part in parts] == [8, 8]


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="a stream needs Parquet files with examples; got 0 files"):
        ExampleStream([])
    stream = ExampleStream(write_shards(tmp_path, [3, 0]))  # the empty one is nobody's part
    assert sorted(numbers(epoch_of(stream))) == [0, 1, 2]
    few = ExampleStream(write_shards(tmp_path, [1, 1, 1]))
    with (
        pytest.warns(UserWarning, match="not divisible"),
        pytest.raises(
            ValueError, match=r"reader 3 of 4 \(ranks x data loader workers\) has no examples: 3 examples in 3"
        ),
    ):
        [epoch_of(few, rank, world_size=4) for rank in range(4)]
