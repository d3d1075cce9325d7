"""Version 1 of the store: groups, arrays, attributes, codecs and label values.

`v1.json` is this module written out (`as_json`) for readers in other languages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from storage_schema.spec import (
    ITEM_BYTES,
    ArraySpec,
    AttributeSpec,
    Column,
    GroupSpec,
    index_codecs,
    inner_codecs,
)

SCHEMA_VERSION = "1.0"

NOT_WRITTEN_HU = -32768
"""Fill value of `hu`: no voxel has it, so a hole that no run filled shows."""

NOT_WRITTEN_LABEL = 255
"""Fill value of `layout`, for the same reason."""

LABELS = {
    0: "background",
    1: "left lung",
    2: "right lung",
    3: "trachea",
    4: "body",
    5: "nodule",
    16: "liver",
    17: "left kidney",
    18: "right kidney",
    19: "spleen",
    20: "tumour",
}
"""Values of a layout voxel; further organs and tumours get numbers from 21 on."""

SPLITS = ("train", "val", "test")
"""`index/split` holds the position in this tuple."""

PROMPT_BYTES = 384
"""Room for a prompt in `index/prompt`."""

NUM_READERS = 4
ATTRIBUTES = (
    "subtlety",
    "internal_structure",
    "calcification",
    "sphericity",
    "margin",
    "lobulation",
    "spiculation",
    "texture",
    "malignancy",
)
"""The nine scores of a reader, in the order of the last axis of `index/ratings`."""

CONDITION_ATTRIBUTES = ("sphericity", "margin", "lobulation", "spiculation", "texture")
"""The scores of `index/attributes` in a synthetic run."""

MAX_SHARD_ROWS = 64
MAX_SHARD_BYTES = 2**28
VOLUME_CHUNK = (8, 128, 128)
VOLUME_SHARD_CHUNKS = (4, 4, 4)
"""A shard of a volume is (32, 512, 512) voxels: 64 chunks, 16 MiB of int16."""


def rows_per_shard(item_shape: Sequence[int], item_bytes: int) -> int:
    """Samples in one shard: 64, or what fits into 2**28 raw bytes if that is less.

    Args:
        item_shape: shape of one sample.
        item_bytes: bytes of one number of the widest per-sample array.
    """
    return max(1, min(MAX_SHARD_ROWS, MAX_SHARD_BYTES // (math.prod(item_shape) * item_bytes)))


def root() -> GroupSpec:
    """The root group."""
    return GroupSpec(
        "root",
        "",
        "Says what the store is.",
        (),
        (
            AttributeSpec("schema_version", "string", f"{SCHEMA_VERSION!r}"),
            AttributeSpec("created_by", "string", "the software that made the store"),
            AttributeSpec("software_version", "string", "its version"),
            AttributeSpec(
                "last_run",
                "object",
                "number, verb, fingerprint and message of the run that main was last moved by",
                required=False,
            ),
            AttributeSpec(
                "ingested",
                "object",
                "settings that all cases share: split; of people also consensus_level and a mark "
                "of the pseudonym key",
                required=False,
            ),
        ),
    )


def volume(shape: Sequence[int]) -> GroupSpec:
    """One case on its native grid.

    Args:
        shape: voxels along (z, y, x).
    """
    shape = tuple(shape)
    chunk = tuple(map(min, VOLUME_CHUNK, shape))
    # A small volume gets a smaller shard: no more chunks along an axis than it has.
    shard = tuple(
        c * min(count, -(-size // c))
        for c, count, size in zip(chunk, VOLUME_SHARD_CHUNKS, shape, strict=True)
    )
    dims = ("z", "y", "x")
    return GroupSpec(
        "volume",
        "volumes/<case_id>",
        "One CT of one patient with its layout and nodules, on the scanner's grid.",
        (
            ArraySpec("hu", "int16", dims, shape, chunk, shard, NOT_WRITTEN_HU, "Hounsfield units"),
            ArraySpec(
                "layout", "uint8", dims, shape, chunk, shard, NOT_WRITTEN_LABEL, "label of a voxel"
            ),
        ),
        _VOLUME_ATTRIBUTES,
        optional=("layout",),
    )


def sample_set(count: int, item_shape: Sequence[int]) -> GroupSpec:
    """Samples cut from volumes, all of one shape.

    Args:
        count: number of samples.
        item_shape: (y, x) of slices, (z, y, x) of patches.
    """
    rows = rows_per_shard(item_shape, ITEM_BYTES["int16"])
    return GroupSpec(
        "sample_set",
        "samples/<set>",
        "Samples of one shape, cut from the volumes; row i of every array is sample i.",
        (*_images(count, item_shape, rows), *_columns(count, rows, _cut_columns(item_shape))),
        _SAMPLE_ATTRIBUTES,
    )


def latents(count: int, item_shape: Sequence[int]) -> GroupSpec:
    """Latents of a sample set by one autoencoder.

    Args:
        count: number of samples, as in the set.
        item_shape: (channel, y, x) or (channel, z, y, x).
    """
    rows = rows_per_shard(item_shape, ITEM_BYTES["float16"])
    dims = ("sample", "channel", *_axes(item_shape[1:]))
    shape, doc = (count, *item_shape), "encoder output, not scaled"
    array = _rowwise("latents", "float16", dims, shape, rows, math.nan, doc)
    return GroupSpec(
        "latents",
        "latents/<set>/<bundle digest, 12 hex digits>",
        "Encoder output for every sample of a set; row i belongs to sample i.",
        (array,),
        _LATENT_ATTRIBUTES,
    )


def synthetic_run(count: int, item_shape: Sequence[int]) -> GroupSpec:
    """Samples that a model drew.

    Args:
        count: number of samples.
        item_shape: (y, x) of slices, (z, y, x) of patches.
    """
    rows = rows_per_shard(item_shape, ITEM_BYTES["int16"])
    return GroupSpec(
        "synthetic_run",
        "synthetic/<run>",
        "Samples drawn by one bundle after one plan. Not images of anybody.",
        (
            *_images(count, item_shape, rows),
            _rowwise(
                "measured",
                "uint8",
                ("sample", *_axes(item_shape)),
                (count, *item_shape),
                rows,
                NOT_WRITTEN_LABEL,
                "5 where the re-measured nodule is, 0 elsewhere",
            ),
            *_columns(count, rows, _common_columns(item_shape) + _SYNTHETIC_COLUMNS),
        ),
        _SYNTHETIC_ATTRIBUTES,
    )


def audit(count: int) -> GroupSpec:
    """How near the samples of a synthetic run come to those that its model learned from.

    Args:
        count: number of samples, as in the run.
    """
    return GroupSpec(
        "audit",
        "audits/<run>",
        "The privacy audit of the synthetic run of that name; row i belongs to its sample i.",
        _columns(count, MAX_SHARD_ROWS, _AUDIT_COLUMNS),
        _AUDIT_ATTRIBUTES,
    )


def quarantine() -> GroupSpec:
    """What was refused, and why."""
    return GroupSpec(
        "quarantine",
        "quarantine",
        "Everything that ingest refused. Nothing is dropped in silence.",
        (),
        (
            AttributeSpec(
                "entries",
                "array of {source, rule, reason, when}",
                "keyed hash of the file or series, name of the broken rule, one line for people, "
                "UTC time (ISO 8601)",
            ),
        ),
    )


def as_json() -> dict[str, object]:
    """The whole schema as JSON values, with example sizes where a size is free."""
    examples = (
        root(),
        volume((300, 512, 512)),
        sample_set(1000, (256, 256)),
        sample_set(1000, (64, 64, 64)),
        latents(1000, (4, 64, 64)),
        synthetic_run(1000, (256, 256)),
        audit(1000),
        quarantine(),
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "labels": {str(value): name for value, name in LABELS.items()},
        "splits": list(SPLITS),
        "attributes": list(ATTRIBUTES),
        "condition_attributes": list(CONDITION_ATTRIBUTES),
        "max_shard_rows": MAX_SHARD_ROWS,
        "max_shard_bytes": MAX_SHARD_BYTES,
        "codecs": {dtype: inner_codecs(dtype) for dtype in ITEM_BYTES},
        "index_codecs": index_codecs(),
        "groups": [group.as_json() for group in examples],
    }


_NODULE_COLUMNS = (
    Column("nodule", "int16", -1, "row in the case's `nodules` attribute; -1: none was aimed at"),
    Column("diameter_mm", "float32", math.nan, "of that nodule, millimetres; NaN: none"),
    Column(
        "ratings",
        "uint8",
        0,
        "scores of the nodule by every reader; 0 = absent",
        (("reader", NUM_READERS), ("attribute", len(ATTRIBUTES))),
    ),
)


def _cut_columns(item_shape: Sequence[int]) -> tuple[Column, ...]:
    case = Column("case", "int32", -1, "row of the sample's case in the attribute `cases`")
    if len(item_shape) == 2:
        doc = "distance from the volume's first plane along z, millimetres"
        place = Column("z_mm", "float32", math.nan, doc)
    else:
        doc = "middle of the sample along the volume's axes, millimetres from the first voxel"
        place = Column("middle_mm", "float32", math.nan, doc, (("axis", 3),))
    return (case, place, *_NODULE_COLUMNS, *_common_columns(item_shape))


def _common_columns(item_shape: Sequence[int]) -> tuple[Column, ...]:
    axes = _axes(item_shape)
    corners = ", ".join(axis + end for end in "01" for axis in axes)
    doc = f"box of equal sides around the nodule, half-open pixels ({corners}); all -1: none"
    return (
        Column("box", "int16", -1, doc, (("corner", 2 * len(axes)),)),
        Column("has_nodule", "uint8", 0, "1 if any nodule voxel is in the sample's layout"),
        Column("split", "uint8", 0, "row in `splits`: 0 train, 1 val, 2 test"),
    )


_SYNTHETIC_COLUMNS = (
    Column("seed", "uint64", 0, "seed of the sample's noise, from which that of a redraw follows"),
    Column(
        "attributes",
        "uint8",
        0,
        "requested scores; 0 = not given",
        (("attribute", len(CONDITION_ATTRIBUTES)),),
    ),
    Column(
        "prompt",
        "uint8",
        0,
        "requested prompt, UTF-8, filled up with 0; all 0 = not given",
        (("byte", PROMPT_BYTES),),
    ),
    Column("source_sample", "int32", -1, "row of the real sample that lent the layout; -1: none"),
    Column(
        "source_case", "int32", -1, "case of that sample: row in the attribute `cases`; -1: none"
    ),
    Column("copied_fraction", "float32", 0.0, "share of pixels pasted from a real sample"),
    Column("batch_shape", "int16", 0, "samples in the network call that drew it (padding too)"),
    Column("accepted", "uint8", 0, "1 if the re-measured sample shows what was asked for"),
    Column(
        "measured_diameter_mm",
        "float32",
        math.nan,
        "re-measured diameter of the nodule, millimetres; NaN if none was found",
    ),
    Column(
        "measured_contrast_hu",
        "float32",
        math.nan,
        "re-measured nodule minus its surroundings, Hounsfield units; NaN if none was found",
    ),
    Column("found", "uint8", 0, "1 if a nodule was found where one was asked for"),
    Column("draws", "uint8", 0, "times it was drawn; of the last draw is all else here"),
    Column("unrequested", "uint8", 0, "compact dense things in the lungs that were not asked for"),
)

_AUDIT_COLUMNS = (
    Column("region", "uint8", 0, "what was compared: row in the attribute `regions`"),
    Column("nearest_sample", "int32", -1, "row of the nearest training sample in `source_set`"),
    Column("embedding_distance", "float32", math.nan, "least distance of features; NaN: not used"),
    Column("pixel_distance", "float32", math.nan, "least distance of low-resolution pixels"),
    Column("ncc", "float32", math.nan, "largest normalized correlation with a training sample"),
    Column("copy_score", "float32", math.nan, "all criteria as one number; larger: likelier copy"),
    Column("exact", "uint8", 0, "1 if it is the same picture as a training sample"),
    Column("flagged", "uint8", 0, "1 if it counts as a copy: nothing held out is so near"),
)

_CHECKSUM = AttributeSpec(
    "checksum",
    "string",
    "first 12 hex digits of SHA-256 of the other attributes as JSON, keys sorted, no spaces",
)

_INTENSITY = AttributeSpec(
    "intensity", "string", "relative: grey values of no known unit", ("hu", "relative")
)

_VOLUME_ATTRIBUTES = (
    _CHECKSUM,
    AttributeSpec("spacing_mm", "array of 3 numbers", "voxel distance along (z, y, x)"),
    AttributeSpec("origin_mm", "array of 3 numbers", "LPS position (z, y, x) of voxel (0, 0, 0)"),
    AttributeSpec(
        "direction",
        "array of 9 numbers",
        "3x3 matrix by rows; column k is the unit vector of array axis k, in (z, y, x) order, LPS",
    ),
    AttributeSpec("patient_key", "string", "keyed hash of the patient"),
    AttributeSpec("split", "string", "decided by the patient alone", SPLITS),
    _INTENSITY,
    AttributeSpec("source", "object", "format and allow-listed acquisition values"),
    AttributeSpec(
        "nodules",
        "array of {centre_zyx, corner_zyx, shape, voxels, diameter_mm, ratings}",
        "voxel coordinates; `voxels` is base64 of the mask of `shape`, in C order, eight voxels a "
        "byte, the first in the lowest bit; ratings: one row of nine scores a reader",
    ),
    AttributeSpec(
        "lung_zyx", "array of 3 [start, stop] | null", "half-open bounding box of labels 1 and 2"
    ),
    AttributeSpec(
        "lung_planes", "array of [start, stop]", "half-open ranges of z with any lung voxel"
    ),
)

_SET_ATTRIBUTES = (
    _CHECKSUM,
    AttributeSpec("kind", "string", "planes (y, x) or boxes (z, y, x)", ("slices", "patches")),
    AttributeSpec("pixel_mm", "number", "side of a pixel of a sample, millimetres"),
    _INTENSITY,
    AttributeSpec("cases", "array of strings", "case ids that columns of the index point into"),
    AttributeSpec("parent_snapshot", "string", "snapshot id of the store it was made from"),
)

_SAMPLE_ATTRIBUTES = (
    *_SET_ATTRIBUTES,
    AttributeSpec("fingerprint", "string", "hash of the settings and cases it was cut from"),
    AttributeSpec("settings", "object", "what decided the cut: the recipe's data.samples"),
    AttributeSpec("spacing_mm", "number", "distance and thickness of planes, millimetres"),
    AttributeSpec("field_of_view_mm", "number", "side of a sample, millimetres"),
)

_LATENT_ATTRIBUTES = (
    _CHECKSUM,
    AttributeSpec("latent_scale", "number", "networks see latents times this"),
    AttributeSpec("bundle", "string", "digest of the autoencoder's bundle"),
    AttributeSpec("parent_snapshot", "string", "snapshot id of the store it was made from"),
)

_SYNTHETIC_ATTRIBUTES = (
    *_SET_ATTRIBUTES,
    AttributeSpec("bundle", "string", "digest of the bundle that drew the samples"),
    AttributeSpec("plan", "string", "digest of the plan of requests"),
    AttributeSpec("source_set", "string", "name of the sample set that lent the layouts"),
    AttributeSpec("passport", "object", "model, data, settings and mark of the run"),
)

_AUDIT_ATTRIBUTES = (
    _CHECKSUM,
    AttributeSpec("bundle", "string", "of the audited run"),
    AttributeSpec("plan", "string", "of the audited run"),
    AttributeSpec("source_set", "string", "name of the sample set that the model learned from"),
    AttributeSpec("fingerprint", "string", "hash of all that decides the audit"),
    AttributeSpec("parent_snapshot", "string", "snapshot id of the store it was made from"),
    AttributeSpec("regions", "array of strings", "what was compared"),
    AttributeSpec("thresholds", "object", "by region: copy score above which a sample is flagged"),
    AttributeSpec("policy", "object", "what the run had to keep: the recipe's `audit`"),
    AttributeSpec("verdict", "string", "whether it kept that", ("passed", "failed")),
    AttributeSpec("findings", "object", "figures with intervals, reasons and notices"),
)


def _axes(item_shape: Sequence[int]) -> tuple[str, ...]:
    return ("z", "y", "x")[-len(item_shape) :]


def _images(count: int, item_shape: Sequence[int], rows: int) -> tuple[ArraySpec, ...]:
    dims, shape = ("sample", *_axes(item_shape)), (count, *item_shape)
    # Of a synthetic sample, the layout is what was asked for.
    return (
        _rowwise("hu", "int16", dims, shape, rows, NOT_WRITTEN_HU, "Hounsfield units"),
        _rowwise("layout", "uint8", dims, shape, rows, NOT_WRITTEN_LABEL, "label of a pixel"),
    )


def _rowwise(
    name: str,
    dtype: str,
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    rows: int,
    fill: int | float,
    doc: str,
) -> ArraySpec:
    item = shape[1:]
    return ArraySpec(name, dtype, dims, shape, (1, *item), (rows, *item), fill, doc)


def _columns(count: int, rows: int, columns: Sequence[Column]) -> tuple[ArraySpec, ...]:
    # A column has the shard boundaries of the images, but one chunk a shard: it is read whole.
    return tuple(
        ArraySpec(
            f"index/{column.name}",
            column.dtype,
            ("sample", *(name for name, _ in column.width)),
            (count, *(size for _, size in column.width)),
            (rows, *(size for _, size in column.width)),
            (rows, *(size for _, size in column.width)),
            column.fill,
            column.doc,
        )
        for column in columns
    )
