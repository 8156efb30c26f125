"""Where a model is strong and weak: what `restomod report --examine` has left in the run's folder, read and checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from restomod.data.manifest import Count
from restomod.runs.reader import Finite, Record, Run, Text, read_optional
from restomod.utils.json_files import as_tuple

FILE = "examined.json"
FORMAT = "restomod-examined-1"

Share = Annotated[float, Field(ge=0, le=1)]


class Kind(TypedDict):
    """A kind of token."""

    name: Text
    meaning: Text
    loss: Finite
    share: Share
    of_loss: Finite


class Positions(TypedDict):
    """Mean losses ``y`` by the number ``x`` of tokens that are seen."""

    x: list[Annotated[float, Field(gt=0, le=1e12)]]
    y: list[Finite]


class Source(TypedDict):
    """A source of the data."""

    name: Text
    loss: Finite
    tokens: Count


class Passage(TypedDict):
    """A passage: the text before it, and the loss of each token."""

    loss: Finite
    before: Text
    tokens: list[Annotated[tuple[Text, Finite], BeforeValidator(as_tuple)]]


class Examined(TypedDict):
    """What `examined.json` holds."""

    format: Literal["restomod-examined-1"]
    checkpoint: Text
    step: Count
    asked: Count
    tokens: Count
    loss: Finite
    kinds: Annotated[list[Kind], Field(min_length=1)]
    positions: Positions
    sources: list[Source]
    best: list[Passage]
    worst: list[Passage]


def read_examined(run: Run) -> Record | None:
    """What was examined last; None where there is nothing, or what is damaged or of another format."""
    values = read_optional(run.folder / FILE, "examination of the run's model", Examined, run.warn)
    if values is not None and len(values["positions"]["x"]) != len(values["positions"]["y"]):
        run.warn(f"warning: left out: {run.folder / FILE} is damaged: its positions differ in length")
        return None
    return None if values is None else dict(values)


def examined(run: Run, newest: str | None) -> dict[str, Any]:
    """What a report says of it: the examination, or ``reason`` why there is none.

    Args:
        run: the run.
        newest: the name of its newest checkpoint.
    """
    values = read_examined(run)
    if values is None:
        how = f"`restomod report {run.folder} --examine` finds it out"
        return {"reason": how if newest else "the run has no checkpoint yet"}
    old = newest is not None and values.get("checkpoint") != newest
    return values | {"remark": f"there is a newer checkpoint, {newest}: --examine again" if old else ""}
