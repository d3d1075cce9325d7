"""Lends `ct-conv@1` to torch-fidelity, so that an outside judge works without a download."""

from __future__ import annotations

import torch
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from raysynth.metrics.features import CtConv

LAYER = str(CtConv.dim)


class CtConvFidelity(FeatureExtractorBase):
    """`ct-conv@1` as torch-fidelity wants it; its input are int16 HU, shape (B, 1, H, W)."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self._extract = CtConv()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The one layer there is."""
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The layer that FID and KID compare."""
        return LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        """It is not a network of modules."""
        return False

    def forward(self, hu: torch.Tensor) -> tuple[torch.Tensor]:
        """Features (B, 80)."""
        return (torch.from_numpy(self._extract(hu[:, 0].cpu().numpy())),)


def register_with_torch_fidelity() -> str:
    """Makes `ct-conv@1` known to torch-fidelity and returns the name it goes by there.

    Then `torch_fidelity.calculate_metrics(input1=..., input2=..., feature_extractor=name, fid=True,
    kid=True, cuda=False)` works on datasets of int16 HU tensors (1, H, W).
    """
    register_feature_extractor(CtConv.name, CtConvFidelity)
    return CtConv.name
