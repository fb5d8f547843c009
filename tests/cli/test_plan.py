"""`onerec-hf plan`: plans from options, from recipes and from saved models; what it refuses; that it makes no weights."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration
from onerec_hf.planning import Batch, Layout, count_parameters, layouts, make_plan, make_plans
from onerec_hf.planning.layouts import Collective, default_expert_ranks
from onerec_hf.planning.parameters import Unit
from onerec_hf.planning.plan import best
from tests.cli.commands import TINY, onerec, refused, succeeded

ROOT = Path(__file__).parents[2]
SIZES = [*TINY[TINY.index("--hidden_size") : TINY.index("--max_steps")], "--codebook_sizes", "8", "8", "8"]


def plan(tmp_path, *argv):
    done = succeeded(onerec("plan", *argv, "--json", tmp_path / "plan.json"))
    return done, json.loads((tmp_path / "plan.json").read_text())


def test_options_a_recipe_and_a_saved_model_give_one_plan(tmp_path):
    options = dict(zip((name.strip("-") for name in SIZES[:14:2]), map(int, SIZES[1:14:2]), strict=True))
    config = OneRecConfig(codebook_sizes=[8, 8, 8], session_length=3, **options)
    OneRecForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    recipe = {
        **options,
        "codebook_sizes": [8, 8, 8],
        "session_length": 3,
        "max_history": 7,
        "per_device_train_batch_size": 9,
    }
    recipe |= {
        "dataset": "movielens",
        "learning_rate": 0.1,
        "bf16": True,
    }  # which a plan has no use for, or by another name
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    same = ["--gpus", "4", "--max_history", "7", "--batch", "9"]
    plans = [
        plan(tmp_path, *SIZES, "--session_length", "3", *same),
        plan(tmp_path, "--config", tmp_path / "recipe.yaml", "--gpus", "4"),
        plan(tmp_path, "--config", tmp_path / "model", *same),
        plan(tmp_path, f"--config={tmp_path / 'model' / 'config.json'}", *same),
        plan(tmp_path, "--model", tmp_path / "model", *same),
    ]
    for done, content in plans:
        assert content == plans[0][1]
        assert done.out == plans[0][0].out
    content = plans[0][1]
    assert content["parameters"] == count_parameters(config)
    assert [each["strategy"] for each in content["plans"]] == ["ddp", "fsdp", "fsdp+ep", "zero3"]
    assert content["plans"][0]["memory"]["weights"] == 4 * content["parameters"]
    assert content["choice"] == "ddp"


def test_a_recipe_with_an_item_head_needs_the_number_of_items(tmp_path):
    recipe = ["--config", ROOT / "recipes" / "amazon_beauty_items.yaml"]
    assert "--num_items" in refused(onerec("plan", *recipe))
    _, with_head = plan(tmp_path, *recipe, "--num_items", "12101")
    _, without = plan(tmp_path, *recipe, "--item_head", "false", "--item_score_weight", "0")
    assert with_head["parameters"] - without["parameters"] == 12102 * 128
    assert with_head["plans"][0]["memory"]["logits"] > without["plans"][0]["memory"]["logits"]


def test_numbers_of_a_gpu_can_be_given(tmp_path):
    _, usual = plan(tmp_path, *SIZES, "--gpus", "2")
    _, slow = plan(
        tmp_path, *SIZES, "--gpus", "2", "--tflops", "0.989", "--node_gb_s", "0.45", "--memory_gb_s", "3.35"
    )
    for mine, theirs in zip(usual["plans"], slow["plans"], strict=True):
        for name in ("compute", "communication", "memory"):
            assert theirs["seconds"][name] == pytest.approx(1000 * mine["seconds"][name])
    done, tight = plan(tmp_path, *SIZES, "--gpus", "2", "--gpu_memory", "0.001")
    assert not any(each["fits"] for each in tight["plans"])
    assert "Nothing fits: try --checkpointing true" in done.out


def test_refuses_what_cannot_be_planned(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "other.yaml").write_text("wings: 2\n")
    wrong = {
        "not the config of a OneRec generator (model_type: bert)": ["--config", tmp_path],
        "cannot read a model's config": ["--config", tmp_path / "broken.json"],
        "no such file or folder": ["--config", tmp_path / "absent"],
        "a YAML mapping of options": ["--config", tmp_path / "list.yaml"],
        "unknown option wings, neither of plan nor of train": ["--config", tmp_path / "other.yaml"],
        "both name a model": ["--config", tmp_path, "--model", tmp_path],
        "--gpus 0": ["--gpus", "0"],
        "--batch 0": ["--batch", "0"],
        "--num_items 0": ["--num_items", "0"],
        "--strategy pipeline": ["--strategy", "pipeline"],
        "--dtype int8": ["--dtype", "int8"],
        "--gpu tpu": ["--gpu", "tpu"],
        "must be above 0": ["--tflops", "0"],
        "is possible on 1 GPUs": ["--strategy", "fsdp"],
    }
    for message, argv in wrong.items():
        assert message in refused(onerec("plan", *argv))


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['onerec-hf', 'plan', '--help']\n"
        "from onerec_hf.cli.main import main\n"
        "status = main(); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--gpus_per_node" in done.stdout


WIDE = OneRecConfig(
    codebook_sizes=[8192] * 3,
    hidden_size=2048,
    intermediate_size=8192,
    moe_intermediate_size=3072,
    encoder_layers=18,
    decoder_layers=18,
    num_attention_heads=32,
)


def test_ten_billion_parameters_take_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF)
    plans = make_plans(WIDE, layouts(WIDE, 128), Batch())
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert len(plans) == 6
    assert after.ru_utime - before.ru_utime < 1
    assert after.ru_maxrss - before.ru_maxrss < 100_000  # KiB


def test_fsdp_cuts_packed_experts_no_finer_than_one_expert():
    held = [Layout("fsdp", gpus, gpus).memory(WIDE, "float32")["weights"] for gpus in (8, 24, 64)]
    expert = 4 * 18 * 3 * 2048 * 3072
    assert held[1] > expert
    assert held[2] > expert
    gathered = {ranks: Unit("experts", ((24, 10, 7),)).shard(ranks) * ranks for ranks in (8, 24, 64)}
    assert gathered == {8: 24 * 70, 24: 24 * 70, 64: 64 * 70}


def test_layouts_that_cannot_train_say_why():
    assert "not a multiple of 128 shards" in Layout("fsdp", 128, 128).problem(WIDE)
    assert Layout("hsdp", 128, 8).problem(WIDE) is None
    assert "must divide 24 experts" in Layout("fsdp+ep", 16, 16, 16).problem(WIDE)
    assert not make_plan(WIDE, Layout("fsdp", 128, 128), Batch()).fits
    assert default_expert_ranks(WIDE, shards=128, gpus_per_node=8) == 8
    dense = OneRecConfig(num_experts=1)
    assert {layout.strategy for layout in layouts(dense, 16)} == {"ddp", "fsdp", "hsdp", "zero3"}


def test_what_crosses_machines_is_shared_by_their_gpus():
    ring = Collective("all_gather", 800, ranks=8, spread=1, what="")
    assert ring.sent(gpus_per_node=8) == (700.0, 0.0)
    assert ring.sent(gpus_per_node=4) == (600.0, 100.0)
    assert Collective("all_reduce", 800, ranks=2, spread=8, what="").sent(8) == (0.0, 800.0)
    assert Collective("all_to_all", 800, ranks=8, spread=1, what="").sent(4) == (300.0, 400.0)


def test_the_simplest_that_is_quick_enough_is_advised():
    plans = make_plans(WIDE, layouts(WIDE, 16), Batch())
    assert best(plans).layout.strategy == "hsdp"
    assert best([plan for plan in plans if plan.layout.strategy == "ddp"]) is None
    small = OneRecConfig()
    assert best(make_plans(small, layouts(small, 16), Batch())).layout.strategy == "ddp"
