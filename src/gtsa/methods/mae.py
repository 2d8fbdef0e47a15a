"""MAE: masked autoencoders (He et al. 2022, arXiv 2111.06377), in the order of the paper.

Shapes: N images (one view each), P patches of side p, k of them visible, D and E widths of encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from gtsa.core.compilation import compilable
from gtsa.core.errors import UserError
from gtsa.core.types import Method, Views
from gtsa.methods.parts import masking
from gtsa.models.backbone import Backbone

VIEWS = {
    "global_crops_number": 1, "local_crops_number": 0, "global_crops_scale": (0.2, 1.0), "rotations": False,
    "hflip": 0.5, "color_jitter": 0.0, "grayscale": 0.0, "gaussian_blur": (0.0, 0.0, 0.0),
}  # fmt: skip


class MAE(Method):
    """The encoder sees a quarter of the patches; a small decoder reconstructs the others. There is no teacher.

    The encoder's position embeddings are learnt, as for all methods here; the paper's are fixed sines and cosines.

    Args:
        encoder: the encoder to train; it is what is exported.
        mask_ratio: fraction of the patches that are masked.
        decoder_dim: width of the decoder: a multiple of 4. If it is a multiple of 32, each head is 32 wide.
        decoder_depth: number of the decoder's blocks.
        normalise: reconstruct each patch normalised by its own mean and standard deviation.
    """

    legend = "loss = mean squared error of the masked patches"
    published_settings: ClassVar = {
        "views": VIEWS, "weight_decay": 0.05, "final_weight_decay": 0.05, "beta2": 0.95, "warmup": 0.05,
        "clip_grad": 0.0, "drop_path": 0.0, "final_learning_rate": 0.0,
    }  # fmt: skip
    base_lr = 1.5e-4
    min_views = 1
    search_space: ClassVar = {"mask_ratio": (0.5, 0.6, 0.75)}

    def __init__(
        self,
        encoder: Backbone,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise UserError(f"mae.mask_ratio: above 0 and below 1, not {mask_ratio}; published is 0.75")
        if decoder_dim < 4 or decoder_dim % 4 or decoder_depth < 1:
            raise UserError("mae: decoder_dim must be a multiple of 4, and decoder_depth at least 1")
        self.student = nn.ModuleDict({"encoder": encoder})
        self.decoder = Decoder(encoder.embed_dim, decoder_dim, decoder_depth, 3 * encoder.patch_size**2)
        self.mask_ratio, self.normalise = mask_ratio, normalise

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        pixels = views.global_crops.pixels.flatten(0, 1)
        order = masking.random_order(len(pixels), self._patches(pixels)).to(pixels.device)
        predicted, masked = self.reconstruct(pixels, order)
        return {"loss": self.errors(predicted, self.targets(pixels), masked).mean()}

    # Asymmetric encoder and decoder (section 3)

    def reconstruct(self, pixels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's prediction of all patches, [N, P, 3 p p], and which of them were masked, bool [N, P].

        Args:
            order: [N, P], a permutation of the patches for each image; the first ones are visible.
        """
        encoder = self.encoder
        count = max(1, round((1 - self.mask_ratio) * order.shape[1]))
        tokens = encoder.visible(pixels, order[:, :count])
        masked = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :count], False)
        grid = pixels.shape[-2] // encoder.patch_size, pixels.shape[-1] // encoder.patch_size
        return self.decoder(tokens[:, encoder.num_prefix_tokens :], order, grid), masked

    def targets(self, pixels: Tensor) -> Tensor:
        """Pixels of every patch, [N, P, 3 p p], each with mean 0 and standard deviation 1 if ``normalise``."""
        p = self.encoder.patch_size
        n, c, height, width = pixels.shape
        cells = pixels.reshape(n, c, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
        cells = cells.reshape(n, self._patches(pixels), -1).to(torch.promote_types(pixels.dtype, torch.float32))
        if not self.normalise:
            return cells
        return (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, keepdim=True) + 1e-6).sqrt()

    @staticmethod
    @compilable
    def errors(predicted: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Mean squared error over the masked patches of each image, [N]."""
        each = (predicted.to(targets.dtype) - targets).square().mean(-1) * masked
        error: Tensor = each.sum(1) / masked.sum(1)
        return error

    @property
    def encoder(self) -> Backbone:
        return self.student["encoder"]  # type: ignore[return-value]

    def _patches(self, pixels: Tensor) -> int:
        return pixels.shape[-2] * pixels.shape[-1] // self.encoder.patch_size**2

    # For evaluation

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.encoder, "student": self.encoder}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """``pixel_score`` of each image: one minus the error of its reconstruction, over the mean error of the same
        reconstruction against up to eight other images. The masked patches are always the same.
        """
        crops = views.global_crops
        pixels = crops.pixels.flatten(0, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            order = masking.random_order(len(pixels), self._patches(pixels)).to(pixels.device)
        predicted, masked = self.reconstruct(pixels, order)
        targets = self.targets(pixels)
        of_others = [
            self.errors(predicted, targets.roll(shift * crops.count, 0), masked)
            for shift in range(1, min(len(crops.pixels), 9))
        ]
        own = self.errors(predicted, targets, masked)
        score = 1 - own / torch.stack(of_others).mean(0) if of_others else torch.zeros_like(own)
        return {"pixel_score": score.reshape(len(crops.pixels), crops.count).mean(1)}


class Decoder(nn.Module):
    """Pre-norm transformer blocks over all patches: visible ones, and a learnt token for each masked one.

    Args:
        width_in: width of the encoder's tokens.
        width: E, a multiple of 4.
        depth: number of blocks.
        out: number of values in a patch.
    """

    def __init__(self, width_in: int, width: int, depth: int, out: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width_in, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        heads = max(1, width // 32)
        heads = heads if width % heads == 0 else 1
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.paint = nn.Linear(width, out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.token, std=0.02)

    @compilable
    def forward(self, visible: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, k, D] tokens of the first k patches of ``order`` [N, P] -> [N, P, out], row by row."""
        tokens = self.embed(visible)
        mask_tokens = self.token.to(tokens.dtype).expand(len(tokens), order.shape[1] - tokens.shape[1], -1)
        positions = order.argsort(dim=1)[..., None].expand(-1, -1, tokens.shape[-1])
        whole = torch.cat([tokens, mask_tokens], dim=1).gather(1, positions)
        return self.paint(self.blocks(whole + sines(grid, tokens.shape[-1]).to(tokens)))  # type: ignore[no-any-return]


def sines(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed position embeddings [h * w, width]: sines and cosines of row and column, a quarter of the width each."""
    rates = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(length, dtype=torch.float64)[:, None] * rates for length in grid)
    parts = [rows.sin(), rows.cos()], [columns.sin(), columns.cos()]
    down, across = (torch.cat(part, 1) for part in parts)
    return torch.cat([down.repeat_interleave(grid[1], 0), across.repeat(grid[0], 1)], 1)
