"""benchmarks/quality/v2.py scores both kinds alike: per code, among the codes of its level."""

import pytest
import torch
from datasets import Dataset

from benchmarks.quality import v2
from onerec_hf import OneRecProcessor
from tests.conftest import make_catalogue
from tests.rounding import assert_close

CATALOGUE = make_catalogue(14, (3, 3, 4), seed=1)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE)
USERS = Dataset.from_list([{"history": ["m1", "m9", "m3"], "session": ["m7"]}, {"history": ["m2"], "session": ["m0"]}])


@pytest.mark.parametrize("kind", v2.KINDS)
def test_the_loss_is_per_code_among_those_of_its_level(kind):
    torch.manual_seed(0)
    model = v2.make(kind, CATALOGUE.codebook_sizes, 32, 2)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    found = v2.code_loss(model, PROCESSOR, USERS)
    with torch.no_grad():
        full = model(**PROCESSOR(USERS["history"][:], sessions=USERS["session"][:])).loss
    if kind == "lazy":
        assert_close(found, full)
    else:  # whose own loss is over the vocabulary
        assert 0 < found < full
