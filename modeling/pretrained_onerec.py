"""What all models of OneRec's generator share: where their code stands, what they support, how weights begin."""

import torch
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import auto_docstring

from .configuration_onerec import OneRecConfig
from .cpu_experts import EXPERTS_IMPLEMENTATION
from .hub import HubModel
from .moe_onerec import OneRecExperts, OneRecTopKRouter
from .sharding_onerec import ShardedModel

ATTENTION_TP_PLAN = {
    f"layers.*.{attention}.{letter}_proj": "rowwise" if letter == "o" else "colwise"
    for attention in ("self_attn", "cross_attn")
    for letter in "qkvo"
}


@auto_docstring
class OneRecPreTrainedModel(HubModel, ShardedModel, PreTrainedModel):
    config: OneRecConfig
    _auto_map = {
        "AutoConfig": "configuration_onerec.OneRecConfig",
        "AutoModel": "modeling_onerec.OneRecModel",
        "AutoModelForSeq2SeqLM": "modeling_onerec.OneRecForConditionalGeneration",
        "AutoProcessor": "processing_onerec.OneRecProcessor",  # for a repository that only the model was pushed to
    }
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OneRecEncoderLayer", "OneRecDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers would look for the experts' decorator in the file of the class that is asked.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, OneRecExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, OneRecTopKRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
