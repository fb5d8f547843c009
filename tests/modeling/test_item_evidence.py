"""Evidence about pairs of items: the formula, the candidates, sessions, fitted weights, items that join, and what is saved."""

import math
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM

from onerec_hf import OneRecProcessor
from onerec_hf.cli.export import export_onnx
from onerec_hf.modeling.configuration_item_head import ItemHeadConfig
from onerec_hf.modeling.item_evidence import LISTS, ItemEvidence, as_times, fit_weights
from onerec_hf.modeling.item_head import history_states
from onerec_hf.modeling.requests import Recommender, Request
from tests.conftest import make_catalogue, make_model
from tests.rounding import assert_close

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=8)
HISTORIES = [["m1", "m2", "m3"], ["m5"]]
ITEMS, WIDTH = len(CATALOGUE), 6
LOG = 300  # interactions


def filled(items, neighbours=4, candidates=200, seed=0, recent=False):
    """Evidence with random lists and weights, all positive."""
    random = torch.Generator().manual_seed(seed)
    evidence = ItemEvidence(items, neighbours, candidates)
    if recent:
        log = torch.randint(0, items + 1, (LOG,), generator=random)
        evidence.set_log(log, torch.arange(LOG))
    for name in LISTS:
        rows = torch.stack([torch.randperm(items, generator=random)[:neighbours] + 1 for _ in range(items)])
        rows[torch.rand(rows.shape, generator=random) < 0.3] = 0  # lists of different lengths
        evidence.set_list(name, rows, torch.randint(1, 9, rows.shape, generator=random).float())
    evidence.interactions[1:] = torch.randint(0, 20, (items,), generator=random)
    evidence.set_weights(torch.rand(len(evidence.names), generator=random) + 0.2)
    return evidence


def content_of(items, seed=0):
    vectors = torch.randn(items + 1, WIDTH, generator=torch.Generator().manual_seed(seed))
    vectors[0] = vectors[items // 2] = 0  # one item has no content
    return F.normalize(vectors, dim=1)


def by_hand(evidence, scores, history, content, times):
    """The formula of the file's head, item by item."""
    weights = dict(zip(evidence.names, evidence.weights.tolist(), strict=True))
    lists = {
        name: [
            dict(zip(*map(torch.Tensor.tolist, pair), strict=True))
            for pair in zip(*evidence.list_of(name), strict=True)
        ]
        for name in LISTS
    }
    degree = (evidence.interactions + 1).tolist()
    out = []
    for of_user, row, time in zip(scores.tolist(), history.tolist(), times, strict=True):
        known = [item for item in row if item]
        values = []
        for item, score in enumerate(of_user, 1):
            near = sum(
                0.8 ** (len(known) - 1 - j)
                * lists["near"][other].get(item, 0)
                / math.sqrt(degree[other] * degree[item])
                for j, other in enumerate(known)
            )
            total = weights["head"] * score + weights["popular"] * math.log1p(float(evidence.interactions[item]))
            for name, width in (("recent", LOG // 10), ("trending", LOG // 100)):
                if evidence.recent:
                    latest = evidence.log_items[:time].tolist()[-width:]
                    total += weights[name] * math.log1p(latest.count(item))
            total += weights["near"] * math.log1p(10 * near)
            if known:
                total += weights["next"] * math.log1p(lists["next"][known[-1]].get(item, 0))
                total += weights["before"] * math.log1p(lists["before"][known[-1]].get(item, 0))
                if content is not None:
                    cosines = [float(content[item] @ content[other]) for other in known]
                    total += weights["content"] * max(cosines) + weights["content_last"] * cosines[-1]
            values.append(total)
        out.append(values)
    return torch.tensor(out)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 12), min_size=5, max_size=5), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_scores_are_those_of_the_formula(history, with_content, recent, seed):
    """For all histories, with padding and unknown items in any place; per user up to a constant, which no ranking sees."""
    evidence, history = filled(12, seed=seed, recent=recent), torch.tensor(history)
    content = content_of(12, seed) if with_content else None
    scores = torch.randn(len(history), 12, generator=torch.Generator().manual_seed(seed))
    times = torch.randint(0, LOG + 9, (len(history),), generator=torch.Generator().manual_seed(seed))
    found = evidence.add(scores, history, content, times=times)
    wanted = by_hand(evidence, scores, history, content, times.tolist())
    assert_close(found - found[:, :1], wanted - wanted[:, :1], terms=64)
    found = evidence.add(scores, history, content)  # now
    wanted = by_hand(evidence, scores, history, content, [LOG] * len(history))
    assert_close(found - found[:, :1], wanted - wanted[:, :1], terms=64)


@pytest.mark.parametrize("recent", [False, True])
def test_features_times_weights_are_the_scores(recent):
    evidence, content = filled(12, recent=recent), content_of(12)
    history, scores = torch.tensor([[1, 5, 0], [0, 7, 7]]), torch.randn(2, 12)
    times = torch.tensor([LOG // 2, 7])
    features, rows = evidence.features(scores, history, content, torch.tensor([[1, 5], [7, 0]]), times)
    assert features.shape == (2, 12, 7 + 2 * recent)
    if recent:
        assert torch.equal(evidence.recent_features(rows, times), features[..., 7:] * (rows > 0)[..., None])
    assert (rows == 0).sum(1).tolist() == [2, 1]  # in place of the excluded ones, which are last
    assert not (rows[0, :, None] == torch.tensor([1, 5])).any()
    direct = evidence.add(scores, history, content, times=times).gather(1, (rows - 1).clamp(0))
    total = features @ evidence.weights
    for user, known in enumerate(rows > 0):
        assert_close((total - total[:, :1])[user, known], (direct - direct[:, :1])[user, known], terms=64)


def test_only_the_best_candidates_are_compared_by_content():
    evidence, content = filled(12, candidates=3), content_of(12)
    history, scores = torch.tensor([[1, 5]]), torch.randn(1, 12)
    without, found = evidence.add(scores, history), evidence.add(scores, history, content)
    changed = (found != without)[0].nonzero().flatten().tolist()
    assert set(changed) < set(without[0].topk(3).indices.tolist())  # the least similar of the three keeps its score
    assert len(changed) == 2
    legal = torch.ones(1, 12, dtype=torch.bool)
    legal[0, without[0].topk(3).indices] = False
    others = (evidence.add(scores, history, content, legal=legal) != without)[0].nonzero().flatten().tolist()
    assert not set(others) & set(changed)


def test_planted_weights_are_found():
    torch.manual_seed(0)
    planted = torch.tensor([1.0, 2.0, 0.5, -0.5, 3.0, 0.0, 1.0])
    features, rows = torch.randn(4000, 20, 7), torch.arange(1, 21).expand(4000, 20)
    targets = torch.distributions.Categorical(logits=features @ planted).sample() + 1
    found = fit_weights(features, rows, targets)
    # Four standard errors of a coefficient: at most the one of a Gaussian with this many observations.
    assert (found - planted).abs().max() < 4 * (1 / 4000) ** 0.5 * 2


@pytest.mark.parametrize("targets", [[0, 0], [99, 99]])
def test_without_targets_the_weights_stay(targets):
    start = torch.tensor([1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    features, rows = torch.randn(2, 5, 7), torch.arange(1, 6).expand(2, 5)
    assert torch.equal(fit_weights(features, rows, torch.tensor(targets), start), start)


def test_evidence_that_never_differs_keeps_its_weight():
    features, rows = torch.randn(50, 5, 7), torch.arange(1, 6).expand(50, 5)
    features[..., 4:6] = 0  # items without content
    start = torch.ones(7)
    found = fit_weights(features, rows, torch.randint(1, 6, (50,)), start)
    assert torch.equal(found[4:6], start[4:6])
    assert not torch.equal(found[:4], start[:4])


@pytest.mark.parametrize(
    ("items", "match"),
    [
        (torch.full((3, 2), 4), "another catalogue"),
        (torch.ones(2, 2, dtype=torch.long), "expected"),
        (torch.ones(3, 9, dtype=torch.long), "expected"),
    ],
)
def test_lists_that_do_not_fit(items, match):
    with pytest.raises(ValueError, match=match):
        ItemEvidence(3, neighbours=2).set_list("near", items, torch.ones(items.shape))


def make(content=True, evidence=True, recent=False, **config):
    """A model whose head has evidence, random lists and content."""
    head = {"num_items": ITEMS, "score_codes": True, "evidence": evidence, "neighbours": 4}
    head |= {"recent": LOG} if recent else {}
    head |= {"content_dim": WIDTH} if content else {}
    model = make_model(CATALOGUE, item_head=head, **config)
    item_head = model.get_encoder().item_head
    if content:
        codes = torch.tensor(CATALOGUE.codes, dtype=torch.long)
        item_head.set_content(codes, torch.randn(ITEMS, WIDTH, generator=torch.Generator().manual_seed(1)))
    if evidence:
        item_head.evidence.load_state_dict(filled(ITEMS, recent=recent).state_dict())
    return model.eval()


def scores_of(model, histories):
    """(users, items) item scores in the order of item indices."""
    inputs = PROCESSOR(histories)
    encoder, trie = model.get_encoder(), model.catalogue.trie
    states = history_states(encoder(**inputs).last_hidden_state, inputs["attention_mask"])
    scorer = model.item_scorer(trie)
    return scorer.log_probs(states, encoder.item_head.history_rows(inputs["input_ids"]))[:, trie.index_to_leaf]


@torch.no_grad()
def test_the_head_alone_ranks_items():
    model, inputs = make(), PROCESSOR(HISTORIES)
    options = {"item_score_weight": 2.0, "decoder_weight": 0.0, "num_beams": 30, "num_return_sequences": 30}
    out = model.recommend(**inputs, session_length=1, exclude=HISTORIES, return_dict_in_generate=True, **options)
    scores = scores_of(model, HISTORIES)
    for user, history in enumerate(HISTORIES):
        scores[user, CATALOGUE.indices(history)] = -torch.inf
    best = scores.topk(30)
    assert torch.equal(PROCESSOR.item_indices(out.sequences).view(2, 30), best.indices)
    # Content is compared for items that may be recommended: with exclusions the constant of a user differs.
    found = out.sequences_scores.view(2, 30)
    assert_close(found - found[:, :1], 2 * (best.values - best.values[:, :1]), terms=64)
    few = model.recommend(
        **inputs, session_length=1, allow=[["m7", "m9"]], **(options | {"num_beams": 3, "num_return_sequences": 3})
    )
    assert sorted(PROCESSOR.item_indices(few).view(2, 3)[0].tolist()) == sorted(
        [-1, *CATALOGUE.indices(["m7", "m9"]).tolist()]
    )


@torch.no_grad()
@pytest.mark.parametrize(("content", "recent"), [(True, True), (False, False)])
def test_each_item_of_a_session_has_the_evidence_of_those_before_it(content, recent):
    """With all items as candidates a session's score is the sum of its items', each scored for the history and what was written before."""
    model, inputs = make(content=content, recent=recent), PROCESSOR(HISTORIES)
    times = torch.tensor([LOG // 3, LOG // 2])
    options = {
        "request_times": times,
        "session_length": 3,
        "num_beams": 20,
        "num_return_sequences": 5,
        "item_score_weight": 2.0,
        "decoder_weight": 0.0,
    }
    out = model.recommend(**inputs, return_dict_in_generate=True, **options)
    sessions = PROCESSOR.item_indices(out.sequences.view(2 * 5, -1)).view(2, 5, 3).tolist()
    encoder, trie = model.get_encoder(), model.catalogue.trie
    states = history_states(encoder(**inputs).last_hidden_state, inputs["attention_mask"])
    scorer, history = model.item_scorer(trie), encoder.item_head.history_rows(inputs["input_ids"])
    rows = encoder.item_head.rows_of(torch.tensor(CATALOGUE.codes, dtype=torch.long))
    for user in range(2):
        for place, session in enumerate(sessions[user]):
            total, written = 0.0, history[user : user + 1]
            for item, index in enumerate(session):
                mine = slice(user, user + 1)
                scores = scorer.scores(states[mine], written, times=times[mine])[:, trie.index_to_leaf]
                scores[:, session[:item]] = -torch.inf
                total += 2 * float(scores.log_softmax(-1)[0, index])
                written = torch.cat([written, rows[index].view(1, 1)], dim=1)
            assert_close(out.sequences_scores.view(2, 5)[user, place], torch.tensor(total), terms=512)


@torch.no_grad()
@pytest.mark.parametrize(("decoder_weight", "session_length"), [(0.0, 1), (0.0, 3), (1.0, 1), (0.5, 3)])
@pytest.mark.parametrize("more", [{}, {"output_scores": True}], ids=["fast", "transformers"])
def test_generate_finds_the_same_sessions(decoder_weight, session_length, more):
    model, inputs = make(), PROCESSOR(HISTORIES)
    weights = {"item_score_weight": 2.0, "decoder_weight": decoder_weight, "num_beams": 12, "num_return_sequences": 4}
    out = model.recommend(**inputs, session_length=session_length, return_dict_in_generate=True, **weights)
    tokens = session_length * model.config.tokens_per_item - 1
    again = model.generate(
        **inputs, max_new_tokens=tokens, length_penalty=0.0, return_dict_in_generate=True, **weights, **more
    )
    assert torch.equal(again.sequences, out.sequences)
    assert_close(again.sequences_scores, out.sequences_scores, terms=512)


@torch.no_grad()
def test_sampled_sessions_have_the_scores_of_both():
    """All sessions of one item are drawn without replacement; the probabilities that they were drawn from sum to one."""
    model, inputs = make(), PROCESSOR(HISTORIES)
    weights = {"item_score_weight": 1.5, "decoder_weight": 0.5}
    out = model.recommend(
        **inputs,
        session_length=1,
        num_beams=ITEMS,
        num_return_sequences=ITEMS,
        do_sample=True,
        return_dict_in_generate=True,
        **weights,
    )
    assert_close(out.sampling_scores.view(2, ITEMS).exp().sum(1), torch.ones(2), terms=1024)


@torch.no_grad()
def test_the_default_weight_is_for_single_items():
    """Longer sessions are written by the decoder too, in both ways to generate."""
    model, inputs = make(), PROCESSOR(HISTORIES)
    model.generation_config.item_score_weight = 2.0
    expected = {}
    for length in (1, 2):
        for weight in (0.0, 1.0):
            expected[length, weight] = model.recommend(
                **inputs, session_length=length, num_beams=8, decoder_weight=weight
            )
    assert any(not torch.equal(expected[length, 0.0], expected[length, 1.0]) for length in (1, 2))
    model.generation_config.decoder_weight = 0.0
    for length, weight in ((1, 0.0), (2, 1.0)):
        tokens = length * model.config.tokens_per_item - 1
        assert torch.equal(model.recommend(**inputs, session_length=length, num_beams=8), expected[length, weight])
        assert torch.equal(model.generate(**inputs, max_new_tokens=tokens, num_beams=8), expected[length, weight])
        again = model.generate(**inputs, max_length=tokens + 1, num_beams=8)
        assert torch.equal(again, expected[length, weight])


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}])
def test_scores_follow_the_weights(optimizer):
    """Between two rankings an optimizer, whether or not it counts versions, a copy of weights, or another dtype changes the item vectors."""
    model, inputs = make(evidence=False), PROCESSOR(HISTORIES)
    options = {
        "session_length": 1,
        "num_beams": 30,
        "num_return_sequences": 30,
        "decoder_weight": 0.0,
        "item_score_weight": 1.0,
    }

    def ranked():
        found = model.recommend(**inputs, **options)
        with torch.no_grad():
            wanted = scores_of(model, HISTORIES).topk(30).indices
        return PROCESSOR.item_indices(found).view(2, 30), wanted

    first, _ = ranked()
    again, _ = ranked()
    assert torch.equal(first, again)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1, **optimizer)
    for _ in range(2):
        model(**PROCESSOR(HISTORIES, sessions=[["m4", "m6"], ["m7", "m8"]])).loss.backward()
        adamw.step()
        found, _ = ranked()
        with torch.enable_grad():  # nothing is kept where gradients are needed
            encoder, trie = model.get_encoder(), model.catalogue.trie
            fresh = model.item_scorer(trie)
        states = history_states(encoder(**inputs).last_hidden_state, inputs["attention_mask"])
        wanted = fresh.log_probs(states)[:, trie.index_to_leaf].topk(30).indices
        assert torch.equal(found, wanted)
        assert not torch.equal(found, first)


def test_what_is_recent_comes_and_goes():
    """Its weights are 0 until they are set, and without it the scores are what they were, bit for bit."""
    evidence, history, scores = filled(12), torch.tensor([[1, 5]]), torch.randn(1, 12)
    before = evidence.add(scores, history)
    evidence.set_log(torch.tensor([3, 4, 4]), torch.tensor([7, 8, 9]))
    assert torch.equal(evidence.add(scores, history), before)
    evidence.set_weights(evidence.weights + torch.tensor([0.0] * 7 + [2.0, 3.0]))
    wanted = F.one_hot(torch.tensor([3]), 12) * 5 * math.log(2)  # of three interactions the last one
    assert_close(evidence.add(scores, history) - before, wanted, terms=64)
    evidence.set_log()
    assert torch.equal(evidence.add(scores, history), before)
    assert "log_items" not in evidence.state_dict()
    for recent, has in ((3, False), (-1, True), (True, True)):
        with pytest.raises(StrictDataclassError, match="length of a log that the evidence reads"):
            ItemHeadConfig(num_items=3, evidence=has, recent=recent)


@torch.no_grad()
def test_a_request_of_the_past_is_answered_as_of_then():
    """In `recommend()`, `generate()` and requests; a request without a time is one of now."""
    model, inputs = make(recent=True), PROCESSOR(HISTORIES)
    evidence = model.get_encoder().item_head.evidence
    evidence.set_log(torch.tensor([4] * 50 + [9] * 50).int(), torch.arange(100))
    evidence.set_weights(torch.tensor([0.0] * 7 + [1.0, 1.0]))
    rows = model.get_encoder().item_head.rows_of(torch.tensor(CATALOGUE.codes, dtype=torch.long)).tolist()
    old, new = (CATALOGUE.ids(np.array([rows.index(row)]))[0] for row in (4, 9))
    options = {"session_length": 1, "item_score_weight": 1.0, "decoder_weight": 0.0}
    then, sessions = torch.tensor([40, 100]), [[old], [new]]
    assert PROCESSOR.batch_decode(model.recommend(**inputs, **options, request_times=then)) == sessions
    assert PROCESSOR.batch_decode(model.recommend(**inputs, **options)) == [[new]] * 2
    del options["session_length"]
    tokens = model.config.tokens_per_item - 1
    found = model.generate(**inputs, **options, max_new_tokens=tokens, num_beams=4, request_times=then)
    assert PROCESSOR.batch_decode(found) == sessions
    model.generation_config.item_score_weight, model.generation_config.decoder_weight = 1.0, 0.0
    requests = [Request(HISTORIES[0], top_k=1, request_time=40, exclude_seen=False), Request(HISTORIES[1], top_k=1)]
    answers = Recommender(model, PROCESSOR).recommend(requests)
    assert [answer.sessions[0] for answer in answers] == sessions
    # Times of requests are floats where they are those of a clock; others of the batch are answered now.
    requests[0] = replace(requests[0], request_time=np.float64(40.9))
    assert [answer.sessions[0] for answer in Recommender(model, PROCESSOR).recommend(requests)] == sessions
    for listed in ([40, None], np.array([40, 100])):
        found = model.recommend(**inputs, session_length=1, request_times=listed)
        assert PROCESSOR.batch_decode(found) == sessions


def test_times_that_are_none():
    for wrong in (float("nan"), True, "1970-01-02", torch.inf):
        with pytest.raises(ValueError, match="request_time is a number in the unit"):
            Request(HISTORIES[0], request_time=wrong)
    model, inputs = make(recent=True), PROCESSOR(HISTORIES)
    for wrong in (torch.tensor([1]), torch.tensor([1, 2, 3]), [5], torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match=r"one whole number per user, shape \(2,\)"):
            model.recommend(**inputs, item_score_weight=1.0, request_times=wrong)
    evidence = model.get_encoder().item_head.evidence
    for items, times, match in (
        ([1], [1, 2], "a time for each"),
        ([1, 2], [2, 1], "in order"),
        ([99], [1], "between 0 and 40"),
    ):
        with pytest.raises(ValueError, match=match):
            evidence.set_log(torch.tensor(items), torch.tensor(times))
    assert as_times([2**53 + 1, None]).tolist() == [2**53 + 1, torch.iinfo(torch.int64).max]


def test_counts_of_now_follow_the_log():
    """They are kept until the log changes: set anew, in place, or by items that join."""
    evidence = filled(12, recent=True)
    now = evidence.recent_counts()
    assert evidence.recent_counts() is now
    evidence.log_items.fill_(3)
    assert evidence.recent_counts()[0, 1].tolist() == [0, 0, 0, LOG // 100, *[0] * 9]
    evidence.set_log(torch.tensor([5]), torch.tensor([0]))
    assert evidence.recent_counts()[0, 0].nonzero().flatten().tolist() == [5]
    evidence.double()
    evidence.load_state_dict({**evidence.state_dict(), "log_items": torch.tensor([7], dtype=torch.int32)})
    assert evidence.recent_counts()[0, 0].nonzero().flatten().tolist() == [7]


def test_nothing_left_to_rank_by():
    model, inputs = make(), PROCESSOR(HISTORIES)
    with pytest.raises(ValueError, match="decoder_weight=0 leaves nothing to rank by"):
        model.recommend(**inputs, decoder_weight=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        model.recommend(**inputs, decoder_weight=-1.0)


@torch.no_grad()
@pytest.mark.parametrize("recent", [False, True])
def test_everything_is_saved(tmp_path, recent):
    model, inputs = make(recent=recent), PROCESSOR(HISTORIES)
    model.generation_config.item_score_weight, model.generation_config.decoder_weight = 3.0, 0.0
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    head = again.get_encoder().item_head
    assert head.content.dtype == torch.float16
    assert head.evidence.near_items.dtype == torch.int32
    assert head.config.recent == head.evidence.recent == recent * LOG
    options = {"num_beams": 20, "num_return_sequences": 20, "session_length": 1}
    assert torch.equal(again.recommend(**inputs, **options), model.recommend(**inputs, **options))


def test_content_is_learned_where_vectors_are_not():
    """The projection gets gradients; hidden vectors leave the content visible; an item without content adds nothing."""
    model = make()
    batch = PROCESSOR(HISTORIES, sessions=[["m4", "m6"], ["m7", "m8"]])
    model(**batch).loss.backward()
    head = model.get_encoder().item_head
    assert head.content_proj.weight.grad.abs().max() > 0
    head.content[head.rows_of(torch.tensor(CATALOGUE.codes[:1], dtype=torch.long))] = 0
    with torch.no_grad():
        head.vectors.weight.zero_()
        codes = torch.tensor(CATALOGUE.codes[:2], dtype=torch.long) + torch.tensor(head.offsets)
        tokens = F.pad(codes, (1, 0), value=3).view(1, -1)
        added = head(tokens)[0, :: codes.shape[1] + 1]
    assert added[0].abs().max() == 0
    assert added[1].abs().max() > 0


@torch.no_grad()
def test_items_that_join_are_scored_by_content_at_once():
    model, inputs = make(recent=True), PROCESSOR(HISTORIES)
    before = scores_of(model, HISTORIES)
    taken = {tuple(code) for code in CATALOGUE.codes.tolist()}
    free = next(code for code in np.ndindex(*CATALOGUE.codebook_sizes) if code not in taken)
    grown = CATALOGUE.add(["new"], [free])
    like = model.get_encoder().item_head.content[inputs.input_ids.new_tensor([1])].float()
    model.set_catalogue(grown, content={"new": like[0].numpy()})
    head = model.get_encoder().item_head
    assert len(head.keys) == head.config.num_items == model.config.item_head.num_items == ITEMS + 1
    after = scores_of(model, HISTORIES)
    assert after.isfinite().all()
    assert_close((after[:, :-1] - after[:, :1]), before - before[:, :1], terms=256)
    row = head.rows_of(torch.tensor([free]))
    assert head.content[row].abs().sum() > 0
    assert head.vectors.weight[row].abs().sum() == 0


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"new": np.ones(WIDTH + 1)}, "expected shape"),
        ({"new": np.full(WIDTH, np.nan)}, "NaN"),
        ({"m1": np.ones(WIDTH)}, "m1"),
    ],
)
def test_content_that_does_not_fit(content, match):
    model = make()
    taken = {tuple(code) for code in CATALOGUE.codes.tolist()}
    free = next(code for code in np.ndindex(*CATALOGUE.codebook_sizes) if code not in taken)
    with pytest.raises(ValueError, match=match):
        model.set_catalogue(CATALOGUE.add(["new"], [free]), content=content)
    assert model.catalogue is CATALOGUE or len(model.catalogue) == ITEMS


@pytest.mark.slow
def test_evidence_is_exported(tmp_path):
    """The encoder's graph has the scores with the evidence."""
    model = make(recent=True)
    export_onnx(model, PROCESSOR, tmp_path)
    batch = PROCESSOR(HISTORIES)
    inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    _states, scores = onnxruntime.InferenceSession(tmp_path / "encoder.onnx").run(None, inputs)
    with torch.no_grad():
        assert_close(torch.tensor(scores), scores_of(model, HISTORIES), terms=4096)
