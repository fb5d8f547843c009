"""`onerec-hf align`: by a reward model or by given pairs, and what it leaves behind."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
from tests.cli.commands import NUM_ITEMS, NUM_USERS, contents, onerec, refused, succeeded, write_csv
from tests.hub_cards.reading import run_snippet, section

QUICK = [
    *[
        "--num_train_epochs",
        "1",
        "--max_steps",
        "3",
        "--num_candidates",
        "6",
        "--dpo_ratio",
        "0.2",
        "--use_cpu",
        "true",
    ],
    *["--bf16", "false", "--learning_rate", "0.01", "--disable_tqdm", "true", "--report_to", "none"],
]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """The folder of an untrained reward model that knows the shop's items."""
    torch.manual_seed(0)
    config = OneRecRewardConfig(
        num_items=NUM_ITEMS, hidden_size=8, intermediate_size=8, num_attention_heads=2, initializer_range=0.5
    )
    model = OneRecForSessionReward(config)
    model.set_items(RewardItems([f"m{i}" for i in range(NUM_ITEMS)]))
    with torch.no_grad():
        for tower in model.towers:
            tower.out_proj.weight.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("reward") / "judge"
    model.save_pretrained(folder)
    return folder


def write_pairs(path, count=20, **columns):
    rows = [
        {"history": [f"m{i}"], "chosen": [f"m{i + 1}", f"m{i + 2}"], "rejected": [f"m{i + 9}"], **columns}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_by_a_reward_model(trained, data, reward, tmp_path, monkeypatch):
    before = contents(trained.folder)
    done = succeeded(
        onerec(
            "align",
            "--model",
            trained.folder,
            "--reward",
            reward,
            "--judge",
            shutil.copytree(reward, tmp_path / "judge"),
            "--max_examples",
            40,
            *data.options,
            *QUICK,
            "--output_dir",
            tmp_path / "aligned",
        )
    )
    folder = tmp_path / "aligned"
    assert contents(trained.folder) == before
    *ranking, picked, judged = done.out.splitlines()[1:]
    assert {line.split()[0] for line in ranking} == {"popularity", "item_knn", "before", "aligned"}
    assert picked.startswith("mean reward of a session by the optimised reward: ")
    assert judged.split(": ")[1] == picked.split(": ")[1]
    assert "40 examples, pairs for 20.0% of them" in done.err
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    was = AutoModelForSeq2SeqLM.from_pretrained(trained.folder)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), was.parameters(), strict=True))
    assert len(processor.batch_decode(model.recommend(**processor([["m1", "m2"]])))[0]) > 0
    pairs = Dataset.from_parquet(str(folder / "pairs" / "pairs.parquet"))
    judge = OneRecForSessionReward.from_pretrained(reward)
    assert len(pairs) > 0
    for side in ("chosen", "rejected"):
        assert judge.reward(pairs["history"], pairs[side]) == pytest.approx(pairs[f"{side}_reward"], rel=1e-4)
    assert all(a > b for a, b in zip(pairs["chosen_reward"], pairs["rejected_reward"], strict=True))
    values = {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())["rows"]}
    wanted = {f"{kind}/{when}" for kind in ("reward", "heldout_reward") for when in ("before", "after")}
    assert {"before/onerec/recall@10", "onerec/recall@10", "popularity/recall@10", "seconds"} | wanted <= values.keys()
    card = (folder / "README.md").read_text()
    assert len(run_snippet(card)["sessions"]) == 1
    told = section(card, "Alignment")
    assert f"({len(pairs)} pairs in iteration 0)" in told
    assert "Reward: the reward model judge" in told
    assert f"| recall@10 | {values['before/onerec/recall@10']:.4f} | {values['onerec/recall@10']:.4f} |" in told
    assert "onerec-hf align --model" in card
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pairs_card = (folder / "pairs" / "README.md").read_text()
    assert run_snippet(pairs_card)["pairs"].to_list() == pairs.to_list()
    assert processor.catalogue.hash[:16] in pairs_card
    assert (folder / "codebooks.safetensors").exists()
    assert not (folder / "checkpoints").exists()
    assert not list(folder.rglob("*.bin"))


def test_by_given_pairs(trained, data, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", note="ignored")
    options = ["--preferences", pairs, "--evaluate", "false", "--output_dir", tmp_path / "aligned"]
    done = succeeded(onerec("align", "--model", trained.folder, *options, *data.options, *QUICK))
    assert done.out == ""
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "aligned")
    assert (tmp_path / "aligned" / "items.parquet").exists()
    was = AutoModelForSeq2SeqLM.from_pretrained(trained.folder)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), was.parameters(), strict=True))
    assert not (tmp_path / "aligned" / "pairs").exists()


POLICY = [
    *["--max_steps", "3", "--num_generations", "4", "--per_device_train_batch_size", "8", "--ntp_batch_size", "4"],
    *[
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--learning_rate",
        "0.01",
        "--disable_tqdm",
        "true",
        "--report_to",
        "none",
    ],
]


def test_by_policy_optimisation(trained, data, reward, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: ecpo\necpo_delta: 0.2\nevaluate: false\n")
    options = ["--model", trained.folder, "--reward", reward, *data.options, *POLICY]
    done = succeeded(onerec("align", *options, "--config", recipe, "--output_dir", tmp_path / "aligned"))
    assert "4 sessions for each" in done.err
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "aligned")
    was = AutoModelForSeq2SeqLM.from_pretrained(trained.folder)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), was.parameters(), strict=True))
    told = section((tmp_path / "aligned" / "README.md").read_text(), "Alignment")
    assert "4 sessions per history, drawn from the catalogue by the current policy without replacement" in told
    assert "ECPO (ratios per token, epsilon 0.2)" in told
    assert "Reward: the reward model" in told
    assert not (tmp_path / "aligned" / "pairs").exists()


def test_by_impressions(trained, data, tmp_path):
    rows = [
        [f"u{user}", f"m{(11 * user + 20 + step) % NUM_ITEMS}", 100 * user + step, 100 * (step + 1), 1000, step == 4]
        for user in range(NUM_USERS)
        for step in range(1, 8)
    ]
    log = write_csv(tmp_path / "log.csv", [["user_id", "item_id", "timestamp", "played", "lasts", "hated"], *rows])
    columns = ["--play_time_column", "played", "--duration_column", "lasts", "--dislike_column", "hated"]
    options = ["--model", trained.folder, "--impressions", log, *data.options, *POLICY, "--evaluate", "false"]
    out = ["--output_dir", tmp_path / "aligned"]
    done = succeeded(onerec("align", *options, *columns, "--method", "gbpo", *out))
    assert " of 210 impressions: " in done.err
    card = (tmp_path / "aligned" / "README.md").read_text()
    assert "logged samples of another policy with given advantages" in section(card, "Alignment")
    out = ["--output_dir", tmp_path / "other"]
    refused(onerec("align", *options, *columns, *out[:2], "--method", "dpo"), "unknown option --num_generations")
    refused(onerec("align", *options, "--method", "gbpo", *out), "log.csv", "play_time_ms")
    assert not (tmp_path / "other").exists()


def test_methods_have_their_own_options(trained, data, reward, tmp_path):
    out = ["--output_dir", tmp_path / "out", *data.options]
    model = ["--model", trained.folder, "--reward", reward]
    refused(onerec("align", *model, *out, "--method", "ppo"), "--method", "ppo")
    refused(onerec("align", *model, *out, "--num_generations", "4"), "unknown option --num_generations")
    refused(onerec("align", *model, *out, "--method", "ecpo", "--dpo_ratio", "0.5"), "unknown option --dpo_ratio")
    both = ["--method", "ecpo", "--loss_type", "gbpo"]
    refused(onerec("align", *model, *out, *both), "--loss_type gbpo does not belong to --method ecpo")
    pairs = ["--model", trained.folder, "--preferences", write_pairs(tmp_path / "pairs.jsonl"), "--method", "gbpo"]
    refused(onerec("align", *pairs, *out), "--preferences are pairs")
    assert not (tmp_path / "out").exists()


def test_refuses_with_one_message(trained, data, reward, tmp_path):
    out = ["--output_dir", tmp_path / "out", *data.options, *QUICK]
    model = ["--model", trained.folder]
    refused(onerec("align", *out), "pass --model")
    refused(onerec("align", *model, *out), "pass either --reward", "or --preferences")
    refused(onerec("align", *model, "--reward", tmp_path / "nothing", *out), "--reward", "no such folder")
    refused(onerec("align", *model, "--reward", reward, *out, "--dpo_ratio", "2"), "dpo_ratio=2.0 must be in (0, 1]")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"history": ["m1"], "chosen": ["m2"]}')
    refused(onerec("align", *model, "--preferences", wrong, *out), "it needs rows with", "rejected")
    wrong.write_text('{"history": ["m1"], "chosen": ["m2"], "rejected": ["zzz"]}')
    refused(onerec("align", *model, "--preferences", wrong, *out), "1 of 3 items are not in the model's catalogue")
    refused(
        onerec("align", *model, "--preferences", tmp_path / "no.csv", *out), "name an existing .jsonl or .parquet file"
    )
    same = ["--output_dir", trained.folder, "--overwrite", *data.options, *QUICK]
    refused(onerec("align", *model, "--reward", reward, *same), "is the model itself")
    assert not (tmp_path / "out").exists()


def test_a_judge_picks_no_pair(trained, data, reward, tmp_path):
    options = ["--model", trained.folder, "--reward", reward, "--judge", reward, *data.options, *QUICK]
    refused(onerec("align", *options, "--output_dir", tmp_path / "aligned"), "is also a --reward")
