"""
OneRec as a Hugging Face plugin: `import onerec_hf` registers the model with the Auto classes, and everything public is found here.

    >>> import onerec_hf
    >>> from transformers import AutoConfig
    >>> type(AutoConfig.for_model("onerec")).__name__
    'OneRecConfig'
"""

import os
import sys
from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports

__version__ = "0.1.0"

_PUBLIC = {
    "CatalogueDiff": "modeling.catalogue",
    "ItemCatalogue": "modeling.catalogue",
    "GenerativeRecommendationPipeline": "modeling.pipeline_onerec",
    "OneRecConfig": "modeling.configuration_onerec",
    "OneRecForSessionReward": "modeling.modeling_onerec_reward",
    "OneRecRewardConfig": "modeling.configuration_onerec_reward",
    "RewardItems": "modeling.processing_onerec_reward",
    "CatalogueConstraint": "modeling.constraint",
    "SemanticIDLogitsProcessor": "modeling.generation_onerec",
    "OneRecForConditionalGeneration": "modeling.modeling_onerec",
    "OneRecModel": "modeling.modeling_onerec",
    "OneRecProcessor": "modeling.processing_onerec",
    "OneRecTokenizer": "modeling.tokenization_onerec",
    "SemanticIDTrie": "modeling.constraint",
}

__all__ = sorted([*_PUBLIC, "register_auto_classes"])

if TYPE_CHECKING:
    from onerec_hf.modeling.catalogue import CatalogueDiff, ItemCatalogue
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.modeling.configuration_onerec_reward import OneRecRewardConfig
    from onerec_hf.modeling.constraint import CatalogueConstraint, SemanticIDTrie
    from onerec_hf.modeling.generation_onerec import SemanticIDLogitsProcessor
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration, OneRecModel
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward
    from onerec_hf.modeling.pipeline_onerec import GenerativeRecommendationPipeline
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.modeling.processing_onerec_reward import RewardItems
    from onerec_hf.modeling.tokenization_onerec import OneRecTokenizer
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)


def register_auto_classes() -> None:
    """
    Registers OneRec with AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer and AutoProcessor, and its reward model with AutoConfig
    and AutoModelForSequenceClassification; and the task "generative-recommendation" with `pipeline()`. May be called again.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.modeling.configuration_onerec_reward import OneRecRewardConfig
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration, OneRecModel
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward
    from onerec_hf.modeling.pipeline_onerec import GenerativeRecommendationPipeline
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.modeling.tokenization_onerec import OneRecTokenizer

    AutoConfig.register("onerec", OneRecConfig, exist_ok=True)
    AutoModel.register(OneRecConfig, OneRecModel, exist_ok=True)
    AutoModelForSeq2SeqLM.register(OneRecConfig, OneRecForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(OneRecConfig, OneRecTokenizer, exist_ok=True)
    AutoProcessor.register(OneRecConfig, OneRecProcessor, exist_ok=True)
    AutoConfig.register("onerec_reward", OneRecRewardConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(OneRecRewardConfig, OneRecForSessionReward, exist_ok=True)
    task = "generative-recommendation"
    if task not in PIPELINE_REGISTRY.supported_tasks:  # it warns of a second time
        PIPELINE_REGISTRY.register_pipeline(task, GenerativeRecommendationPipeline, AutoModelForSeq2SeqLM)


# The command line answers `--help` without torch and transformers (seconds of imports), so its process registers when a command
# starts, not here.
if os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0] != "onerec-hf":
    register_auto_classes()
