"""A session head for a saved generator: sessions in one pass (`recommend --session_decoding parallel`), trained after the model and without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onerec_hf.trainers.session_head_config import SessionHeadArguments
from onerec_hf.workflows.artefact import catalogue_of, load_model, load_processor, load_reward, without_bars
from onerec_hf.workflows.data_options import excludes_seen
from onerec_hf.workflows.dataset import check_catalogue, drawn_examples
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.loading import as_dataset, data_and_options
from onerec_hf.workflows.run_folder import check_folder, own_folder
from onerec_hf.workflows.settings import gather
from onerec_hf.workflows.updating import folder_of, replacing_model

if TYPE_CHECKING:
    from onerec_hf.workflows.dataset import RecommendationDataset
    from onerec_hf.workflows.settings import DataSettings


@dataclass
class SessionHeadSettings:
    """The model, the reward models, and the output folder."""

    model: str | None = field(
        default=None,
        metadata={"help": "A saved OneRec with an item head: folder or Hub id. Its weights do not change."},
    )
    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models: sessions that they score best become likely, the worst ones unlikely. Without one, only the sessions of the data count."
        },
    )
    max_examples: int = field(default=20_000, metadata={"help": "Size of a random sample of training examples."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the model with its session head; by default the model's folder."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results in --output_dir."})

    def check(self) -> None:
        """
        Raises:
            ValueError: no model, or no examples.
        """
        if self.model is None:
            raise ValueError("pass --model: the folder or Hub id of a trained OneRec")
        if self.max_examples < 2:
            raise ValueError(f"--max_examples must be at least 2; got {self.max_examples}")


@dataclass(frozen=True)
class SessionHeadResult:
    """
    The folder of the model, and how the training went.

    Args:
        folder: with `session_head.safetensors`.
        metrics: of [`~onerec_hf.trainers.fit_session_head`].

    Example:
        >>> SessionHeadResult(Path("runs/mine"), {"covered": 0.7}).metrics["covered"]
        0.7
    """

    folder: Path
    metrics: dict[str, float]


def train_session_head(
    data: RecommendationDataset | DataSettings | None = None, *settings: object, **options
) -> SessionHeadResult:
    """
    Trains a session head on a saved generator and saves it with the model. A head that the model has is replaced.

    Args:
        data: a dataset, or the settings to load one. Without it, `options` name the data; data options that are not given are those that the model was
            trained with.
        settings: [`SessionHeadSettings`] and [`~onerec_hf.trainers.SessionHeadArguments`], each optional.
        options: single fields of these settings, e.g. `model="runs/mine", reward=["runs/reward"]`, and of [`DataSettings`].

    Raises:
        ValueError: no model, one without item scores, or data of another catalogue.
        FileExistsError: `output_dir` is not empty and `overwrite` is not set.

    Example:
        >>> train_session_head(dataset, model="runs/mine").metrics  # doctest: +SKIP
        {'loss': 4.1, 'covered': 0.71, 'alpha': 0.01, 'heldout': 0.31}
    """
    from onerec_hf.modeling.session_head import SESSION_HEAD_NAME
    from onerec_hf.trainers import fit_session_head

    if not any(isinstance(each, SessionHeadSettings) for each in settings):
        options = {"output_dir": None, **options}
    where, options = data_and_options(data, options)
    how, args = gather((SessionHeadSettings, SessionHeadArguments), settings, options)
    assert isinstance(how, SessionHeadSettings)
    assert isinstance(args, SessionHeadArguments)
    how.check()
    args.check()
    assert how.model is not None
    if how.output_dir is None and not Path(how.model).is_dir():
        raise ValueError(
            f"--model {how.model} is no folder: pass --output_dir, where the model is saved with its session head"
        )
    source = folder_of(how.model)
    target = source if how.output_dir is None else Path(how.output_dir)
    with own_folder(target):
        if target.resolve() != source.resolve():
            check_folder(target, how.overwrite)
        processor, model = load_processor("--model", how.model), load_model("--model", how.model)
        rewards = [load_reward(path) for path in how.reward or []]
        dataset = as_dataset(where, how.model)
        check_catalogue(f"--model {how.model}", catalogue_of(processor), dataset)
        examples = drawn_examples(dataset.train, how.max_examples, args.seed)
        say(f"session head: {len(examples):,} examples" + (f", {len(rewards)} reward models" if rewards else ""))
        exclude_seen = excludes_seen("--model", how.model)
        metrics = fit_session_head(model, processor, examples, rewards, args, exclude_seen=exclude_seen)
        assert model.parallel_decoder is not None
        if target.resolve() == source.resolve():  # all other files stay as they are
            model.parallel_decoder.save(target / SESSION_HEAD_NAME)
        else:
            with without_bars(), replacing_model(model, source, target, "config.json"):
                pass
    return SessionHeadResult(target, metrics)
