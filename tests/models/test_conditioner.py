import numpy as np
import pytest
import torch
from torch.nn import functional

from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.models.conditioner import (
    AttributeEmbedding,
    TokenContext,
    box_mask,
    collate,
    edge_map,
    lung_mask,
)


def test_attribute_embedding_has_the_published_size():
    assert sum(p.numel() for p in AttributeEmbedding().parameters()) == 24_580


def test_absent_attributes_embed_to_zero():
    embedding = AttributeEmbedding()
    scores = torch.tensor([[0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [0, 0, 3, 0, 0]])
    vectors = embedding(scores)
    assert torch.equal(vectors[0], torch.zeros(10))
    assert not torch.allclose(vectors[1], vectors[2])
    assert (embedding.rows(scores)[2].abs().sum(dim=1) > 0).tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("box", [(8, 16, 24, 32), (3, 5, 9, 6), (0, 0, 64, 64), (-1, -1, -1, -1)])
def test_box_mask_is_the_area_pooled_mask(box):
    drawn = torch.zeros(1, 1, 64, 64)
    if box[0] >= 0:
        drawn[..., box[0] : box[2], box[1] : box[3]] = 1
    pooled = functional.interpolate(drawn, size=(16, 16), mode="area")
    torch.testing.assert_close(box_mask(torch.tensor([box]), 64, 16), pooled)


def test_box_mask_in_three_dimensions():
    mask = box_mask(torch.tensor([[0, 4, 8, 4, 8, 16]]), 16, 4)
    assert mask.shape == (1, 1, 4, 4, 4)
    assert mask[0, 0, 0, 1, 2:].tolist() == [1, 1]
    assert mask.sum() == 2


def test_lung_mask_pools_both_lungs_and_hides_the_nodule():
    layout = torch.zeros(1, 8, 8, dtype=torch.uint8)
    layout[:, :4, :2], layout[:, :4, 2:4] = Label.LEFT_LUNG, Label.RIGHT_LUNG
    layout[:, 4:, 4:], layout[:, 4:, :2] = Label.BODY, Label.TRACHEA
    plain = lung_mask(layout, 2)
    assert plain.tolist() == [[[[1, 0], [0, 0]]]]
    layout[:, 1:3, 1:3] = Label.NODULE
    assert torch.equal(lung_mask(layout, 2), plain)


def test_collate_fills_absent_parts_with_null():
    layout = np.full((16, 16), Label.BODY, dtype=np.uint8)
    batch = collate(
        [Condition(layout=layout), Condition(box=(1, 2, 3, 4), attributes=(1, 2, 3, 4, 5))], 16
    )
    assert batch.layout[0].unique().tolist() == [Label.BODY]
    assert batch.layout[1].unique().tolist() == [0]
    assert batch.box.tolist() == [[-1] * 4, [1, 2, 3, 4]]
    assert batch.attributes.tolist() == [[0] * 5, [1, 2, 3, 4, 5]]


def test_drop_makes_null_rows_of_the_masked_samples_only():
    layout = np.full((16, 16), Label.BODY, dtype=np.uint8)
    batch = collate([Condition(layout, (1, 2, 3, 4), (1, 2, 3, 4, 5))] * 3, 16)
    dropped, null = batch.drop(torch.tensor([True, False, True])), batch.null()
    for name in ("layout", "box", "attributes"):
        rows = getattr(dropped, name)
        assert torch.equal(rows[[0, 2]], getattr(null, name)[:2])
        assert torch.equal(rows[1], getattr(batch, name)[1])


def test_both_sides_of_a_change_are_an_edge():
    layout = torch.full((2, 5, 5), Label.BODY, dtype=torch.uint8)
    layout[0, 1:4, 1:4] = Label.LIVER  # the same channel as the body, and an edge all the same
    edges = edge_map(layout)
    assert edges.shape == (2, 1, 5, 5)
    assert edges[0, 0].tolist() == [
        [0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 0, 1, 1],
        [1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0],
    ]
    assert not edges[1].any()


def test_mask_tokens_are_patches():
    context = TokenContext(latent_size=16, width=4, attributes=None)
    assert (context.grid, context.patch) == (8, 2)
    mask = torch.zeros(1, 1, 16, 16)
    mask[0, 0, 2:4, 14:16] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    patches = context._patches(mask)
    assert patches[0, 8 + 7].tolist() == [1, 2, 3, 4]
    assert patches.sum() == 10
