"""Mask R-CNN, or Faster R-CNN for boxes alone, on a feature pyramid over a ViT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from gtsa.evaluation.heads.feature_pyramid import Pyramid
from gtsa.models.backbone import Backbone

Target = dict[str, Tensor]  # boxes [n, 4] px, labels [n] from 1 on, masks [n, H, W] uint8 if they are trained
SIZE = 8  # side of a level's anchors in strides: 32 to 512 px for a patch of 16 (FPN)
LONGEST = 1333 / 800  # largest ratio of the long side to the scale
LEVELS = ("0", "1", "2", "3", "4")


class Detector(nn.Module):
    """Images to boxes with classes and scores, and masks.

    Strides and anchors are proportional to the patch: for 16 px they are those of torchvision and of the papers.

    Args:
        backbone: a copy of it is trained.
        classes: their number, without the background.
        masks: whether to predict masks too.
        width: channels of pyramid and heads.
        drop_path: stochastic depth of the copy's last block.
        freeze: the copy is not trained.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        masks: bool,
        width: int = 256,
        drop_path: float = 0.0,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = _copy_of(backbone, 0.0 if freeze else drop_path).requires_grad_(not freeze)
        self.freeze, self.masks, self.patch = freeze, masks, backbone.patch_size
        depth = len(self.backbone.vit.blocks)
        self.which = [max(1, round(depth * share)) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.pyramid = Pyramid(backbone.embed_dim, width)
        heads = _heads(self.patch, classes, masks, width)
        self.proposals, self.regions = heads.rpn, heads.roi_heads

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: normalised, [3, H, W] of any sizes.
            targets: the objects of each image, in training mode.

        Returns:
            The mean losses; and for each image: boxes [n, 4] in px of the given image, labels from 1 on, scores
            (descending), and masks [n, 1, 28, 28] of probabilities in the box.
        """
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        pixels = padded(images, 2 * self.patch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            tokens = self.backbone.blocks(pixels, self.which)
        maps = self.pyramid([t.patches.permute(0, 3, 1, 2) for t in tokens])
        with torch.autocast(pixels.device.type, enabled=False):  # bf16 cannot represent all px above 256
            levels = [level.float() for level in maps]
            levels.append(F.max_pool2d(levels[-1], 1, 2))
            named_levels = dict(zip(LEVELS, levels, strict=True))
            proposals, proposal_losses = self.proposals(ImageList(pixels, sizes), named_levels, targets)
            detections, region_losses = self.regions(named_levels, proposals, sizes, targets)
        return proposal_losses | region_losses, detections


class Anchors(nn.Module):
    """torchvision's anchors at exact strides. torchvision rounds them to whole px, which is wrong for a patch of 14."""

    def __init__(self, strides: Sequence[float], ratios: tuple[float, ...] = (0.5, 1.0, 2.0)) -> None:
        super().__init__()
        self.strides = strides
        self.generator = AnchorGenerator(tuple((SIZE * s,) for s in strides), (ratios,) * len(strides))

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """[anchors, 4] in px, for each image."""
        device = maps[0].device
        self.generator.set_cell_anchors(torch.float32, device)
        grids = [list(level.shape[-2:]) for level in maps]
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.generator.grid_anchors(grids, steps))
        return [anchors] * len(images.image_sizes)


class _Width(nn.Module):
    """In place of torchvision's backbone, of which it reads only the number of channels."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


def _heads(patch: int, classes: int, masks: bool, width: int) -> FasterRCNN:
    """torchvision's region proposals and heads with its settings, except for the threshold on scores.

    torchvision leaves out detections that score below 0.05. COCO's AP uses the best hundred of an image at any score,
    so a threshold would only hide the ranking of a weakly trained head. Here there is none.
    """
    anchors = Anchors([patch * share for share in (1 / 4, 1 / 2, 1, 2, 4)])
    options = {
        "rpn_anchor_generator": anchors.generator,
        "box_roi_pool": _pool(7, patch),
        "box_head": TwoMLPHead(width * 49, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, classes + 1),
        "box_score_thresh": 0.0,
        "box_detections_per_img": 100,
    }
    if masks:
        options |= {
            "mask_roi_pool": _pool(14, patch),
            "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
            "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
        }
    network: FasterRCNN = (MaskRCNN if masks else FasterRCNN)(_Width(width), **options)
    network.rpn.anchor_generator = anchors
    return network


def _pool(size: int, patch: int) -> MultiScaleRoIAlign:
    """RoIAlign on the four maps at exact strides. torchvision would guess them as powers of two."""
    pool = MultiScaleRoIAlign(LEVELS[:4], size, sampling_ratio=2)
    pool.scales = [share / patch for share in (4, 2, 1, 1 / 2)]
    pool.map_levels = initLevelMapper(2, 5, canonical_scale=14 * patch, canonical_level=4)  # 224 px for a patch of 16
    return pool


def padded(images: Sequence[Tensor], multiple: int) -> Tensor:
    """[3, H, W] of any sizes -> [N, 3, H, W], zeros at the right and below, sides multiples of ``multiple``."""
    height, width = (max(image.shape[d] for image in images) for d in (-2, -1))
    height, width = (-(-side // multiple) * multiple for side in (height, width))
    return torch.stack([F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images])


def _copy_of(backbone: Backbone, drop_path: float) -> Backbone:
    """A copy with another stochastic depth."""
    copy = Backbone(
        backbone.model, drop_path=drop_path, normalisation=backbone.normalisation, arguments=backbone.arguments
    )
    copy.load_state_dict(backbone.state_dict())
    return copy
