"""The session head of `session_decoding="parallel"`: matrix, loss and contrastive decoding by hand, what sessions hold, and its file."""

import json
import math

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.modeling.session_head import (
    SESSION_HEAD_NAME,
    ParallelDecoder,
    SessionHead,
    read_sessions,
    session_head_loss,
)
from tests.conftest import make_catalogue, make_model
from tests.rounding import assert_close

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=10)
HISTORIES = [["m1", "m2", "m3", "m4"], ["m5"], ["m7", "m9"]]


def trained_head(width: int = 32, positions: int = 4) -> SessionHead:
    """A head whose weights are random, as after a training."""
    torch.manual_seed(7)
    head = SessionHead(width, positions, width=8, heads=2)
    with torch.no_grad():
        head.match.weight.normal_()
    return head.eval()


def make_parallel(candidates: int = 12, alpha: float = 0.2, **config) -> OneRecForConditionalGeneration:
    model = make_model(CATALOGUE, session_length=4, **{"item_head": {"num_items": 40}, **config})
    model.parallel_decoder = ParallelDecoder(trained_head(), candidates, alpha)
    return model


def sessions_of(model, histories=HISTORIES, count=1, **options):
    """Per history, its (session, score) pairs."""
    out = model.recommend(
        **PROCESSOR(histories),
        **{"session_decoding": "parallel", "num_return_sequences": count, "return_dict_in_generate": True, **options},
    )
    pairs = list(zip(PROCESSOR.batch_decode(out), out.sequences_scores.tolist(), strict=True))
    return [pairs[start : start + count] for start in range(0, len(pairs), count)]


# -- matrix, loss, decoding ------------------------------------------------------------------
def by_hand(head: SessionHead, state, vectors, scores):
    """The matrix of one user from the equations, one number at a time where that says more; candidates without a score are left out."""

    def normed(x, norm):
        centred = x - x.mean(-1, keepdim=True)
        centred = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred if norm is None else centred * norm.weight + norm.bias

    def attended(attention, queries, keys):
        q, k, v = (
            x @ w.T + b
            for x, w, b in zip(
                (queries, keys, keys), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
            )
        )
        parts = []
        for h in (slice(0, 4), slice(4, 8)):
            weights = torch.stack([torch.stack([(a * b).sum() for b in k[:, h]]) for a in q[:, h]]) / math.sqrt(4)
            parts.append(weights.softmax(1) @ v[:, h])
        return torch.cat(parts, 1) @ attention.out_proj.weight.T + attention.out_proj.bias

    def fed(layer, x):
        return layer.linear2(torch.nn.functional.gelu(layer.linear1(x)))

    user = head.user(normed(state, None))
    log_q = scores - scores.exp().sum().log()
    items = head.item(normed(vectors, None)) + log_q[:, None] * head.score.weight[:, 0] + user
    layer = head.candidate_layer
    again = normed(items, layer.norm1)
    items = items + attended(layer.self_attn, again, again)
    items = normed(items + fed(layer, normed(items, layer.norm2)), head.candidate_norm)
    layer, places = head.position_layer, head.position + user
    again = normed(places, layer.norm1)
    places = places + attended(layer.self_attn, again, again)
    places = places + attended(layer.multihead_attn, normed(places, layer.norm2), items)
    places = normed(places + fed(layer, normed(places, layer.norm3)), head.position_norm) @ head.match.weight.T
    exponents = torch.stack([torch.stack([(x * t).sum() for t in places]) for x in items]) / math.sqrt(8)
    exponents = (exponents + log_q[:, None]).exp()
    return exponents / exponents.sum(0), items


@torch.no_grad()
def test_matrix_equals_the_equations():
    head = trained_head()
    states, vectors = torch.randn(2, 32), torch.randn(2, 6, 32)
    scores = torch.randn(2, 6)
    scores[1, 4:] = -math.inf  # two candidates of the second user are not legal
    log_probs, items = head(states, vectors, scores)
    assert_close(log_probs.exp().sum(1), torch.ones(2, 4), terms=64)
    for user, legal in enumerate((6, 4)):
        wanted, representations = by_hand(head, states[user], vectors[user, :legal], scores[user, :legal])
        assert_close(log_probs[user, :legal].exp(), wanted, terms=1024)
        assert_close(items[user, :legal], representations, terms=1024)
    assert torch.isneginf(log_probs[1, 4:]).all()


def test_loss_equals_the_equations():
    matrix = torch.tensor([[[0.2, 0.7], [0.8, 0.3]], [[0.4, 0.9], [0.6, 0.1]]])
    sessions, likely = torch.tensor([[1, 0], [0, -1]]), torch.tensor([True, False])
    wanted = (
        -(math.log(0.8) + math.log(0.7) + math.log(1 - 0.4)) / 3
    )  # the second session's other item is no candidate
    assert_close(session_head_loss(matrix.log(), sessions, likely), torch.tensor(wanted), terms=16)
    certain = torch.tensor([[[1.0], [0.0]]]).log()
    assert session_head_loss(certain, torch.tensor([[0]]), torch.tensor([False])).isfinite()


def test_training_steps_raise_likely_sessions_and_lower_unlikely_ones():
    head, states, vectors = trained_head(), torch.randn(2, 32), torch.randn(2, 6, 32)
    scores, sessions = torch.zeros(2, 6), torch.tensor([[0, 1, 2, 3], [2, 4, 5, 0]])
    optimizer = torch.optim.SGD(head.parameters(), 0.02)
    before, now = None, torch.zeros(2)
    for _ in range(20):
        log_probs, _ = head(states, vectors, scores)
        now = log_probs.detach().gather(1, sessions[:, None])[:, 0].sum(1)
        before = now if before is None else before
        optimizer.zero_grad()
        session_head_loss(log_probs, sessions, torch.tensor([True, False])).backward()
        optimizer.step()
    assert now[0] > before[0]
    assert now[1] < before[1]


def read_by_hand(log_probs, alike, count, alpha):
    """Contrastive decoding of one user, one choice at a time: pairs of a session and its score, best first."""
    probs, candidates = log_probs.exp(), range(len(log_probs))
    found = []
    for first in sorted(candidates, key=lambda i: (-log_probs[i, 0].item(), i))[:count]:
        session = [first]
        for position in range(1, log_probs.shape[1]):

            def value(i, position=position, placed=tuple(session)):
                return (1 - alpha) * probs[i, position] - alpha * max(alike[i, k] for k in placed)

            left = [i for i in candidates if i not in session and log_probs[i, position] > -math.inf]
            session.append(max(left, key=lambda i: (value(i).item(), -i)))
        found.append((session, sum(log_probs[i, j].item() for j, i in enumerate(session))))
    return sorted(found, key=lambda pair: -pair[1])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6])
def test_contrastive_decoding_equals_a_greedy_choice(alpha):
    torch.manual_seed(1)
    for _ in range(5):
        logits, vectors = torch.randn(2, 7, 4), torch.nn.functional.normalize(torch.randn(2, 7, 3), dim=-1)
        logits[1, 2] = -math.inf
        log_probs, alike = logits.log_softmax(1), vectors @ vectors.mT
        sessions, scores = read_sessions(log_probs, alike, 5, alpha)
        for user in range(2):
            wanted = read_by_hand(log_probs[user], alike[user], 5, alpha)
            assert sessions[user].tolist() == [session for session, _ in wanted]
            assert_close(scores[user], torch.tensor([score for _, score in wanted]), terms=16)


def test_likeness_keeps_copies_apart():
    log_probs = torch.tensor([0.4, 0.35, 0.25]).log()[None, :, None].expand(-1, -1, 2)
    alike = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    assert read_sessions(log_probs, alike, 1)[0].tolist() == [[[0, 1]]]
    assert read_sessions(log_probs, alike, 1, alpha=0.2)[0].tolist() == [[[0, 2]]]


# -- recommend() -----------------------------------------------------------------------------
@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_sessions_hold_legal_items_once(sample, evidence):
    model = make_parallel(item_head={"num_items": 40, "evidence": evidence})
    model.set_catalogue(CATALOGUE.retire(["m20"]))
    excluded = [["m10", "m11"], ["m12"], []]
    for history, out, answers in zip(
        HISTORIES,
        excluded,
        sessions_of(model, count=6, exclude_seen=True, exclude=excluded, do_sample=sample),
        strict=True,
    ):
        found = [session for session, _ in answers]
        assert all(len(set(session)) == len(session) == 4 for session in found)
        assert not {item for session in found for item in session} & {*history, *out, "m20"}
        assert len({session[0] for session in found}) == 6  # different starts
        assert [score for _, score in answers] == sorted((score for _, score in answers), reverse=True)
    allowed = ["m3", "m30", "m31", "m32", "m33", "m34"]
    for answers in sessions_of(model, count=4, allow=allowed, do_sample=sample):
        assert {item for session, _ in answers for item in session} <= set(allowed)
    short = sessions_of(model, count=2, allow=["m3", "m30", "m31"], do_sample=sample)  # too few for a session of four
    assert all(answer == ([], -math.inf) for answers in short for answer in answers)


def test_scores_are_those_of_the_matrix():
    model = make_parallel(alpha=0.0)
    inputs = PROCESSOR(HISTORIES[:1])
    with torch.no_grad():
        states = model.get_encoder()(**inputs).last_hidden_state
        constraint = model._constraint(None, None, True)
        item_scores = model._item_scores(states, inputs["attention_mask"], constraint.trie, 1.0, inputs["input_ids"])
        log_probs, _, leaves = model.parallel_decoder.matrix(item_scores, constraint)
    best = item_scores.scorer.log_probs(item_scores.states).topk(12)
    assert leaves.tolist() == best.indices.tolist()  # the best by the item head
    ids = CATALOGUE.ids(CATALOGUE.trie.leaf_to_index[leaves[0]].numpy())
    ((session, score),) = sessions_of(model, HISTORIES[:1])[0]
    assert_close(
        score, sum(log_probs[0, ids.index(item), place].item() for place, item in enumerate(session)), terms=64
    )
    for length in (1, 2):
        ((shorter, _),) = sessions_of(model, HISTORIES[:1], session_length=length)[0]
        assert shorter == session[:length]


@pytest.mark.parametrize("sample", [False, True])
def test_neither_padding_nor_other_users_matter(sample):
    model = make_parallel()

    def generators():
        return [torch.Generator().manual_seed(place) for place in range(len(HISTORIES))]

    together = sessions_of(model, count=3, do_sample=sample, generator=generators() if sample else None)
    for history, answers, own in zip(HISTORIES, together, generators(), strict=True):
        (alone,) = sessions_of(model, [history], count=3, do_sample=sample, generator=[own] if sample else None)
        assert [session for session, _ in alone] == [session for session, _ in answers]
        assert_close([score for _, score in alone], [score for _, score in answers])


def test_sampling_follows_the_matrix_and_its_temperature():
    torch.manual_seed(0)
    log_probs = torch.tensor([[[0.6, 0.1], [0.3, 0.2], [0.1, 0.7]]]).log()
    users = 4000
    for temperature in (1.0, 0.5):
        noise = torch.empty(users, 1, 2, 3).exponential_().log_().neg_() * temperature
        many = log_probs.expand(users, -1, -1)
        first, second = read_sessions(many, torch.zeros(users, 3, 3), 1, noise=noise)[0][:, 0].unbind(1)
        wanted = (log_probs[0, :, 0] / temperature).softmax(0)
        assert_shares(first, wanted)
        after = (log_probs[0, :, 1] / temperature).softmax(0)
        after = torch.stack([wanted[i] * after[j] / (1 - after[i]) * (i != j) for i in range(3) for j in range(3)])
        assert_shares(first * 3 + second, after)


def assert_shares(drawn, wanted):
    """Within four standard errors of the wanted shares."""
    shares = torch.bincount(drawn, minlength=len(wanted)) / len(drawn)
    assert ((shares - wanted).abs() <= 4 * (wanted * (1 - wanted) / len(drawn)).sqrt() + 1e-9).all(), (shares, wanted)


def test_an_added_item_can_be_recommended():
    model = make_parallel(candidates=40, item_head={"num_items": 40, "score_codes": True})
    grown = CATALOGUE.add(["new"], [free_codes()])
    model.set_catalogue(grown)
    processor = OneRecProcessor.from_catalogue(grown)
    out = model.recommend(**processor([["m1"]]), session_decoding="parallel", session_length=1, allow=["new"])
    assert processor.batch_decode(out) == [["new"]]


def free_codes() -> list[int]:
    taken = set(map(tuple, CATALOGUE.codes.tolist()))
    return next([a, b, c] for a in range(4) for b in range(5) for c in range(6) if (a, b, c) not in taken)


def test_a_head_follows_the_model_to_other_precision():
    model = make_parallel()
    assert len(sessions_of(model.to(torch.bfloat16))[0][0][0]) == 4


# -- its file --------------------------------------------------------------------------------
def test_saved_only_where_it_was_trained_and_read_back(tmp_path):
    model = make_parallel()
    wanted = sessions_of(model, count=3)
    model.save_pretrained(tmp_path / "with")
    again = OneRecForConditionalGeneration.from_pretrained(tmp_path / "with")
    assert sessions_of(again, count=3) == wanted
    assert (again.parallel_decoder.candidates, again.parallel_decoder.alpha) == (12, 0.2)
    bare = make_model(CATALOGUE, session_length=4, item_head={"num_items": 40})
    bare.save_pretrained(tmp_path / "without")
    files = {path.name: path.read_bytes() for path in (tmp_path / "with").iterdir() if path.is_file()}
    head = files.pop(SESSION_HEAD_NAME)
    assert len(head) > 1000
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "without").iterdir() if path.is_file()}
    bare.save_pretrained(tmp_path / "with")  # of other weights: the former head goes
    assert not (tmp_path / "with" / SESSION_HEAD_NAME).exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "damaged or cut short"),
        (lambda path: rewritten(path, metadata={"version": "9"}), "no session head of version 1"),
        (lambda path: rewritten(path, metadata={"settings": "{}"}), "is damaged"),
        (lambda path: rewritten(path, settings={"width": 16}), "is damaged"),
        (lambda path: rewritten(path, settings={"candidates": 0}), "candidates=0"),
        (lambda path: rewritten(path, settings={"alpha": "x"}), "is damaged"),
        (lambda path: rewritten(path, settings={"positions": 10**9}), "cannot be"),
        (lambda path: ParallelDecoder(trained_head(width=16)).save(path), "another model's"),
    ],
)
def test_a_file_that_is_no_head_of_this_model_is_refused(tmp_path, change, reason):
    make_parallel().save_pretrained(tmp_path)
    change(tmp_path / SESSION_HEAD_NAME)
    with pytest.raises(ValueError, match=reason) as error:
        OneRecForConditionalGeneration.from_pretrained(tmp_path)
    assert SESSION_HEAD_NAME in str(error.value)


def rewritten(path, metadata=None, settings=None):
    head = ParallelDecoder.load(path)
    own = {**head.head.sizes, "candidates": head.candidates, "alpha": head.alpha, **(settings or {})}
    about = {"format": "onerec-session-head", "version": "1", "settings": json.dumps(own), **(metadata or {})}
    save_file(load_file(path), path, about)


# -- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"session_decoding": "nar"}, "session_decoding must be one of beam, parallel; got 'nar'"),
        ({"session_length": 5}, "session_length=5: the session head was trained for sessions of up to 4 items"),
        ({"diversity": 0.5}, "does not read diversity"),
        ({"distinct": False}, "does not read distinct=False"),
        ({"decoder_weight": 1.0}, "does not read decoder_weight"),
        ({"item_score_weight": 1.0}, "does not read item_score_weight"),
    ],
)
def test_requests_that_it_cannot_answer(options, reason):
    with pytest.raises(ValueError, match=reason):
        sessions_of(make_parallel(), **options)


def test_a_model_without_a_head_names_the_command():
    with pytest.raises(ValueError, match="train one with `onerec-hf session-head --model FOLDER`"):
        sessions_of(make_model(CATALOGUE, item_head={"num_items": 40}))


@pytest.mark.parametrize("sizes", [{"positions": 0}, {"width": 6}, {"item_width": 2.5}, {"heads": 0}])
def test_sizes_that_no_head_has(sizes):
    with pytest.raises(ValueError, match="cannot be"):
        SessionHead(**{"item_width": 8, "positions": 2, "width": 8, "heads": 4, **sizes})


def test_more_sessions_than_candidates_have_more_candidates():
    few, many = make_parallel(candidates=3), make_parallel(candidates=20)
    assert sessions_of(few, count=20) == sessions_of(many, count=20)
    assert all(sessions_of(few, count=20))


def test_an_adapter_does_not_bring_the_head_of_its_base_back(tmp_path):
    model = make_parallel()
    model.save_pretrained(tmp_path / "base")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    assert loaded.parallel_decoder is not None
    loaded.parallel_decoder = None
    loaded.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    loaded.save_pretrained(tmp_path / "adapter")
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").parallel_decoder is None
