"""gtsa embed: vectors of images by a frozen backbone, for search, clustering and probes in other tools."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from gtsa.core.errors import UserError, escaped
from gtsa.core.settings import AUTO
from gtsa.core.terminal import say
from gtsa.data.images.pixels import Range
from gtsa.data.scan import group_by_reason, open_images
from gtsa.data.sources import Selection, Source
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.embed_requirements import check_arguments
from gtsa.evaluation.embedding_files import FORMATS
from gtsa.evaluation.embedding_work import Embedded, Images, Work, work_folder
from gtsa.models.backbone import Backbone
from gtsa.models.formats import weights_path
from gtsa.models.transform import input_size
from gtsa.models.weights import load_backbone
from gtsa.training import threads
from gtsa.training.devices import launch_fabric, resolve_device, resolve_workers

PART = 2_000  # images after which an interrupted command resumes, without --shard-size
Kind = Literal["mean", "cls", "patches"]


@threads.considerate()
def embed(
    weights: str | os.PathLike[str],
    data: object,
    out: str | os.PathLike[str],
    tokens: Kind | Sequence[Kind] = (),
    dtype: Literal["float32", "float16"] = "float32",
    size: int | Sequence[int] = (),
    shard_size: int | None = None,
    network: Literal["teacher", "student"] = "teacher",
    model: str | None = None,
    batch_size: int = 32,
    workers: int | Literal["auto"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_bad: float = 0.01,
    range16: Range | None = None,
    data_root: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow_links: bool = False,
) -> Embedded:
    """Writes the vectors of images, with their names and sizes. The same command resumes after an interruption.

    Images are prepared as by timm's evaluation transform: the short side is resized, and the centre is cut.

    Args:
        weights: a run, an export, or other weights (docs/weights.md).
        data: folder, list file, or in Python any torch Dataset of images.
        out: a ``.parquet`` file (extra ``embed``), or a ``.npy`` file with the names beside it.
        tokens: ``mean`` of the patch tokens, the ``cls`` token, all ``patches``; none: the vector that was trained.
        dtype: of the vectors in the file; they are computed in float32.
        size: side, or height and width, of the network's input, px; none: that of the weights.
        shard_size: images a shard; ``out`` is then a folder of shards.
        network: the teacher or the student, where the weights hold both.
        model: timm's name of the model, where the weights do not name it.
        batch_size: images a forward pass.
        workers: processes that read images.
        device: auto: the GPU if there is one.
        max_bad: share of images that may be unreadable; one always may. They are left out and recorded.
        range16: values of 16-bit images that become black and white; None: as in the training of the weights.
        data_root: for list files: the folder that paths are relative to.
        include: patterns of paths below the folder; other images are left out.
        exclude: patterns of paths below the folder that are left out.
        follow_links: follow symbolic links that lead out of the folder.

    Raises:
        UserError: a setting is wrong, or ``out`` exists (2); there are no images, or too many unreadable ones (3); the
            weights are damaged (4); the disk is full, or another process writes ``out`` (6).
    """
    # Arguments, device and weights. What can be checked without the weights is checked before they are read.
    spec = weights_path(weights)
    path, given = Path(out), (tokens,) if isinstance(tokens, str) else tuple(tokens)
    sides = (size,) if isinstance(size, int) else tuple(size)
    check_arguments(path, given, dtype, sides, shard_size, batch_size, workers, max_bad, range16)
    where = resolve_device(_Where(device, AUTO if workers == "auto" else workers))
    resolve_workers(where)
    backbone, description = load_backbone(spec, network, model)
    kinds = _kinds(given, backbone)
    height, width = input_size(sides or (backbone.arguments["img_size"],), backbone.patch_size)
    range16 = backbone.range16 if range16 is None else range16
    form = FORMATS[path.suffix](
        _shapes(kinds, backbone, height, width), dtype, _facts(backbone, kinds, dtype, height, width)
    )

    # The images, and how they become the network's input.
    say(description)
    source = open_images(data, Selection(range16, data_root, include, exclude, follow_links))
    fabric = launch_fabric(where.settings)
    context = EvalContext(fabric, batch_size=batch_size, workers=where.settings.workers)
    images = Images(source, (height, width), backbone.normalisation)

    # The work, in parts. The command that resumes it has to be the same.
    job = {**form.facts, "range16": list(range16), "batch_size": batch_size, "shard_size": shard_size or PART}
    job |= {"images": len(source), "list": _digest(source), "sharded": shard_size is not None}
    try:
        with work_folder(path, form, job) as folder:
            work = Work(folder, form, source, shard_size or PART, max_bad)
            work.embed(images, backbone.to(fabric.device).eval(), context)
            result = work.finish(path, sharded=shard_size is not None)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--out {path} cannot be written: {reason}; then give the same command again", 6) from None
    arrays = [file.name for file in form.outputs(path) if file.suffix == path.suffix]
    _report(result, [path.name] if shard_size else arrays)
    return result


@dataclass(frozen=True)
class _Where:
    """The settings of the device; float32, so that vectors are those of an export."""

    device: str
    workers: int
    devices: int = 1
    nodes: int = 1
    precision: str = "32"

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> _Where:
        return replace(self, **(update or {}))


def _kinds(tokens: tuple[str, ...], backbone: Backbone) -> tuple[str, ...]:
    """The kinds of tokens, each once. None given: the vector that was trained."""
    kinds = tuple(dict.fromkeys(tokens)) or (backbone.pooling,)
    if "cls" in kinds and not backbone.num_prefix_tokens:
        raise UserError("--tokens cls: this backbone has no CLS token; use mean")
    return kinds


def _shapes(kinds: Sequence[str], backbone: Backbone, height: int, width: int) -> dict[str, tuple[int, ...]]:
    grid = height // backbone.patch_size, width // backbone.patch_size
    return {kind: (*grid, backbone.embed_dim) if kind == "patches" else (backbone.embed_dim,) for kind in kinds}


def _facts(backbone: Backbone, kinds: Sequence[str], dtype: str, height: int, width: int) -> dict[str, Any]:
    """What the files say of themselves."""
    mean, std = backbone.normalisation
    return {
        "gtsa_version": version("gtsa"),
        "weights": backbone.fingerprint,
        "model": backbone.model,
        "patch_size": backbone.patch_size,
        "size": [height, width],
        "grid": [height // backbone.patch_size, width // backbone.patch_size],
        "embed_dim": backbone.embed_dim,
        "tokens": list(kinds),
        "pooling": backbone.pooling,
        "dtype": dtype,
        "mean_of_pixels": list(mean),
        "std_of_pixels": list(std),
    }


def _digest(source: Source) -> str:
    """SHA-256 of the images' names and bytes, 16 digits."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(f"{source.size(index)} ".encode() + os.fsencode(source.name(index)) + b"\0")
    return digest.hexdigest()[:16]


def _report(result: Embedded, names: Sequence[str]) -> None:
    for line in group_by_reason(result.left_out):
        say(f"left out: {line}")
    files = ", ".join(escaped(str(result.path.with_name(name))) for name in names)
    say(f"{files}: {result.images:,} images")
