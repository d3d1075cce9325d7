"""What API v1 takes and gives: JSON bodies, and their way to conditions and pictures."""

from __future__ import annotations

import base64
import binascii
import io
import json
from typing import Annotated, Literal

import numpy as np
from imagecodecs import png_check, png_decode, png_encode
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.condition import Condition, check_condition
from raysynth.errors import InputError
from raysynth.models.facts import BundleFacts

State = Literal["waiting", "drawing", "done", "failed", "cancelled"]

MAX_SEED = 2**63 - 1
PNG_HEADER_BYTES = 33
"""Signature and first chunk of a PNG: its size stands there."""


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

    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """The same seed gives the same sample, bit by bit. None: one is drawn, and told."""
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    box: Annotated[tuple[int, ...], Field(max_length=6)] | None = None
    """Half-open pixels around the nodule: y0, x0, y1, x1; in volumes z0, y0, x0, z1, y1, x1."""
    attributes: dict[str, Annotated[int, Field(ge=1, le=5)]] = Field(default_factory=dict)
    """Scores from 1 to 5."""
    prompt: str | None = Field(None, max_length=1000)
    layout_png: str | None = None
    """Of slices: labels as a grey PNG of the sample's size, in base64."""


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
    window_hu: tuple[float, float]
    intensity: str
    card: str


class JobOut(BaseModel):
    """A job: one sample that is drawn in the background."""

    id: str
    state: State
    step: int = 0
    num_steps: int = 0
    seed: int
    error: str | None = None


def condition_from(body: SampleIn, facts: BundleFacts) -> Condition:
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
    layout = None if body.layout_png is None else _layout(body.layout_png, facts.samples.shape)
    condition = Condition(layout=layout, box=body.box, attributes=attributes, text=body.prompt)
    check_condition(condition, facts.samples.size, facts.spatial_dims)
    return condition


def _layout(text: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Decodes labels, after a look at how large they are."""
    if len(shape) != 2:
        raise InputError("layout_png: this model draws volumes; a PNG has no depth")
    try:
        packed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("layout_png: this is no base64") from error
    if len(packed) < PNG_HEADER_BYTES or not png_check(packed):
        raise InputError("layout_png: this is no PNG")
    width, height = (int.from_bytes(packed[at : at + 4], "big") for at in (16, 20))
    if (height, width) != shape:
        raise InputError(f"layout_png of {height} x {width} pixels: this model needs {shape}")
    try:
        labels: NDArray[np.uint8] = png_decode(packed)
    except Exception as error:  # whatever the decoder finds
        raise InputError("layout_png: this PNG is damaged") from error
    if labels.dtype != np.uint8 or labels.shape != shape:
        raise InputError("layout_png: give grey values of 8 bits, which are the labels")
    return labels


def png_of(hu: NDArray[np.int16], window_hu: tuple[float, float]) -> bytes:
    """A slice as a grey PNG of 8 bits; of a volume the middle plane.

    Args:
        hu: the sample.
        window_hu: HU of black and white.
    """
    plane = hu[len(hu) // 2] if hu.ndim == 3 else hu
    low, high = window_hu
    grey = (np.clip((plane - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    return bytes(png_encode(grey))


def npz_of(hu: NDArray[np.int16], facts: dict[str, object]) -> bytes:
    """A sample in HU with what is known of it, as NumPy reads it."""
    packed = io.BytesIO()
    np.savez_compressed(packed, hu=hu, facts=np.array(json.dumps(facts)))
    return packed.getvalue()
