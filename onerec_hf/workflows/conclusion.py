"""The end of a training: a small SASRec beside the other baselines, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onerec_hf.modeling.files import short
from onerec_hf.workflows.advice import what_to_try, with_features
from onerec_hf.workflows.artefact import catalogue_of
from onerec_hf.workflows.distributed import num_ranks
from onerec_hf.workflows.evaluation import Ranking
from onerec_hf.workflows.small_sasrec import fit_small_sasrec
from onerec_hf.workflows.verdict import Verdict

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments
    from onerec_hf.workflows.dataset import RecommendationDataset
    from onerec_hf.workflows.pace import TimeLimit


def verdict_on(
    ranking: Ranking,
    ks: Sequence[int],
    name: str = "onerec",
    notes: Sequence[str] = (),
    advice: Sequence = (),
    always: Sequence = (),
) -> Verdict | None:
    """
    The verdict on a ranking; None without baselines.

    Args:
        ks: the cut-offs of the ranking; NDCG@10 is compared, or that at the largest.
        name: the model.
        notes, advice, always: as in [`Verdict.on`].
    """
    from onerec_hf.evaluation import ndcg_at_k

    if len(ranking.ranked) < 2:
        return None
    k = 10 if 10 in ks else max(ks)
    gains = {
        each: np.asarray(ndcg_at_k(ranked, ranking.relevant, k, per_row=True))
        for each, ranked in ranking.ranked.items()
    }
    return Verdict.on(gains, name, f"NDCG@{k}", notes, advice, always)


def conclude(
    trainer: OneRecTrainer,
    data: RecommendationDataset,
    ranking: Ranking,
    folder: Path,
    *,
    sasrec: TimeLimit | None = None,
    command: str | None = None,
    given: Mapping[str, Any] | None = None,
    fixed_sizes: bool = False,
    unread: str = "",
) -> Verdict | None:
    """
    The verdict on a training, on the first rank; None without baselines.

    Args:
        ranking: of the test users by model and baselines; a SASRec is added to it.
        sasrec: time of a small SASRec, from `Pace.of_sasrec`; None trains none.
        command, given, fixed_sizes: as in [`what_to_try`].
        unread: what features would add, from [`~onerec_hf.workflows.unread.unread`].
    """
    if len(ranking.ranked) < 2:
        return None
    args, notes = cast("OneRecTrainingArguments", trainer.args), []
    ks = tuple(args.eval_top_k)
    if sasrec is not None:
        notes.append(_add_sasrec(trainer, data, ranking, sasrec))
    features = with_features(unread, folder, command, given) if unread else ()
    advice = what_to_try(trainer, folder, command, given, fixed_sizes)
    return verdict_on(ranking, ks, notes=notes, advice=advice, always=features)


def _add_sasrec(trainer: OneRecTrainer, data: RecommendationDataset, ranking: Ranking, time: TimeLimit) -> str:
    """Ranks with a small SASRec too; returns a sentence about it."""
    args = cast("OneRecTrainingArguments", trainer.args)
    catalogue = catalogue_of(cast("OneRecProcessor", trainer.processing_class))
    if num_ranks() > 1:
        return "No SASRec is beside it, which is trained by a single process."
    try:
        sasrec = fit_small_sasrec(data, catalogue, args, *time)
    except (FloatingPointError, MemoryError) as error:
        return f"No SASRec is beside it: its training failed ({short(error)})."
    ks, users = tuple(args.eval_top_k), data.test.select(np.flatnonzero(ranking.kept))
    ranked = sasrec.model.rank_examples(users, max(ks), args.eval_exclude_seen, active=catalogue.active)
    ranking.add("sasrec", ranked, ks, catalogue.num_active)
    return sasrec.note
