"""Item vectors beside semantic IDs: where they stand, what they learn, what they add to a ranking, and how they are saved."""

import json

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from onerec_hf import OneRecConfig, OneRecProcessor
from onerec_hf.cli.export import export_onnx
from onerec_hf.modeling.item_head import history_states
from onerec_hf.planning.parameters import count_parameters
from tests.conftest import make_catalogue, make_model
from tests.modeling.test_packing import PREFIXES, pack, windows_of
from tests.rounding import assert_close

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=8)
HISTORIES, SESSIONS = [["m1", "m2", "m3"], ["m5"]], [["m4", "m6"], ["m7"]]


def make(*, loss_weight=0.0, dropout=0.0, score_codes=False, **config):
    head = {"num_items": len(CATALOGUE), "loss_weight": loss_weight, "dropout": dropout, "score_codes": score_codes}
    return make_model(CATALOGUE, item_head=head, **config)


def output_vectors(encoder, tokens=None):
    return encoder.item_head.output_vectors(encoder.embed_tokens, tokens)


def weighted(model, weight):
    """The model with this `item_score_weight` as its default."""
    model.generation_config.item_score_weight = weight
    return model


def vector(model, item):
    """The vector of an item by its place among all codes in order."""
    codes = [tuple(code) for code in CATALOGUE.codes.tolist()]
    row = sorted(codes).index(codes[CATALOGUE.indices([item])[0]])
    return model.model.encoder.item_head.vectors.weight[row + 1]


def named_by(model, item):
    """What an item's score is the inner product with: its vector, and the embeddings of its codes where they count."""
    name = vector(model, item)
    if model.config.item_head.score_codes:
        tokens = torch.tensor(CATALOGUE.codes[CATALOGUE.indices([item])[0]]) + torch.tensor(model.config.level_offsets)
        name = name + model.get_input_embeddings().weight[tokens].sum(0)
    return name


def test_vectors_stand_at_the_separators():
    model = make()
    inputs = PROCESSOR(HISTORIES)
    added = model.model.encoder.item_head(inputs["input_ids"])
    for row, history in enumerate(HISTORIES):
        for place in range(3):
            there = vector(model, history[place]) if place < len(history) else torch.zeros(32)
            assert_close(added[row, 4 * place], there)
            assert not added[row, 4 * place + 1 : 4 * place + 4].any()
    without = make()
    without.model.encoder.item_head.vectors.weight.data.zero_()
    assert not torch.allclose(
        model(**PROCESSOR(HISTORIES, SESSIONS)).logits, without(**PROCESSOR(HISTORIES, SESSIONS)).logits
    )


def test_hidden_items_are_hidden_in_training_only():
    model = make(dropout=0.5)
    ids = PROCESSOR([[f"m{i}" for i in range(8)]] * 200)["input_ids"]
    embedding = model.model.encoder.item_head
    assert embedding(ids)[:, ::4].any(-1).all()
    share = embedding.train()(ids)[:, ::4].any(-1).float().mean()
    assert 0.45 < share < 0.55


@pytest.mark.parametrize(("parts", "with_codes"), [(None, False), (30, False), (30, True)])
def test_the_item_loss_is_a_cross_entropy_over_the_catalogue(parts, with_codes):
    batch = PROCESSOR(HISTORIES, SESSIONS)
    more = {} if parts is None else {"num_items_in_batch": torch.tensor(parts)}
    config = {"loss_weight": 0.7, "score_codes": with_codes}
    model, plain = make(**config), make(**config)
    plain.config.item_head.loss_weight = 0
    out = model(**batch, **more)
    names = [named_by(model, item) for item in CATALOGUE.item_ids]
    values = []
    for row, (history, session) in enumerate(zip(HISTORIES, SESSIONS, strict=True)):
        state = out.encoder_last_hidden_state[row, 4 * len(history) - 1]
        scores = torch.stack([state @ name for name in names])
        values.append(F.cross_entropy(scores, torch.tensor(CATALOGUE.indices(session[:1])[0])))
    tokens = 9 if parts is None else parts  # three items of three codes
    wanted = 0.7 * 3 * sum(values) / tokens
    assert_close(out.loss - plain(**batch, **more).loss, wanted, scale=float(out.loss.detach()))


def test_packed_prefixes_have_the_loss_of_their_windows():
    model = make(loss_weight=1.0, encoder_is_causal=True)
    together = model(**pack(PREFIXES, True), num_items_in_batch=torch.tensor(1.0)).loss
    windows = windows_of(PREFIXES)
    one_by_one = sum(
        model(**PROCESSOR([w["history"]], [w["session"]]), num_items_in_batch=torch.tensor(1.0)).loss for w in windows
    )
    assert_close(together, one_by_one)


def test_everything_learns():
    model = make(loss_weight=1.0).train()
    model(**PROCESSOR(HISTORIES, SESSIONS)).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    gradient = model.model.encoder.item_head.vectors.weight.grad
    assert not gradient[0].any()
    assert gradient[1:].any(-1).all()  # the softmax is over all items


@pytest.mark.parametrize("padding", ["right", "left"])
def test_states_where_histories_end(padding):
    states, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    mask = mask if padding == "right" else mask.flip(1)
    last = [1, 2] if padding == "right" else [3, 3]
    assert torch.equal(history_states(states, mask), states[[0, 1], last])
    assert torch.equal(history_states(states, None), states[:, -1])


def item_scores(model, inputs):
    """(users, items) log-probabilities of the next item, by the rows of `vectors` from 1."""
    history = model.model.encoder(**inputs).last_hidden_state
    states = history_states(history, inputs["attention_mask"])
    return (states @ output_vectors(model.model.encoder).T).log_softmax(-1)


@pytest.mark.parametrize(("session_length", "with_codes"), [(1, False), (2, False), (2, True)])
def test_guided_beams_are_the_best_sums(session_length, with_codes):
    model = make(loss_weight=1.0, score_codes=with_codes)
    inputs, many = PROCESSOR(HISTORIES), 40 if session_length == 1 else 40 * 39
    asked = {"num_beams": many, "num_return_sequences": many, "return_dict_in_generate": True}
    plain = model.recommend(**inputs, **asked, session_length=session_length)
    model.generation_config.item_score_weight = 0.5
    guided = model.recommend(**inputs, **asked, session_length=session_length)
    items = item_scores(model, inputs)
    for user in range(2):
        some = slice(many * user, many * user + many)
        rows = model.model.encoder.item_head.rows(plain.sequences[some, 1:4])
        sums = plain.sequences_scores[some] + 0.5 * items[user, rows - 1]
        order = sums.argsort(descending=True)
        assert_close(guided.sequences_scores[some], sums[order])
        assert set(map(tuple, guided.sequences[some].tolist())) == set(map(tuple, plain.sequences[some].tolist()))
        assert not torch.equal(order, torch.arange(many))


def test_a_few_beams_follow_the_item_scores_to_items_that_the_codes_alone_would_not_reach():
    model = make(loss_weight=1.0)
    inputs = PROCESSOR(HISTORIES)
    best = item_scores(model, inputs).argmax(-1)
    found = {}
    for weight in (0.0, 1000.0):
        model.generation_config.item_score_weight = weight
        sequences = model.recommend(**inputs, num_beams=1, session_length=1)
        found[weight] = model.model.encoder.item_head.rows(sequences[:, 1:]) - 1
    assert torch.equal(found[1000.0], best)
    assert not torch.equal(found[0.0], best)


@pytest.mark.parametrize("more", [{}, {"output_scores": True}], ids=["fast", "transformers"])
@pytest.mark.parametrize(("session_length", "score_codes"), [(1, True), (2, False)])
def test_generate_finds_the_same_guided_beams(session_length, score_codes, more):
    model, inputs = make(loss_weight=1.0, score_codes=score_codes, initializer_range=0.3), PROCESSOR(HISTORIES)
    exclude = torch.tensor([[4, 7], [9, -1]])
    beams = {"num_beams": 6, "num_return_sequences": 6, "exclude": exclude, "return_dict_in_generate": True}
    ours = model.recommend(**inputs, **beams, session_length=session_length, item_score_weight=2.0)
    length = {"max_new_tokens": 4 * session_length - 1, "length_penalty": 0.0}
    theirs = model.generate(**inputs, **beams, **length, **more, item_score_weight=2.0)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(ours.sequences_scores, theirs.sequences_scores)
    without = model.recommend(**inputs, **beams, session_length=session_length)
    assert not torch.equal(ours.sequences, without.sequences)
    model.generation_config.item_score_weight = 2.0  # the default of both
    assert torch.equal(model.recommend(**inputs, **beams, session_length=session_length).sequences, ours.sequences)
    assert torch.equal(model.generate(**inputs, **beams, **length, **more).sequences, ours.sequences)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_transformers_search_has_several_rows_per_user(num_beams):
    """A request without exclusions does not say how many users its rows belong to."""
    model, inputs = make(loss_weight=1.0, initializer_range=0.3), PROCESSOR(HISTORIES)
    rows = {"num_return_sequences": 3, "max_new_tokens": 3, "item_score_weight": 2.0}
    drawn = model.generate(**inputs, **rows, do_sample=True, num_beams=num_beams)
    assert (PROCESSOR.item_indices(drawn) >= 0).all()
    assert len(drawn) == 6
    beams = {**rows, "num_beams": 3}
    assert torch.equal(
        model.generate(**inputs, **beams, output_scores=True, return_dict_in_generate=True).sequences,
        model.generate(**inputs, **beams),
    )


def test_a_generation_config_is_completed_by_the_default_weight():
    model, inputs = weighted(make(loss_weight=1.0, initializer_range=0.3), 2.0), PROCESSOR(HISTORIES)
    options = {"num_beams": 6, "num_return_sequences": 6, "max_new_tokens": 3, "return_dict_in_generate": True}
    given, own = GenerationConfig(**options), GenerationConfig(**options, item_score_weight=0.0)
    wanted = model.generate(**inputs, **options)
    assert_close(model.generate(**inputs, generation_config=given).sequences_scores, wanted.sequences_scores)
    without = model.generate(**inputs, **options, item_score_weight=0.0)
    assert_close(model.generate(**inputs, generation_config=own).sequences_scores, without.sequences_scores)
    assert not torch.allclose(wanted.sequences_scores, without.sequences_scores)


def test_embedded_histories_have_item_scores():
    model, inputs = weighted(make(loss_weight=1.0, initializer_range=0.3), 2.0), PROCESSOR(HISTORIES)
    encoder, ids = model.get_encoder(), inputs["input_ids"]
    embedded = {"inputs_embeds": encoder.embed_tokens(ids) + encoder.item_head(ids)}
    options = {"num_beams": 6, "max_new_tokens": 3, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(model.generate(**embedded, **options), model.generate(ids, **options))


@pytest.mark.parametrize("sample", ["recommend", "generate"])
def test_sampled_items_follow_decoder_and_item_scores(sample):
    """The shares of first codes are those of the product of decoder and item scores, each code normalised over the legal ones."""
    model, inputs, weight = make(loss_weight=1.0, score_codes=True), PROCESSOR(HISTORIES[:1]), 0.7
    trie = CATALOGUE.trie
    state = history_states(model.model.encoder(**inputs).last_hidden_state, inputs["attention_mask"])
    tokens = torch.tensor(CATALOGUE.codes[trie.leaf_to_index].tolist()) + torch.tensor(model.config.level_offsets)
    items = (state @ output_vectors(model.model.encoder, tokens).T)[0].log_softmax(-1)
    first = torch.tensor(CATALOGUE.codes[trie.leaf_to_index][:, 0].tolist())
    mass = torch.stack([items[first == code].logsumexp(0) for code in trie.codes[0]])
    logits = model(**inputs, decoder_input_ids=torch.tensor([[1]])).logits[0, 0, trie.codes[0] + 4]
    wanted = (logits + weight * mass).softmax(-1)
    draws, torch_seed = 4000, torch.manual_seed(3)
    many = {name: value.expand(draws, -1) for name, value in inputs.items()}
    if sample == "recommend":
        found = model.recommend(
            **many, do_sample=True, num_beams=1, session_length=1, item_score_weight=weight, generator=torch_seed
        )
    else:
        found = model.generate(**many, do_sample=True, max_new_tokens=3, item_score_weight=weight, top_k=0)
    shares = torch.bincount(found[:, 1] - 4, minlength=4)[trie.codes[0]] / draws
    error = (wanted * (1 - wanted) / draws).sqrt()
    assert ((shares - wanted).abs() < 4.5 * error).all(), (shares, wanted)
    assert ((shares - logits.softmax(-1)).abs() > 4.5 * error).any()  # the decoder alone is another distribution


def test_sampling_scores_are_of_the_distribution_that_was_sampled_from():
    model, inputs = make(loss_weight=1.0), PROCESSOR(HISTORIES)
    beams = {"num_beams": 40, "num_return_sequences": 40, "session_length": 1, "return_dict_in_generate": True}
    out = model.recommend(**inputs, **beams, do_sample=True, item_score_weight=1.5)
    total = out.sampling_scores.view(2, 40).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2), rtol=1e-4, atol=0)
    best = model.recommend(**inputs, **beams, item_score_weight=1.5)
    for user in range(2):  # the same sessions have the same scores, in whichever order they are found
        pairs = [
            {tuple(s): float(v) for s, v in zip(o.sequences.tolist(), o.sequences_scores, strict=True)}
            for o in (
                type(out)(
                    sequences=o.sequences[40 * user :][:40], sequences_scores=o.sequences_scores[40 * user :][:40]
                )
                for o in (out, best)
            )
        ]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-4)


def test_a_model_without_item_scores_refuses_a_weight():
    inputs = PROCESSOR(HISTORIES)
    for model in (make_model(CATALOGUE), make()):
        for call in (model.recommend, model.generate):
            with pytest.raises(ValueError, match=r"item_score_weight=1.0 needs item scores"):
                call(**inputs, item_score_weight=1.0)
    with pytest.raises(ValueError, match="must not be negative"):
        make(loss_weight=1.0).recommend(**inputs, item_score_weight=-1.0)
    with pytest.raises(ValueError, match="needs constrained generation"):
        make(loss_weight=1.0).generate(**inputs, item_score_weight=1.0, constrained=False)


def test_the_item_loss_needs_the_history():
    model, batch = make(loss_weight=1.0), PROCESSOR(HISTORIES, SESSIONS)
    states = model.model.encoder(batch["input_ids"], batch["attention_mask"])
    with pytest.raises(ValueError, match="pass input_ids without encoder_outputs"):
        model(encoder_outputs=states, attention_mask=batch["attention_mask"], labels=batch["labels"])


def test_what_a_user_must_not_get_guides_no_beam():
    """All items but one under a first code are excluded: the one that is left has only its own score to lead there."""
    model = weighted(make(loss_weight=1.0), 1000.0)
    inputs, first = PROCESSOR(HISTORIES), torch.tensor(CATALOGUE.codes[:, 0])
    items = item_scores(model, inputs)
    for user in range(2):
        names = model.model.encoder.item_head.rows(torch.tensor(CATALOGUE.codes) + torch.tensor([4, 8, 13])) - 1
        scores = items[user, names]
        code = first[scores.argmax()]
        below = (first == code).nonzero()[:, 0]
        worst = below[scores[below].argmin()]
        exclude = torch.stack([row for row in below if row != worst])[None].expand(2, -1)
        others = (first != code).nonzero()[:, 0]
        assert scores[others].max() > scores[worst]
        sequences = model.recommend(**inputs, exclude=exclude, num_beams=1, session_length=1)
        row = int(PROCESSOR.item_indices(sequences)[user])
        mass = {int(c): scores[(first == c)].logsumexp(0) for c in first.unique() if c != code}
        likeliest = max({**mass, int(code): scores[worst]}.items(), key=lambda each: each[1])[0]
        assert int(first[row]) == likeliest


def test_the_encoder_scales_what_it_embeds():
    model, plain = make(encoder_scales_embeddings=True), make()
    plain.load_state_dict(model.state_dict())
    batch = PROCESSOR(HISTORIES)
    embeds = plain.model.encoder.embed_tokens(batch["input_ids"]) + plain.model.encoder.item_head(batch["input_ids"])
    wanted = plain.model.encoder(inputs_embeds=embeds * 32**0.5, attention_mask=batch["attention_mask"])
    assert_close(model.model.encoder(**batch).last_hidden_state, wanted.last_hidden_state)


def test_a_saved_model_finds_its_vectors(tmp_path):
    model = weighted(make(loss_weight=1.0), 1.0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    batch = PROCESSOR(HISTORIES, SESSIONS)
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    assert torch.equal(loaded.recommend(batch["input_ids"]), model.recommend(batch["input_ids"]))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")  # PEFT's advice to untie what is adapted
@pytest.mark.parametrize(
    "adapter",
    [{"target_modules": r".*\.encoder\.(item_head\.vectors|embed_tokens)"}, {"modules_to_save": ["vectors"]}],
)
def test_items_are_named_by_what_adapters_make_of_their_vectors(adapter):
    from peft import LoraConfig, get_peft_model

    model = make(loss_weight=1.0, score_codes=True)
    untouched = output_vectors(model.model.encoder).detach().clone()
    adapted = get_peft_model(model, LoraConfig(r=2, **({"target_modules": ["q_proj"]} | adapter)))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and ("lora_embedding" in name or "modules_to_save" in name):
            torch.nn.init.normal_(weight)
    tokens = model.model.encoder.item_head.tokens()
    found, some = output_vectors(model.model.encoder), output_vectors(model.model.encoder, tokens[2:5])
    assert found.requires_grad
    assert not torch.allclose(found, untouched)
    merged = adapted.merge_and_unload().model.encoder
    assert_close(found, output_vectors(merged))
    assert_close(some, output_vectors(merged)[2:5])


@pytest.mark.parametrize("with_codes", [False, True])
def test_items_that_come_later_are_read_by_their_codes(with_codes):
    model = weighted(make(loss_weight=1.0, score_codes=with_codes), 1.0)
    taken = {tuple(code) for code in CATALOGUE.codes.tolist()}
    free = next((a, b, c) for a in range(4) for b in range(5) for c in range(6) if (a, b, c) not in taken)
    grown = CATALOGUE.add(["new"], codes=[list(free)]).retire(["m39"])
    model.set_catalogue(grown)
    ids = OneRecProcessor.from_catalogue(grown)([["new", "m1"]])["input_ids"]
    added = model.model.encoder.item_head(ids)[0]
    assert not added[0].any()
    assert_close(added[4], vector(model, "m1"))
    model.generation_config.item_score_weight = 1e6  # the items' scores alone decide
    everything = model.recommend(ids, num_beams=40, num_return_sequences=40, session_length=1)
    rows = OneRecProcessor.from_catalogue(grown).item_indices(everything)
    tokens = torch.tensor(grown.codes) + torch.tensor(model.config.level_offsets)
    scores = (
        model.get_encoder()(ids).last_hidden_state[0, -1] @ output_vectors(model.get_encoder(), tokens).T
    ).tolist()
    new = int(grown.indices(["new"])[0])
    others = sorted(
        (row for row in range(len(grown)) if row not in (new, grown.indices(["m39"])[0])), key=lambda row: -scores[row]
    )
    if with_codes:
        wanted = sorted([*others, new], key=lambda row: -scores[row])
        assert rows.flatten().tolist() == wanted
    else:
        assert sorted(rows.flatten().tolist()[-2:]) == sorted([others[-1], new])


def test_whoever_gets_freed_codes_does_not_get_the_vector(tmp_path):
    before = CATALOGUE.codes[CATALOGUE.indices(["m4", "m5", "m6"])].tolist()
    freed = CATALOGUE.retire(["m4", "m5"], free_codes=True)
    grown = freed.add(["new", "m5"], codes=before[:2])  # the codes of two that went, one of which came back
    again = grown.retire(["m6"], free_codes=True).add(["newer"], codes=before[2:])
    for steps in ([freed, grown, again], [grown, again], [again]):
        model = weighted(make(loss_weight=1.0), 1.0)
        known = {item: vector(model, item).clone() for item in CATALOGUE.item_ids}
        for catalogue in steps:
            model.set_catalogue(catalogue)
        model.save_pretrained(tmp_path)
        for one in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path)):
            for item in again.item_ids:
                ids = OneRecProcessor.from_catalogue(again)([[item]])["input_ids"]
                added = one.model.encoder.item_head(ids)[0, 0]
                if item in ("new", "newer") or (item == "m5" and freed in steps):
                    assert not added.any(), item
                else:
                    assert_close(added, known[item])


def test_the_plan_counts_them():
    model = make()
    assert count_parameters(model.config) == model.num_parameters()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"item_head": {"num_items": 0}}, "num_items=0"),
        ({"item_head": {}}, "item_head needs num_items"),
        (
            {"item_head": {"num_items": 40, "loss_weight": 0.0, "score_codes": True}},
            "score_codes=True needs a loss_weight",
        ),
        ({"item_head": {"num_items": 40, "loss_weight": -1.0}}, "loss_weight=-1.0 must not be negative"),
        ({"item_head": {"num_items": 40, "dropout": 1.0}}, "dropout=1.0 must lie between"),
        ({"item_head": {"num_items": 40}, "codebook_sizes": [2**21] * 3, "vocab_size": 2**23}, "63 bits"),
        ({"num_item_embeddings": 40}, "num_item_embeddings is no option of OneRecConfig any more: use item_head"),
        ({"session_loss_weights": [1.0]}, "use OneRecTrainingArguments"),
    ],
)
def test_settings_that_do_not_fit(config, match):
    with pytest.raises(Exception, match=match):
        OneRecConfig(**config)


def test_another_number_of_items():
    with pytest.raises(ValueError, match=r"num_items=39, the catalogue 40 items"):
        make_model(CATALOGUE, item_head={"num_items": 39})


def test_a_folder_of_format_version_1_loads_as_it_was(tmp_path):
    """Names of options and weights, and the score weight, which was an option of the model then."""
    model = weighted(make(loss_weight=0.5, dropout=0.3, score_codes=True), 2.0)
    model.save_pretrained(tmp_path, include_code=False)
    config = json.loads((tmp_path / "config.json").read_text())
    head = config.pop("item_head")
    config |= {"format_version": 1, "num_item_embeddings": 40, "item_embedding_dropout": 0.3, "item_loss_weight": 0.5}
    config |= {"item_scores_with_codes": True, "item_score_weight": 2.0, "session_loss_weights": [3.0, 1.0]}
    config |= {"router_bias_update_rate": 0.01}
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation.pop("item_score_weight") == 2.0
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("item_head", "item_embedding"): value for name, value in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = PROCESSOR(HISTORIES, SESSIONS)
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    assert torch.equal(loaded.recommend(batch["input_ids"]), model.recommend(batch["input_ids"]))
    assert (loaded.config.item_head.dropout, loaded.config.item_head.num_items) == (0.3, head["num_items"])
    loaded.save_pretrained(tmp_path / "again", include_code=False)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["format_version"] == 2
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.recommend(batch["input_ids"]), model.recommend(batch["input_ids"]))


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [False, True])
def test_item_scores_are_exported(tmp_path, pooled):
    """The encoder's graph has the item scores beside the states, in the catalogue's order; encoder variants together."""
    variants = {"encoder_pools_items": pooled, "encoder_attention": "pointwise", "encoder_scales_embeddings": True}
    model = make(loss_weight=1.0, score_codes=True, **variants)
    grown = CATALOGUE.retire(["m39"])
    model.set_catalogue(grown)
    processor = OneRecProcessor.from_catalogue(grown, max_history=8)
    export_onnx(model, processor, tmp_path)
    batch = processor(HISTORIES)
    inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    _states, scores = onnxruntime.InferenceSession(tmp_path / "encoder.onnx").run(None, inputs)
    assert scores.shape == (2, 40)
    assert (scores[:, 39] == float("-inf")).all()
    everything = {"session_length": 1, "num_beams": 39, "num_return_sequences": 39, "item_score_weight": 1e6}
    rows = processor.item_indices(model.recommend(**batch, **everything)).view(2, 39)
    assert torch.equal(torch.tensor(scores).argsort(descending=True)[:, :39], rows)
