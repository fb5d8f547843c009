"""Settings of the workflows as dataclasses: data, semantic IDs, model size, output."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from onerec_hf.modeling.configuration_onerec import OneRecConfig
    from onerec_hf.modeling.features import FeatureSchema


@dataclass
class WindowSettings:
    """Columns, and how interactions become training examples."""

    user_column: str = field(default="user_id", metadata={"help": "Name of the user column."})
    item_column: str = field(default="item_id", metadata={"help": "Name of the item column."})
    timestamp_column: str = field(
        default="timestamp",
        metadata={"help": "Name of the time column; none where the rows of a user are in the order of time."},
    )
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of a text file without a header, in order."}
    )
    positive: list[str] | None = field(
        default=None,
        metadata={
            "help": "Positive feedback, e.g. 'rating>=4' 'day>=2024-01-31' 'event=purchase' (any of them); by default the data set's rule."
        },
    )
    min_item_interactions: int = field(default=5, metadata={"help": "Leave out items with fewer interactions."})
    session_length: int = field(default=5, metadata={"help": "Items of a training session (the paper's m)."})
    max_history: int = field(default=50, metadata={"help": "Latest items of a history that the encoder reads."})
    stride: int = field(default=1, metadata={"help": "Step between a user's training sessions."})


@dataclass
class DataSettings(WindowSettings):
    """
    The interactions, and their items.

    Example:
        >>> DataSettings(interactions="ratings.csv", items="films.csv", positive=["rating>=4"]).session_length
        5
    """

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A named data set: movielens, movielens-small, amazon-beauty, amazon-sports, kuairand-pure. Or pass --interactions."
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set's files."})
    interactions: str | None = field(
        default=None,
        metadata={
            "help": "Your own table: .csv, .tsv, .parquet, .json, .jsonl (also .gz, .zst), .txt or RecBole's .inter with user, item and timestamp."
        },
    )
    items: str | None = field(
        default=None, metadata={"help": "Your items: the same formats, item_id and text columns."}
    )
    item_column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of --items without a header, in order."}
    )
    missing_items: str = field(
        default="error",
        metadata={"help": "Interactions with items that have no row in --items: error, or drop (counted)."},
    )
    embeddings: str | None = field(
        default=None, metadata={"help": ".npy of item embeddings, one row per row of --items."}
    )
    users: str | None = field(
        default=None, metadata={"help": "Your users: the same formats, user_id and the columns of --user_features."}
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "auto: the model reads every column that is a feature, of --users, --items and --interactions, and interactions that are not positive. none (the default): items only. The four options below choose one by one, also beside auto."
        },
    )
    user_features: list[str] | None = field(
        default=None, metadata={"help": "Columns of --users that the model reads; auto guesses them."}
    )
    item_features: list[str] | None = field(
        default=None, metadata={"help": "Columns of --items that the model reads; auto guesses them."}
    )
    interaction_features: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of --interactions that the model reads of a history, and time (time since, hour, weekday); auto guesses them."
        },
    )
    history_feedback: str | None = field(
        default=None,
        metadata={
            "help": "Interactions of a history: positive (those of --positive; the default), or all, also those that are no targets."
        },
    )
    ties: str = field(
        default="file",
        metadata={"help": "Order of a user's rows of equal time: file (as in the table), or shuffle (random)."},
    )
    ties_seed: int = field(default=0, metadata={"help": "Seed of --ties shuffle."})
    holdout: str = field(
        default="last",
        metadata={
            "help": "Held-out items: last (each user's last two: leave-one-out), temporal (by time) or given (your own files)."
        },
    )
    validation_start: str | None = field(
        default=None,
        metadata={
            "help": "With --holdout temporal: start of the validation period, a number as in the table or an ISO date (UTC); by default four fifths of the interactions are before it."
        },
    )
    test_start: str | None = field(
        default=None, metadata={"help": "Likewise the start of the test period; by default nine tenths."}
    )
    validation_interactions: str | None = field(
        default=None,
        metadata={"help": "With --holdout given: table of validation targets; --interactions are for training."},
    )
    test_interactions: str | None = field(
        default=None, metadata={"help": "With --holdout given: table of test targets."}
    )
    prepared: str | None = field(
        default=None,
        metadata={"help": "Folder of `onerec-hf prepare`, whose examples are streamed; in place of --interactions."},
    )
    eval_users: int | None = field(
        default=None,
        metadata={"help": "With --prepared: evaluate on a random sample of this many users; all by default."},
    )


#: Options of features, which data without features do not have; `features` stands for them.
FEATURE_OPTIONS = ("user_features", "item_features", "interaction_features", "history_feedback")


def data_options() -> list[Field]:
    """
    The options of [`DataSettings`] that say what a model is trained on, without paths and samples, which say where and how much.

    Example:
        >>> [each.name for each in data_options()][:4]
        ['user_column', 'item_column', 'timestamp_column', 'positive']
    """
    others = (
        "data_dir",
        "interactions",
        "items",
        "column_names",
        "item_column_names",
        "users",
        "features",
        "missing_items",
        "embeddings",
        "prepared",
        "eval_users",
        "validation_interactions",
        "test_interactions",
    )
    return [each for each in fields(DataSettings) if each.name not in others]


@dataclass
class SemanticIDSettings:
    """Source of the semantic IDs, or options to fit them."""

    semantic_ids: str | None = field(
        default=None, metadata={"help": "Folder of `semantic-ids fit` to take the IDs from; fitted by default."}
    )
    codebook_sizes: list[int] = field(
        default_factory=lambda: [256, 256, 256],
        metadata={"help": "Codes per level; the largest at most the number of items."},
    )
    embedding: str = field(
        default="auto",
        metadata={
            "help": "Sources of the item embeddings, joined by '+': given, text, behaviour, aligned (given or text, aligned with behaviour). auto: given+behaviour, or text+behaviour. graph smooths the others (alone: those of auto) over the user-item graph (MMGRec)."
        },
    )
    embedding_dim: int = field(default=64, metadata={"help": "Dimensions of text and of behaviour embeddings."})
    behaviour_weight: float = field(
        default=1.0, metadata={"help": "Weight of behaviour relative to the other embeddings."}
    )
    graph_layers: int = field(
        default=1, metadata={"help": "With --embedding graph: steps from items to their users and back."}
    )
    quantizer: str = field(
        default="balanced", metadata={"help": "balanced k-means (the paper's), kmeans (faiss) or rq-vae (TIGER's)."}
    )
    on_collision: str = field(
        default="assign",
        metadata={
            "help": "Items with equal codes: assign moves items to other codes at the least cost, extra-digit adds a level (TIGER), popularity-rank adds one that ranks them by popularity (MMGRec)."
        },
    )
    kmeans_iterations: int = field(default=20, metadata={"help": "Maximum number of k-means iterations per level."})
    semantic_id_seed: int = field(default=0, metadata={"help": "Seed of the clustering."})


@dataclass
class ModelSettings:
    """Size of a new generator, or the saved one to start from."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "A saved OneRec (folder or Hub id) to start from, with its catalogue; a new one by default."
        },
    )
    architecture: str = field(
        default="onerec",
        metadata={
            "help": "onerec, or onerec_v2: the lazy decoder, whose history has no encoder layers (options of the encoder are left out)."
        },
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of both stacks."})
    encoder_layers: int = field(default=2, metadata={"help": "Encoder layers."})
    decoder_layers: int = field(default=2, metadata={"help": "Decoder layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads."})
    intermediate_size: int = field(default=256, metadata={"help": "Width of the encoder's feed-forward layers."})
    moe_intermediate_size: int = field(default=128, metadata={"help": "Width of one expert."})
    num_experts: int = field(default=24, metadata={"help": "Experts per decoder layer; 1 is a dense decoder."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts that a token uses."})
    norm_topk_prob: bool = field(default=False, metadata={"help": "Rescale the chosen experts' gates to sum to one."})
    dropout_rate: float = field(default=0.1, metadata={"help": "Dropout."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of new weights."})
    encoder_is_causal: bool = field(default=False, metadata={"help": "Causal encoder."})
    encoder_attention: str = field(
        default="softmax",
        metadata={"help": "softmax, or pointwise: self-attention of the encoder without a softmax, as in HSTU."},
    )
    encoder_pools_items: bool = field(
        default=False,
        metadata={"help": "One position per item in the encoder: the embeddings of its tokens are summed."},
    )
    encoder_scales_embeddings: bool = field(
        default=False, metadata={"help": "Multiply the encoder's embeddings by the square root of the hidden size."}
    )
    decoder_scales_embeddings: bool = field(
        default=False, metadata={"help": "Multiply the decoder's embeddings by the square root of the hidden size."}
    )
    cross_attention_rope: bool = field(default=True, metadata={"help": "Rotary positions in cross-attention."})
    item_head: bool = field(
        default=False,
        metadata={
            "help": "A learned vector per item: an input of the encoder in addition to its codes, and scored as the next item."
        },
    )
    item_head_dropout: float = field(
        default=0.0, metadata={"help": "Share of history items whose vector is hidden in training."}
    )
    item_head_loss_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the item loss, added to the loss of the codes; with 0 the vectors are inputs only."
        },
    )
    item_head_codes: bool = field(
        default=False, metadata={"help": "Add the embeddings of an item's codes to its vector in the item scores."}
    )
    item_head_content: bool = field(
        default=False,
        metadata={
            "help": "Add a projection of content vectors (--embeddings, or the items' text) to the vectors of the item head."
        },
    )
    item_head_evidence: bool = field(
        default=False,
        metadata={
            "help": "Add evidence about pairs of items to the item scores: counts from training rows, cosines of content; weights from validation users."
        },
    )
    item_head_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of the rarest items' vectors: low rank in blocks by popularity, several times fewer parameters (CpRec); by default all vectors are full."
        },
    )
    item_score_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of item scores in rankings, saved as the model's default (default: that of the saved model, 0 for a new one)."
        },
    )
    decoder_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the decoder in rankings, saved as the model's default; with 0 the item head alone ranks single items (default: that of the saved model, 1 for a new one)."
        },
    )
    feature_dim: int = field(default=32, metadata={"help": "Width of each feature's embedding."})
    feature_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of features that are hidden in training, so that a missing one costs less."},
    )
    feature_user_at_items: bool = field(
        default=False,
        metadata={"help": "Add what the user's features say to each item of the history, not to a token alone."},
    )
    pathways: list[str] | None = field(
        default=None,
        metadata={
            "help": "With --history_feedback all: read a history as two pathways, e.g. short_term=20 positive=256 (the latest interactions of any feedback, then the latest positive ones); by default as one, whose interactions say whether they were positive."
        },
    )
    lifelong: list[str] | None = field(
        default=None,
        metadata={
            "help": "A pathway of what is older than max_history, e.g. longest=100000: sizes of longest (interactions, 100000), items (clusters, 2000), queries (states, 128) and layers (2). Trains on windows, without packing."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})

    def config(
        self,
        codebook_sizes: Sequence[int],
        session_length: int,
        num_items: int | None = None,
        content_dim: int = 0,
        features: FeatureSchema | None = None,
    ) -> OneRecConfig:
        """
        The configuration of a new model.

        Args:
            num_items: of the catalogue, for the item head.
            content_dim: width of the content vectors, for an item head with content.
            features: what the model reads beside items.

        Raises:
            ValueError: sizes that do not fit together, or an item head without the number of items.

        Example:
            >>> ModelSettings(hidden_size=64).config([16, 16, 16], session_length=5).hidden_size
            64
        """
        from huggingface_hub.errors import StrictDataclassError

        from onerec_hf.modeling.configuration_onerec import OneRecConfig
        from onerec_hf.modeling.configuration_onerec_v2 import OneRecV2Config

        kinds = {"onerec": OneRecConfig, "onerec_v2": OneRecV2Config}
        if self.architecture not in kinds:
            raise ValueError(f"--architecture {self.architecture}: choose one of {', '.join(kinds)}")
        others = (
            "architecture",
            "model",
            "attn_implementation",
            "item_score_weight",
            "decoder_weight",
            "pathways",
            "lifelong",
        )
        if self.architecture == "onerec_v2":
            others += tuple(name for name in asdict(self) if name.startswith("encoder_"))
        sizes = {
            name: value
            for name, value in asdict(self).items()
            if name not in others and not name.startswith(("item_head", "feature_"))
        }
        if features is not None:
            sizes["features"] = {
                **features.config(),
                "dim": self.feature_dim,
                "dropout": self.feature_dropout,
                "user_at_items": self.feature_user_at_items,
                "not_positive": features.not_positive,
                "pathways": sizes_of_pathways(self.pathways),
            }
        if (lifelong := sizes_of_lifelong(self.lifelong)) is not None:
            sizes["lifelong"] = {name: size for name, size in lifelong.items() if name != "longest"}
        if self.item_head:
            if num_items is None:
                raise ValueError("--item_head needs the number of items: pass --num_items")
            sizes["item_head"] = {
                "num_items": num_items,
                "dropout": self.item_head_dropout,
                "loss_weight": self.item_head_loss_weight,
                "score_codes": self.item_head_codes,
            }
            # A head without them is saved as earlier versions saved it.
            sizes["item_head"] |= {"content_dim": content_dim} if content_dim else {}
            sizes["item_head"] |= {"evidence": True} if self.item_head_evidence else {}
            sizes["item_head"] |= {"rank": self.item_head_rank} if self.item_head_rank is not None else {}
        if (self.item_head_content or self.item_head_evidence) and not self.item_head:
            raise ValueError("--item_head_content and --item_head_evidence need --item_head true")
        if self.item_head_rank is not None and not self.item_head:
            raise ValueError("--item_head_rank needs --item_head true")
        if self.item_score_weight and not (self.item_head and self.item_head_loss_weight):
            raise ValueError(
                f"--item_score_weight {self.item_score_weight:g} needs item scores: add --item_head true and a --item_head_loss_weight above 0"
            )
        try:
            return kinds[self.architecture](
                codebook_sizes=list(codebook_sizes), session_length=session_length, **sizes
            )
        except StrictDataclassError as error:
            raise ValueError(f"model options: {error.__cause__ or error}") from error


def sizes_of_pathways(pathways: Sequence[str] | None) -> dict[str, int] | None:
    """
    The sizes of `--pathways`.

    Raises:
        ValueError: no NAME=NUMBER, or other names.

    Example:
        >>> sizes_of_pathways(["short_term=20", "positive=256"])
        {'short_term': 20, 'positive': 256}
    """
    if pathways is None:
        return None
    from onerec_hf.modeling.features import check_pathways

    sizes = _sizes("--pathways", pathways, "short_term=20 positive=256")
    check_pathways(sizes, ())  # whether the histories have them is known later
    return sizes


def sizes_of_lifelong(lifelong: Sequence[str] | None) -> dict[str, int] | None:
    """
    The sizes of `--lifelong`.

    Raises:
        ValueError: no NAME=NUMBER, or another name.

    Example:
        >>> sizes_of_lifelong(["longest=5000", "queries=16"])
        {'longest': 5000, 'items': 2000, 'queries': 16, 'layers': 2}
    """
    if lifelong is None:
        return None
    sizes, own = (
        {"longest": 100_000, "items": 2000, "queries": 128, "layers": 2},
        _sizes("--lifelong", lifelong, "longest=100000"),
    )
    if unknown := own.keys() - sizes.keys():
        raise ValueError(f"--lifelong {min(unknown)!s:.40}: choose among {', '.join(sizes)}")
    if not own or min(own.values()) < 1:
        raise ValueError(f"--lifelong {' '.join(lifelong)!s:.80}: give sizes, at least 1, e.g. longest=100000")
    return sizes | own


def _sizes(option: str, texts: Sequence[str], example: str) -> dict[str, int]:
    pairs = [text.partition("=") for text in texts]
    if not all(size.isdecimal() for _, _, size in pairs):
        raise ValueError(f"{option} {' '.join(texts)!s:.80}: write {example}, with your numbers")
    return {name: int(size) for name, _, size in pairs}


@dataclass
class DtypeSettings:
    """The precision of a generator."""

    dtype: str = field(
        default="float32",
        metadata={
            "help": "float32, bfloat16, or auto: bfloat16 where this CPU multiplies clearly faster in it. For generators."
        },
    )


@dataclass
class OutputSettings:
    """Where results go."""

    overwrite: bool = field(
        default=False, metadata={"help": "Write into a folder that exists already, replacing its earlier results."}
    )


@dataclass
class ModelOutputSettings(OutputSettings):
    """Output folder and the files saved in it."""

    save_items: bool = field(
        default=True,
        metadata={"help": "Save titles and other columns of the items (items.parquet), to show them in answers."},
    )


def given_options(kinds: Sequence[type], given: Sequence[object], options: dict[str, Any]) -> dict[str, Any]:
    """
    What the caller of a workflow decided, by option: every field of the settings objects, and the single options over them.

    Args:
        given, options: those of [`gather`], which checks them.

    Example:
        >>> given_options((OutputSettings, ModelSettings), [OutputSettings()], {"hidden_size": 64})
        {'overwrite': False, 'hidden_size': 64}
    """
    found = {each.name: getattr(one, each.name) for one in given for each in fields(cast("Any", one)) if each.init}
    return found | options


def gather(kinds: Sequence[type], given: Sequence[object], options: dict[str, Any]) -> tuple[Any, ...]:
    """
    One settings object of each kind, for a workflow that takes settings objects and single options.

    Args:
        given: settings objects in any order, at most one of a kind; a kind without one has its defaults.
        options: values of single fields by name, over the settings.

    Raises:
        TypeError: an option that no kind has, settings of another kind, two of one kind, or no `output_dir` where a kind has one.

    Example:
        >>> gather((SemanticIDSettings, ModelSettings), [ModelSettings(hidden_size=64)], {"quantizer": "kmeans"})[0].quantizer
        'kmeans'
        >>> gather((ModelSettings,), [], {"hiden_size": 64})
        Traceback (most recent call last):
        ...
        TypeError: unknown option 'hiden_size' (did you mean 'hidden_size'?)
    """
    names = {kind: {each.name for each in fields(kind) if each.init} for kind in kinds}
    known = set().union(*names.values())
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            raise TypeError(f"unknown option {option!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    found = {}
    for settings in given:
        kind = type(settings)
        if kind not in names or kind in found:
            wanted = ", ".join(each.__name__ for each in kinds)
            raise TypeError(f"{kind.__name__} does not fit here: pass at most one each of {wanted}")
        found[kind] = settings
    filled = []
    for kind in kinds:
        mine = {name: value for name, value in options.items() if name in names[kind]}
        if kind not in found and "output_dir" in names[kind] and "output_dir" not in mine:
            raise TypeError("output_dir is missing: pass output_dir=FOLDER")
        filled.append(replace(found[kind], **mine) if mine and kind in found else found.get(kind) or kind(**mine))
    return tuple(filled)
