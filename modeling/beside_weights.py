"""What a generator has beside its weights: the item catalogue, a session head where one was trained, and a weight that old configs held."""

from __future__ import annotations

from typing import Any

from .catalogue import CATALOGUE_NAME, ItemCatalogue
from .files import find_file, read_json_object
from .session_head import SESSION_HEAD_NAME, ParallelDecoder


class BesideWeights:
    """Mixin of generators: writes and reads these files for [`HubModel`]."""

    _files_beside = (CATALOGUE_NAME, SESSION_HEAD_NAME)
    _former_beside = (SESSION_HEAD_NAME,)
    catalogue: ItemCatalogue | None = None
    #: Decodes sessions in one pass, where a session head was trained ([`~onerec_hf.trainers.fit_session_head`]).
    parallel_decoder: ParallelDecoder | None = None

    def _save_beside(self, folder) -> None:
        if self.catalogue is not None:
            self.catalogue.save(f"{folder}/{CATALOGUE_NAME}")
        if self.parallel_decoder is not None:
            self.parallel_decoder.save(f"{folder}/{SESSION_HEAD_NAME}")

    def _load_beside(self, repo, **kwargs) -> None:
        model: Any = self
        if (catalogue := ItemCatalogue.find(repo, **kwargs)) is not None:
            model.set_catalogue(catalogue)
        if (parallel := ParallelDecoder.find(repo, **kwargs)) is not None:
            width = parallel.head.sizes["item_width"]
            if width != model.config.hidden_size:
                raise ValueError(
                    f"{SESSION_HEAD_NAME} is another model's: it reads states of {width}, this model's have {model.config.hidden_size}. Remove it"
                )
        # That of the last place, or none: an adapter changes the weights that the base's was trained for.
        self.parallel_decoder = parallel
        if weight := former_item_score_weight(repo, **kwargs):
            model.generation_config.item_score_weight = weight


def former_item_score_weight(repo, **kwargs) -> float | None:
    """The `item_score_weight` of a config.json of format version 1, where it was an option of the model; None in later ones."""
    path = find_file(repo, "config.json", **kwargs)
    config = {} if path is None else read_json_object(path)
    return config.get("item_score_weight") if config.get("format_version", 1) == 1 else None


__all__ = ["BesideWeights", "former_item_score_weight"]
