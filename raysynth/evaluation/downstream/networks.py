"""Residual networks whose width can be chosen, so that they train on a CPU as well."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.resnet import BasicBlock
from torchvision.ops import SqueezeExcitation
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from raysynth.config.downstream import DownstreamConfig

REDUCTION = 16
"""Channels a stage has for each that its weights are computed from."""

ANCHORS_PX = (8, 16, 32, 64, 128)
"""A size for each level of the pyramid, in pixels of `detection_size`."""

MAX_BOXES = 100
MIN_SCORE = 0.01

Norm = Callable[[int], nn.Module]

GROUP_NORM = partial(nn.GroupNorm, 4)
"""Batches of a few slices are too small for batch norm."""


class SEBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """A residual block whose channels are weighed by what is in all of the image."""

    def __init__(self, channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        downsample = None
        if stride > 1 or channels != out_channels:
            convolution = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            downsample = nn.Sequential(convolution, norm(out_channels))
        super().__init__(channels, out_channels, stride, downsample, norm_layer=norm)
        squeezed = max(4, out_channels // REDUCTION)
        weighed = SqueezeExcitation(out_channels, squeezed)
        self.bn2 = nn.Sequential(norm(out_channels), weighed)


def stages(width: int, norm: Norm) -> list[nn.Sequential]:
    """The four stages of a ResNet-18 with squeeze and excitation (Hu et al. 2018).

    Each has twice the channels of the one before, and half its pixels a side.
    """
    widths = [width << stage for stage in range(4)]
    return [
        nn.Sequential(
            SEBlock(before, channels, 1 if before == channels else 2, norm),
            SEBlock(channels, channels, 1, norm),
        )
        for before, channels in zip([width, *widths], widths, strict=False)
    ]


def se_resnet18(width: int) -> nn.Sequential:
    """One logit of images (B, 1, H, W).

    Its stem has no stride, so that crops of 32 or 16 pixels keep their detail.
    """
    norm = nn.BatchNorm2d
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), norm(width), nn.ReLU(True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 1)]
    return nn.Sequential(*stem, *stages(width, norm), *head)


def faster_rcnn(config: DownstreamConfig) -> nn.Module:
    """Torchvision's Faster R-CNN with a feature pyramid, from fresh weights.

    With the backbone `narrow` all its parts shrink with `config.width`; of 64 they are as wide as
    torchvision's own.
    """
    pixels, channels, width = config.detection_size, 256, 1024
    if config.backbone == "narrow":
        channels, width = 4 * config.width, 16 * config.width
        backbone = _narrow_pyramid(config.width, channels)
    else:
        backbone = resnet_fpn_backbone(
            backbone_name=config.backbone, weights=None, norm_layer=GROUP_NORM, trainable_layers=5
        )
    shapes = ((1.0,),) * len(ANCHORS_PX)  # boxes are squares
    network: nn.Module = FasterRCNN(
        backbone,
        min_size=pixels,
        max_size=pixels,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in ANCHORS_PX), shapes),
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=200,
        rpn_batch_size_per_image=64,
        box_head=TwoMLPHead(channels * 7**2, width),
        box_predictor=FastRCNNPredictor(width, num_classes=2),
        box_batch_size_per_image=64,
        box_score_thresh=MIN_SCORE,
        box_detections_per_img=MAX_BOXES,
    )
    return network


def _narrow_pyramid(width: int, channels: int) -> nn.Module:
    """Levels at a half to a sixteenth of the image's pixels a side: nodules are small."""
    stem = nn.Sequential(
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), GROUP_NORM(width), nn.ReLU(True)
    )
    names = [f"stage{number}" for number in range(4)]
    parts = zip(names, stages(width, GROUP_NORM), strict=True)
    pyramid: nn.Module = BackboneWithFPN(
        nn.Sequential(OrderedDict([("stem", stem), *parts])),
        return_layers={name: str(number) for number, name in enumerate(names)},
        in_channels_list=[width << number for number in range(4)],
        out_channels=channels,
        extra_blocks=LastLevelMaxPool(),
    )
    return pyramid
