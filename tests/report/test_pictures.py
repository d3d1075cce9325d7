"""Volumes as pictures: planes lie where they are, and animations have their frames."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from scipy import ndimage

from raysynth.report.pictures import (
    GAP_PX,
    MAX_FRAMES,
    MAX_SCROLL_BYTES,
    beside,
    plane_boxes,
    planes,
    scroll,
    three_planes,
    webp_data_uri,
)


def _numbered(shape: tuple[int, int, int]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def test_planes_meet_in_the_voxel_and_show_the_head_above() -> None:
    volume = _numbered((4, 5, 6))
    axial, coronal, sagittal = planes(volume, (1, 2, 3))
    assert (axial.shape, coronal.shape, sagittal.shape) == ((5, 6), (4, 6), (4, 5))
    voxel = volume[1, 2, 3]
    assert axial[2, 3] == coronal[4 - 1 - 1, 3] == sagittal[4 - 1 - 1, 2] == voxel
    # The last plane of a volume is the one nearest to the head: it is the uppermost row.
    assert np.array_equal(coronal[0], volume[-1, 2])
    assert np.array_equal(sagittal[-1], volume[0, :, 3])


def test_planes_beside_each_other_keep_their_scale() -> None:
    volume = _numbered((4, 5, 6))
    picture = three_planes(volume, (1, 2, 3), -1)
    assert picture.shape == (5, 6 + 6 + 5 + 2 * GAP_PX)
    assert np.array_equal(picture[:, :6], volume[1])
    assert (picture[:, 6 : 6 + GAP_PX] == -1).all()
    assert np.array_equal(picture[:4, 6 + GAP_PX : 12 + GAP_PX], volume[::-1, 2])
    assert (picture[4:, 6:] == -1).all()


def test_a_box_lies_in_every_plane_where_its_voxels_are() -> None:
    volume, box = np.zeros((8, 9, 10), np.uint8), (1, 2, 3, 4, 6, 8)
    volume[1:4, 2:6, 3:8] = 1
    at = (2, 4, 5)
    in_planes = plane_boxes(box, volume.shape)
    picture = three_planes(volume, at)
    for plane, one in zip(planes(volume, at), in_planes, strict=True):
        assert np.array_equal(plane == 1, _filled(plane.shape, [one]))
    assert np.array_equal(picture == 1, _filled(picture.shape, beside(in_planes, volume.shape)))


def _filled(shape: tuple[int, ...], boxes: list[tuple[int, ...]]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for y0, x0, y1, x1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def _frames(encoded: bytes) -> list[np.ndarray]:
    image = Image.open(io.BytesIO(encoded))
    frames = []
    for number in range(image.n_frames):
        image.seek(number)
        frames.append(np.asarray(image.convert("L")))
    return frames


def test_an_animation_runs_through_all_planes_from_the_head_down() -> None:
    real = np.full((10, 24, 24), -1150, np.int16)
    synthetic = real + np.linspace(0, 1500, 10).astype(np.int16)[:, None, None]
    frames = _frames(scroll({"real": real, "synthetic": synthetic}))
    assert len(frames) == 10
    height, width = frames[0].shape
    assert height == 192
    left, right = frames[0][30:150, :190], frames[0][30:150, width - 190 :]
    assert left.mean() < 10
    assert right.mean() > 245  # the head's plane is the brightest
    middles = [frame[30:150, width - 190 :].mean() for frame in frames]
    assert middles == sorted(middles, reverse=True)
    # Both panels are named, whatever page they are shown on.
    assert frames[0][:14, :60].max() > 200
    assert frames[-1][:14, width - 190 : width - 120].max() > 200


def test_large_volumes_are_cut_to_size() -> None:
    noise = np.random.default_rng(0).normal(size=(96, 96, 96))
    smooth = ndimage.gaussian_filter(noise, 0.7)
    hu = (smooth / smooth.std() * 400 - 400).astype(np.int16)
    encoded = scroll({"real": hu, "synthetic": hu[::-1]})
    assert len(encoded) <= MAX_SCROLL_BYTES
    assert len(_frames(encoded)) == MAX_FRAMES
    kind, _, text = webp_data_uri(encoded).partition(",")
    assert kind == "data:image/webp;base64"
    assert base64.b64decode(text) == encoded
