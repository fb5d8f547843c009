"""
The decoder's sparse mixture of experts (OneRec, arXiv 2502.18965, section 3.2): router, experts in packed weights, and the block of both. How the
experts are computed where speed counts is cpu_experts.py's concern.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation


@use_experts_implementation
class OneRecExperts(nn.Module):
    """All experts of a layer in packed weights; this loop is the "eager" implementation."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]
        self.packed = None  # a second copy of the weights, within `OneRecGenerationMixin.packed_experts`

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        with torch.no_grad():  # one class more: expert parallelism marks slots of other ranks with id == num_experts
            mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for row in hit:
            expert = row[0]
            if expert == self.num_experts:
                continue
            slot, token = torch.where(mask[expert])
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            update = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, update.to(out.dtype))
        return out


class OneRecTopKRouter(nn.Module):
    """
    Gates `g_i = s_i` for the top-k of `s = softmax(h E^T)` over all experts (paper, section 3.2), not rescaled unless
    `norm_topk_prob`. The balancing bias is added to `s` for the choice only (loss-free balancing, technical report).
    """

    def __init__(self, config):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, hidden_states):
        router_logits = F.linear(hidden_states.float(), self.weight.float())
        scores = router_logits.softmax(-1)
        index = torch.topk(scores + self.e_score_correction_bias, self.top_k, dim=-1)[1]
        weights = scores.gather(1, index)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return router_logits, weights.to(hidden_states.dtype), index


class OneRecSparseMoeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts  # under expert parallelism `experts` knows only its own
        self.experts = OneRecExperts(config)
        self.gate = OneRecTopKRouter(config)

    def forward(self, hidden_states, token_mask=None):
        """(batch, length, width) states, and in training how many tokens (those of `token_mask`) chose each expert."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(flat)
        out = self.experts(flat, index, weights).reshape(hidden_states.shape)
        if not self.training:
            return out, None
        counted = (
            torch.ones_like(index) if token_mask is None else token_mask.reshape(-1, 1).to(index).expand_as(index)
        )
        counts = index.new_zeros(self.num_experts).scatter_add(0, index.flatten(), counted.flatten())
        return out, counts
