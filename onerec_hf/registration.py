"""
Registers OneRec with transformers' Auto classes and pipelines when transformers is imported, before or after `onerec_hf`.

`import onerec_hf` takes milliseconds and imports neither torch nor transformers, so a command line can print its help at once. If the Auto
classes are already loaded, it registers immediately. Otherwise a finder on `sys.meta_path` waits for the import that loads them.
"""

from __future__ import annotations

import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

# Every Auto class imports this module.
_AUTO_CLASSES = "transformers.models.auto.configuration_auto"
# Packages whose modules import one another: none of them may be half imported while we register.
_PACKAGES = ("transformers", "onerec_hf")


def register_auto_classes() -> None:
    """
    Registers OneRec and OneRec-V2 with AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer and AutoProcessor, the reward model with AutoConfig and
    AutoModelForSequenceClassification, the sequence models with AutoConfig and AutoModel, and the task "generative-recommendation" with
    `pipeline()`. Repeated calls change nothing.
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

    from onerec_hf.baselines.configuration_sequential import SequentialConfig
    from onerec_hf.baselines.modeling_sequential import SequentialRecommender
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.modeling.configuration_onerec_reward import OneRecRewardConfig
    from onerec_hf.modeling.configuration_onerec_v2 import OneRecV2Config
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration, OneRecModel
    from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward
    from onerec_hf.modeling.modeling_onerec_v2 import OneRecV2ForConditionalGeneration, OneRecV2Model
    from onerec_hf.modeling.pipeline_onerec import GenerativeRecommendationPipeline
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.modeling.tokenization_onerec import OneRecTokenizer

    generators: list[tuple[Any, Any, Any]] = [
        (OneRecConfig, OneRecModel, OneRecForConditionalGeneration),
        (OneRecV2Config, OneRecV2Model, OneRecV2ForConditionalGeneration),
    ]
    for config, backbone, generator in generators:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, backbone, exist_ok=True)
        AutoModelForSeq2SeqLM.register(config, generator, exist_ok=True)
        AutoTokenizer.register(config, OneRecTokenizer, exist_ok=True)
        AutoProcessor.register(config, OneRecProcessor, exist_ok=True)
    AutoConfig.register("onerec_reward", OneRecRewardConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(OneRecRewardConfig, OneRecForSessionReward, exist_ok=True)
    AutoConfig.register("onerec_baseline", SequentialConfig, exist_ok=True)
    AutoModel.register(SequentialConfig, SequentialRecommender, exist_ok=True)
    task = "generative-recommendation"
    if task not in PIPELINE_REGISTRY.supported_tasks:  # a second registration would warn
        PIPELINE_REGISTRY.register_pipeline(task, GenerativeRecommendationPipeline, AutoModelForSeq2SeqLM)


def register_when_imported() -> None:
    """Registers now if the Auto classes are loaded, otherwise at the end of the import that loads them."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)  # before the check: another thread may be importing transformers
    if _AUTO_CLASSES in sys.modules:
        finder.register()


class _Finder(MetaPathFinder):
    """Counts the nested imports of `_PACKAGES` in each thread and registers at the end of the outermost one."""

    def __init__(self):
        self.imports = threading.local()

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _PACKAGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _CountingLoader(spec.loader, self)
        return spec

    def register(self) -> None:
        if self in sys.meta_path:  # not another thread's turn already
            sys.meta_path.remove(self)
            register_auto_classes()


class _CountingLoader(Loader):
    """A module's loader, which notifies the finder when the module's import begins and ends."""

    def __init__(self, loader, finder: _Finder):
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec):
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        imports = self.finder.imports
        outer = getattr(imports, "depth", 0)
        imports.depth = outer + 1
        try:
            self.loader.exec_module(module)
        finally:
            imports.depth = outer
        if not outer and _AUTO_CLASSES in sys.modules:
            self.finder.register()
