"""
The decoder, a few tokens at a time for all beams of all users: what beam search runs instead of the training forward.

The history's keys and values are projected once per user and read by all of its beams. The keys and values of the session lie in one buffer for
all layers, so that reordering the beams is a single copy of whole rows between two buffers that are allocated once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .rotary_onerec import history_positions, rotate


class BeamDecoder:
    """
    Decodes sessions incrementally: `step` feeds the next tokens of every beam, `reorder` says which beam each one continues.

    Dropout is off. Adapters work: projections and experts are called as modules.

    Args:
        decoder: the model's `OneRecDecoder`.
        history: (users, t, width) encoder states.
        history_mask: (users, t), 1 for tokens, or None where nothing is padding.
        max_beams: most beams of a user.
        max_tokens: most tokens that will be fed.
        static: attend to all `max_tokens` places behind a mask instead of to those filled so far: shapes then depend on the number of
            beams and of tokens fed alone, as CUDA graphs and `torch.compile` want it.
    """

    def __init__(
        self,
        decoder: nn.Module,
        history: torch.Tensor,
        history_mask: torch.Tensor | None,
        max_beams: int,
        max_tokens: int,
        static: bool = False,
    ):
        self.decoder, self.static, self.length = decoder, static, 0
        self.config = config = decoder.config
        self.head_dim, self.users = config.head_dim, len(history)
        self._grouped = config.num_key_value_heads != config.num_attention_heads
        groups = config.num_key_value_heads * config.head_dim
        shape = (self.users * max_beams, max_tokens, config.decoder_layers, 2, groups)
        # Behind the mask, too, values must be numbers.
        new = history.new_zeros if static else history.new_empty
        self.buffer, self._spare = new(shape), new(shape)
        positions = torch.arange(max_tokens, device=history.device)
        self._cos, self._sin = (part[0, :, None] for part in decoder.rotary_emb(history, positions[None]))
        self._visible = (positions[None, :] <= positions[:, None])[None, None]
        self._history_visible = None
        if history_mask is not None and not bool(history_mask.all()):
            self._history_visible = history_mask[:, None, None, :].bool()
        self._cross_rope = None
        key_rope = None
        if config.cross_attention_rope:
            keys = history_positions(history, history_mask)
            key_rope = tuple(part.unsqueeze(-2) for part in decoder.rotary_emb(history, keys))
            queries = keys[:, -1:] + 1 + positions
            self._cross_rope = tuple(part[:, None, :, None] for part in decoder.rotary_emb(history, queries))
        self._cross = [self._history_keys_values(layer.cross_attn, history, key_rope) for layer in decoder.layers]

    def _history_keys_values(self, attention, history, key_rope):
        key, value = self._heads(attention.k_proj(history)), self._heads(attention.v_proj(history))
        if key_rope is not None:
            key = rotate(key, *key_rope)
        return key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()

    def reorder(self, origin: torch.Tensor) -> None:
        """Row `i` goes on from row `origin[i]`: (rows,) int64; their number may change."""
        source = self.buffer if self.static else self.buffer[:, : self.length]
        target = self._spare[: len(origin)] if self.static else self._spare[: len(origin), : self.length]
        torch.index_select(source, 0, origin, out=target)
        self.buffer, self._spare = self._spare, self.buffer

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The decoder's normed states (rows, width) after the last of `tokens` (rows, n), rows being the users' beams in order."""
        start, self.length = self.length, self.length + tokens.shape[1]
        if self.static:
            return self.forward(tokens, torch.arange(start, self.length, device=tokens.device))
        return self.forward(tokens, slice(start, self.length))

    def forward(self, tokens: torch.Tensor, places: slice | torch.Tensor) -> torch.Tensor:
        """One step, whose tokens stand at `places` of the session: a slice, or int64 indices when static."""
        buffer = self.buffer[: len(tokens)]
        rope, cross_rope, visible = self._at(places)
        if isinstance(places, slice):
            buffer = buffer[:, : places.stop]
            visible = visible[:, :, :, : places.stop]
        hidden = self.decoder.embed_tokens(tokens)
        last = len(self.decoder.layers) - 1
        for index, layer in enumerate(self.decoder.layers):
            states = layer.input_layernorm(hidden)
            key = rotate(self._heads(layer.self_attn.k_proj(states)), *rope).flatten(-2)
            buffer[:, places, index, 0] = key
            buffer[:, places, index, 1] = layer.self_attn.v_proj(states)
            if index == last:  # of the tokens before the last one only the keys and values are needed any more
                hidden, states, visible = hidden[:, -1:], states[:, -1:], visible[:, :, -1:]
                rope = tuple(part[-1:] for part in rope)
                cross_rope = cross_rope and tuple(part[:, :, -1:] for part in cross_rope)
            hidden = hidden + self._attend_session(layer.self_attn, states, buffer[:, :, index], rope, visible)
            hidden = hidden + self._attend_history(
                layer.cross_attn, layer.cross_attn_layernorm(hidden), self._cross[index], cross_rope
            )
            states = layer.post_attention_layernorm(hidden)
            hidden = hidden + (layer.mlp(states)[0] if layer.is_sparse else layer.mlp(states))
        return self.decoder.norm(hidden[:, -1])

    def _at(self, places):
        """Rotary embeddings of both attentions and the causal mask at these places of the session."""
        rope = self._cos[places], self._sin[places]
        cross_rope = self._cross_rope and tuple(part[:, :, places] for part in self._cross_rope)
        return rope, cross_rope, self._visible[:, :, places]

    def _heads(self, states):
        return states.unflatten(-1, (-1, self.head_dim))

    def _attend_session(self, attention, states, keys_values, rope, visible):
        query = rotate(self._heads(attention.q_proj(states)), *rope).transpose(1, 2)
        key, value = self._heads(keys_values).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            # A single token sees all that is filled; without a mask it is cheaper.
            attn_mask=visible if self.static or states.shape[1] > 1 else None,
            scale=attention.scaling,
            enable_gqa=self._grouped,
        )
        return attention.o_proj(out.transpose(1, 2).flatten(-2))

    def _attend_history(self, attention, states, keys_values, rope):
        query = self._heads(attention.q_proj(states)).unflatten(0, (self.users, -1))
        if rope is not None:
            query = rotate(query, *rope)
        out = F.scaled_dot_product_attention(
            query.flatten(1, 2).transpose(1, 2),
            *keys_values,
            attn_mask=self._history_visible,
            scale=attention.scaling,
            enable_gqa=self._grouped,
        )
        return attention.o_proj(out.transpose(1, 2).reshape(states.shape[0], states.shape[1], -1))


__all__ = ["BeamDecoder"]
