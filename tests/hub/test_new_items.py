"""New items for a model on the Hub: its repository has all that they need, and the grown folder is pushed as any other."""

import pandas as pd
import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from onerec_hf.workflows import add_items, train
from tests.cli.commands import interaction_rows, item_rows
from tests.workflows.conftest import TINY, frame

REPO = "tester/onerec-lamps"


@pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file")
def test_items_are_added_to_the_copy_of_the_hub(hub, tmp_path):
    folder = tmp_path / "trained"
    train(
        interactions=frame(interaction_rows()),
        items=frame(item_rows()),
        output_dir=folder,
        item_head=True,
        item_head_content=True,
        baselines=False,
        **TINY,
    )
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    new = pd.DataFrame({"item_id": ["m40"], "title": ["green lamp 40"], "genre": ["garden"]})
    result = add_items(new, model=REPO, output_dir=tmp_path / "grown")
    assert result.added == ["m40"]
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "grown")
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(REPO), AutoProcessor.from_pretrained(REPO)
    assert len(processor.catalogue) == 41
    assert model.catalogue.hash == processor.catalogue.hash
    found = model.recommend(**processor([["m40", "m1"]]), session_length=1, num_beams=41, num_return_sequences=41)
    assert ["m40"] in processor.batch_decode(found)
    assert not hub.unknown
