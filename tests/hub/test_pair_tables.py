"""The pairs that alignment drew, pushed as a dataset and trained on again without a reward."""

import datasets.config
import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi

from onerec_hf import OneRecProcessor
from onerec_hf.trainers import Seq2SeqDPOConfig, Seq2SeqDPOTrainer
from tests.conftest import make_model
from tests.trainers.test_onerec_dpo import CATALOGUE, make_trainer

REPO = "tester/onerec-pairs"


@pytest.fixture
def datasets_hub(hub, tmp_path, monkeypatch):
    """`datasets` keeps an endpoint of its own."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return hub


def test_pairs_come_back_and_train(datasets_hub, tmp_path):
    drawn = make_trainer(tmp_path / "drawn")
    drawn.begin_iteration(0)
    drawn.pairs.push_to_hub(REPO)
    files = HfApi(endpoint=datasets_hub.endpoint).list_repo_files(REPO, repo_type="dataset")
    assert any(name.endswith(".parquet") for name in files)
    pairs = load_dataset(REPO, split="train")
    assert isinstance(pairs, Dataset)
    assert pairs.to_list() == drawn.pairs.to_list()
    args = Seq2SeqDPOConfig(
        str(tmp_path / "again"), max_steps=2, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Seq2SeqDPOTrainer(
        make_model(CATALOGUE, seed=1),
        args=args,
        train_dataset=pairs,
        processing_class=OneRecProcessor.from_catalogue(CATALOGUE),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert not datasets_hub.unknown
