"""Request and response schemas as pydantic models: types are strict, unknown keys are refused, and the OpenAPI schema comes from here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag

# Of a list of half a million wrong ids, one error is enough.
ItemIds = Annotated[list[StrictInt | StrictStr], Field(fail_fast=True)]


class Query(BaseModel):
    """One history and what is wanted for it."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"history": [260, 1196, 1210], "top_k": 5}]}
    )

    history: ItemIds = Field(description="Item ids, oldest first.")
    top_k: StrictInt = Field(10, ge=1, description="Items (or sessions) to return, best first.")
    session_length: StrictInt = Field(
        1, ge=1, description="Items per session; 1 gives a ranked list of items under `items`."
    )
    num_beams: StrictInt | None = Field(None, ge=1, description="Beams; 50, or `top_k` where that is more.")
    exclude_seen: StrictBool = Field(True, description="Leave out the items of the history.")
    exclude: ItemIds = Field(default_factory=list, description="More items to leave out.")
    allow: ItemIds | None = Field(None, description="The only items to choose from.")
    unknown: Annotated[StrictStr, Field(pattern="^(skip|error)$")] | None = Field(
        None,
        description="Ids that the catalogue lacks: `skip` leaves them out and counts them, `error` answers 422. The server's default when not given.",
    )


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


Queries = Annotated[
    Annotated[Query, Tag("one")] | Annotated[list[Query], Field(fail_fast=True), Tag("many")],
    Discriminator(_one_or_many),
]


class Answer(BaseModel):
    """The answer to one history: `items` where sessions of one item were asked for, else `sessions`."""

    items: list[int | str] | None = Field(None, description="Item ids, best first.")
    sessions: list[list[int | str]] | None = Field(None, description="Sessions of item ids, best first.")
    scores: list[float] = Field(description="Log-probabilities of the items or sessions.")
    fields: list[dict[str, str | int | float | bool] | list[dict[str, str | int | float | bool]]] | None = Field(
        None,
        description="Titles and other fields, an object per item in the order of `items` (of `sessions`, a list of objects per session). "
        "Only of models with an items table.",
    )
    unknown_items: int = Field(description="Ids of the request that the catalogue lacks and that were left out.")
    model: str = Field(description="Version of the model that answered.")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class Readiness(BaseModel):
    """Whether requests are taken, and by which model."""

    status: str
    model: str


class Reloaded(BaseModel):
    """What a reload did."""

    reloaded: bool = Field(description="False where the folder holds the model that is served already.")
    model: str
    previous: str
