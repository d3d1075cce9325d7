"""The networks that MONAI supplies, and how one looks at a volume larger than its crops.

`import monai` imports every module of it, and through them two large packages that it takes as
optional and that these networks do not need. Hidden meanwhile, they leave a worker's start half
as long.
"""

from __future__ import annotations

import sys

_HIDDEN = [name for name in ("torchvision", "transformers") if name not in sys.modules]
for _name in _HIDDEN:
    sys.modules[_name] = None  # type: ignore[assignment]  # "there is no such module"
try:
    from monai.inferers.utils import sliding_window_inference
    from monai.networks.blocks.spade_norm import SPADE
    from monai.networks.blocks.upsample import UpSample
    from monai.networks.nets.autoencoderkl import AEKLResBlock, AutoencoderKL
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
    from monai.networks.nets.patchgan_discriminator import PatchDiscriminator
    from monai.networks.nets.spade_diffusion_model_unet import SPADEDiffusionModelUNet
    from monai.networks.nets.spade_network import SPADEDecoder
    from monai.networks.nets.unet import UNet
finally:
    for _name in _HIDDEN:
        del sys.modules[_name]

__all__ = [
    "SPADE",
    "AEKLResBlock",
    "AutoencoderKL",
    "DiffusionModelUNet",
    "PatchDiscriminator",
    "SPADEDecoder",
    "SPADEDiffusionModelUNet",
    "UNet",
    "UpSample",
    "sliding_window_inference",
]
