"""
OneRec as a Hugging Face plugin: `import onerec_hf` registers the models with the Auto classes and exports the public classes.

    >>> import onerec_hf
    >>> from transformers import AutoConfig
    >>> type(AutoConfig.for_model("onerec")).__name__
    'OneRecConfig'
"""

from typing import TYPE_CHECKING

from onerec_hf._lazy import lazy_exports
from onerec_hf.registration import register_auto_classes, register_when_imported

__version__ = "0.2.0"  # the only place: pyproject.toml reads it from here

_PUBLIC = {
    "CatalogueDiff": "modeling.catalogue",
    "ItemCatalogue": "modeling.catalogue",
    "ItemHeadConfig": "modeling.configuration_item_head",
    "LifelongConfig": "modeling.configuration_lifelong",
    "LifelongHistory": "modeling.lifelong_history",
    "GenerativeRecommendationPipeline": "modeling.pipeline_onerec",
    "OneRecConfig": "modeling.configuration_onerec",
    "OneRecForSessionReward": "modeling.modeling_onerec_reward",
    "OneRecRewardConfig": "modeling.configuration_onerec_reward",
    "OneRecV2Config": "modeling.configuration_onerec_v2",
    "OneRecV2ForConditionalGeneration": "modeling.modeling_onerec_v2",
    "OneRecV2Model": "modeling.modeling_onerec_v2",
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
    from onerec_hf.modeling.configuration_item_head import ItemHeadConfig
    from onerec_hf.modeling.configuration_lifelong import LifelongConfig
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.modeling.configuration_onerec_reward import OneRecRewardConfig
    from onerec_hf.modeling.configuration_onerec_v2 import OneRecV2Config
    from onerec_hf.modeling.constraint import CatalogueConstraint, SemanticIDTrie
    from onerec_hf.modeling.generation_onerec import SemanticIDLogitsProcessor
    from onerec_hf.modeling.lifelong_history import LifelongHistory
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration, OneRecModel
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward
    from onerec_hf.modeling.modeling_onerec_v2 import OneRecV2ForConditionalGeneration, OneRecV2Model
    from onerec_hf.modeling.pipeline_onerec import GenerativeRecommendationPipeline
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.modeling.processing_onerec_reward import RewardItems
    from onerec_hf.modeling.tokenization_onerec import OneRecTokenizer
else:
    __getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)

register_when_imported()
