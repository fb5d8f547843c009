"""A model with features on the Hub: pushed, loaded, and used by a process that has only the repository's code."""

import json
import os

import numpy as np
import pytest
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from onerec_hf.modeling.features_file import FEATURES_NAME
from tests.hub.strangers import stranger
from tests.modeling.feature_models import HISTORIES, ITEM_FEATURES, PROCESSOR, SCHEMA, USERS, make
from tests.rounding import close

REPO = "tester/onerec-features"
STRANGER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from remote_code import WithoutThePackage
sys.meta_path.insert(0, WithoutThePackage())
from transformers import pipeline
recommend = pipeline("generative-recommendation", model=sys.argv[2], trust_remote_code=True, device="cpu", num_beams=8, top_k=4)
histories, users = map(json.loads, sys.argv[3:])
print(json.dumps([recommend({"history": history, "user": user}) for history, user in zip(histories, users)]))
"""


@pytest.fixture
def pushed(hub):
    model = make()
    model.push_to_hub(REPO)
    PROCESSOR.push_to_hub(REPO)
    return model


def test_push_and_load(hub, pushed):
    assert FEATURES_NAME in hub.files(REPO)
    processor, model = AutoProcessor.from_pretrained(REPO), AutoModelForSeq2SeqLM.from_pretrained(REPO).eval()
    assert processor.features == SCHEMA
    assert np.array_equal(processor.item_features, ITEM_FEATURES)
    inputs = processor(HISTORIES, users=USERS)
    options = {"num_beams": 4, "num_return_sequences": 4}
    wanted = pushed.recommend(**PROCESSOR(HISTORIES, users=USERS), **options)
    assert processor.batch_decode(model.recommend(**inputs, **options)) == PROCESSOR.batch_decode(wanted)


@pytest.mark.slow
def test_a_process_without_the_package_reads_features(hub, pushed, tmp_path):
    asked = [os.path.dirname(__file__), REPO, json.dumps(HISTORIES), json.dumps(USERS)]
    printed, _ = stranger(hub, tmp_path, "-c", STRANGER, *asked)
    for rows, history, user in zip(printed, HISTORIES, USERS, strict=True):
        seen = [[entry["item"] if isinstance(entry, dict) else entry for entry in history]]
        out = pushed.recommend(
            **PROCESSOR([history], users=[user]), session_length=1, num_beams=8, num_return_sequences=4, exclude=seen,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert [row["item"] for row in rows] == [item for (item,) in PROCESSOR.batch_decode(out)]
        assert [row["score"] for row in rows] == close(out.sequences_scores.tolist())
