"""Bodies of requests and answers of the JSON API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hf_xmc.serving.settings import MAX_TOP_K


def _as_list(texts: Any) -> Any:
    return [texts] if isinstance(texts, str) else texts


Texts = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


class PredictRequest(BaseModel):
    """Texts, and the labels that are wanted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: Texts = Field(description="One text, or several. A blank text has no label.", examples=[["a red boat"]])
    top_k: int | None = Field(
        None,
        ge=1,
        le=MAX_TOP_K,
        description=f"Maximum number of labels of a text. By default 5; with a threshold {MAX_TOP_K}.",
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="Minimum probability of a label, for a calibrated model."
    )
    allow: list[str] | None = Field(None, description="The uids of the labels to choose from.")
    deny: list[str] | None = Field(None, description="The uids of the labels to leave out.")
    explain: bool = Field(False, description="Whether to explain each label.")


class Word(BaseModel):
    """A word of the text, and its part in the score of a label."""

    text: str
    start: int
    end: int
    weight: float


class Remembered(BaseModel):
    """A training text that has the label."""

    text: str | None
    similarity: float = Field(description="Cosine with the text that is explained.")
    weight: float = Field(description="Its fraction of the votes.")


class PredictedLabel(BaseModel):
    """A label of a text."""

    uid: str
    text: str
    score: float = Field(description="A probability if the model is calibrated.")
    words: list[Word] | None = Field(None, description="The words of the text, with `explain`.")
    words_add_up: bool | None = Field(None, description="Whether the weights of the words add up to the label score.")
    nearest: list[Remembered] | None = Field(None, description="Similar training texts with this label.")


class PredictResponse(BaseModel):
    """The labels of each text, best first."""

    predictions: list[list[PredictedLabel]]


class Label(BaseModel):
    """A label of the model."""

    uid: str
    text: str
    seen: bool | None = Field(None, description="Whether the label was in the training, if known.")


class LabelsResponse(BaseModel):
    """Labels in the order of the model."""

    labels: list[Label]
    total: int = Field(description="Number of labels with this prefix.")


class Health(BaseModel):
    """State of the server."""

    status: str
    model: str
    num_labels: int
    calibrated: bool
    version: str


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
