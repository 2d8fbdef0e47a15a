"""The work of gtsa embed, part by part: a part is whole or absent, and a resumed command computes the same."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.core.terminal import Count, say
from gtsa.data.images.pixels import BadImage
from gtsa.data.scan import group_by_reason
from gtsa.data.sources import Source
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.embed_requirements import JOB, check_new, unfinished
from gtsa.evaluation.embedding_files import EmbeddingFormat, Rows, as_text
from gtsa.evaluation.loading import batches_of
from gtsa.models.backbone import Backbone
from gtsa.models.transform import Normalisation, as_image, eval_transform


@dataclass(frozen=True)
class Embedded:
    """The result of ``embed``: the file or folder, its images, and what was left out with the reason."""

    path: Path
    images: int
    left_out: list[tuple[str, str]]


@dataclass
class _Batch:
    """Images that were read, and those that could not be."""

    images: list[int]
    sizes: list[tuple[int, int]]  # width, height, upright
    pixels: Tensor  # [images, 3, height, width], normalised
    bad: list[tuple[int, str]]


class Images(Dataset[_Batch]):
    """Index -> the network's input. An image that cannot be read is recorded with its reason."""

    def __init__(self, source: Source, size: tuple[int, int], normalisation: Normalisation) -> None:
        self.source, self.size, self.normalisation = source, size, normalisation

    def __getitem__(self, index: int) -> _Batch:
        try:
            pixels = self.source.read(index)
        except BadImage as reason:
            return _Batch([], [], torch.empty(0, 3, *self.size), [(index, str(reason))])
        transform = eval_transform(self.size, self.normalisation)
        return _Batch([index], [(pixels.shape[-1], pixels.shape[-2])], transform(as_image(pixels))[None], [])


def _collate(items: list[_Batch]) -> _Batch:
    return _Batch(
        [image for item in items for image in item.images],
        [size for item in items for size in item.sizes],
        torch.cat([item.pixels for item in items]),
        [bad for item in items for bad in item.bad],
    )


# The work, part by part


@contextmanager
def work_folder(path: Path, form: EmbeddingFormat, job: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of finished parts beside ``path``, locked. It must be new, or of the same command.

    Raises:
        UserError: ``path`` exists, or the folder is of another command (2); another process works there (6).
    """
    folder = unfinished(path)
    check_new(path, [path, *form.outputs(path)])
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {path}; wait for it, or stop it", 6) from None
        _check_job(folder, job)
        files.clear_drafts(folder, "*")
        yield folder
    finally:
        os.close(descriptor)


def _check_job(folder: Path, job: Mapping[str, Any]) -> None:
    """Raises UserError (2) where the folder holds the parts of another command, or of images that changed."""
    file = folder / JOB
    if not file.is_file():
        files.store(file, (json.dumps(job, indent=1) + "\n").encode())
        return
    try:
        before = json.loads(file.read_bytes())
        changed = [
            f"{name} was {before.get(name)}, now {value}" for name, value in job.items() if before.get(name) != value
        ]
    except (ValueError, AttributeError):
        changed = [f"{JOB} is damaged"]
    if changed:
        raise UserError(
            f"{folder} holds the unfinished work of another command: {'; '.join(changed)}. Give that command again, or "
            "remove the folder to start anew"
        )


class Work:
    """The parts of one command.

    Args:
        part: images of the source a part.
        max_bad: share of images that may be unreadable.
    """

    def __init__(self, folder: Path, form: EmbeddingFormat, source: Source, part: int, max_bad: float) -> None:
        self.folder, self.form, self.source, self.part, self.max_bad = folder, form, source, part, max_bad
        self.parts = [folder / f"part-{n:05d}{form.suffix}" for n in range(-(-len(source) // part))]

    def embed(self, images: Images, backbone: Backbone, context: EvalContext) -> None:
        """Writes the parts that are missing."""
        missing = [n for n, part in enumerate(self.parts) if not self.form.outputs(part)[-1].is_file()]
        if done := len(self.parts) - len(missing):
            say(f"resuming: {done:,} of {len(self.parts):,} parts are done")
        bad = len(self.left_out())
        draws = {number: self._draws(number, context.batch_size) for number in missing}
        stream = iter(batches_of(images, (draw for number in missing for draw in draws[number]), context, _collate))
        with Count("embedded", sum(len(draw) for number in missing for draw in draws[number])) as count:
            seen = 0
            for number in missing:
                failed: list[tuple[int, str]] = []
                with self.form.write(self.parts[number]) as add:
                    for draw in draws[number]:
                        batch = next(stream)
                        failed += batch.bad
                        if batch.images:
                            add(self._rows(batch, backbone, context))
                        seen += len(draw)
                        count(seen, f"{bad + len(failed):,} left out" if bad + len(failed) else "")
                    bad += len(failed)
                    self._check_bad(bad, failed)
                    self._record(number, failed)

    def _draws(self, number: int, batch_size: int) -> list[range]:
        """The batches of a part. None reaches into another part, so a resumed command computes the same."""
        end = min(len(self.source), (number + 1) * self.part)
        return [range(at, min(end, at + batch_size)) for at in range(number * self.part, end, batch_size)]

    @torch.no_grad()
    def _rows(self, batch: _Batch, backbone: Backbone, context: EvalContext) -> Rows:
        tokens = backbone(batch.pixels.to(context.device))
        values = {"patches": tokens.patches, "mean": tokens.patches.mean((1, 2)), "cls": tokens.prefix[:, :1].sum(1)}
        vectors = {kind: values[kind].cpu().numpy().astype(self.form.dtype) for kind in self.form.shapes}
        if not all(np.isfinite(vector).all() for vector in vectors.values()):
            raise UserError("a vector is not finite; with --dtype float16 values end at 65504: use float32", 4)
        return Rows([as_text(self.source.name(image)) for image in batch.images], batch.sizes, vectors)

    def _check_bad(self, count: int, failed: list[tuple[int, str]]) -> None:
        """Raises UserError (3) where too many images cannot be read."""
        if count > max(1, self.max_bad * len(self.source)) or count == len(self.source):
            lines = group_by_reason((self.source.name(image), reason) for image, reason in failed)
            raise UserError(
                "\n  ".join([f"{count} of {len(self.source):,} images cannot be read so far:", *lines[:5]])
                + "\nrepair them and give the same command again, or allow more with --max-bad",
                3,
            )

    def _record(self, number: int, failed: Sequence[tuple[int, str]]) -> None:
        """Records what is left out of a part, before the part itself is whole."""
        record = self.folder / f"_left_out-{number:05d}.jsonl"
        record.unlink(missing_ok=True)
        if failed:
            lines = [{"name": as_text(self.source.name(image)), "reason": reason} for image, reason in failed]
            files.store(record, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def left_out(self) -> list[tuple[str, str]]:
        """Names and reasons, as the finished parts recorded them."""
        whole = [n for n, part in enumerate(self.parts) if self.form.outputs(part)[-1].is_file()]
        records = [self.folder / f"_left_out-{number:05d}.jsonl" for number in whole]
        lines = [json.loads(line) for file in records if file.is_file() for line in file.read_bytes().splitlines()]
        return [(line["name"], line["reason"]) for line in lines]

    def finish(self, path: Path, sharded: bool) -> Embedded:
        """The folder of parts becomes the result, or is joined to one file."""
        left_out = self.left_out()
        result = Embedded(path, len(self.source) - len(left_out), left_out)
        if sharded:
            self.folder.rename(path)
            files.flush(path.parent)
            return result
        if left_out:
            lines = "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in left_out)
            files.store(path.with_suffix(".left_out.jsonl"), lines.encode())
        self.form.join(self.parts, path)
        shutil.rmtree(self.folder)
        return result
