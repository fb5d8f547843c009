"""Growing catalogues: what add, retire and restore keep and change, and what a trained model makes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from onerec_hf import ItemCatalogue, OneRecProcessor
from onerec_hf.data.collators import OneRecDataCollator
from onerec_hf.modeling.catalogue import CatalogueDiff
from tests.conftest import make_catalogue, make_model
from tests.rounding import close

SIZES = (3, 2, 4)
CODES = [tuple(code) for code in np.ndindex(*SIZES)]


def names(id_type):
    """Ids of unequal width; strings beyond ASCII."""
    return [7**i - 50 for i in range(12)] if id_type == "int" else [f"m{i}" + "é日"[: i % 3] * i for i in range(12)]


def state(catalogue):
    """What a catalogue says, as a dictionary in row order: id -> (code, active)."""
    codes = map(tuple, catalogue.codes.tolist())
    return dict(zip(catalogue.item_ids, zip(codes, catalogue.active.tolist(), strict=True), strict=True))


def assert_is(catalogue, wanted):
    """Every lookup of a catalogue against the dictionary it should equal."""
    assert state(catalogue) == wanted
    assert list(state(catalogue)) == list(wanted)  # the rows
    ids, codes = list(wanted), [code for code, _ in wanted.values()]
    assert catalogue.indices(ids[::-1]).tolist() == list(range(len(ids)))[::-1]
    assert catalogue.ids(np.arange(len(ids))) == ids
    assert catalogue.num_active == sum(active for _, active in wanted.values())
    row_of = {code: row for row, code in enumerate(codes)}
    assert catalogue.indices_of_codes(torch.tensor(CODES)).tolist() == [row_of.get(code, -1) for code in CODES]
    prefixes = np.array([code[:-1] for code in CODES[:: SIZES[-1]]])
    assert catalogue.free_last_codes(prefixes).tolist() == [
        [(*prefix, last) not in row_of for last in range(SIZES[-1])] for prefix in prefixes.tolist()
    ]
    active = sorted(code for code, active in wanted.values() if active)
    trie = catalogue.trie
    assert [codes[row] for row in trie.leaf_to_index.tolist()] == active
    assert trie.index_to_leaf.tolist() == [active.index(code) if code in active else -1 for code in codes]
    catalogue.verify()


@st.composite
def changes(draw):
    """A catalogue of some ids, and a list of changes: (what, ids, codes)."""
    ids = names(draw(st.sampled_from(["int", "str"])))
    count = draw(st.integers(1, 6))
    first = draw(st.permutations(CODES))[:count]
    some = st.lists(st.sampled_from(ids), max_size=4, unique=True)
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["add", "retire", "free", "restore"]),
                some,
                st.lists(st.sampled_from(CODES), min_size=4, max_size=4, unique=True),
            ),
            max_size=8,
        )
    )
    popularity = draw(st.sampled_from([None, list(range(count))]))
    return ItemCatalogue(ids[:count], first, SIZES, popularity), steps


def apply(catalogue, known, step):
    """The catalogue and the dictionary after one change; both unchanged where it must be refused."""
    what, ids, codes = step
    if what == "add":
        new = dict(zip(ids, ((code, True) for code in codes), strict=False))
        taken = {code for code, _ in known.values()}
        if set(new) & set(known) or taken & {code for code, _ in new.values()}:
            with pytest.raises(ValueError, match=r"in the catalogue|are taken"):
                catalogue.add(ids, codes[: len(ids)])
            return catalogue, known
        return catalogue.add(ids, codes[: len(ids)]), known | new
    change = {
        "retire": catalogue.retire,
        "free": lambda items: catalogue.retire(items, free_codes=True),
        "restore": catalogue.restore,
    }[what]
    if set(ids) - set(known):
        with pytest.raises(KeyError, match="not in the catalogue"):
            change(ids)
        return catalogue, known
    if what == "free":
        wanted = {item: entry for item, entry in known.items() if item not in ids}
    else:
        wanted = {item: (code, what == "restore" if item in ids else active) for item, (code, active) in known.items()}
    if wanted != known and not any(active for _, active in wanted.values()):
        with pytest.raises(ValueError, match="leave none"):
            change(ids)
        return catalogue, known
    return change(ids), wanted


@settings(max_examples=150, deadline=None)
@given(changes())
def test_any_sequence_of_changes(tmp_path_factory, case):
    catalogue, steps = case
    known, versions = state(catalogue), [catalogue]
    for step in steps:
        grown, wanted = apply(catalogue, known, step)
        assert_is(grown, wanted)
        assert state(catalogue) == known  # the old one stays as it was
        assert (grown is catalogue) == (wanted == known)
        assert grown.diff(catalogue).added == [item for item in known if item not in wanted]
        if grown is not catalogue:
            versions.append(grown)
        catalogue, known = grown, wanted
    hashes = [version.hash for version in versions]
    assert len(set(hashes)) == len(hashes)
    for number, version in enumerate(versions):
        assert (version.version, version.lineage) == (number, hashes[:number])
    path = tmp_path_factory.mktemp("catalogue") / "catalogue.safetensors"
    catalogue.save(path)
    loaded = ItemCatalogue.load(path)
    assert_is(loaded, known)
    assert (loaded.hash, loaded.version, loaded.lineage) == (hashes[-1], len(hashes) - 1, hashes[:-1])
    assert repr(loaded) == repr(catalogue)
    if catalogue.popularity is not None:
        assert loaded.popularity.tolist() == catalogue.popularity.tolist()
        assert len(loaded.popularity) == len(loaded)


@settings(max_examples=100, deadline=None)
@given(changes(), st.integers(0, 8))
def test_diff_equals_set_operations(case, split):
    catalogue, steps = case
    known, seen = state(catalogue), []
    for step in [("retire", [], CODES[:4]), *steps]:
        catalogue, known = apply(catalogue, known, step)
        seen.append((catalogue, known))
    (a, before), (b, after) = seen[min(split, len(seen) - 1)], seen[-1]
    both = [item for item in before if item in after]
    assert a.diff(b) == CatalogueDiff(
        added=[item for item in after if item not in before],
        removed=[item for item in before if item not in after],
        retired=[item for item in both if before[item][1] and not after[item][1]],
        restored=[item for item in both if after[item][1] and not before[item][1]],
        recoded=[item for item in both if before[item][0] != after[item][0]],
    )
    back = b.diff(a)
    assert (len(back.added), len(back.retired)) == (len(a.diff(b).removed), len(a.diff(b).restored))
    assert set(back.recoded) == set(a.diff(b).recoded)


def test_diff_of_other_codebooks_and_types():
    base = ItemCatalogue(["a", "b"], [[0], [1]], [2])
    assert str(base.diff(base)) == "0 added, 0 removed, 0 retired, 0 restored, 0 recoded"
    refitted = ItemCatalogue(["b", "c"], [[0, 1], [1, 0]], [2, 2])
    assert base.diff(refitted) == CatalogueDiff(["c"], ["a"], [], [], ["b"])
    with pytest.raises(TypeError, match="str ids, the other int ids"):
        base.diff(ItemCatalogue([1], [[0]], [2]))


def test_add_refuses():
    base = ItemCatalogue(["a", "b"], [[0, 0], [1, 0]], [2, 4]).retire(["b"])
    for ids, codes, words in [
        (["c", "a"], [[0, 1], [0, 2]], "1 of 2 item ids are in the catalogue already, e.g. 'a'"),
        (["b"], [[0, 1]], r"1 of 1 item ids are in the catalogue, retired, e.g. 'b'; bring them back with restore"),
        (["c"], [[0, 0]], r"semantic IDs are taken, e.g. \[0, 0\] of 'c' by 'a'; free_last_codes"),
        (["c"], [[1, 0]], "of 'c' by the retired 'b'"),
        (["c"], [[0, 4]], "level 1 run from 4 to 4; its codebook has 4"),
        (["c", "d"], [[0, 1], [0, 1]], "share a semantic ID.*'c' and 'd'"),
        (["c", "c"], [[0, 1], [0, 2]], "item ids repeat, e.g. 'c'"),
        (["c"], [[0]], "expected shape"),
        (["c"], [[0.5, 1]], "must be integers"),
    ]:
        with pytest.raises(ValueError, match=words):
            base.add(ids, codes)
    with pytest.raises(TypeError, match="of type str; got 3"):
        base.add([3], [[0, 1]])
    with pytest.raises(ValueError, match="keeps no popularity"):
        base.add(["c"], [[0, 1]], popularity=[3])
    counted = ItemCatalogue([1], [[0]], [3], popularity=[5])
    assert counted.add([2], [[1]]).add([3], [[2]], popularity=[4]).popularity.tolist() == [5, 0, 4]
    with pytest.raises(ValueError, match=r"prefixes|expected shape"):
        base.free_last_codes(np.zeros((1, 2), dtype=int))


def test_freed_codes_may_be_given_away():
    base = ItemCatalogue(["a", "b", "c"], [[0], [1], [2]], [3], embedding_fingerprint="old")
    assert not base.free_last_codes(np.zeros((1, 0), dtype=int)).any()
    freed = base.retire(["b"]).retire(["b"], free_codes=True)
    assert freed.indices(["b", "c"], unknown="mask").tolist() == [-1, 1]
    with pytest.raises(KeyError, match="not in the catalogue"):
        freed.restore(["b"])
    grown = freed.add(["d"], [[1]], embedding_fingerprint="new")
    assert grown.ids(grown.indices_of_codes(torch.tensor([[1]])).numpy()) == ["d"]
    assert (base.embedding_fingerprint, freed.embedding_fingerprint) == ("old", "old")
    assert grown.embedding_fingerprint == "new"
    assert str(base.diff(grown)) == "1 added, 1 removed, 0 retired, 0 restored, 0 recoded"
    assert repr(base.retire(["b"])) == "ItemCatalogue(3 items (1 retired), str ids, codebook_sizes=[3], version=1)"


def test_a_mapped_catalogue_grows_and_saves_over_its_own_file(tmp_path):
    path = tmp_path / "catalogue.safetensors"
    make_catalogue().save(path)
    catalogue = ItemCatalogue.load(path)
    for step in range(3):
        prefix = [1, step]
        free = catalogue.free_last_codes(np.array([prefix]))[0].argmax()
        catalogue = catalogue.add([f"new{step}"], [[*prefix, free]]).retire([f"m{step}"])
        before = state(catalogue)
        catalogue.save(path)
        assert state(catalogue) == before  # it still reads the file that it mapped
        catalogue = ItemCatalogue.load(path)
        assert state(catalogue) == before
    assert catalogue.version == 6
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# A generator trained on groups: a history lies in one group, and so does the next item. A group's items share their first two codes;
# one last code of each group is left for an item that comes later.
GROUPS = [(a, b) for a in range(3) for b in range(3)]
FIRST = ItemCatalogue(
    [f"g{group}-{last}" for group in range(9) for last in range(4) if last != group % 4],
    [(*GROUPS[group], last) for group in range(9) for last in range(4) if last != group % 4],
    (3, 3, 4),
)
NEW, GROUP = "new", 5
GROWN = FIRST.add([NEW], [(*GROUPS[GROUP], GROUP % 4)])
HISTORY = [[f"g{GROUP}-0", f"g{GROUP}-2"]]


@pytest.fixture(scope="module")
def trained():
    small = {"encoder_layers": 1, "decoder_layers": 1, "num_experts": 2, "session_length": 1}
    model = make_model(FIRST, initializer_range=0.05, **small).train()
    processor = OneRecProcessor.from_catalogue(FIRST)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng = np.random.default_rng(0)
    items = np.array(FIRST.item_ids).reshape(9, 3)
    for _ in range(50):
        groups = rng.integers(0, 9, 32)
        picked = items[groups[:, None], rng.integers(0, 3, (32, 3))].tolist()
        batch = processor([row[:2] for row in picked], sessions=[row[2:] for row in picked])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def ranked(model, catalogue, beams, **arguments):
    """{item: score} of the beams, best first."""
    processor = OneRecProcessor.from_catalogue(catalogue)
    out = model.recommend(
        **processor(HISTORY), num_beams=beams, num_return_sequences=beams, return_dict_in_generate=True, **arguments
    )
    sessions = processor.batch_decode(out)
    return {
        session[0]: score for session, score in zip(sessions, out.sequences_scores.tolist(), strict=True) if session
    }


@pytest.fixture
def model(trained):
    """The trained generator with its first catalogue."""
    trained.config.catalogue_hash = None
    trained.set_catalogue(FIRST)
    return trained


def test_a_new_item_is_recommended_at_once(model):
    before = ranked(model, FIRST, 27)
    assert NEW not in before
    assert list(before)[:3] == sorted(list(before)[:3], key=before.get, reverse=True)
    assert {item.split("-")[0] for item in list(before)[:3]} == {f"g{GROUP}"}  # it has learnt the groups
    model.set_catalogue(GROWN)
    after = ranked(model, GROWN, 28)
    assert set(after) == {*before, NEW}
    # Its group is the one of this history: it comes before every item of another.
    assert list(after).index(NEW) <= 3
    assert NEW in ranked(model, GROWN, 4)
    for item, score in before.items():  # log-probabilities over the whole vocabulary do not know the catalogue
        assert after[item] == close(score)


def test_a_retired_item_never_comes_again_but_is_read(model):
    retired = GROWN.retire([NEW, f"g{GROUP}-0"])
    model.set_catalogue(GROWN)
    before = ranked(model, GROWN, 28)
    model.set_catalogue(retired)
    after = ranked(model, retired, 28)  # HISTORY holds a retired item
    assert set(before) - set(after) == {NEW, f"g{GROUP}-0"}
    for item, score in after.items():
        assert before[item] == close(score)
    processor = OneRecProcessor.from_catalogue(retired)
    examples = [{"history": [NEW, f"g{GROUP}-0"], "session": [f"g{GROUP}-2"]}]
    wanted = OneRecDataCollator(OneRecProcessor.from_catalogue(GROWN), with_seen=True)(examples)
    found = OneRecDataCollator(processor, with_seen=True)(examples)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
    generated = model.generate(**processor(HISTORY), num_beams=28, num_return_sequences=26)
    assert {item for (item,) in processor.batch_decode(generated)} == set(after)
    model.set_catalogue(retired.restore([NEW]))
    assert set(ranked(model, retired, 28)) == {*after, NEW}


def test_excluding_a_retired_item_is_harmless(model):
    retired = GROWN.retire([NEW])
    model.set_catalogue(retired)
    plain = ranked(model, retired, 27)
    assert ranked(model, retired, 27, exclude=[[NEW]]) == plain
    assert ranked(model, retired, 27, exclude=torch.from_numpy(retired.indices([NEW]))[None]) == plain
    without = ranked(model, retired, 27, exclude=[[NEW, f"g{GROUP}-3"]])
    assert set(plain) - set(without) == {f"g{GROUP}-3"}
    inputs = OneRecProcessor.from_catalogue(retired)([[NEW, f"g{GROUP}-2"]])
    assert model.history_indices(inputs["input_ids"]).tolist() == [retired.indices([NEW, f"g{GROUP}-2"]).tolist()]
    seen = OneRecProcessor.from_catalogue(retired).batch_decode(
        model.recommend(**inputs, exclude_seen=True, num_beams=27, num_return_sequences=27)
    )
    assert {item for session in seen for item in session} == set(FIRST.item_ids) - {f"g{GROUP}-2"}


def test_which_catalogues_a_model_takes(model):
    model.set_catalogue(GROWN)
    assert model.config.catalogue_hash == GROWN.hash
    with pytest.raises(
        ValueError, match="older than the model's own: version 0 with 27 items, the model's is version 1"
    ):
        model.set_catalogue(FIRST)
    sibling = FIRST.add(["other"], [(*GROUPS[0], 0)])
    with pytest.raises(ValueError, match=r"trained with the catalogue .* load the catalogue that was saved"):
        model.set_catalogue(sibling)
    model.set_catalogue(GROWN.retire([NEW]).restore([NEW]))
    assert model.catalogue.version == 3


@pytest.mark.parametrize("saved_by", ["model", "processor"])
def test_a_grown_catalogue_travels_with_the_checkpoint(model, tmp_path, saved_by):
    grown = GROWN.retire([f"g{GROUP}-0"])
    processor = OneRecProcessor.from_catalogue(grown)
    if saved_by == "processor":  # the config still names the catalogue of the training: this one grew from it
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    else:
        model.set_catalogue(grown)
        processor.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    loaded, reader = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    for catalogue in (loaded.catalogue, reader.catalogue):
        assert (catalogue.hash, catalogue.version, catalogue.num_active) == (grown.hash, 2, 27)
    assert loaded.config.catalogue_hash == grown.hash
    model.set_catalogue(grown)
    assert torch.equal(
        loaded.recommend(**reader(HISTORY), num_beams=20, num_return_sequences=20),
        model.recommend(**processor(HISTORY), num_beams=20, num_return_sequences=20),
    )
    loaded.save_pretrained(tmp_path)  # over the file that both have mapped
    reader.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.catalogue.hash == loaded.catalogue.hash == loaded.config.catalogue_hash
    assert state(again.catalogue) == state(grown) == state(reader.catalogue)
