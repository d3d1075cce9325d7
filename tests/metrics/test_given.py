from pathlib import Path

import numpy as np
import pytest

from raysynth.errors import InputError
from raysynth.metrics.features import load_extractor

MODULE = """
import numpy as np

class Means:
    name, dim = "means@3", 1

    def __call__(self, hu):
        return hu.mean((1, 2))[:, None]

class Wide(Means):
    dim = 2

class Broken(Means):
    def __call__(self, hu):
        return np.full((len(hu), 1), np.nan)

class Nameless(Means):
    name = "means"

class Dimless(Means):
    dim = None
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given_by_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_of_the_users_module_gives_an_extractor() -> None:
    extract = load_extractor("module:given_by_user:Means")
    assert (extract.name, extract.dim, extract.spatial_dims) == ("means@3", 1, 2)
    features = extract(np.full((4, 16, 16), -700, np.int16))
    assert features.dtype == np.float32
    assert features.tolist() == [[-700.0]] * 4


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("given_by_nobody:Means", "No module named 'given_by_nobody': name a module"),
        ("given_by_user:Mean", "has no attribute 'Mean': name a module"),
        ("given_by_user:Nameless", "whose name is 'means': metric keys need NAME@VERSION"),
        ("given_by_user:Dimless", "whose dim is None"),
    ],
)
def test_what_is_no_extractor_is_refused(place: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_extractor(f"module:{place}")


def test_features_that_are_none_are_refused() -> None:
    hu = np.zeros((4, 16, 16), np.int16)
    wide, broken = (load_extractor(f"module:given_by_user:{name}") for name in ("Wide", "Broken"))
    with pytest.raises(InputError, match=r"gave features \(4, 1\) of 4 samples: .* \(4, 2\)"):
        wide(hu)
    with pytest.raises(InputError, match="features of 4 of 4 samples are not finite"):
        broken(hu)
