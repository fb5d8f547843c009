"""Sessions that a policy draws, and the policy's log-probabilities of their tokens: two functions of the same distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from onerec_hf.modeling.beam_search import gumbel_noise
from onerec_hf.modeling.generation_onerec import SemanticIDLogitsProcessor
from onerec_hf.modeling.layers_onerec import at_places

if TYPE_CHECKING:
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

ROLLOUTS = ("distinct", "beam", "sample")


@torch.no_grad()
def roll_out(
    model: OneRecForConditionalGeneration,
    processor: OneRecProcessor,
    histories: Sequence[list],
    count: int,
    generators: Sequence[torch.Generator],
    how: str = "distinct",
    temperature: float = 1.0,
    session_length: int | None = None,
    exclude_seen: bool = True,
    constrained: bool = True,
    features: Mapping[str, Sequence] | None = None,
) -> torch.Tensor:
    """
    `count` sessions per history, drawn from the decoder at a temperature (an item head's scores are left out).

    Args:
        generators: random numbers per history, on the model's device: sessions depend neither on the batch nor on the rank.
        how: "distinct" draws without replacement (stochastic beam search), "beam" takes the most probable ones, "sample" draws independently.
        exclude_seen: leave out the items of the whole history, of a model with features those of positive interactions.
        constrained: sessions of distinct items of the catalogue; otherwise any tokens but the given BOS, drawn independently.
        features: codes beside the histories, as [`~onerec_hf.data.collators.feature_columns`] finds them.

    Returns:
        (histories * count, session_length * (levels + 1)) tokens `BOS a b c BOS ...`; BOS and padding where fewer legal sessions exist.

    Example:
        >>> generators = [torch.Generator().manual_seed(0)]
        >>> roll_out(model, processor, [["m1"]], 8, generators).shape  # doctest: +SKIP
        torch.Size([8, 20])
    """
    features = features or {}
    inputs = processor(histories, **features)
    length = model.config.session_length if session_length is None else session_length
    if not constrained:
        return _sample_freely(model, inputs, count, generators, temperature, length)
    sampling = {"do_sample": how != "beam", "temperature": temperature}
    excluded = None
    if exclude_seen:
        whole = processor(histories, max_history=max(map(len, histories)), **features)
        excluded = model.history_indices(whole["input_ids"], whole.get("feature_ids"))
    beams = count
    if how == "sample":  # the largest of a user's Gumbel keys alone is an independent draw
        inputs = {name: value.repeat_interleave(count, 0) for name, value in inputs.items()}
        excluded = None if excluded is None else excluded.repeat_interleave(count, 0)
        seeds = [torch.randint(2**62, (count,), generator=each, device=each.device).tolist() for each in generators]
        generators = [torch.Generator(model.device).manual_seed(seed) for own in seeds for seed in own]
        beams = 1
    return model.recommend(
        **inputs,
        num_beams=beams,
        num_return_sequences=beams,
        session_length=length,
        exclude=excluded,
        generator=list(generators),
        # The decoder alone: what the log-probabilities below are of.
        item_score_weight=0.0,
        decoder_weight=1.0,
        **sampling,
    )


def _sample_freely(model, inputs, count, generators, temperature, session_length) -> torch.Tensor:
    """Independent draws from the model's softmax, without a constraint; BOS is given before each item, as in training."""
    was_training, config = model.training, model.config
    model.eval()
    mask = inputs["attention_mask"].to(model.device)
    states = model.get_encoder()(
        inputs["input_ids"].to(model.device), mask, feature_ids=inputs.get("feature_ids")
    ).last_hidden_state
    decoder = model._beam_decoder(
        model.get_decoder(),
        states,
        at_places(mask, config.encoder_stride),
        count,
        session_length * config.tokens_per_item - 1,
    )
    written = torch.full((len(states) * count, 1), config.bos_token_id, device=model.device)
    for position in range(1, session_length * config.tokens_per_item):
        if position % config.tokens_per_item == 0:
            written = torch.nn.functional.pad(written, (0, 1), value=config.bos_token_id)
            continue
        opens = written.shape[1] > 1 and position % config.tokens_per_item == 1
        # BOS is given: it goes in together with the code before it.
        states = decoder.step(written[:, -2:] if opens else written[:, -1:])
        level = position % config.tokens_per_item - 1
        begin = config.level_offsets[level]
        tokens = decoder.normalized_over(slice(begin, begin + config.codebook_sizes[level]))
        logits = model.lm_head(states)[:, tokens].float() / temperature
        noise = gumbel_noise(torch.empty_like(logits).view(len(generators), count, -1), generators)
        drawn = (logits + noise.flatten(0, 1)).argmax(-1, keepdim=True) + tokens.start
        written = torch.cat([written, drawn], dim=1)
    model.train(was_training)
    return written


def code_places(tokens: int, tokens_per_item: int, device: torch.device | None = None) -> torch.Tensor:
    """
    The places of codes in a session of `tokens` tokens after its first BOS; the others are BOS, which is given.

    Example:
        >>> code_places(7, 4).tolist()
        [0, 1, 2, 4, 5, 6]
    """
    places = torch.arange(tokens, device=device)
    return places[(places + 1) % tokens_per_item != 0]


def legal_codes(model: OneRecForConditionalGeneration, seen: torch.Tensor | None) -> SemanticIDLogitsProcessor:
    """
    The legal continuations of [`roll_out`]'s constrained sessions: distinct items of the catalogue.

    Args:
        seen: (rows, e) indices of items that are left out, padded with -1; None for none.

    Example:
        >>> legal_codes(model, None)  # doctest: +SKIP
    """
    config = model.config
    constraint = model._constraint(seen, None, distinct=True)
    return SemanticIDLogitsProcessor(constraint, config.level_offsets, config.bos_token_id)


def token_log_probs(
    logits: torch.Tensor,
    sequences: torch.Tensor,
    places: torch.Tensor,
    temperature: float = 1.0,
    legal: SemanticIDLogitsProcessor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of sessions' tokens under the policy that [`roll_out`] draws from: per code, the softmax of `logits / temperature`, over its
    legal continuations with `legal`, else over the model's vocabulary.

    Args:
        logits: (rows, places, vocabulary) of the decoder at `places`.
        sequences: (rows, 1 + t) tokens, from the first BOS on.
        places: the places of codes, [`code_places`].

    Returns:
        Log-probabilities and entropies (rows, t), 0 at other places, and log-probabilities of 0 at tokens that `legal` rules out.
    """
    logps, entropies = logits.new_zeros(2, len(sequences), sequences.shape[1] - 1, dtype=torch.float32).unbind()
    found, spread = [], []
    for column, place in enumerate(places.tolist()):
        scores = logits[:, column].float() / temperature
        token = sequences[:, place + 1, None]
        possible = None
        if legal is not None:
            constrained = legal(sequences[:, : place + 1], scores)
            possible = constrained.gather(1, token) != float("-inf")  # NaN stays
            # A softmax without any finite entry would have NaN as its gradient.
            scores = torch.where(possible, constrained, scores)
        log_softmax = scores.log_softmax(-1)
        chosen = log_softmax.gather(1, token)
        found.append(chosen if possible is None else torch.where(possible, chosen, 0.0))
        finite = log_softmax.masked_fill(log_softmax == float("-inf"), 0.0)
        spread.append(-(log_softmax.exp() * finite).sum(-1, keepdim=True))
    return logps.index_copy(1, places, torch.cat(found, 1)), entropies.index_copy(1, places, torch.cat(spread, 1))


def right_padded(
    values: torch.Tensor, mask: torch.Tensor, latest: int | None = None, static: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Values (rows, t, ...) padded on the left, as TRL's prompts are, padded on the right as the processor does; and their mask.

    Args:
        mask: (rows, t).
        latest: keep the first `static` values of a row, and the last `latest` behind them; all of them when None.

    Example:
        >>> tokens, mask = torch.tensor([[0, 0, 5], [7, 8, 9]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
        >>> right_padded(tokens, mask)[0].tolist()
        [[5, 0, 0], [7, 8, 9]]
        >>> right_padded(tokens, mask, latest=1, static=1)[0].tolist()
        [[5, 0], [7, 9]]
    """
    lengths = mask.sum(1, keepdim=True)
    kept = lengths if latest is None else lengths.clamp(max=static + latest)
    place = torch.arange(int(kept.max()), device=values.device)
    inside = place < kept
    source = torch.where(place < static, place, place + lengths - kept) + values.shape[1] - lengths
    taken = values[torch.arange(len(values), device=values.device)[:, None], source.clamp(max=values.shape[1] - 1)]
    return taken.masked_fill(~inside.view(*inside.shape, *[1] * (values.dim() - 2)), 0), inside.long()
