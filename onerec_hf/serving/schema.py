"""Request and response schema as pydantic models: strict types, no unknown keys; source of the OpenAPI schema."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictFloat, StrictInt, StrictStr, Tag

# Stop at the first error of a long list.
ItemIds = Annotated[list[StrictInt | StrictStr], Field(fail_fast=True)]
Value = StrictBool | StrictInt | StrictFloat | StrictStr | None
# Values of features by column, as a log has them.
Values = Annotated[dict[StrictStr, Value | Annotated[list[Value], Field(max_length=100)]], Field(max_length=100)]
Entries = Annotated[list[StrictInt | StrictStr | Values], Field(fail_fast=True)]


class Query(BaseModel):
    """One history and the options of its recommendation."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"history": [260, 1196, 1210], "top_k": 5}]}
    )

    history: Entries = Field(
        description='Item ids, oldest first. For a model with features also objects with values of the interaction, {"item": 260, "like": true}; values '
        "that the model does not read are left out."
    )
    user: Values | None = Field(None, description="Values of the user's features, for a model that reads them.")
    top_k: StrictInt = Field(10, ge=1, description="Items (or sessions) to return, best first.")
    session_length: StrictInt = Field(
        1, ge=1, description="Items per session; 1 returns a ranked list of items under `items`."
    )
    num_beams: StrictInt | None = Field(None, ge=1, description="Beam width; by default 50, or `top_k` if larger.")
    diversity: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = Field(
        0.0,
        description="Penalty on items that the sessions share: 0 returns the most probable ones, with 1 they share hardly any item.",
    )
    exclude_seen: StrictBool = Field(True, description="Exclude the items of the history.")
    exclude: ItemIds = Field(default_factory=list, description="Further items to exclude.")
    allow: ItemIds | None = Field(None, description="Recommend only these items.")
    candidates: ItemIds | None = Field(
        None,
        description="Rank these items: the answer has all of them, best first, also those of the history, with exact scores. `top_k`, `num_beams` and "
        "`exclude_seen` do not count then.",
    )
    unknown: Annotated[StrictStr, Field(pattern="^(skip|error)$")] | None = Field(
        None,
        description="Ids that are not in the catalogue: `skip` ignores and counts them, `error` returns 422. Default: the server's setting.",
    )
    user_id: StrictInt | StrictStr | None = Field(
        None, description="Returned with the answer as it is; not used otherwise."
    )


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


Queries = Annotated[
    Annotated[Query, Tag("one")] | Annotated[list[Query], Field(fail_fast=True), Tag("many")],
    Discriminator(_one_or_many),
]


class Answer(BaseModel):
    """The answer to one history: `items` for sessions of one item, else `sessions`."""

    user_id: int | str | None = Field(None, description="The request's, if it has one.")
    items: list[int | str] | None = Field(None, description="Item ids, best first.")
    sessions: list[list[int | str]] | None = Field(None, description="Sessions of item ids, best first.")
    scores: list[float] = Field(description="Log-probabilities of the items or sessions.")
    fields: list[dict[str, str | int | float | bool] | list[dict[str, str | int | float | bool]]] | None = Field(
        None,
        description="Titles and other fields, an object per item in the order of `items` (of `sessions`, a list of objects per session). "
        "Only of models with an items table.",
    )
    unknown_items: int = Field(description="Number of ignored ids of the request that are not in the catalogue.")
    model: str = Field(description="Version of the model.")


class SimilarQuery(BaseModel):
    """Items whose most similar items are looked for."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"similar_to": [260], "top_k": 5}]})

    similar_to: ItemIds = Field(description="Item ids of the catalogue.")
    top_k: StrictInt = Field(10, ge=1, description="Similar items to return for each, best first.")


class SimilarAnswer(BaseModel):
    """The most similar items of one item, by the cosine of their vectors."""

    similar_to: int | str = Field(description="The item of the request.")
    items: list[int | str] = Field(description="Item ids, best first, without the item itself.")
    scores: list[float] = Field(description="Cosines.")
    fields: list[dict[str, str | int | float | bool]] | None = Field(
        None, description="Titles and other fields, an object per item. Only of models with an items table."
    )
    model: str = Field(description="Version of the model.")


class Problem(BaseModel):
    """Error response."""

    detail: str


class Readiness(BaseModel):
    """Readiness and model version."""

    status: str
    model: str


class Reloaded(BaseModel):
    """Result of a reload."""

    reloaded: bool = Field(description="False if the folder contains the model that is already served.")
    model: str
    previous: str
