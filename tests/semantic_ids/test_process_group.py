"""Semantic IDs fitted by several ranks: the codes of one process, exact balance, no id twice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.semantic_ids import BalancedKMeans, Ranks, ResidualQuantizer, add_digit, fit_semantic_ids, make_unique
from onerec_hf.semantic_ids.balanced_assignment import accepted, accepted_over_ranks
from onerec_hf.semantic_ids.embeddings import fingerprint_of
from onerec_hf.semantic_ids.process_group import SINGLE_PROCESS, SingleProcess
from onerec_hf.semantic_ids.unique_codes import add_digit_over, make_unique_over
from tests.ranks import on_ranks
from tests.rounding import assert_close


def clustered(count, dim, groups=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(groups, dim, generator=generator)
    weights = torch.rand(groups, generator=generator) ** 2 + 1e-3
    which = torch.multinomial(weights, count, replacement=True, generator=generator)
    return centers[which] + 0.5 * torch.randn(count, dim, generator=generator)


def uneven(count, ranks):
    """Rank 0 holds few rows and the last one most."""
    bounds = [0, *(count * (rank + 1) ** 2 // ranks.size**2 for rank in range(ranks.size))]
    return slice(bounds[ranks.rank], bounds[ranks.rank + 1])


def fit_kmeans(points, clusters, settings):
    ranks = Ranks()
    kmeans = BalancedKMeans(clusters, **settings).fit(points[uneven(len(points), ranks)], ranks)
    return kmeans.labels_.numpy(), kmeans.cluster_centers_.numpy(), kmeans.inertia_, kmeans.n_iter_


@pytest.mark.parametrize(
    ("size", "count", "clusters", "options"),
    [
        (2, 3001, 24, {}),
        (3, 3001, 24, {"init": "k-means++", "max_points_per_cluster": 40}),
        (3, 401, 7, {}),  # the solver's size
        (2, 5, 5, {}),
    ],
)
def test_kmeans_is_that_of_one_process(size, count, clusters, options):
    points = clustered(count, 12)
    alone = BalancedKMeans(clusters, **options).fit(points)
    found = on_ranks(size, fit_kmeans, points, clusters, options)
    labels = np.concatenate([labels for labels, *_ in found])
    assert np.array_equal(labels, alone.labels_.numpy())
    for _, centers, inertia, iterations in found:
        assert np.array_equal(centers, found[0][1])
        assert_close(centers, alone.cluster_centers_)
        assert inertia == pytest.approx(alone.inertia_, rel=1e-6)
        assert iterations == alone.n_iter_


def test_copies_of_an_item_are_spread_evenly():
    """5,000 equal points, more than the solver takes, on both sides of the ranks' border: roundings decide who goes where."""
    points = torch.cat([torch.ones(5000, 4), clustered(1000, 4)])
    found = on_ranks(2, fit_kmeans, points, 50, {"max_iter": 4})
    labels = np.concatenate([labels for labels, *_ in found])
    assert np.bincount(labels, minlength=50).tolist() == [120] * 50
    assert found[0][2] == found[1][2] == pytest.approx(BalancedKMeans(50, max_iter=4).fit(points).inertia_, rel=1e-2)


def stays_over_ranks(cases):
    ranks, answers = Ranks(), []
    for choice, regret, room, bounds in cases:
        mine = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
        stays, left = accepted_over_ranks(ranks, choice[mine], regret[mine], room)
        answers.append((stays.numpy(), left.numpy()))
    return answers


def test_thresholds_of_counts_choose_whom_sorting_would_choose():
    """Many ties, zeros, infinite regrets, centroids without room, that nobody wants, with room for all; ranks without points."""
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(60):
        count, clusters = int(rng.integers(0, 40)), int(rng.integers(1, 6))
        kinds = [rng.choice([0.0, 1.0, 2.5, np.inf], count), rng.random(count) * 10.0 ** rng.integers(-30, 30, count)]
        regret = torch.tensor(kinds[rng.integers(2)], dtype=torch.float32)
        choice = torch.from_numpy(rng.integers(0, clusters, count))
        room = torch.from_numpy(rng.integers(0, 12, clusters))
        bounds = [0, *np.sort(rng.integers(0, count + 1, 2)).tolist(), count]
        cases.append((choice, regret, room, bounds))
    found = on_ranks(3, stays_over_ranks, cases)
    for number, (choice, regret, room, _) in enumerate(cases):
        wanted = accepted(choice, regret, room)
        theirs = np.concatenate([answers[number][0] for answers in found])
        assert np.array_equal(theirs, wanted.numpy()), cases[number]
        for answers in found:
            assert answers[number][1].tolist() == (room - choice[wanted].bincount(minlength=len(room))).tolist()


def unique_over_ranks(codes, residuals, codebook):
    ranks = Ranks()
    mine = uneven(len(codes), ranks)
    unique = make_unique_over(ranks, codes[mine], residuals[mine], codebook)
    return unique.codes.numpy(), unique.moved.numpy(), add_digit_over(ranks, codes[mine]).numpy()


@pytest.mark.parametrize("size", [2, 3])
def test_prefixes_whose_items_lie_on_several_ranks_are_settled_as_one_process_does(size):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (150, 3), generator=generator)
    codes[:, 2] = torch.randint(0, 20, (150,), generator=generator)
    residuals, codebook = torch.randn(150, 5, generator=generator), torch.randn(20, 5, generator=generator)
    alone = make_unique(codes, residuals, codebook)
    assert alone.moved.any()
    found = on_ranks(size, unique_over_ranks, codes, residuals, codebook)
    assert np.array_equal(np.concatenate([part[0] for part in found]), alone.codes.numpy())
    assert np.array_equal(np.concatenate([part[1] for part in found]), alone.moved.numpy())
    assert np.array_equal(np.concatenate([part[2] for part in found]), add_digit(codes).numpy())


def fit_ids(ids, vectors, sizes, settings, split):
    ranks = Ranks()
    mine = split(len(vectors), ranks)
    popularity = np.arange(len(vectors))[mine]
    fitted = fit_semantic_ids(ids[mine], vectors[mine], sizes, popularity=popularity, ranks=ranks, **settings)
    return (
        fitted.catalogue.hash,
        fitted.catalogue.embedding_fingerprint,
        fitted.catalogue.codes[:],
        fitted.report.as_dict(),
        [codebook.numpy() for codebook in fitted.quantizer.codebooks_],
    )


def even(count, ranks):
    return ranks.share(count)


def one_has_all(count, ranks):
    """A rank without items."""
    return slice(0, 0) if ranks.rank else slice(0, count)


@pytest.mark.parametrize(
    ("size", "split", "options"),
    [
        (2, even, {}),
        (3, uneven, {"seed": 4}),
        (2, one_has_all, {}),
        (3, even, {"on_collision": "extra-digit"}),
        (3, uneven, {"on_collision": "popularity-rank"}),
    ],
)
def test_catalogue_and_report_are_those_of_one_process(size, split, options):
    vectors = clustered(2000, 16, seed=1).numpy()
    ids = np.array([f"item-{i}" for i in range(2000)])
    sizes = [24, 20, 64]
    alone = fit_semantic_ids(ids, vectors, sizes, popularity=np.arange(2000), **options)
    found = on_ranks(size, fit_ids, ids, vectors, sizes, options, split)
    for digest, fingerprint, codes, report, codebooks in found:
        assert np.array_equal(codes, found[0][2])
        same = codes == alone.catalogue.codes
        assert same[:, 0].mean() > 0.99
        if not same.all():
            # Kernels that add in another order decide about an item between two codes, and so about the levels below it. The balance is
            # exact all the same (at the last level it gives way to distinct IDs), and the error is that of one process.
            assert report["cluster_sizes"][:-1] == alone.report.cluster_sizes[:-1]
            assert report["residual_energy"] == pytest.approx(alone.report.residual_energy, rel=2e-2)
            continue
        assert (digest, fingerprint) == (alone.catalogue.hash, alone.catalogue.embedding_fingerprint)
        for name, value in alone.report.as_dict().items():
            wanted = pytest.approx(value, rel=1e-5) if name in ("residual_energy", "reconstruction_error") else value
            if name not in ("cluster_sizes", "neighbour_agreement", "entropy"):
                assert report[name] == wanted, name
        assert report["cluster_sizes"] == alone.report.cluster_sizes
        assert report["neighbour_agreement"] == pytest.approx(alone.report.neighbour_agreement, abs=1e-3)
        for theirs, mine in zip(codebooks, alone.quantizer.codebooks_, strict=True):
            assert_close(theirs, mine)


def fit_large(vectors, sizes):
    ranks = Ranks()
    quantizer = ResidualQuantizer(sizes).fit(vectors[ranks.share(len(vectors))], ranks)
    residual = vectors[ranks.share(len(vectors))]
    return quantizer.codes_.numpy(), float(quantizer.reconstruction_error(residual, quantizer.codes_, ranks))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_many_items_keep_balance_and_error(size):
    """At forty thousand items roundings decide about some; the balance is exact and the error the same."""
    vectors, sizes = clustered(40_001, 32, 500), [64, 64, 64]
    alone = ResidualQuantizer(sizes).fit(vectors)
    error = float(alone.reconstruction_error(vectors, alone.codes_))
    found = on_ranks(size, fit_large, vectors, sizes)
    codes = np.concatenate([part[0] for part in found])
    for column, count in zip(codes.T, sizes, strict=True):
        counts = np.bincount(column, minlength=count)
        assert counts.max() - counts.min() <= 1
    assert found[0][1] == pytest.approx(error, rel=1e-3)


BAD = np.where(np.arange(60)[:, None] == 50, np.nan, clustered(60, 4).numpy())


@pytest.mark.parametrize(
    ("vectors", "sizes", "options", "words"),
    [
        (BAD, [4, 4, 9], {}, r"1 of 30 items have NaN or infinite embeddings \(first: item 50\)"),
        (clustered(60, 4).numpy(), [64, 4], {}, "fewer items than codes: 60 items cannot fill 64"),
        (clustered(60, 4).numpy(), [2, 2, 2], {}, "items share the prefix"),
        (clustered(60, 4).numpy(), [4, 4], {"method": "rq-vae"}, "'rq-vae' does not support distributed fitting"),
        (clustered(60, 4).numpy(), [4, 4], {"method": "kmeans"}, 'use clustering "balanced" in distributed'),
        (clustered(60, 4).numpy(), [4, 4], {"assignment": "greedy"}, 'use assignment="optimal" in distributed'),
    ],
)
def test_every_rank_refuses_what_one_cannot_use(vectors, sizes, options, words):
    for error in on_ranks(2, fit_ids, np.arange(60), vectors, sizes, options, even):
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=words):
            raise error


def stream(rows):
    ranks = Ranks()
    parts = [part.numpy() for part in ranks.in_order(rows[uneven(len(rows), ranks)], 7)]
    shape = tuple(rows.shape)
    return parts, fingerprint_of(parts, np.dtype(np.float32), shape, "r")


def test_rows_come_to_rank_0_in_their_order():
    rows = torch.arange(80, dtype=torch.float32).view(40, 2)
    found = on_ranks(3, stream, rows)
    assert np.array_equal(np.concatenate(found[0][0]), rows.numpy())
    assert max(len(part) for part in found[0][0]) <= 7
    assert found[1][0] == found[2][0] == []
    assert found[0][1] == fingerprint_of([rows.numpy()], np.dtype(np.float32), (40, 2), "r")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50), st.integers(1, 7))
def test_shares_cover_all_rows_once(count, size):
    rows = list(range(count))
    shares = []
    for rank in range(size):
        ranks = SingleProcess()
        ranks.rank, ranks.size = rank, size
        shares.append(rows[ranks.share(count)])
    assert [row for share in shares for row in share] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert SINGLE_PROCESS.share(count) == slice(0, count)


def test_ranks_need_torch_distributed():
    with pytest.raises(ValueError, match=r"start the program with torchrun"):
        Ranks()
