"""What a report shows of volumes, and that each picture says what is real."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from raysynth.case import Label
from raysynth.evaluation.volume_pictures import compared_rows, middle_of, planes_tile
from raysynth.report.html import Scroll, write_report
from tests.report.test_html import _data

WINDOW = (-1000.0, 400.0)


def _layout() -> np.ndarray:
    layout = np.full((16, 16, 16), Label.BODY, np.uint8)
    layout[2:10, 4:12, 2:6] = Label.LEFT_LUNG
    return layout


def test_the_nodule_is_looked_at_then_the_lungs_then_the_middle() -> None:
    layout = _layout()
    assert middle_of(layout, (1, 2, 3, 5, 6, 7)) == (3, 4, 5)
    assert middle_of(layout, None) == (6, 8, 4)
    layout[4:6, 8:10, 2:4] = Label.NODULE
    assert middle_of(layout, None) == (5, 9, 3)
    assert middle_of(np.zeros((16, 16, 16), np.uint8), None) == (8, 8, 8)


def test_hosts_stand_beside_what_was_made_of_their_layout() -> None:
    layout = _layout()
    host = np.full(layout.shape, -300, np.int16)
    sample = np.where(layout == Label.LEFT_LUNG, host + 250, host).astype(np.int16)
    rows = compared_rows(host, layout, sample, None, "real", WINDOW)
    assert [row[0].caption for row in rows] == [
        f"real host, {plane}" for plane in ("axial", "coronal", "sagittal")
    ]
    for row in rows:
        _, drawn, made, difference = row
        assert made.caption == "synthetic"
        inside = made.hu == -50
        assert inside.any()
        assert (drawn.hu[inside] == -850).all()
        # No difference is the middle of the window, 250 HU a quarter of it further.
        assert (difference.hu[~inside] == -300).all()
        assert (difference.hu[inside] == 50).all()


def test_a_page_of_volumes_shows_planes_animations_and_rows(tmp_path: Path) -> None:
    layout = _layout()
    hu = np.where(layout == Label.BODY, 40, -850).astype(np.int16)
    tile = planes_tile(hu, layout, None, "case 1")
    data = replace(
        _data(),
        space="volume",
        real=[tile],
        synthetic=[replace(tile, caption="all made")],
        scrolls=[Scroll({"real": hu, "synthetic": hu}, "left: real; right: synthetic")],
        compared=compared_rows(hu, layout, hu, None, "real", WINDOW),
    )
    path = tmp_path / "report.html"
    write_report(data, path)
    page = path.read_text()
    (encoded,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).n_frames == 16
    for text in ("left: real; right: synthetic", "real host, axial", "sets of volumes", "coronal"):
        assert text in page
    assert "Neighbouring slices” are" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(one))).size for one in pictures}
    assert {(3 * 16 + 4, 16), (16, 16)} <= sizes
