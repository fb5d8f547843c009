"""Model cards: the snippet runs, the front matter is valid, the numbers are the model's, and no name becomes markup."""

import re
import sys

import numpy as np
import pandas as pd
import pytest
import transformers
import yaml
from huggingface_hub import ModelCard

from onerec_hf import ItemCatalogue, OneRecProcessor
from onerec_hf.data import RecommendationData
from onerec_hf.evaluation.results import result_row
from onerec_hf.hub_cards import Alignment, write_generator_card
from onerec_hf.hub_cards.common import plain_text
from tests.conftest import make_catalogue, make_model
from tests.hub_cards.reading import HOSTILE, headings, run_snippet, section, table_of

PROTOCOL = "Leave-one-out split: for each of 7 users the last item is the test target."
SCORES = {"recall@10": 0.123456, "coverage@10": 1.0, "ndcg@10": 0.000004}


def source(name="clicks", description="Read from clicks.csv."):
    frame = pd.DataFrame({"user_id": [1], "item_id": ["m1"], "timestamp": [0]})
    return RecommendationData(name, frame, description=description)


def rows(models=("onerec", "popularity", "item_knn")):
    """Each model a hundredth below the one before; rows that are no metric too."""
    scored = [
        result_row(f"{model}/{metric}", max(0.0, value - number / 100), "share")
        for number, model in enumerate(models)
        for metric, value in SCORES.items()
    ]
    return [*scored, result_row("invalid_id_rate", 0.0, "share"), result_row("seconds", 3.0, "s")]


@pytest.fixture
def write(model, processor, tmp_path):
    """Writes a card into `tmp_path / name`; gives its text."""

    def write(name="shop", *, model=model, processor=processor, data=None, protocol=PROTOCOL, results=None, **options):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        results = rows() if results is None else results
        write_generator_card(folder, processor, model, data or source(), protocol, results, **options)
        assert [path.name for path in folder.glob("README*")] == ["README.md"]
        return (folder / "README.md").read_text(encoding="utf-8")

    return write


@pytest.mark.parametrize("name", ["shop", 'it\'s a "shop"\\n', "``` shop"])
def test_the_snippet_runs_as_it_stands(write, model, processor, tmp_path, name):
    card = write(name)
    model.save_pretrained(tmp_path / name)
    processor.save_pretrained(tmp_path / name)
    scope = run_snippet(card)
    assert scope["sessions"] == processor.batch_decode(
        model.recommend(**processor([["m0", "m1", "m2"]]), num_beams=20, session_length=model.config.session_length)
    )
    assert len(scope["sessions"][0]) == model.config.session_length == 2


def test_the_snippet_with_ids_that_look_like_code(tmp_path, write):
    ids = ["```\n", "'\"\\", "é\u2028😀"]
    catalogue = ItemCatalogue(ids, [[0, 1, 2], [1, 0, 0], [2, 2, 2]], [4, 5, 6])
    processor, model = OneRecProcessor.from_catalogue(catalogue), make_model(catalogue)
    card = write("shop", model=model, processor=processor)
    model.save_pretrained(tmp_path / "shop")
    processor.save_pretrained(tmp_path / "shop")
    scope = run_snippet(card)
    assert scope["processor"].catalogue.item_ids == ids
    assert set(scope["sessions"][0]) <= set(ids)


def test_the_front_matter_is_a_model_card(write, tmp_path):
    write()
    card = ModelCard.load(tmp_path / "shop" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "other"
    assert {"onerec", "semantic-ids"} <= set(card.data.tags)
    assert card.data.model_name == "shop"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"recall@10": 0.1235, "coverage@10": 1.0, "ndcg@10": 0.0}
    assert {(result.dataset_name, result.task_type) for result in card.data.eval_results} == {
        ("clicks", "recommendation")
    }
    assert card.text.lstrip().startswith("# shop\n")
    card.save(tmp_path / "again.md")  # what the hub's own code writes of it
    assert ModelCard.load(tmp_path / "again.md").data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_names(write, tmp_path, name):
    card = write("shop", data=source(name, f"Read from {name}."), protocol=f"Positive feedback: {name} >= 1.")
    loaded = ModelCard.load(tmp_path / "shop" / "README.md")
    assert {result.dataset_name for result in loaded.data.eval_results} == {name}
    _, _, body = card.split("---\n", 2)
    assert headings(body) == ["# shop", "## Semantic IDs", "## Model", "## Data", "## Evaluation", "## Limits"]
    data = body.split("## Data\n")[1].split("\n## ")[0].strip()
    assert data == f"Read from {plain_text(name)}. Positive feedback: {plain_text(name)} &gt;= 1."
    assert "\n" not in data
    assert not re.search(r"<|(?<!\\)[`*_\[\]|~$!]", data)


@pytest.mark.parametrize("name", [name for name in HOSTILE if "/" not in name and "\n" not in name])
def test_the_folders_name_is_only_a_name(write, tmp_path, name):
    card = write(name)
    assert ModelCard.load(tmp_path / name / "README.md").data.model_name == name
    assert f"\n# {plain_text(name)}\n" in card


def test_plain_text_reads_as_the_name():
    """Undoing Markdown's escapes and HTML's entities gives the name back."""
    import html

    for name in HOSTILE:
        shown = html.unescape(re.sub(r"\\([\\`*_\[\]|~#$!])", r"\1", plain_text(name)))
        assert shown == " ".join(name.split())


@pytest.mark.parametrize("experts", [1, 4])
def test_the_numbers_are_the_models_and_the_catalogues(write, experts):
    catalogue = make_catalogue(1234, (16, 9, 30))
    model = make_model(catalogue, num_experts=experts, encoder_layers=3, decoder_layers=1)
    processor = OneRecProcessor.from_catalogue(catalogue, max_history=17)
    card = write(model=model, processor=processor)
    ids = section(card, "Semantic IDs")
    assert ids.startswith("1,234 items (string ids), 3 levels, one item per semantic ID.")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in ids.splitlines() if line[:3].strip("| ").isdigit()
    ]
    for level, (column, size) in enumerate(zip(catalogue.codes.T, (16, 9, 30), strict=True)):
        use = [int((column == code).sum()) for code in range(size)]
        assert list(map(int, rows[level])) == [level + 1, size, sum(n > 0 for n in use), min(use), max(use)]
    assert f"`{catalogue.hash[:16]}`" in ids
    assert "embeddings" not in ids  # the catalogue knows none
    described = section(card, "Model")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    experts_weights = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    assert (experts_weights > 0) == (experts == 4)
    assert f"| parameters | {parameters:,} |" in described
    assert f"| active per token | {parameters - experts_weights // 2:,} |" in described  # two of four experts
    assert "| encoder | 3 layers, fully visible |" in described
    assert "| decoder | 1 layers |" in described
    assert ("| experts | 4 per decoder layer, 2 per token |" in described) == (experts == 4)
    assert ("dense decoder" in described) == (experts == 1)
    assert "Expert load" not in described  # nobody counted
    assert ("mixture-of-experts" in ModelCard(card).data.tags) == (experts == 4)
    assert "| history | the latest 17 items |" in described
    processor = OneRecProcessor.from_catalogue(catalogue)
    assert "| history | whole |" in write(model=model, processor=processor)


def test_encoder_variants_and_the_item_head_are_named(write, processor):
    catalogue = processor.catalogue
    variants = {"encoder_attention": "pointwise", "encoder_pools_items": True, "encoder_scales_embeddings": True}
    head = {"num_items": len(catalogue), "score_codes": True}
    model = make_model(catalogue, **variants, item_head=head)
    model.generation_config.item_score_weight = 32.0
    lines = section(write(model=model), "Model").splitlines()
    assert (
        "| encoder | 2 layers, fully visible, pointwise attention, one position per item, scaled embeddings |" in lines
    )
    assert "| item head | 40 item vectors, item scores with codes of weight 32.0 in recommendations |" in lines
    model.config.item_head.loss_weight = 0.0
    assert "| item head | 40 item vectors |" in section(write(model=model), "Model").splitlines()
    assert "item head" not in section(write(), "Model")


def test_the_table_holds_the_rows(write):
    assert table_of(section(write(), "Evaluation")) == [
        "| | recall@10 | coverage@10 | ndcg@10 |",
        "|---|---|---|---|",
        "| onerec | 0.1235 | 1.0000 | 0.0000 |",
        "| popularity | 0.1135 | 0.9900 | 0.0000 |",
        "| item\\_knn | 0.1035 | 0.9800 | 0.0000 |",
    ]


def test_it_claims_only_what_was_done(write, tmp_path):
    card = write()
    assert "seen items excluded" in card
    assert "popularity and item\\_knn" in card
    assert "coverage@k is" in card
    assert "item catalogue and codebooks" not in card
    (tmp_path / "shop" / "codebooks.safetensors").write_bytes(b"")
    assert "item catalogue and codebooks." in write()
    alone = write(results=rows(["onerec"])[:1], exclude_seen=False)
    assert "seen items included" in alone
    assert "popularity and item" not in alone
    assert "coverage@k is" not in alone
    nothing = write(results=[])
    assert "## Evaluation" not in nothing
    assert "model-index" not in yaml.safe_load(nothing.split("---\n")[1])


def test_a_repository_of_the_hub_stands_in_the_snippet(write, tmp_path):
    card = write(repo_id="me/onerec-movies")
    assert "AutoProcessor.from_pretrained('me/onerec-movies')" in card
    assert "AutoModelForSeq2SeqLM.from_pretrained('me/onerec-movies')" in card
    assert "\n# onerec-movies\n" in card
    assert str(tmp_path) not in card


def test_a_card_that_fails_leaves_the_old_one(write, processor, tmp_path):
    before = write()
    with pytest.raises(AttributeError):
        write(model=object())
    assert (tmp_path / "shop" / "README.md").read_text(encoding="utf-8") == before


def test_the_report_beside_the_codebooks_tells_of_collisions(write, processor, tmp_path):
    import json

    from onerec_hf.semantic_ids import fit_semantic_ids

    vectors = np.random.default_rng(0).normal(size=(40, 8))
    fitted = fit_semantic_ids([f"m{i}" for i in range(40)], vectors, [4, 4, 8], recipe="random")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "semantic_ids.json").write_text(json.dumps(fitted.report.as_dict()))
    processor = OneRecProcessor.from_catalogue(fitted.catalogue)
    ids = section(write(processor=processor, model=make_model(fitted.catalogue)), "Semantic IDs")
    assert "Quantiser: balanced." in ids
    assert f"{fitted.report.collisions} collisions among 40 items, resolved by moving {fitted.report.moved}" in ids
    assert f"embeddings `{fitted.catalogue.embedding_fingerprint[:16]}`" in ids
    grown = OneRecProcessor.from_catalogue(fitted.catalogue.retire(["m1"]))  # another catalogue than the report's
    ids = section(write(processor=grown, model=make_model(fitted.catalogue)), "Semantic IDs")
    assert "collisions" not in ids
    assert "1 of them retired" in ids


def test_expert_load_is_what_was_counted(write, tmp_path, monkeypatch):
    counts = np.array([[10, 30, 20, 20], [0, 80, 0, 0]])
    described = section(write(tokens_per_expert=counts), "Model")
    assert "Expert load over 40 training tokens" in described  # two experts each
    assert "layer 1 0.50 to 1.50; layer 2 0.00 to 4.00." in described
    assert "(expert_load.png)" in described
    assert (tmp_path / "shop" / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    described = section(write("plain", tokens_per_expert=counts), "Model")
    assert "layer 1 0.50 to 1.50" in described
    assert "expert_load.png" not in described
    assert not (tmp_path / "plain" / "expert_load.png").exists()


def test_limits_count_cold_items_and_what_is_popular(write):
    catalogue = ItemCatalogue(
        [f"m{i}" for i in range(20)], [[i // 5, i % 5] for i in range(20)], [4, 5], [0, 0, 90, *[1] * 17]
    )
    processor = OneRecProcessor.from_catalogue(catalogue)
    limits = section(write(processor=processor, model=make_model(catalogue)), "Limits")
    assert "2 of 20 items have no training interaction" in limits
    assert "the most popular 10 % of items account for 85% of the training interactions" in limits  # 91 of 107
    assert "no interaction in training" not in section(write(), "Limits")


def test_command_counts_and_versions_stand_as_they_are(write):
    command = "onerec-hf train --output_dir '```\n# shop'"
    card = write(command=command, counts={"users": 1234}, num_beams=30)
    assert f"\n````sh\n{command}\n````\n" in card
    assert "| users | 1,234 |" in card
    assert "beam search with 30 beams" in card
    assert f"transformers {transformers.__version__}" in card
    assert "co2" not in card.lower()


ALIGNED = Alignment(["the function <b>f</b>"], {0: 5, 1: 7}, 2, 1000, 0.01, "6 candidates | drawn.", "DPO, beta 0.1")


def test_alignment_before_and_after(write):
    more = [("before/onerec/recall@10", 0.05), ("reward/before", 1.0), ("reward/after", 2.0)]
    more += [("heldout_reward/before", 1.5), ("heldout_reward/after", 1.25)]
    card = write(alignment=ALIGNED, results=[*rows(), *(result_row(name, value, "x") for name, value in more)])
    told = section(card, "Alignment")
    assert (
        "2 iterations, pairs drawn for 1.0% of 1,000 training examples in each (5 pairs in iteration 0, 7 pairs in iteration 1)."
        in told
    )
    assert "Reward: the function &lt;b&gt;f&lt;/b&gt;." in told
    assert table_of(told)[2:] == [
        "| recall@10 | 0.0500 | 0.1235 |",
        "| mean reward of generated sessions, by the optimised reward | 1.0000 | 2.0000 |",
        "| mean reward of generated sessions, by a held-out judge | 1.5000 | 1.2500 |",
    ]
    assert len(table_of(section(card, "Evaluation"))) == 5
    assert "## Alignment" not in write()
    given = section(write(alignment=Alignment([], {0: 20}, 0, 20, None, "", "DPO")), "Alignment")
    assert "on given pairs: 20 of them. The source of the preferences is not recorded" in given
