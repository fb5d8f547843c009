"""Constrained generation: only items of the catalogue, none twice in a session, none that a request excludes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput

from .catalogue_onerec import ItemCatalogue
from .trie_onerec import SemanticIDTrie


class SemanticIDLogitsProcessor(LogitsProcessor):
    """
    Leaves only tokens that continue an item of the catalogue, for all rows at once.

    Where an item is complete the next token is BOS with probability one: it is given in training too, so it adds nothing to a beam's
    score. Elsewhere the scores of legal tokens stay as they are (full-vocabulary log-probabilities inside beam search), all others
    become -inf.

    Args:
        trie: the catalogue's semantic IDs, on the device of the scores.
        level_offsets: token id of code 0 of each level.
        bos_token_id: the token that opens an item.
        excluded: (users, e) int64 leaves that must not be generated, padded with -1; rows of `input_ids` belong to users in order,
            equally many each.
        distinct: whether an item may stand only once in a session.

    Raises:
        ValueError: a user whose exclusions leave no item.
    """

    def __init__(
        self,
        trie: SemanticIDTrie,
        level_offsets: Sequence[int],
        bos_token_id: int,
        excluded: torch.Tensor | None = None,
        distinct: bool = True,
    ):
        self.trie, self.level_offsets, self.bos_token_id, self.distinct = trie, level_offsets, bos_token_id, distinct
        self.excluded, self._dead = None, None
        if excluded is not None and excluded.shape[1]:
            self.excluded = _sorted_distinct(excluded, trie.num_leaves)
            left = trie.num_leaves - (self.excluded < trie.num_leaves).sum(1)
            if (left == 0).any():
                user = int((left == 0).nonzero()[0])
                raise ValueError(
                    f"the exclusions of user {user} leave none of the {trie.num_leaves} items; exclude fewer"
                )
            self._dead = [self._dead_nodes(level) for level in range(trie.num_levels)]

    def _dead_nodes(self, level: int) -> torch.Tensor:
        """(users, e) nodes of `level` whose leaves are all excluded, padded with -1."""
        trie, leaves = self.trie, self.excluded
        nodes = trie.ancestors(level, leaves)
        inside = leaves < trie.num_leaves
        last = (trie.leaves[level][nodes.clamp(max=len(trie.codes[level]) - 1) + 1]) - 1
        # The leaves are sorted and distinct, so a node's excluded leaves are a run; it is full when the run that starts at its first
        # leaf reaches its last one.
        size = last - trie.leaves[level][nodes.clamp(max=len(trie.codes[level]) - 1)]
        end = torch.arange(leaves.shape[1], device=leaves.device) + size
        reaches = leaves.gather(1, end.clamp(max=leaves.shape[1] - 1)) == last
        return torch.where(inside & reaches & (end < leaves.shape[1]), nodes, -1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        trie, rows = self.trie, input_ids.shape[0]
        levels = trie.num_levels
        items, level = divmod(input_ids.shape[1] - 1, levels + 1)
        constrained = torch.full_like(scores, float("-inf"))
        if level == levels:
            constrained[:, self.bos_token_id] = 0.0
            return constrained
        offset = self.level_offsets[level]
        prefix = input_ids[:, input_ids.shape[1] - level :] - torch.tensor(
            self.level_offsets[:level], device=input_ids.device
        )
        nodes = trie.find_nodes(prefix).clamp_(min=0)  # a beam without any legal token left carries -inf already
        begin = trie.children[level]
        if level == 0:
            tokens = trie.codes[0] + offset
            constrained[:, tokens] = scores[:, tokens]
        else:
            first, count = begin[nodes], begin[nodes + 1] - begin[nodes]
            child = torch.arange(trie.max_children[level], device=scores.device)
            # Rows with fewer children name their first child again: the same value is written twice.
            child = first[:, None] + torch.where(child < count[:, None], child, 0)
            tokens = trie.codes[level][child] + offset
            constrained.scatter_(1, tokens, scores.gather(1, tokens))
        if self.excluded is not None:
            self._forbid(constrained, level, nodes, self._dead[level].repeat_interleave(rows // len(self.excluded), 0))
        if self.distinct and items:
            self._forbid(constrained, level, nodes, self._used_up(level, input_ids, items))
        return constrained

    def _used_up(self, level: int, input_ids: torch.Tensor, items: int) -> torch.Tensor:
        """(rows, items) nodes of `level` with no leaf left beside the row's own items and its user's exclusions, else -1."""
        trie = self.trie
        written = input_ids[:, : items * (trie.num_levels + 1)].view(len(input_ids), items, -1)[..., 1:]
        own = trie.find_leaves(written - torch.tensor(self.level_offsets, device=written.device))
        nodes = trie.ancestors(level, own.clamp(min=0))
        first, end = trie.leaves[level][nodes], trie.leaves[level][nodes + 1]
        taken = (nodes[:, :, None] == nodes[:, None, :]).sum(-1)
        if self.excluded is not None:
            beams = len(input_ids) // len(self.excluded)
            by_user = (len(self.excluded), beams * items)
            bounds = torch.searchsorted(self.excluded, torch.cat([first.view(by_user), end.view(by_user)], 1))
            below_first, below_end = bounds.chunk(2, dim=1)
            taken = taken + (below_end - below_first).view_as(taken)
        return torch.where((own >= 0) & (taken >= end - first), nodes, -1)

    def _forbid(self, scores, level, nodes, dead) -> None:
        """-inf for the children `dead` (rows, d) of each row's node."""
        trie = self.trie
        below = (dead >= 0) & (trie.parents[level][dead.clamp(min=0)] == nodes[:, None])
        row, column = below.nonzero(as_tuple=True)
        scores[row, trie.codes[level][dead[row, column]] + self.level_offsets[level]] = float("-inf")


def _sorted_distinct(leaves: torch.Tensor, sentinel: int) -> torch.Tensor:
    """Rows sorted, -1 and repetitions replaced by `sentinel` at the end."""
    leaves = torch.where(leaves < 0, sentinel, leaves).sort(dim=1).values
    repeated = torch.zeros_like(leaves, dtype=torch.bool)
    repeated[:, 1:] = leaves[:, 1:] == leaves[:, :-1]
    return leaves.masked_fill(repeated, sentinel).sort(dim=1).values.contiguous()


class OneRecGenerationMixin(GenerationMixin):
    """
    `generate()` and `recommend()` of a OneRec model. A model that knows its catalogue (it is loaded with the checkpoint, or given by
    [`set_catalogue`]) generates nothing but its items.
    """

    catalogue: ItemCatalogue | None = None

    def set_catalogue(self, catalogue: ItemCatalogue) -> None:
        """
        Gives the model its catalogue, and writes its hash into the config: the first one, and later any that grew from it
        ([`ItemCatalogue.add`], `retire`, `restore`). That needs no training: the model scores codes, new items' as all others'.

        Raises:
            ValueError: codebooks of other sizes, or a catalogue that did not grow from the model's own.
        """
        if catalogue.codebook_sizes != list(self.config.codebook_sizes):
            raise ValueError(
                f"the model has codebooks of {self.config.codebook_sizes}, the catalogue of {catalogue.codebook_sizes}; "
                "they belong to different models"
            )
        own = self.config.catalogue_hash
        if own not in (None, catalogue.hash, *catalogue.lineage):
            if self.catalogue is not None and catalogue.hash in self.catalogue.lineage:
                raise ValueError(
                    f"this catalogue is older than the model's own: version {catalogue.version} with {len(catalogue)} items, the model's "
                    f"is version {self.catalogue.version} with {len(self.catalogue)}; give it a catalogue that grew from its own, or "
                    "set model.config.catalogue_hash to None to go back"
                )
            raise ValueError(
                f"this model was trained with the catalogue {own[:12]}..., this is {catalogue.hash[:12]}... "
                f"({len(catalogue)} items); load the catalogue that was saved with the model, or train for this one"
            )
        self.config.catalogue_hash = catalogue.hash
        self.catalogue = catalogue

    def history_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Catalogue rows of encoder inputs `SEP a b c ...`: (users, t) tokens give (users, t / (levels + 1)) rows, -1 for padding."""
        items = input_ids.view(len(input_ids), -1, self.config.tokens_per_item)[..., 1:]
        return self.catalogue.rows_of_codes(items - torch.tensor(self.config.level_offsets, device=input_ids.device))

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        constrained: bool | None = None,
        exclude: torch.Tensor | None = None,
        distinct: bool = True,
        **kwargs,
    ):
        """
        `GenerationMixin.generate`, held to the catalogue.

        Args:
            constrained: whether only items of the catalogue may be generated; by default wherever the model has a catalogue.
            exclude: (users, e) int64 catalogue rows that a user must not get, padded with -1.
            distinct: whether an item may stand only once in a session.

        Other arguments are those of `GenerationMixin.generate`; without a length it writes `config.session_length` items.
        """
        constrained = self.catalogue is not None if constrained is None else constrained
        if constrained:
            logits_processor = LogitsProcessorList(logits_processor or [])
            logits_processor.append(self._constraint(exclude, distinct))
        elif exclude is not None:
            raise ValueError("exclude needs constrained generation")
        if all(kwargs.get(name) is None for name in ("max_new_tokens", "max_length")) and generation_config is None:
            kwargs["max_new_tokens"] = self._session_tokens(self.config.session_length)
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def _session_tokens(self, session_length: int) -> int:
        """New tokens of a session: its first BOS is the decoder's start token."""
        return session_length * self.config.tokens_per_item - 1

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        session_length: int | None = None,
        num_beams: int = 32,
        num_return_sequences: int = 1,
        exclude_seen: bool = False,
        exclude: torch.Tensor | Sequence[Sequence] | None = None,
        distinct: bool = True,
        return_dict_in_generate: bool = False,
    ) -> torch.LongTensor | ModelOutput:
        """
        The most probable sessions for each history, by beam search over the catalogue (paper, section 3.2).

        Args:
            input_ids, attention_mask: (users, t), as the processor makes them.
            session_length: items per session, `config.session_length` when not given. With 1, the beams are a ranked list of items.
            num_beams: beams per user.
            num_return_sequences: sessions returned per user, at most `num_beams`.
            exclude_seen: leave out the items of `input_ids`.
            exclude: more items to leave out per user: lists of item ids, or (users, e) int64 catalogue rows padded with -1.
            distinct: whether an item may stand only once in a session.
            return_dict_in_generate: return `sequences` and `sequences_scores` (log-probability of a session, full vocabulary).

        Returns:
            (users * num_return_sequences, 1 + new tokens) int64 tokens, best first per user, for `processor.batch_decode`. Where fewer
            legal sessions exist than were asked for, the missing ones are BOS and padding, with score -inf.

        Raises:
            ValueError: no catalogue, `num_return_sequences > num_beams`, or exclusions that leave a user no item.
            KeyError: an id in `exclude` that the catalogue lacks.
        """
        session_length = self.config.session_length if session_length is None else session_length
        if min(session_length, num_beams, num_return_sequences) < 1:
            raise ValueError(
                "session_length, num_beams and num_return_sequences must be at least 1; got "
                f"{session_length}, {num_beams} and {num_return_sequences}"
            )
        if num_return_sequences > num_beams:
            raise ValueError(
                f"num_return_sequences={num_return_sequences} exceeds num_beams={num_beams}; raise num_beams"
            )
        input_ids = input_ids.to(self.device)
        attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        excluded = []
        if exclude is not None:
            excluded.append(
                exclude.to(self.device) if isinstance(exclude, torch.Tensor) else self._exclude_rows(exclude)
            )
        if exclude_seen:
            excluded.append(self.history_rows(input_ids))
        sequences, scores = self._beam_search_catalogue(
            input_ids,
            attention_mask,
            session_length,
            num_beams,
            self._constraint(torch.cat(excluded, dim=1) if excluded else None, distinct),
        )
        sequences = sequences[:, :num_return_sequences].flatten(0, 1)
        scores = scores[:, :num_return_sequences].flatten()
        sequences[scores == float("-inf"), 1:] = self.config.pad_token_id
        if return_dict_in_generate:
            return ModelOutput(sequences=sequences, sequences_scores=scores)
        return sequences

    def _constraint(self, exclude: torch.Tensor | None, distinct: bool) -> SemanticIDLogitsProcessor:
        """
        The catalogue's constraint on the model's device: its active items. `exclude` (users, e) holds catalogue rows, padded with -1;
        retired ones among them have no leaf, and nothing to exclude.
        """
        if self.catalogue is None:
            raise ValueError(
                "this model has no item catalogue; give it one with model.set_catalogue(processor.catalogue)"
            )
        trie = self.catalogue.trie.to(self.device)
        if exclude is not None:
            exclude = exclude.to(self.device)
            exclude = torch.where(exclude >= 0, trie.row_to_leaf[exclude.clamp(min=0)], -1)
        return SemanticIDLogitsProcessor(
            trie, self.config.level_offsets, self.config.bos_token_id, exclude, distinct=distinct
        )

    def _beam_search_catalogue(self, input_ids, attention_mask, session_length, num_beams, constraint):
        """(users, num_beams, tokens) sequences and (users, num_beams) log-probabilities, best first; -inf where no session was left."""
        users = len(input_ids)
        history = self.get_encoder()(input_ids, attention_mask).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        sequences = input_ids.new_full((users, 1), self.config.bos_token_id)
        scores = torch.zeros(users, 1, device=history.device)
        fed = 0
        for length in range(1, 1 + self._session_tokens(session_length)):
            if length % self.config.tokens_per_item == 0:  # BOS is given: it goes in together with the code before it
                sequences = torch.nn.functional.pad(sequences, (0, 1), value=self.config.bos_token_id)
                continue
            hidden = self.get_decoder()(
                sequences[:, fed:],
                encoder_hidden_states=history,
                encoder_attention_mask=attention_mask,
                past_key_values=cache,
            ).last_hidden_state[:, -1]
            fed = sequences.shape[1]
            token_scores = constraint(sequences, self.lm_head(hidden).float().log_softmax(-1))
            beams, vocabulary = scores.shape[1], token_scores.shape[1]
            candidates = (scores.view(-1, 1) + token_scores).view(users, -1)
            scores, best = candidates.topk(min(num_beams, candidates.shape[1]), dim=1)
            origin = best // vocabulary + beams * torch.arange(users, device=best.device)[:, None]
            sequences = torch.cat([sequences[origin.flatten()], (best % vocabulary).view(-1, 1)], dim=1)
            cache.self_attention_cache.reorder_cache(origin.flatten())
        return sequences.view(users, -1, sequences.shape[1]), scores

    def _exclude_rows(self, lists: Sequence[Sequence]) -> torch.Tensor:
        """Item ids to leave out per user as (users, e) catalogue rows, padded with -1."""
        rows = [torch.from_numpy(self.catalogue.rows(items)) for items in lists]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(self.device)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # The history is the same for all beams of a user: encoder states and their mask stay one row per user, and cross-attention folds
        # the beams into the query length. Copies per beam cost more than the whole decoder.
        shared = {
            name: model_kwargs.pop(name) for name in ("encoder_outputs", "attention_mask") if name in model_kwargs
        }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **shared}

    def _reorder_cache(self, past_key_values, beam_idx):
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values


__all__ = ["OneRecGenerationMixin", "SemanticIDLogitsProcessor"]
