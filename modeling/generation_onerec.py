"""Constrained generation: only items of the catalogue, none twice in a session, none that a request excludes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
)
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput
from transformers.utils import ModelOutput

from .beam_search import BeamDecoder, Beams, beam_search
from .catalogue import ItemCatalogue
from .constraint import CatalogueConstraint
from .cpu_experts import packed
from .diversity import SessionDiversity
from .feature_codes import BESIDE_HISTORIES
from .feature_embedding import positive_places
from .item_evidence import times_of
from .item_head import history_states
from .item_scores import ItemScorer, ItemScores, SessionGuide, kept_scorer
from .layers_onerec import at_places
from .session_head import decoder_of

# Beams of all users that exist at once.
_CPU_ROWS_AT_ONCE, _ROWS_AT_ONCE = 1024, 1 << 16
# Arguments that generate() passes to its search and that the fast path uses, or may ignore.
_FAST_INPUTS = {
    "encoder_outputs",
    "attention_mask",
    "labels",
    "logits_to_keep",
    "past_key_values",
    "use_cache",
    "synced_gpus",
    "streamer",
    *BESIDE_HISTORIES,
}


class SemanticIDLogitsProcessor(LogitsProcessor):
    """
    Leaves only tokens that continue a legal item of the catalogue, for all rows at once.

    Where an item is complete the next token is BOS with probability one: it is given in training too, so it adds nothing to a beam's
    score. Elsewhere the scores of legal tokens stay as they are (full-vocabulary log-probabilities inside beam search), all others
    become -inf.

    Args:
        constraint: the legal items, on the device of the scores. Each user has the same number of rows of `input_ids`, in order.
        level_offsets: token id of code 0 of each level.
        bos_token_id: the token that opens an item.
        item_scores: the item head's scores, added to those of the decoder.
        decoder_weight: factor of the decoder's scores.
    """

    def __init__(
        self,
        constraint: CatalogueConstraint,
        level_offsets: Sequence[int],
        bos_token_id: int,
        item_scores: ItemScores | None = None,
        decoder_weight: float = 1.0,
    ):
        self.constraint, self.level_offsets, self.bos_token_id = constraint, level_offsets, bos_token_id
        self.item_scores, self.decoder_weight = item_scores, decoder_weight
        self._guide: SessionGuide | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        trie, rows = self.constraint.trie, len(input_ids)
        users = rows if self.constraint.users is None else self.constraint.users
        items, level = divmod(input_ids.shape[1] - 1, trie.num_levels + 1)
        constrained = torch.full_like(scores, float("-inf"))
        if level == trie.num_levels:
            constrained[:, self.bos_token_id] = 0.0
            return constrained
        offsets = torch.tensor(self.level_offsets, device=input_ids.device)
        written = input_ids[:, : items * (trie.num_levels + 1)].view(rows, items, trie.num_levels + 1)[..., 1:]
        own = trie.find_leaves(written - offsets)
        prefix = input_ids[:, input_ids.shape[1] - level :] - offsets[:level]
        nodes = trie.find_nodes(prefix).clamp_(min=0)  # a beam without any legal token left carries -inf already
        beams = rows // users
        legal = self.constraint.legal_children(level, nodes.view(users, beams), own.view(users, beams, items))
        legal = legal.flatten(0, 1)
        nothing = float("-inf")
        added = self._increments(items, level, nodes, own)
        if self.decoder_weight != 1:
            scores = torch.nan_to_num(scores * self.decoder_weight, nan=nothing, neginf=nothing)
        if level == 0:  # all rows have the same children
            tokens = trie.codes[0] + self.level_offsets[0]
            values = scores.index_select(1, tokens) + added
            return constrained.index_copy_(1, tokens, torch.where(legal, values, nothing))
        tokens = trie.child_codes(level, nodes) + self.level_offsets[level]
        # Illegal children, and columns beyond a node's children, go to token 0 (padding), which is never legal.
        tokens = torch.where(legal, tokens, 0)
        return constrained.scatter_(1, tokens, torch.where(legal, scores.gather(1, tokens) + added, nothing))

    def _increments(self, item: int, level: int, nodes: torch.Tensor, own: torch.Tensor) -> torch.Tensor | float:
        """(rows, children) that the item scores add to the children of nodes (rows,) of beams with the items `own` (rows, items)."""
        if self.item_scores is None:
            return 0.0
        if self._guide is None:
            self._guide = self.item_scores.guide(slice(None), self.constraint)
        if not self._guide.guides(item):
            return 0.0
        users = len(self.item_scores.states)  # a constraint that holds for all users does not know their number
        self._guide.begin(item, own.unflatten(0, (users, -1)))
        nodes = nodes.view(users, -1)
        children = self._guide.at_children(item, level, nodes)
        return self._guide.increments(children, item, level, nodes).flatten(0, 1)


class OneRecGenerationMixin(GenerationMixin):
    """
    `generate()` and `recommend()` of a OneRec model. A model with a catalogue (loaded with the checkpoint, or set by
    [`set_catalogue`]) generates only its items.
    """

    catalogue: ItemCatalogue | None = None
    _beam_decoder: type[BeamDecoder] = BeamDecoder

    def set_catalogue(self, catalogue: ItemCatalogue, content: Mapping[Any, Any] | None = None) -> None:
        """
        Sets the model's catalogue and writes its hash into the config: the first one, and later any that grew from it
        ([`ItemCatalogue.add`], `retire`, `restore`). That needs no training: the model scores codes, of new items as of all others. Items
        whose codes were freed lose their vectors, if the model has any.

        Args:
            content: content vectors (content_dim,) of items that the catalogue added, by item id, for a model whose item head has content: they are
                scored by it at once.

        Raises:
            ValueError: codebooks of other sizes, a catalogue that did not grow from the model's own, content of items that were not added or that does not fit.
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
                    f"is version {self.catalogue.version} with {len(self.catalogue)}; set a catalogue that grew from its own, or "
                    "set model.config.catalogue_hash to None to go back"
                )
            raise ValueError(
                f"this model was trained with the catalogue {own[:12]}..., this is {catalogue.hash[:12]}... "
                f"({len(catalogue)} items); load the catalogue that was saved with the model, or train for this one"
            )
        if self.config.item_head is not None:
            item_head = self.get_encoder().item_head
            if own is None:
                counts = None if catalogue.popularity is None else torch.tensor(catalogue.popularity)
                item_head.set_codes(torch.tensor(catalogue.codes, dtype=torch.long), counts)
            elif self.catalogue is not None and own != catalogue.hash:
                item_head.follow(self.catalogue, catalogue, content)
        self.config.catalogue_hash = catalogue.hash
        self.catalogue = catalogue

    def history_indices(self, input_ids: torch.Tensor, feature_ids: torch.Tensor | None = None) -> torch.Tensor:
        """
        Item indices of encoder inputs `SEP a b c ...`: (users, t) tokens to (users, t / (levels + 1)) indices, -1 for padding, and by `feature_ids` for
        interactions that were not positive.
        """
        items = input_ids.view(len(input_ids), -1, self.config.tokens_per_item)[..., 1:]
        found = self.catalogue.indices_of_codes(
            items - torch.tensor(self.config.level_offsets, device=input_ids.device)
        )
        positive = positive_places(self.config.features, feature_ids)
        return found if positive is True else torch.where(positive.to(found.device), found, -1)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        constrained: bool | None = None,
        exclude: torch.Tensor | None = None,
        allow: torch.Tensor | None = None,
        distinct: bool = True,
        item_score_weight: float | None = None,
        decoder_weight: float | None = None,
        request_times: torch.Tensor | Sequence | None = None,
        **kwargs,
    ):
        """
        `GenerationMixin.generate`, constrained to the catalogue.

        Args:
            constrained: whether only items of the catalogue may be generated; by default wherever the model has a catalogue.
            exclude: (users, e) int64 item indices to leave out per user, padded with -1.
            allow: (users, a) int64 item indices, the only items to choose from per user, padded with -1.
            distinct: whether an item may occur only once in a session.
            item_score_weight: weight of the item head's log-probabilities, added to the decoder's; see [`recommend`].
            decoder_weight, request_times: as for [`recommend`].

        Other arguments are those of `GenerationMixin.generate`; without a length it writes `config.session_length` items.
        """
        constrained = self.catalogue is not None if constrained is None else constrained
        tokens = kwargs.get("input_ids") if inputs is None else inputs
        if tokens is not None and kwargs.get("attention_mask") is None and kwargs.get("encoder_outputs") is None:
            kwargs["attention_mask"] = (tokens != self.config.pad_token_id).long()
        if constrained:
            constraint, item_scores = self._constraint(exclude, allow, distinct), None
            if weight := self._item_score_weight(item_score_weight, generation_config):
                history, mask, input_ids = self._encoded(inputs, kwargs)
                features = kwargs.get("feature_ids")
                item_scores = self._item_scores(
                    history, mask, constraint.trie, weight, input_ids, features, request_times
                )
            one_item = self._generates_one_item(kwargs, generation_config)
            decoder_weight = self._decoder_weight(decoder_weight, weight, one_item, generation_config)
            logits_processor = LogitsProcessorList(logits_processor or [])
            logits_processor.append(
                SemanticIDLogitsProcessor(
                    constraint, self.config.level_offsets, self.config.bos_token_id, item_scores, decoder_weight
                )
            )
        elif item_score_weight:
            raise ValueError(
                f"item_score_weight={item_score_weight} needs constrained generation: pass constrained=True"
            )
        elif exclude is not None or allow is not None:
            raise ValueError("exclude and allow need constrained generation")
        if self._requested_tokens(kwargs, generation_config) is None:
            own = kwargs if generation_config is None else vars(generation_config := copy.copy(generation_config))
            own["max_new_tokens"] = self._session_tokens(self.config.session_length)
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def _beam_search(self, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        found = self._fast_generate(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        if found is not None:
            return found
        return super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        found = self._fast_generate(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        if found is not None:
            return found
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

    def _fast_generate(self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs):
        """
        `generate`'s result for greedy and beam search by [`beam_search`], or None for requests that it does not support: other logits processors or stopping criteria, sampling, sessions that end inside an item, scores or states of each
        step, a prompt, dropout, synchronised ranks.
        """
        if len(logits_processor) != 1 or not isinstance(logits_processor[0], SemanticIDLogitsProcessor):
            return None
        config, constraint = generation_config, logits_processor[0].constraint
        # End of sequence is never legal.
        ends_by_length = all(isinstance(each, MaxLengthCriteria | EosTokenCriteria) for each in stopping_criteria)
        per_step = (config.output_scores, config.output_logits, config.output_attentions, config.output_hidden_states)
        tokens = config.max_length - 1
        session_length, inside_item = divmod(tokens + 1, self.config.tokens_per_item)
        starts_anew = input_ids.shape[1] == 1 and bool((input_ids == self.config.bos_token_id).all())
        if (
            config.do_sample
            or self.training
            or inside_item
            or any(per_step)
            or not (ends_by_length and starts_anew)
            or model_kwargs.get("synced_gpus")
            or model_kwargs.get("streamer") is not None
            or not model_kwargs.keys() <= _FAST_INPUTS
        ):
            return None
        beams = self._search(
            model_kwargs["encoder_outputs"].last_hidden_state,
            at_places(model_kwargs.get("attention_mask"), self.config.encoder_stride),
            constraint,
            config.num_beams,
            session_length,
            item_scores=logits_processor[0].item_scores,
            decoder_weight=logits_processor[0].decoder_weight,
        )
        sequences, scores = self._sequences(beams, config.num_return_sequences)
        if not config.return_dict_in_generate:
            return sequences
        if config.num_beams == 1:
            return GenerateEncoderDecoderOutput(sequences=sequences)
        return GenerateBeamEncoderDecoderOutput(
            sequences=sequences, sequences_scores=scores / tokens**config.length_penalty
        )

    def _session_tokens(self, session_length: int) -> int:
        """New tokens of a session: its first BOS is the decoder's start token."""
        return session_length * self.config.tokens_per_item - 1

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        feature_ids: torch.Tensor | None = None,
        lifelong_ids: torch.Tensor | None = None,
        session_length: int | None = None,
        num_beams: int = 32,
        num_return_sequences: int = 1,
        exclude_seen: bool = False,
        exclude: torch.Tensor | Sequence | None = None,
        allow: torch.Tensor | Sequence | None = None,
        distinct: bool = True,
        item_score_weight: float | None = None,
        decoder_weight: float | None = None,
        request_times: torch.Tensor | Sequence | None = None,
        unknown: str = "error",
        session_decoding: str = "beam",
        diversity: float = 0.0,
        do_sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict_in_generate: bool = False,
    ) -> torch.LongTensor | ModelOutput:
        """
        The most probable sessions for each history, by beam search over the catalogue (paper, section 3.2), or, with `do_sample`, as many
        different ones drawn at random. Dropout is off.

        Args:
            input_ids, attention_mask: (users, t), as the processor makes them.
            feature_ids, lifelong_ids: (users, places, slots), (users, n, 1 + levels), for a model with features and a lifelong pathway.
            session_length: items per session, `config.session_length` when not given. With 1, the beams are a ranked list of items.
            num_beams: beams per user.
            num_return_sequences: sessions returned per user, at most `num_beams`.
            exclude_seen: leave out the items of `input_ids`.
            exclude: more items to leave out per user: lists of item ids, or (users, e) int64 item indices padded with -1. One list holds for all.
            allow: the only items to choose from, in the same forms (a category, what is in stock).
            distinct: whether an item may occur only once in a session.
            unknown: "error", or "skip" to leave out ids in `exclude` and `allow` that the catalogue lacks.
            item_score_weight: weight of the item head's log-probability of a session's first item, beside the session's own; with evidence
                ([`ItemEvidence`]) of each item, given the items before it. It guides the beams from the first code on.
                `generation_config.item_score_weight` when not given, 0 where that has none.
            decoder_weight: factor of the decoder's log-probabilities beside the item scores. With 0 and sessions of one item the item head
                alone ranks, and no decoder runs. When not given, `generation_config.decoder_weight` for sessions of one item (1 where that has
                none), and 1 for longer ones.
            request_times: (users,) int64 in the unit of the training table: when the requests were made, for evidence of what was asked for lately
                ([`ItemEvidence`]). They are made now, after all that was counted, when not given.
            session_decoding: "beam", or "parallel" for sessions in one pass without the decoder, by a session head ([`ParallelDecoder`]): sessions that
                differ in their first items, sorted by their log-probability under the head. `num_beams` does not matter.
            diversity: penalty on items that the returned sessions of a user share; 0 returns the best beams, which differ by an item or two. With 1,
                three sessions of five share almost none; each shared item takes `log(items)`, the score of an item drawn at random. The first session
                is the best one, each other the best beside those before it, and `sequences_scores` say what that costs: they are without the penalty.
                About twice the time ([`SessionDiversity`]).
            do_sample: draw `num_beams` sessions without replacement (stochastic beam search) instead of finding the most probable
                ones. The distribution is the model's (and the item head's) at this `temperature`, over the legal items at each code.
            temperature: divides the logits that are sampled from; scores are those of the model itself.
            generator: random numbers for `do_sample`, on the model's device; or a list of generators, one per user, with which a user's
                sessions do not depend on the other users of the batch.
            return_dict_in_generate: return `sequences` and `sequences_scores` (log-probability of a session, full vocabulary, and
                `item_score_weight` times its first item's); with `do_sample` also `sampling_keys` (the perturbed log-probabilities that the sessions are sorted by) and
                `sampling_scores` (log-probabilities under the distribution that was sampled from).

        Returns:
            (users * num_return_sequences, 1 + new tokens) int64 tokens, best first per user, for `processor.batch_decode`. Where fewer
            legal sessions exist than requested, the missing ones are BOS and padding, with score -inf.

        Raises:
            ValueError: no catalogue, `session_decoding="parallel"` without a session head or with options of beam search, an `item_score_weight` for a model without item scores, a `decoder_weight` of 0 without one, `num_return_sequences > num_beams`, a
                `diversity` that is negative or goes with `do_sample`, a temperature that is not positive, another number of generators than users, or
                exclusions that leave a user no item.
            KeyError: an id in `exclude` or `allow` that the catalogue lacks, unless `unknown="skip"`.
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
        if not 0 <= diversity < float("inf"):
            raise ValueError(f"diversity={diversity} must be a finite number, at least 0")
        if diversity and do_sample:
            raise ValueError(
                f"diversity={diversity} goes with beam search: leave out do_sample, or diversity and raise temperature"
            )
        if temperature <= 0:
            raise ValueError(
                f"temperature={temperature} must be positive; for the most probable sessions leave do_sample out"
            )
        parallel = decoder_of(
            self,
            session_decoding,
            session_length,
            **{"distinct=False": not distinct, "diversity": diversity, "decoder_weight": decoder_weight is not None},
            item_score_weight=item_score_weight is not None,
        )
        if isinstance(generator, Sequence) and len(generator) != len(input_ids):
            raise ValueError(f"{len(generator)} generators for {len(input_ids)} users: pass one each, or one for all")
        input_ids = input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        attention_mask = attention_mask.to(self.device)
        if unknown not in ("error", "skip"):
            raise ValueError(f'unknown must be "error" or "skip"; got {unknown!r:.80}')
        excluded = [] if exclude is None else [self._rows_per_user(exclude, "exclude", len(input_ids), unknown)]
        if exclude_seen:
            excluded.append(self.history_indices(input_ids, feature_ids))
        constraint = self._constraint(
            torch.cat(excluded, dim=1) if excluded else None,
            None if allow is None else self._rows_per_user(allow, "allow", len(input_ids), unknown),
            distinct,
        )
        with _without_dropout(self):
            encoder = self.get_encoder()
            states = encoder(input_ids, attention_mask, feature_ids=feature_ids, lifelong_ids=lifelong_ids)
            history = states.last_hidden_state
            attention_mask = at_places(attention_mask, self.config.encoder_stride)
            sampling = {"sample": do_sample, "temperature": temperature, "generator": generator}
            item_scores = None
            if weight := 1.0 if parallel is not None else self._item_score_weight(item_score_weight):
                item_scores = self._item_scores(
                    history, attention_mask, constraint.trie, weight, input_ids, feature_ids, request_times
                )
            decoder_weight = self._decoder_weight(decoder_weight, weight, session_length == 1)
            diverse = None
            if diversity and min(num_return_sequences, session_length) > 1:  # single items are all different
                weights = torch.full((session_length,), decoder_weight, device=self.device)
                if item_scores is not None:
                    weights[: session_length if item_scores.reads_sessions else 1] += weight
                diverse = SessionDiversity(diversity, num_return_sequences, weights, constraint.trie)
            if parallel is not None:
                beams = parallel.search(item_scores, constraint, session_length, num_return_sequences, **sampling)
            else:
                beams = self._search(
                    history,
                    attention_mask,
                    constraint,
                    num_beams,
                    session_length,
                    item_scores=item_scores,
                    decoder_weight=decoder_weight,
                    diverse=diverse,
                    **sampling,
                )
        sequences, scores = self._sequences(beams, num_return_sequences)
        if not return_dict_in_generate:
            return sequences
        output = ModelOutput(sequences=sequences, sequences_scores=scores)
        if do_sample and parallel is None:
            output["sampling_keys"] = _first(beams.perturbed, num_return_sequences).flatten()
            output["sampling_scores"] = _first(beams.sampled_from, num_return_sequences).flatten()
        return output

    @contextmanager
    def packed_experts(self) -> Iterator[None]:
        """
        For many `recommend()` or `generate()` calls with the same weights on a CPU, in float32 or bfloat16: while it lasts, the decoder's weights
        also exist in the layout that the CPU multiplies fastest (once more their memory). Changed weights and adapters are noticed, and
        computed from the originals, unless a change goes past autograd's version counter (`parameter.data`). Elsewhere it does nothing.

        Example:
            >>> with model.packed_experts():  # doctest: +SKIP
            ...     for histories in batches:
            ...         sessions = model.recommend(**processor(histories))
        """
        # An adapter may wrap experts and linear layers; the `packed` attribute identifies them.
        modules = (module for module in self.get_decoder().modules() if "packed" in vars(module))
        with packed(list(modules)):
            yield

    def _search(
        self,
        history,
        attention_mask,
        constraint,
        num_beams,
        session_length,
        item_scores: ItemScores | None = None,
        decoder_weight: float = 1.0,
        diverse: SessionDiversity | None = None,
        generator=None,
        **sampling,
    ) -> Beams:
        if decoder_weight == 0 and session_length == 1 and not sampling.get("sample") and item_scores is not None:
            scores, leaves = item_scores.best(constraint, num_beams)
            return Beams(leaves[..., None], scores * item_scores.weight)
        # With a few users at a time, the search of a CPU stays in its caches; the answer is the same.
        users = len(history)
        at_once = max(1, (_CPU_ROWS_AT_ONCE if history.device.type == "cpu" else _ROWS_AT_ONCE) // num_beams)
        compile_config = self.generation_config.compile_config
        parts = []
        for start in range(0, users, at_once):
            some = slice(start, start + at_once)
            mask, legal = None if attention_mask is None else attention_mask[some], constraint.of(some)
            decoder = self._beam_decoder(
                self.get_decoder(),
                history[some],
                mask,
                num_beams,
                self._session_tokens(session_length),
                static=compile_config is not None,
            )
            if compile_config is not None:
                decoder.forward = torch.compile(decoder.forward, **compile_config.to_dict())
            sampling["generator"] = generator[some] if isinstance(generator, Sequence) else generator
            guide = None if item_scores is None else item_scores.guide(some, legal)
            run = partial(
                beam_search,
                decoder,
                self.lm_head,
                legal,
                session_length=session_length,
                guide=guide,
                decoder_weight=decoder_weight,
                **sampling,
            )
            parts.append(run(num_beams) if diverse is None else diverse.search(run, num_beams))
        return parts[0] if len(parts) == 1 else Beams.cat(parts)

    def _item_score_weight(self, given: float | None, generation_config=None) -> float:
        """The weight that was given, or else the default of the generation config."""
        weight = self._generation_default("item_score_weight", generation_config) if given is None else given
        if not weight:
            return 0.0
        if weight < 0:
            raise ValueError(f"item_score_weight={weight} must not be negative")
        head = self.config.item_head
        if head is None or not head.loss_weight:
            raise ValueError(
                f"item_score_weight={weight} needs item scores: this model has no item_head with a loss_weight above 0. Train one "
                "(OneRecConfig(item_head=...)), or leave item_score_weight out"
            )
        return float(weight)

    def _generation_default(self, name: str, generation_config=None) -> float | None:
        """A field of ours, not of transformers', in the generation config of a call or else in the model's, as generate() fills in others."""
        values = (getattr(config, name, None) for config in (generation_config, self.generation_config))
        return next((value for value in values if value is not None), None)

    def _generates_one_item(self, kwargs: dict, generation_config) -> bool:
        """Whether `generate` with these arguments writes sessions of one item."""
        tokens = self._requested_tokens(kwargs, generation_config)
        return (
            self._session_tokens(self.config.session_length) if tokens is None else tokens
        ) == self._session_tokens(1)

    def _requested_tokens(self, kwargs: dict, generation_config) -> int | None:
        """New tokens that the arguments of `generate`, its generation config or the model's ask for; None if none of them does."""
        for source in (kwargs, {} if generation_config is None else vars(generation_config)):
            if source.get("max_new_tokens") is not None:
                return source["max_new_tokens"]
            if source.get("max_length") is not None:
                return source["max_length"] - 1
        return self.generation_config.max_new_tokens  # max_length may be a default that Seq2SeqTrainer sets

    def _decoder_weight(
        self, given: float | None, item_score_weight: float, one_item: bool, generation_config=None
    ) -> float:
        """The weight that was given, or else for single items the default of the generation config; 1 for longer sessions."""
        default = self._generation_default("decoder_weight", generation_config) if one_item else None
        weight = next((float(each) for each in (given, default) if each is not None), 1.0)
        if weight < 0:
            raise ValueError(f"decoder_weight={weight} must not be negative")
        if weight == 0 and not item_score_weight:
            if given is None:  # the default of a model that is ranked without its item scores for once
                return 1.0
            raise ValueError(
                "decoder_weight=0 leaves nothing to rank by: pass an item_score_weight above 0, or a decoder_weight above 0"
            )
        return weight

    def _item_scores(
        self, history, attention_mask, trie, weight: float, input_ids=None, feature_ids=None, request_times=None
    ) -> ItemScores:
        """Of encoder states and their mask; evidence reads the histories' tokens too, of positive interactions."""
        head, rows = self.get_encoder().item_head, None
        if head.evidence is not None and input_ids is not None:
            rows = head.history_rows(input_ids) * positive_places(self.config.features, feature_ids)
        states = history_states(history, attention_mask)
        times = times_of(len(states), request_times, states.device)
        return ItemScores(self.item_scorer(trie), states, trie, weight, rows, times)

    def item_scorer(self, trie) -> ItemScorer:
        """The item head's scores of a trie's leaves. While no gradients are needed, it is kept until a weight changes."""
        leaves = torch.arange(trie.num_leaves, device=trie.leaf_to_index.device)
        return kept_scorer(self.get_encoder(), trie, lambda: self._code_tokens(trie, leaves))

    @torch.no_grad()
    def _encoded(self, inputs, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encoder states, their mask and the tokens for `generate`'s arguments; the states are kept among them, so that it does not compute them again."""
        mask, input_ids = kwargs.get("attention_mask"), kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get("encoder_outputs") is None:
            embeds = kwargs.pop("inputs_embeds", None)
            if input_ids is None and embeds is None:
                raise ValueError("item_score_weight needs the history: pass input_ids or encoder_outputs")
            with _without_dropout(self):
                kwargs["encoder_outputs"] = self.get_encoder()(
                    None if embeds is not None else input_ids.to(self.device),
                    None if mask is None else mask.to(self.device),
                    None if embeds is None else embeds.to(self.device),
                    **{name: kwargs.get(name) for name in BESIDE_HISTORIES},
                )
        mask = None if mask is None else mask.to(self.device)
        input_ids = None if input_ids is None else input_ids.to(self.device)
        return kwargs["encoder_outputs"][0], at_places(mask, self.config.encoder_stride), input_ids

    def _code_tokens(self, trie, leaves: torch.Tensor) -> torch.Tensor:
        """(..., levels) tokens of leaves."""
        levels = enumerate(self.config.level_offsets)
        return torch.stack([trie.codes[level][trie.ancestors(level, leaves)] + offset for level, offset in levels], -1)

    def _sequences(self, beams: Beams, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `count` sessions per user as (users * count, tokens) tokens beginning with BOS, and their scores."""
        trie = self.catalogue.trie.to(beams.leaves.device)
        scores, leaves = _first(beams.scores, count).flatten(), _first(beams.leaves, count, fill=0).flatten(0, 1)
        opens = torch.full_like(leaves, self.config.bos_token_id).unsqueeze(-1)
        sequences = torch.cat([opens, self._code_tokens(trie, leaves)], dim=-1).flatten(1)
        sequences[scores == float("-inf"), 1:] = self.config.pad_token_id
        return sequences, scores

    def _constraint(self, exclude, allow, distinct: bool) -> CatalogueConstraint:
        """
        The constraint to the catalogue's active items, on the model's device. `exclude` and `allow` (users, e) are item indices padded with -1;
        retired items have no leaf.
        """
        if self.catalogue is None:
            raise ValueError("this model has no item catalogue; set one with model.set_catalogue(processor.catalogue)")
        trie = self.catalogue.trie.to(self.device)
        leaves = [
            rows if rows is None else torch.where(rows >= 0, trie.index_to_leaf[rows.clamp(min=0)], -1)
            for rows in (
                exclude if exclude is None else exclude.to(self.device),
                allow if allow is None else allow.to(self.device),
            )
        ]
        return CatalogueConstraint(trie, *leaves, distinct=distinct)

    def _rows_per_user(
        self, items: torch.Tensor | Sequence, what: str, users: int, unknown: str = "error"
    ) -> torch.Tensor:
        """(users, e) item indices, padded with -1, from lists of item ids or from indices; one list, flat or not, holds for all users."""
        if isinstance(items, torch.Tensor):
            rows = torch.atleast_2d(items.to(self.device))
        else:
            flat = any(isinstance(each, str) or not isinstance(each, Iterable) for each in items)
            how = "mask" if unknown == "skip" else unknown
            lists = [torch.from_numpy(self.catalogue.indices(each, how)) for each in ([items] if flat else items)]
            rows = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1).to(self.device)
        if len(rows) not in (1, users):
            raise ValueError(
                f"{what} has lists for {len(rows)} users, input_ids has {users}; pass one list per user, or one for all"
            )
        return rows.expand(users, -1)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # The history is the same for all beams of a user: encoder states and their mask stay one row per user, and cross-attention folds
        # the beams into the query length. Copies per beam cost more than the whole decoder.
        names = ("encoder_outputs", "attention_mask", *BESIDE_HISTORIES)
        shared = {name: model_kwargs.pop(name) for name in names if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **shared}

    def _reorder_cache(self, past_key_values, beam_idx):
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values


def _first(values: torch.Tensor, count: int, fill: float = float("-inf")) -> torch.Tensor:
    """The first `count` beams of (users, beams, ...), `fill` where there are fewer."""
    values = values[:, :count]
    missing = values.new_full((len(values), count - values.shape[1], *values.shape[2:]), fill)
    return torch.cat([values, missing], dim=1)


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the modules that are in training mode, and back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


__all__ = ["OneRecGenerationMixin", "SemanticIDLogitsProcessor"]
