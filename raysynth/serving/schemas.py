"""What API v1 takes and gives: JSON bodies, and their way to conditions."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.condition import Condition, check_condition
from raysynth.config import LayoutGuided
from raysynth.config.sampling import SamplerName
from raysynth.errors import InputError
from raysynth.layout.holes import layout_hole
from raysynth.models.facts import BundleFacts
from raysynth.serving.arrays import PNG, Sent, read_array

State = Literal["waiting", "drawing", "done", "failed", "cancelled"]

MAX_SEED = 2**63 - 1

UploadId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

Score = Annotated[int, Field(ge=1, le=5)]

Part = Literal["box", "attributes", "prompt", "layout", "reference"]
"""Of a request: what a model may or may not be told."""

_SPACING_TOLERANCE = 0.01
"""Share by which a reference's pixels may differ from the model's."""


class Strict(BaseModel):
    """A body: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SampleIn(Strict):
    """A request for one sample. All parts of the condition may be left out."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "seed": 7,
                    "box": [20, 24, 30, 34],
                    "attributes": {"margin": 4, "spiculation": 2},
                    "num_inference_steps": 20,
                }
            ]
        }
    )

    model: str | None = Field(None, max_length=200)
    """Name of a served model; None: the recipe's own."""
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """The same seed gives the same sample, bit by bit. None: one is drawn, and told."""
    sampler: SamplerName | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    previews: bool = False
    """Of jobs: whether its events show what the sample would be by now."""
    batch_shape: int | None = Field(None, ge=1, le=128)
    """Rows of the network calls, as a result tells: bits of a sample are fixed at these."""
    box: Annotated[tuple[int, ...], Field(max_length=6)] | None = None
    """Half-open pixels around the nodule: y0, x0, y1, x1; in volumes z0, y0, x0, z1, y1, x1."""
    attributes: dict[str, Score] = Field(default_factory=dict)
    """Scores from 1 to 5."""
    prompt: str | None = Field(None, max_length=1000)
    layout_png: str | None = None
    """Of slices: labels as a grey PNG of the sample's size, in base64."""
    layout: UploadId | None = None
    """Labels that were uploaded, on the sample's grid."""
    reference: UploadId | None = None
    """HU that were uploaded, on the sample's grid: they stay but for the region."""
    region: UploadId | None = None
    """What of the reference to draw anew, 0 and 1. None: the layout's organs, or the box."""


class BatchIn(Strict):
    """Many samples that land in the recipe's store as one synthetic run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Of the run: it will be `synthetic/NAME`."""
    requests: Annotated[tuple[SampleIn, ...], Field(min_length=1)]


class Problem(BaseModel):
    """What is wrong (RFC 9457)."""

    title: str
    status: int
    detail: str
    field: str | None = None


class ModelOut(BaseModel):
    """A model that is served."""

    name: str
    family: str
    digest: str
    shape: tuple[int, ...]
    pixel_mm: float
    depth_mm: float
    window_hu: tuple[float, float]
    intensity: str
    card: str
    hears: tuple[Part, ...]
    """What of a request it follows; anything else changes nothing."""
    words: dict[str, tuple[str, ...]]
    """Of the attributes: what each score means, from 1 on."""
    sampler: SamplerName
    """Where a request says nothing; so are the next two."""
    num_inference_steps: int
    guidance_scale: float
    samplers: tuple[SamplerName, ...]
    max_steps: int
    can_guide: bool
    """Whether a guidance scale other than 1 can be asked for."""


class UploadOut(BaseModel):
    """An array that was uploaded."""

    id: str
    shape: tuple[int, ...]
    dtype: str


class JobOut(BaseModel):
    """A job: samples that are drawn in the background."""

    id: str
    kind: Literal["sample", "batch"]
    model: str
    state: State
    asked_at: float | None
    """Seconds since 1970; None: an earlier version took it."""
    step: int = 0
    num_steps: int = 0
    samples_done: int = 0
    num_samples: int = 1
    seed: int | None = None
    run: str | None = None
    """Of a batch that is done: the run's place in the store."""
    error: str | None = None


class AdherenceOut(BaseModel):
    """What a sample shows where a nodule was asked for, measured."""

    found: bool
    """Something of plausible density, size and place stands out from the lung around it."""
    requested_diameter_mm: float
    diameter_mm: float | None
    """None, here and below: nothing stands out."""
    offset_mm: float | None
    """Of its centre from the middle of the box."""
    mean_hu: float | None
    contrast_hu: float
    """Of the middle of the box against the lung around it."""


class StreamOut(BaseModel):
    """A stream of metrics that can be read."""

    name: str
    reference: Literal["store", "sent"]


class LiveValue(BaseModel):
    """A metric by now."""

    value: float
    """Of the samples so far."""
    low: float | None
    """Lower end of its 95 % interval, over synthetic samples; None: too few."""
    high: float | None
    n: int
    """Synthetic samples."""
    n_reference: int
    """Real samples."""
    floor: float | None
    """The same between halves of the real ones; None: there is one patient."""


class MetricsOut(BaseModel):
    """A stream of metrics by now."""

    name: str
    reference: Literal["store", "sent"]
    counts: dict[str, int]
    metrics: dict[str, LiveValue]


ReadUpload = Callable[[str, str], Sent]
"""Gives an upload's array by its id, for a field."""


def condition_from(body: SampleIn, facts: BundleFacts, read_upload: ReadUpload) -> Condition:
    """The condition that a body asks for.

    Raises:
        InputError: it makes no sense to this model; its first word is the field.
    """
    attributes = None
    if body.attributes:
        unknown = sorted(set(body.attributes) - set(CONDITION_ATTRIBUTES))
        if unknown:
            raise InputError(
                f"attributes {', '.join(unknown)}: give {', '.join(CONDITION_ATTRIBUTES)}"
            )
        attributes = tuple(body.attributes.get(name, 0) for name in CONDITION_ATTRIBUTES)
    layout = _layout(body, facts, read_upload)
    # All but what is known, which is found by a layout or box that make sense.
    condition = Condition(layout=layout, box=body.box, attributes=attributes, text=body.prompt)
    check_condition(condition, facts.samples.size, facts.spatial_dims)
    if body.reference is None:
        if body.region is not None:
            raise InputError("region: give the reference, too, of which it says what to draw anew")
        return condition
    known_hu = _reference(read_upload(body.reference, "reference"), facts)
    hole = _region(body, facts, layout, read_upload)
    condition = replace(condition, known_hu=known_hu, known_mask=~hole)
    check_condition(condition, facts.samples.size, facts.spatial_dims)
    return condition


def _layout(
    body: SampleIn, facts: BundleFacts, read_upload: ReadUpload
) -> NDArray[np.uint8] | None:
    shape = facts.samples.shape
    if body.layout_png is not None:
        if body.layout is not None:
            raise InputError("layout: give it, or layout_png, and not both")
        if len(shape) != 2:
            raise InputError("layout_png: this model draws volumes; upload a layout")
        return _labels(_decoded(body.layout_png), "layout_png", shape)
    if body.layout is not None:
        return _labels(read_upload(body.layout, "layout").values, "layout", shape)
    return None


def _decoded(text: str) -> NDArray[np.generic]:
    try:
        packed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("layout_png: this is no base64") from error
    try:
        return read_array(packed, PNG).values
    except InputError as error:
        raise InputError(f"layout_png: {str(error).partition(': ')[2]}") from error


def _labels(values: NDArray[np.generic], field: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if values.shape != shape:
        raise InputError(f"{field} of shape {values.shape}: this model needs {shape}")
    if values.dtype.kind not in "biu" or values.min() < 0 or values.max() > 255:
        raise InputError(f"{field}: give whole numbers of 0 to 255, which are the labels")
    return values.astype(np.uint8)


def _reference(sent: Sent, facts: BundleFacts) -> NDArray[np.int16]:
    values, shape = sent.values, facts.samples.shape
    if values.shape != shape:
        raise InputError(f"reference of shape {values.shape}: this model needs {shape}")
    if sent.spacing_mm is not None:
        own = spacing_of(facts)
        told = sent.spacing_mm[-len(shape) :]
        wanted = (own[0], own[1], own[1])[-len(shape) :]
        if not np.allclose(told, wanted, rtol=_SPACING_TOLERANCE):
            raise InputError(
                f"reference with voxels of {', '.join(f'{one:g}' for one in told)} mm: this model "
                f"needs {', '.join(f'{one:g}' for one in wanted)}; resample it"
            )
    limits = np.iinfo(np.int16)
    finite = np.isfinite(values).all() if values.dtype.kind == "f" else True
    if not finite or values.min() < limits.min or values.max() > limits.max:
        raise InputError(f"reference: give HU from {limits.min} to {limits.max}")
    hu: NDArray[np.int16] = np.rint(values).astype(np.int16)
    return hu


def _region(
    body: SampleIn,
    facts: BundleFacts,
    layout: NDArray[np.uint8] | None,
    read_upload: ReadUpload,
) -> NDArray[np.bool_]:
    """What of a reference is drawn anew."""
    shape = facts.samples.shape
    if body.region is not None:
        values = read_upload(body.region, "region").values
        if values.shape != shape:
            raise InputError(f"region of shape {values.shape}: this model needs {shape}")
        hole: NDArray[np.bool_] = values != 0
    elif isinstance(facts.model, LayoutGuided) and layout is not None:
        hole = layout_hole(layout, facts.model.layout_labels)
    elif body.box is not None:
        axes = len(shape)
        hole = np.zeros(shape, np.bool_)
        hole[tuple(map(slice, body.box[:axes], body.box[axes:]))] = True
    else:
        raise InputError("region: say what of the reference to draw anew, or give a box")
    if not hole.any():
        raise InputError("region: nothing of the reference is to be drawn anew")
    return hole


def spacing_of(facts: BundleFacts) -> tuple[float, float]:
    """Between planes, and of a pixel, in mm."""
    return float(facts.samples.spacing_mm), float(facts.samples.pixel_mm)
