"""
What a stranger does with a repository, in a process where onerec_hf cannot be imported: `python remote_code.py JSON`. Run by
test_remote_code.py, which compares what it prints.
"""

import importlib.abc
import json
import sys
import warnings


class WithoutThePackage(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in ("onerec_hf", "modeling"):
            raise ImportError(f"{fullname} is not installed here")
        return None


def use(repo, history, **kwargs):
    """What the Auto classes make of a repository, and the model and processor themselves."""
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer, pipeline

    config = AutoConfig.from_pretrained(repo, trust_remote_code=True, **kwargs)
    model = AutoModelForSeq2SeqLM.from_pretrained(repo, trust_remote_code=True, **kwargs)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True, **kwargs)
    inputs = processor([history])
    beams = processor.batch_decode(model.recommend(**inputs, num_beams=4, num_return_sequences=4))
    generated = model.generate(**inputs, num_beams=4, num_return_sequences=4)
    recommender = pipeline("generative-recommendation", model=repo, trust_remote_code=True, device="cpu", **kwargs)
    return {
        "pipeline": [type(recommender).__module__, recommender([history, history[:1]], items={"m4": "Alien"})],
        "modules": [type(thing).__module__ for thing in (config, model, processor, processor.tokenizer)],
        "experts": model.config._experts_implementation,
        "recommend": beams,
        "generate": processor.batch_decode(generated),
        "backbone": type(AutoModel.from_pretrained(repo, trust_remote_code=True, **kwargs)).__name__,
        "tokenizer": type(AutoTokenizer.from_pretrained(repo, trust_remote_code=True, **kwargs)).__name__,
    }, (model, processor)


def main():
    absent = WithoutThePackage()
    sys.meta_path.insert(0, absent)
    from transformers import (
        AutoConfig,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoProcessor,
        pipeline,
    )

    asked = json.loads(sys.argv[1])
    answer = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer["hub"], (model, processor) = use(asked["repo"], asked["history"], revision="main")
        model.save_pretrained(asked["folder"])
        processor.save_pretrained(asked["folder"])
        answer["folder"], _ = use(asked["folder"], asked["history"])
        reward = AutoModelForSequenceClassification.from_pretrained(
            asked["reward"], trust_remote_code=True, revision="main"
        )
        answer["reward"] = reward.reward([asked["history"], []], asked["sessions"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the repository holds no processor
        made = AutoProcessor.from_pretrained(asked["repo"], trust_remote_code=True, revision=asked["model_only"])
    answer["made"] = made.batch_decode(made([asked["history"]], [["m4"]])["labels"])
    answer["warnings"] = sorted({str(one.message)[:300] for one in caught})
    for load in (AutoConfig.from_pretrained, lambda repo, **kwargs: pipeline(model=repo, **kwargs)):
        for repo in (asked["plain"], asked["repo"]):
            try:
                load(repo, trust_remote_code=False)
            except ValueError as error:
                answer.setdefault("refused", []).append(str(error))
    sys.meta_path.remove(absent)  # installed after all, in the process that runs the repository's code already
    import onerec_hf

    model, processor = (
        AutoModelForSeq2SeqLM.from_pretrained(asked["repo"]),
        AutoProcessor.from_pretrained(asked["repo"]),
    )
    answer["installed"] = [isinstance(model, onerec_hf.OneRecForConditionalGeneration), type(processor).__module__]
    print(json.dumps(answer))


if __name__ == "__main__":  # pytest looks into every file for doctests
    main()
