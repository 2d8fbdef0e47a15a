"""ONNX: the encoder as a graph for any batch and image size, compared with PyTorch before it is written.

timm resamples position embeddings by an operator that runtimes implement differently. Bicubic resampling is separable,
so here two matrices do it, made inside the graph from the sizes of the image by plain arithmetic.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm.models.eva
import timm.models.vision_transformer
import torch
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.extras import require
from gtsa.models.backbone import Backbone

OUTPUTS = ("patch_tokens", "pooled", "prefix_tokens")
TOLERANCE = 1e-4  # largest difference from PyTorch, as a share of the largest value of an output
LARGEST = 2**31 - 2**24  # bytes of weights: protobuf, and so an ONNX file, ends at 2 GiB
OPSET = 18
EDGE = -0.5  # the parameter of PyTorch's antialiased bicubic kernel


def check_installed() -> None:
    """Raises UserError (2) where the libraries of the extra ``onnx`` are missing."""
    require("--to onnx", "onnx", "onnx", "onnxruntime", "onnxscript")


def convert(backbone: Backbone, properties: Mapping[str, str]) -> tuple[bytes, float]:
    """The encoder as the bytes of an ONNX file, and its largest relative difference from PyTorch.

    Input: ``images`` [batch, 3, height, width], normalised floats; both sides are multiples of the patch. Outputs:
    ``patch_tokens`` [batch, rows, columns, D], ``pooled`` [batch, D], and ``prefix_tokens`` [batch, p, D] if there are
    any.

    Args:
        properties: ``metadata_props`` of the file.

    Raises:
        UserError: the graph differs from PyTorch, the model cannot be converted or is too large (4).
    """
    import onnx

    backbone = backbone.cpu().eval()
    if (size := sum(p.numel() * 4 for p in backbone.parameters())) > LARGEST:
        raise UserError(f"its weights have {size / 2**30:.1f} GiB, and an ONNX file ends at 2 GiB; use --to timm", 4)
    model = _traced(backbone)
    _remove_traces(model)
    _name_sizes(model)
    _refuse_parts_of_patches(model, backbone.patch_size)
    onnx.helper.set_model_props(model, dict(properties))
    data: bytes = model.SerializeToString()
    gap = _compare(backbone, data)
    if not gap <= TOLERANCE:
        raise UserError(
            f"the ONNX graph of {backbone.model} differs from PyTorch by {gap:.1e} of its largest value, and "
            f"{TOLERANCE:g} is allowed; nothing was written. Use --to timm",
            4,
        )
    return data, gap


class _Graph(nn.Module):
    """Images -> the outputs, by name."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.vit = backbone.vit
        self.patch, self.prefix, self.pooling = backbone.patch_size, backbone.num_prefix_tokens, backbone.pooling

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.vit(images)  # [N, prefix + h * w, D]
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        pooled = tokens[:, 0] if self.pooling == "cls" else patches.mean(1)
        rows, columns = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        outputs = patches.reshape(tokens.shape[0], rows, columns, tokens.shape[-1]), pooled
        return (*outputs, prefix) if self.prefix else outputs


def _traced(backbone: Backbone) -> Any:
    """The graph as a ModelProto. The exporter prints nothing."""
    patch = backbone.patch_size
    batch, rows, columns = map(torch.export.Dim, ("batch", "rows", "columns"))
    names = list(OUTPUTS if backbone.num_prefix_tokens else OUTPUTS[:2])
    try:
        with torch.no_grad(), _symbolic(backbone.vit), _quiet():
            program = torch.onnx.export(
                _Graph(backbone).eval(),
                (torch.zeros(2, 3, 5 * patch, 4 * patch),),
                dynamo=True,
                input_names=["images"],
                output_names=names,
                dynamic_shapes=({0: batch, 2: patch * rows, 3: patch * columns},),
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        return program.model_proto
    except Exception as error:  # the exporter raises nearly anything
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"PyTorch cannot export {backbone.model} to ONNX ({type(error).__name__}: {reason}); use --to timm", 4
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no log of the exporter: they are about its own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _symbolic(vit: Any) -> Iterator[None]:
    """Positions are computed from sizes that are known only when the graph runs.

    timm's own code for both kinds would fix the sizes of the example: the resampling of position embeddings, and
    DINOv3's rotary embedding, which divides by a Python number.
    """
    modules = (timm.models.vision_transformer, timm.models.eva)
    before = [module.resample_abs_pos_embed for module in modules]
    rope: Any = getattr(vit, "rope", None)
    centred = hasattr(rope, "normalize_coords")
    for module in modules:
        module.resample_abs_pos_embed = _resampled_positions
    if centred:
        rope._create_embed = lambda shape, no_aug=False: _rotary_embedding(rope, shape)
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.resample_abs_pos_embed = function
        if centred:
            del rope._create_embed


def _resampled_positions(
    positions: Tensor, new_size: tuple[int, int], old_size: tuple[int, int], num_prefix_tokens: int, **_: object
) -> Tensor:
    """``timm.layers.resample_abs_pos_embed`` by two matrix products: [1, p + n, D] -> [1, p + rows * columns, D]."""
    (old_rows, old_columns), width = old_size, positions.shape[-1]
    prefix, grid = positions[:, :num_prefix_tokens], positions[0, num_prefix_tokens:]
    by_row = bicubic(new_size[0], old_rows) @ grid.reshape(old_rows, old_columns * width)
    resampled = bicubic(new_size[1], old_columns) @ by_row.reshape(-1, old_columns, width)
    return torch.cat([prefix, resampled.reshape(1, -1, width)], dim=1)


def bicubic(new: int, old: int) -> Tensor:
    """The matrix [new, old] of PyTorch's antialiased bicubic resampling of a line of ``old`` values to ``new``."""
    scale = old / torch.scalar_tensor(new)
    centres = (torch.arange(new) + 0.5) * scale
    distance = ((torch.arange(old) + 0.5 - centres[:, None]) / scale.clamp(min=1)).abs()
    near = ((EDGE + 2) * distance - (EDGE + 3)) * distance**2 + 1
    far = ((EDGE * distance - 5 * EDGE) * distance + 8 * EDGE) * distance - 4 * EDGE
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def _rotary_embedding(rope: Any, shape: tuple[int, int]) -> Tensor:
    """DINOv3's rotary embedding [rows * columns, 2 * D], as timm makes it in evaluation mode."""
    if rope.normalize_coords != "separate" or rope.grid_offset or rope.grid_indexing != "ij":
        raise NotImplementedError("rotary embeddings with other coordinates than DINOv3's")
    lines = [2 * (torch.arange(side) + 0.5) / torch.scalar_tensor(side) - 1 for side in shape]
    coordinates = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat(rope._get_pos_embed_from_coords(coordinates), dim=-1)


def _remove_traces(model: Any) -> None:
    """Removes where in whose files each node was traced: the exporter writes paths of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _name_sizes(model: Any) -> None:
    """Gives the sizes of input and outputs names that a reader understands."""
    names = {
        "images": ("batch", None, "height", "width"),
        "patch_tokens": ("batch", "rows", "columns", None),
        "pooled": ("batch", None),
        "prefix_tokens": ("batch", None, None),
    }
    for value in (*model.graph.input, *model.graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=True):
            if name:
                dimension.dim_param = name


def _refuse_parts_of_patches(model: Any, patch: int) -> None:
    """Makes the graph fail where a side is no multiple of the patch; it would leave the last pixels out otherwise.

    The input is reshaped to whole patches first. This is not possible if pixels would be left.
    """
    import onnx

    graph = model.graph
    for node in graph.node:
        node.input[:] = ["whole_images" if name == "images" else name for name in node.input]
    unit = onnx.numpy_helper.from_array(np.array([1, 1, patch, patch], np.int64), "patch_shape")
    graph.initializer.append(unit)
    check = f"height_and_width_must_be_multiples_of_{patch}"
    nodes = [
        onnx.helper.make_node("Shape", ["images"], ["images_shape"]),
        onnx.helper.make_node("Div", ["images_shape", "patch_shape"], ["patches_shape"]),
        onnx.helper.make_node("Mul", ["patches_shape", "patch_shape"], ["whole_shape"]),
        onnx.helper.make_node("Reshape", ["images", "whole_shape"], ["whole_images"], name=check, allowzero=1),
    ]
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)


def _compare(backbone: Backbone, data: bytes) -> float:
    """The largest relative difference of an output from PyTorch: batches of 1 and 3, at the own size and at another."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    own = max(1, backbone.arguments["img_size"] // backbone.patch_size)
    draw = torch.Generator().manual_seed(0)
    gap = 0.0
    grids = (own, own), (own + 2, max(1, own - 3))
    for batch, (rows, columns) in itertools.product((1, 3), grids):
        shape = batch, 3, rows * backbone.patch_size, columns * backbone.patch_size
        images = torch.randn(shape, generator=draw)
        with torch.no_grad():
            tokens = backbone(images)
        expected = (tokens.patches, backbone.pooled(tokens), tokens.prefix)
        for output, reference in zip(session.run(None, {"images": images.numpy()}), expected, strict=False):
            reference = reference.numpy()
            if output.shape != reference.shape:
                return float("inf")
            gap = max(gap, float(np.abs(output - reference).max() / np.abs(reference).max()))
    return gap
