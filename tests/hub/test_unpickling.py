"""Nothing that comes from a Hub is unpickled, and no code of a repository runs unless it is asked for."""

from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoProcessor

from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
from tests.unpickling import heard_unpickling


def test_loading_from_a_hub(hub, model, processor):
    model.push_to_hub("onerec-movies")
    processor.push_to_hub("onerec-movies")
    judge = OneRecForSessionReward(OneRecRewardConfig(num_items=2, hidden_size=8, num_attention_heads=2))
    judge.set_items(RewardItems(["a", "b"]))
    judge.push_to_hub("judge")
    with heard_unpickling() as heard:
        loaded = AutoProcessor.from_pretrained("tester/onerec-movies")
        generator = AutoModelForSeq2SeqLM.from_pretrained("tester/onerec-movies")
        rewarded = AutoModelForSequenceClassification.from_pretrained("tester/judge")
    assert heard == []
    # The repositories carry code; the package's own classes are used.
    assert {type(part).__module__.split(".")[0] for part in (loaded, generator, rewarded)} == {"onerec_hf"}
