"""OneRec once more, in plain float64 from the paper's equations: one row at a time, no padding, no cache, no shared code with the model."""

import math

import torch
import torch.nn.functional as F


class Reference:
    """Reads the weights of a `OneRecForConditionalGeneration` and recomputes it for single, unpadded rows."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: value.double() for name, value in model.state_dict().items()}

    def _norm(self, name, x):
        return (
            x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]
        )

    def _linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T

    def _rotate(self, x, positions):
        """x (length, heads, head_dim): channel pairs (i, i + half) turn by position / theta^(2i / head_dim)."""
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = positions[:, None].double() / theta ** (torch.arange(half).double() * 2 / x.shape[-1])
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _attention(self, name, queries, keys, query_positions, key_positions, visible):
        heads, size = self.config.num_attention_heads, self.config.head_dim
        q = self._linear(f"{name}.q_proj", queries).view(-1, heads, size)
        k = self._linear(f"{name}.k_proj", keys).view(-1, self.config.num_key_value_heads, size)
        v = self._linear(f"{name}.v_proj", keys).view(-1, self.config.num_key_value_heads, size)
        if query_positions is not None:
            q, k = self._rotate(q, query_positions), self._rotate(k, key_positions)
        repeat = heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        return self._linear(f"{name}.o_proj", torch.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1))

    def _mlp(self, name, x):
        return self._linear(
            f"{name}.down_proj", F.silu(self._linear(f"{name}.gate_proj", x)) * self._linear(f"{name}.up_proj", x)
        )

    def _experts(self, name, x):
        """Paper, section 3.2: s = softmax over all experts, the top-k keep s_i as their gate; the bias only moves the choice."""
        scores = self._linear(f"{name}.gate", x).softmax(-1)
        bias = self.weights[f"{name}.gate.e_score_correction_bias"]
        out = torch.zeros_like(x)
        for t in range(len(x)):
            chosen = (scores[t] + bias).argsort(descending=True)[: self.config.num_experts_per_tok]
            gates = scores[t, chosen]
            if self.config.norm_topk_prob:
                gates = gates / gates.sum()
            for gate, expert in zip(gates, chosen, strict=True):
                g, u = (self.weights[f"{name}.experts.gate_up_proj"][expert] @ x[t]).chunk(2)
                out[t] += gate * (self.weights[f"{name}.experts.down_proj"][expert] @ (F.silu(g) * u))
        return out

    def encode(self, tokens):
        x = self.weights["model.encoder.embed_tokens.weight"][tokens]
        at = torch.arange(len(tokens))
        visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
        if self.config.encoder_is_causal:
            visible = visible.tril()
        for i in range(self.config.encoder_layers):
            name = f"model.encoder.layers.{i}"
            h = self._norm(f"{name}.input_layernorm", x)
            x = x + self._attention(f"{name}.self_attn", h, h, at, at, visible)
            x = x + self._mlp(f"{name}.mlp", self._norm(f"{name}.post_attention_layernorm", x))
        return self._norm("model.encoder.norm", x)

    def logits(self, history, session):
        """(len(session), vocabulary) logits of the decoder inputs `session` after the history tokens."""
        memory = self.encode(history)
        x = self.weights["model.decoder.embed_tokens.weight"][session]
        at, keys = torch.arange(len(session)), torch.arange(len(history))
        causal = torch.ones(len(session), len(session), dtype=torch.bool).tril()
        every = torch.ones(len(session), len(history), dtype=torch.bool)
        cross = (at + len(history), keys) if self.config.cross_attention_rope else (None, None)
        for i in range(self.config.decoder_layers):
            name = f"model.decoder.layers.{i}"
            h = self._norm(f"{name}.input_layernorm", x)
            x = x + self._attention(f"{name}.self_attn", h, h, at, at, causal)
            h = self._norm(f"{name}.cross_attn_layernorm", x)
            x = x + self._attention(f"{name}.cross_attn", h, memory, *cross, every)
            feed_forward = self._experts if self.config.num_experts > 1 else self._mlp
            x = x + feed_forward(f"{name}.mlp", self._norm(f"{name}.post_attention_layernorm", x))
        return self._linear("lm_head", self._norm("model.decoder.norm", x))

    def session_log_probability(self, history, codes, offsets):
        """Sum of the log-probabilities of the codes of a session: codes (m, L), BOS before each item given (equation 4)."""
        tokens = [[1, *(code + offset for code, offset in zip(item, offsets, strict=True))] for item in codes]
        flat = torch.tensor([token for item in tokens for token in item])
        log_probabilities = self.logits(history, flat[:-1]).log_softmax(-1)
        return sum(log_probabilities[t, flat[t + 1]] for t in range(len(flat) - 1) if flat[t + 1] != 1)
