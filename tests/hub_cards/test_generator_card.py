"""Model cards: the snippet runs, the front matter is valid, the numbers are the model's, and no name becomes markup."""

import re

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard

from onerec_hf import OneRecProcessor
from onerec_hf.data import RecommendationData
from onerec_hf.evaluation.results import result_row
from onerec_hf.hub_cards import write_generator_card
from onerec_hf.hub_cards.common import plain_text
from tests.conftest import make_catalogue, make_model

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
    return [*scored, result_row("illegal_share", 0.0, "share"), result_row("seconds", 3.0, "s")]


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


def run_snippet(card):
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.S | re.M)
    scope = {}
    exec(snippet, scope)
    return scope


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
    from onerec_hf import ItemCatalogue

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


HOSTILE = [
    "<script>alert(1)</script>",
    "a: [b, {c}] # d",
    "yes",
    "{{ 7 * 7 }} {% raw %}",
    "x|y `z` *w* _v_ [u](http://evil) ![t](s) ~~r~~ $q$",
    "one\n# two\n---\nthree",
    "'quoted' \"twice\" \\ & co",
    "日本語 é",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_names(write, tmp_path, name):
    card = write("shop", data=source(name, f"Read from {name}."), protocol=f"Positive feedback: {name} >= 1.")
    loaded = ModelCard.load(tmp_path / "shop" / "README.md")
    assert {result.dataset_name for result in loaded.data.eval_results} == {name}
    _, _, body = card.split("---\n", 2)
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == ["# shop", "## Semantic IDs", "## Model", "## Data", "## Evaluation", "## Limits"]
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


def section(card, name):
    return card.split(f"\n## {name}\n")[1].split("\n## ")[0]


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


def test_the_table_holds_the_rows(write):
    table = [line for line in section(write(), "Evaluation").splitlines() if line.startswith("|")]
    assert table == [
        "| | recall@10 | coverage@10 | ndcg@10 |",
        "|---|---|---|---|",
        "| onerec | 0.1235 | 1.0000 | 0.0000 |",
        "| popularity | 0.1135 | 0.9900 | 0.0000 |",
        "| item\\_knn | 0.1035 | 0.9800 | 0.0000 |",
    ]


def test_it_claims_only_what_was_done(write, tmp_path):
    card = write()
    assert "the user's seen items left out" in card
    assert "popularity and item\\_knn" in card
    assert "coverage@k is" in card
    assert "item catalogue and codebooks" not in card
    (tmp_path / "shop" / "codebooks.safetensors").write_bytes(b"")
    assert "item catalogue and codebooks are all in this repository" in write()
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
