"""For tests of evaluations: labelled images in memory, a context, and backbones with known features."""

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from gtsa.core.types import Tokens
from gtsa.data.images.pixels import BadImage
from gtsa.data.labels import Labelled
from gtsa.evaluation.context import EvalContext


class Pictures:
    """A source of images in memory."""

    def __init__(self, images, names=None):
        self.images, self.names = images, names or [f"{i:03d}.png" for i in range(len(images))]
        self.ignored, self.unreadable, self.range16 = {}, [], (0.0, 65535.0)

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return self.names[index]

    def size(self, index):
        return 0

    def path(self, index):
        return None

    def read(self, index, detail=None):
        if self.images[index] is None:
            raise BadImage("damaged")
        return self.images[index]


def labelled(images, targets=None, kind="classes", classes=("a", "b"), names=None, **more):
    targets = [None] * len(images) if targets is None else targets
    return Labelled(Pictures(images, names), range(len(images)), targets, kind, tuple(classes), "digest", **more)


def make_context(**options):
    return EvalContext(Fabric(accelerator="cpu", devices=1), **{"batch_size": 16, **options})


def noise(count, side=32, seed=0):
    """uint8 images [3, side, side] of random pixels."""
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(draw.integers(0, 256, (3, side, side), dtype=np.uint8)) for _ in range(count)]


def coloured(classes, side=32, seed=0):
    """An image of one colour, with noise, for each class: red, green, blue, yellow, ..."""
    hues = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
    draw = np.random.default_rng(seed)
    return [
        torch.from_numpy((200 * hues[c][:, None, None] + draw.integers(0, 40, (3, side, side))).astype(np.uint8))
        for c in classes
    ]


class Stub(nn.Module):
    """In place of a Backbone. ``see`` computes patch tokens [N, h, w, D] of normalised pixels, equal for all blocks."""

    num_prefix_tokens = 0

    def __init__(self, see, patch=8):
        super().__init__()
        self.see, self.patch_size = see, patch
        self.normalisation = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def blocks(self, images, which=(), norm=True):
        tokens = Tokens(self.see(images), images.new_zeros(len(images), 0, 1))
        return [tokens] * max(1, len(which))

    def forward(self, images):
        return self.blocks(images)[-1]

    @property
    def embed_dim(self):
        return self.see(torch.zeros(1, 3, 4 * self.patch_size, 4 * self.patch_size)).shape[-1]


def cells(images, patch=8):
    """Pixels of every patch: [N, 3, H, W] -> [N, h, w, 3 * patch * patch]."""
    n, c, h, w = images.shape
    blocks_of_pixels = images.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return blocks_of_pixels.reshape(n, h // patch, w // patch, -1)
