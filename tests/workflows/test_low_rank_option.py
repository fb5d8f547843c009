"""`--item_head_rank`: train, evaluate, add items, update and recommend with it; wrong options before any training."""

import json

import pytest

from onerec_hf import OneRecForConditionalGeneration
from onerec_hf.workflows.sharding import ShardingSettings
from onerec_hf.workflows.training import given_settings
from tests.cli.commands import onerec, refused, succeeded
from tests.workflows.conftest import TINY, options_of

HEAD = {"item_head": True, "item_head_content": True, "item_head_evidence": True, "item_head_codes": True, "item_score_weight": 1.0}  # fmt: skip


def test_a_model_of_low_rank_goes_through_every_command(tables, files, tmp_path):
    rows, items = tables["interactions"], tables["items"]
    new = rows["item_id"].isin(["m38", "m39"])
    rows[~new].to_csv(tmp_path / "old.csv", index=False)
    items[items["item_id"].isin(["m38", "m39"])].to_csv(tmp_path / "new_items.csv", index=False)
    folder, grown = tmp_path / "mine", tmp_path / "grown"
    data = ["--interactions", tmp_path / "old.csv", "--items", files["items"]]
    options = options_of({**TINY, **HEAD, "item_head_rank": 2, "baselines": False})
    succeeded(onerec("train", *data, *options, "--output_dir", folder))
    assert json.loads((folder / "config.json").read_text())["item_head"]["rank"] == 2
    succeeded(onerec("evaluate", "--model", folder, *data))
    succeeded(onerec("add-items", "--model", folder, "--items", tmp_path / "new_items.csv", "--output_dir", grown))
    model = OneRecForConditionalGeneration.from_pretrained(grown)
    assert model.config.item_head.blocks == [1, 7, 32]
    assert model.get_encoder().item_head.vectors.blocks == [(1, 16), (7, 4), (32, 2)]
    succeeded(onerec("update", "--model", grown, "--interactions", files["interactions"]))
    more = ["--interactions", files["interactions"], "--items", files["items"], *options_of(TINY)[2:]]
    succeeded(onerec("train", "--model", grown, *more, "--baselines", "false", "--output_dir", tmp_path / "more"))
    histories = tmp_path / "histories.jsonl"
    histories.write_text('["m38", "m1"]\n')
    asked = ["recommend", "--model", tmp_path / "more", "--histories", histories, "--top_k", 38, "--num_beams", 38]
    assert '"m39"' in succeeded(onerec(*asked)).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item_head_rank": 2}, "--item_head_rank needs --item_head true"),
        ({"item_head": True, "item_head_rank": 16}, "rank=16 must be below hidden_size=16"),
    ],
)
def test_wrong_options_are_one_error(files, tmp_path, options, message):
    argv = ["train", "--interactions", files["interactions"], *options_of({**TINY, **options})]
    refused(onerec(*argv, "--output_dir", tmp_path / "out"), message)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_sharded_vectors_of_low_rank_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(ShardingSettings, "check", lambda *_: None)  # of how many ranks there are
    options = {"fsdp_size": 2, "save_strategy": "no", "use_cpu": True, "item_head": True, "output_dir": str(tmp_path)}
    options |= {"preset": "paper", "interactions": "rows.csv"}
    given_settings(None, (), dict(options))
    with pytest.raises(ValueError, match="--item_head_rank: vectors of low rank are not sharded"):
        given_settings(None, (), {**options, "item_head_rank": 8})
