"""From requests to what a network reads: input channels and cross-attention context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from raysynth.case import CONDITION_ATTRIBUTES, LUNG_LABELS, Label
from raysynth.condition import Condition, check_condition
from raysynth.config.model import LatentDiffusionConfig, Window
from raysynth.layout.holes import channels_of
from raysynth.window import normalize

NUM_ATTRIBUTES = len(CONDITION_ATTRIBUTES)
NUM_SCORES = 5
NUM_CLASSES = 6
"""Labels that a semantic model tells apart: background to nodule."""


@dataclass(frozen=True)
class ConditionBatch:
    """Conditions of several samples as tensors. A part a sample lacks holds its null value.

    Attributes:
        layout: labels, uint8 (B, *spatial); null is 0 everywhere.
        box: as in `Condition`, int64 (B, 2 * spatial_dims); null is -1.
        attributes: scores 1-5 of `CONDITION_ATTRIBUTES`, int64 (B, 5); null is 0.
        text: a prompt for each sample, null is empty; None where no sample has any.
        known_hu: HU to keep, int16 (B, *spatial); None where nothing is kept of any sample.
        known_mask: where, bool (B, *spatial); null is false everywhere.
    """

    layout: Tensor
    box: Tensor
    attributes: Tensor
    text: tuple[str, ...] | None = None
    known_hu: Tensor | None = None
    known_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.box)

    def to(self, device: torch.device | str) -> ConditionBatch:
        """The same conditions on another device."""
        return self._map(lambda part: part.to(device, non_blocking=True), self.text)

    def select(self, rows: slice | Tensor) -> ConditionBatch:
        """The conditions of some samples."""
        text = self.text
        if text is not None:
            chosen = np.arange(len(text))[rows if isinstance(rows, slice) else rows.cpu().numpy()]
            text = tuple(text[row] for row in chosen)
        return self._map(lambda part: part[rows], text)

    def null(self) -> ConditionBatch:
        """As many null conditions."""
        return self.drop(torch.ones(len(self), dtype=torch.bool, device=self.box.device))

    def drop(self, mask: Tensor) -> ConditionBatch:
        """Null conditions where `mask` (bool, (B,)) is true: what trains free guidance.

        Ho & Salimans 2022, algorithm 1.
        """

        def emptied(part: Tensor) -> Tensor:
            null = -1 if part is self.box else 0
            return part.masked_fill(mask.view(-1, *[1] * (part.ndim - 1)), null)

        text = self.text
        if text is not None:
            text = tuple("" if d else t for d, t in zip(mask.tolist(), text, strict=True))
        return self._map(emptied, text)

    def _map(
        self, change: Callable[[Tensor], Tensor], text: tuple[str, ...] | None
    ) -> ConditionBatch:
        known = self.known_hu, self.known_mask
        return ConditionBatch(
            change(self.layout),
            change(self.box),
            change(self.attributes),
            text,
            *(None if part is None else change(part) for part in known),
        )


def collate(conditions: Sequence[Condition], size: int, spatial_dims: int = 2) -> ConditionBatch:
    """Puts requests into a batch.

    Args:
        conditions: requests for slices or volumes.
        size: pixels along a sample's side.
        spatial_dims: 2 of slices, 3 of volumes.

    Raises:
        InputError: one does not fit; see `check_condition`.
    """
    shape = (size,) * spatial_dims
    layout = np.zeros((len(conditions), *shape), dtype=np.uint8)
    box = np.full((len(conditions), 2 * spatial_dims), -1, dtype=np.int64)
    attributes = np.zeros((len(conditions), NUM_ATTRIBUTES), dtype=np.int64)
    for row, condition in enumerate(conditions):
        check_condition(condition, size, spatial_dims)
        if condition.layout is not None:
            layout[row] = condition.layout
        if condition.box is not None:
            box[row] = condition.box
        if condition.attributes is not None:
            attributes[row] = condition.attributes
    text = None
    if any(condition.text is not None for condition in conditions):
        text = tuple(condition.text or "" for condition in conditions)
    return ConditionBatch(
        torch.from_numpy(layout),
        torch.from_numpy(box),
        torch.from_numpy(attributes),
        text,
        *_collate_known(conditions, shape),
    )


def _collate_known(
    conditions: Sequence[Condition], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What is known of each image, and where; nothing if nothing is of any."""
    if all(condition.known_mask is None for condition in conditions):
        return None, None
    known_hu = np.zeros((len(conditions), *shape), dtype=np.int16)
    known_mask = np.zeros((len(conditions), *shape), dtype=bool)
    for row, condition in enumerate(conditions):
        if condition.known_hu is not None and condition.known_mask is not None:
            known_hu[row], known_mask[row] = condition.known_hu, condition.known_mask
    return torch.from_numpy(known_hu), torch.from_numpy(known_mask)


def box_mask(box: Tensor, image_size: int, latent_size: int) -> Tensor:
    """The box's share of every latent cell: its mask, area-pooled, without drawing it first.

    Args:
        box: half-open corners (B, 2 * spatial_dims), -1 for none.
        image_size: pixels along a sample's side.
        latent_size: cells along a latent's side.

    Returns:
        Shares 0-1, (B, 1, *latent).
    """
    spatial_dims = box.shape[1] // 2
    corners = box.float() * (latent_size / image_size)
    cells = torch.arange(latent_size, device=box.device)
    mask = torch.ones(len(box), 1, device=box.device)
    for axis in range(spatial_dims):
        low, high = corners[:, axis, None], corners[:, spatial_dims + axis, None]
        share = (torch.minimum(high, cells + 1) - torch.maximum(low, cells)).clamp(min=0)
        mask = mask[..., None] * share.view(len(box), *[1] * (axis + 1), latent_size)
    return mask


def lung_mask(layout: Tensor, latent_size: int) -> Tensor:
    """The lungs' share of every latent cell, (B, 1, *latent).

    A nodule counts as lung: where it is, the box says, and its outline must not leak.
    """
    lungs = torch.zeros_like(layout, dtype=torch.bool)
    for label in (*LUNG_LABELS, Label.NODULE):
        lungs |= layout == label
    cells = (latent_size,) * (layout.ndim - 1)
    return functional.interpolate(lungs.float()[:, None], size=cells, mode="area")


def layout_channels(layout: Tensor, organs: Sequence[str], latent_size: int) -> Tensor:
    """A channel for each organ, 1 inside and -1 outside, (B, k, *latent); means of larger cells.

    A layout of nothing but background is the null condition: all channels are zero there.

    Args:
        layout: labels (B, *spatial).
        organs: `layout_labels` of the model.
        latent_size: cells along a side.
    """
    masks = [
        torch.stack([layout == label for label in labels]).any(dim=0)
        for labels in channels_of(organs)
    ]
    channels = torch.stack(masks, dim=1).float() * 2 - 1
    given = (layout > 0).flatten(1).any(dim=1)
    channels = channels * given.view(-1, *[1] * layout.ndim)
    if layout.shape[-1] == latent_size:
        return channels
    return functional.interpolate(channels, size=(latent_size,) * (layout.ndim - 1), mode="area")


def split_known(condition: ConditionBatch, window_hu: Window) -> tuple[Tensor, Tensor]:
    """The known image in [-1, 1], 0 in its hole, and 1 where it is known, both (B, 1, *spatial)."""
    mask, hu = condition.known_mask, condition.known_hu
    if mask is None or hu is None:
        nothing = torch.zeros_like(condition.layout[:, None], dtype=torch.float32)
        return nothing, nothing
    keep = mask[:, None].float()
    return normalize(hu[:, None], window_hu) * keep, keep


def one_hot_layout(layout: Tensor) -> Tensor:
    """A channel for each of the labels 0-5, (B, 6, *spatial); organs count as body.

    A layout of nothing but background is the null condition: all channels are zero there.
    """
    classes = layout.masked_fill(layout >= NUM_CLASSES, Label.BODY)
    labels = torch.arange(NUM_CLASSES, device=layout.device, dtype=layout.dtype)
    channels = classes[:, None] == labels.view(1, -1, *[1] * (layout.ndim - 1))
    given = (layout > 0).flatten(1).any(dim=1)
    return (channels & given.view(-1, *[1] * layout.ndim)).float()


def edge_map(layout: Tensor) -> Tensor:
    """1 where one of the four neighbours has another label, (B, 1, y, x); organs have edges, too.

    The null condition has none: its layout is the same everywhere.
    """
    edges = torch.zeros_like(layout, dtype=torch.bool)
    for axis in (1, 2):
        count = layout.shape[axis] - 1
        changes = layout.narrow(axis, 1, count) != layout.narrow(axis, 0, count)
        edges.narrow(axis, 1, count).logical_or_(changes)
        edges.narrow(axis, 0, count).logical_or_(changes)
    return edges[:, None].float()


class AttributeEmbedding(nn.Module):
    """System A's embedding: a row of D numbers for each score, mixed into one vector of D.

    24,580 parameters at D = 10. An absent score has a zero row; if all are absent, so is the
    vector.
    """

    def __init__(self, width: int = 10, hidden: int = 128) -> None:
        super().__init__()
        self.width = width
        self.tables = nn.Parameter(torch.randn(NUM_ATTRIBUTES, NUM_SCORES, width))
        self.mix = nn.Sequential(
            nn.Linear(NUM_ATTRIBUTES * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        )

    def rows(self, attributes: Tensor) -> Tensor:
        """Each score's own row, (B, 5, D)."""
        which = torch.arange(NUM_ATTRIBUTES, device=attributes.device)
        rows = self.tables[which, (attributes - 1).clamp(min=0)]
        return rows * (attributes > 0)[..., None]

    def forward(self, attributes: Tensor) -> Tensor:
        """The merged vector, (B, D), of scores (B, 5)."""
        vector: Tensor = self.mix(self.rows(attributes).flatten(1))
        return vector * (attributes > 0).any(dim=1, keepdim=True)


class EncodedCondition(NamedTuple):
    """What a network reads of a condition; the same at every step of a sample.

    Attributes:
        channels: put beside x_t, (B, k, *latent).
        context: keys and values of cross-attention, (B, tokens, width), or None.
    """

    channels: Tensor
    context: Tensor | None = None


class SingleContext(nn.Module):
    """The published context, read literally: one token of flattened mask and attribute vector.

    Softmax over a single key is 1, so cross-attention adds a learned bias without a place; it is
    kept to reproduce system A. `TokenContext` is what we use.
    """

    def __init__(self, num_cells: int, attributes: AttributeEmbedding | None) -> None:
        super().__init__()
        self.attributes = attributes
        self.width = num_cells + (attributes.width if attributes else 0)

    def forward(self, mask: Tensor, scores: Tensor) -> Tensor:
        """One token, (B, 1, cells + D), of the latent mask (B, 1, *latent) and the scores."""
        parts = [mask.flatten(1)]
        if self.attributes is not None:
            parts.append(self.attributes(scores))
        return torch.cat(parts, dim=1)[:, None]


class TokenContext(nn.Module):
    """A token for each mask patch (an 8 x 8 grid where it divides the latent) and each score."""

    def __init__(
        self,
        latent_size: int,
        width: int,
        attributes: AttributeEmbedding | None,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.attributes = attributes
        self.width = width
        self.grid = math.gcd(latent_size, 8)
        self.patch = latent_size // self.grid
        self.project_patch = nn.Linear(self.patch**spatial_dims, width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.grid**spatial_dims, width))
        if attributes is not None:
            self.project_score = nn.Linear(2 * attributes.width, width)
            self.roles = nn.Parameter(0.02 * torch.randn(NUM_ATTRIBUTES, width))

    def forward(self, mask: Tensor, scores: Tensor) -> Tensor:
        """Tokens (B, patches + 5, width) of the latent mask (B, 1, *latent) and the scores."""
        tokens: Tensor = self.project_patch(self._patches(mask)) + self.positions
        if self.attributes is None:
            return tokens
        score_tokens = _score_tokens(scores, self.attributes, self.project_score, self.roles)
        return torch.cat([tokens, score_tokens], dim=1)

    def _patches(self, mask: Tensor) -> Tensor:
        """Cells of each patch, (B, patches, cells)."""
        spatial_dims = mask.ndim - 2
        split = mask.view(len(mask), *(self.grid, self.patch) * spatial_dims)
        grids = range(1, 2 * spatial_dims, 2)
        cells = range(2, 2 * spatial_dims + 1, 2)
        return split.permute(0, *grids, *cells).reshape(len(mask), len(self.positions), -1)


class ScoreContext(nn.Module):
    """A token for each score; those of absent ones are zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attributes = AttributeEmbedding()
        self.project = nn.Linear(2 * self.attributes.width, width)
        self.roles = nn.Parameter(0.02 * torch.randn(NUM_ATTRIBUTES, width))

    def forward(self, scores: Tensor) -> Tensor:
        """Tokens (B, 5, width) of scores (B, 5)."""
        return _score_tokens(scores, self.attributes, self.project, self.roles)


def _score_tokens(
    scores: Tensor, attributes: AttributeEmbedding, project: nn.Linear, roles: Tensor
) -> Tensor:
    """A token for each score: its own row, and the merged vector of the company it keeps."""
    merged = attributes(scores)[:, None].expand(-1, NUM_ATTRIBUTES, -1)
    scored = torch.cat([attributes.rows(scores), merged], dim=2)
    tokens: Tensor = (project(scored) + roles) * (scores > 0)[..., None]
    return tokens


class Conditioner(nn.Module):
    """Encodes conditions as one of the four configurations of system A asks."""

    def __init__(self, config: LatentDiffusionConfig, latent_size: int) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.with_lungs = config.conditioning >= 4
        self.context: SingleContext | TokenContext | None = None
        if config.conditioning >= 2:
            attributes = AttributeEmbedding() if config.conditioning >= 3 else None
            self.context = (
                SingleContext(latent_size**2, attributes)
                if config.context == "single"
                else TokenContext(latent_size, config.channels[0], attributes)
            )

    @property
    def num_channels(self) -> int:
        """Input channels beside x_t."""
        return 2 if self.with_lungs else 1

    @property
    def context_width(self) -> int | None:
        """Width of a context token; None without cross-attention."""
        return self.context.width if self.context is not None else None

    def forward(self, condition: ConditionBatch) -> EncodedCondition:
        """What the network reads of these conditions."""
        mask = box_mask(condition.box, condition.layout.shape[-1], self.latent_size)
        channels = [mask]
        if self.with_lungs:
            channels.append(lung_mask(condition.layout, self.latent_size))
        context = self.context(mask, condition.attributes) if self.context is not None else None
        return EncodedCondition(torch.cat(channels, dim=1), context)
