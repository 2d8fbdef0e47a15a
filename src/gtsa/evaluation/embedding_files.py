"""Files of embeddings: Parquet, or .npy with the names beside it. They are written in parts, each whole or absent."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gtsa.core import files
from gtsa.evaluation.embed_requirements import NUMPY, PARQUET, outputs_of

GROUP = 2**24  # bytes of vectors that a Parquet part keeps in memory: one row group
CHUNK = 2**24  # bytes that are copied at a time when .npy files are joined


@dataclass
class Rows:
    """Some images: names, (width, height) in px, and {kind of tokens: array [images, ...]}."""

    names: list[str]
    sizes: list[tuple[int, int]]
    vectors: dict[str, np.ndarray]


Add = Callable[[Rows], None]


class EmbeddingFormat(ABC):
    """A format of embeddings.

    Args:
        shapes: {kind of tokens: shape of one image's values}.
        dtype: float16 or float32.
        facts: what the files say of themselves: weights, model, patch size, grid, version.
    """

    suffix: str

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str, facts: Mapping[str, Any]) -> None:
        self.shapes, self.dtype, self.facts = shapes, np.dtype(dtype), facts

    def outputs(self, path: Path) -> list[Path]:
        """All files that are written for ``path``, the last of them last: where it is, all are whole."""
        return outputs_of(path, tuple(self.shapes))

    @abstractmethod
    def write(self, path: Path) -> AbstractContextManager[Add]:
        """Writes the files of one part; rows are added with the function that it gives."""

    @abstractmethod
    def join(self, parts: Sequence[Path], path: Path) -> None:
        """Writes the files of ``path`` from those of all parts, in their order."""


class Parquet(EmbeddingFormat):
    """A table with the columns name, width, height, and a list of fixed length for each kind of tokens."""

    suffix = PARQUET

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str, facts: Mapping[str, Any]) -> None:
        import pyarrow as pa

        super().__init__(shapes, dtype, facts)
        value = pa.float16() if dtype == "float16" else pa.float32()
        columns = [("name", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
        columns += [(kind, pa.list_(value, math.prod(shape))) for kind, shape in shapes.items()]
        self.schema = pa.schema(columns, {name: _text(fact) for name, fact in facts.items()})

    @contextmanager
    def write(self, path: Path) -> Iterator[Add]:
        width = sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize
        waiting: list[Rows] = []
        with files.drafted(path) as draft, self._open(draft) as file:

            def add(rows: Rows) -> None:
                waiting.append(rows)
                if sum(len(each.names) for each in waiting) * width >= GROUP:
                    file.write_batch(self._batch(waiting))
                    waiting.clear()

            yield add
            if waiting:
                file.write_batch(self._batch(waiting))

    def join(self, parts: Sequence[Path], path: Path) -> None:
        import pyarrow.parquet as pq

        with files.drafted(path) as draft, self._open(draft) as file:
            for part in parts:
                with pq.ParquetFile(part) as whole:
                    for number in range(whole.num_row_groups):
                        file.write_table(whole.read_row_group(number))

    def _open(self, path: Path) -> Any:
        """A writer. Vectors are written plain: they do not compress, and can be mapped into memory."""
        import pyarrow.parquet as pq

        return pq.ParquetWriter(path, self.schema, use_dictionary=False, compression="NONE")

    def _batch(self, waiting: Sequence[Rows]) -> Any:
        import pyarrow as pa

        widths, heights = zip(*(size for rows in waiting for size in rows.sizes), strict=True)
        arrays = [pa.array([name for rows in waiting for name in rows.names], pa.string())]
        arrays += [pa.array(widths, pa.int32()), pa.array(heights, pa.int32())]
        for kind, shape in self.shapes.items():
            values = np.concatenate([rows.vectors[kind].reshape(-1) for rows in waiting])
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values), math.prod(shape)))
        return pa.record_batch(arrays, schema=self.schema)


class Numpy(EmbeddingFormat):
    """Arrays [images, ...], one file a kind of tokens. Beside them: a line of JSON an image, and the facts.

    ``x.npy`` holds a single kind; of several each has a file, ``x.mean.npy``. The names are in ``x.images.jsonl``, the
    facts in ``x.json``.
    """

    suffix = NUMPY

    @contextmanager
    def write(self, path: Path) -> Iterator[Add]:
        with self._open(path) as (arrays, images):
            count = 0
            for kind, file in arrays.items():
                _write_head(file, (0, *self.shapes[kind]), self.dtype)

            def add(rows: Rows) -> None:
                nonlocal count
                count += len(rows.names)
                for kind, file in arrays.items():
                    file.write(np.ascontiguousarray(rows.vectors[kind]).data)
                for name, (width, height) in zip(rows.names, rows.sizes, strict=True):
                    images.write((json.dumps({"name": name, "width": width, "height": height}) + "\n").encode())

            yield add
            for kind, file in arrays.items():
                _write_head(file, (count, *self.shapes[kind]), self.dtype)

    def join(self, parts: Sequence[Path], path: Path) -> None:
        with self._open(path) as (arrays, images):
            for number, (kind, file) in enumerate(arrays.items()):
                sources = [np.load(self.outputs(part)[number], mmap_mode="r") for part in parts]
                _write_head(file, (sum(map(len, sources)), *self.shapes[kind]), self.dtype)
                for source in sources:
                    for start in range(
                        0, len(source), rows := max(1, CHUNK // source[:1].nbytes if len(source) else 1)
                    ):
                        file.write(np.ascontiguousarray(source[start : start + rows]).data)
            for part in parts:
                images.write(self.outputs(part)[-1].read_bytes())

    @contextmanager
    def _open(self, path: Path) -> Iterator[tuple[dict[str, BinaryIO], BinaryIO]]:
        """The files of arrays, by kind, and that of the images. All become whole when the block ends."""
        *arrays, facts, images = self.outputs(path)
        with ExitStack() as stack:
            opened = []
            for file in (images, *arrays):  # they are renamed in reverse: the images last
                draft = stack.enter_context(files.drafted(file))
                opened.append(stack.enter_context(open(draft, "wb")))
            files.store(facts, (json.dumps(self.facts, indent=1) + "\n").encode())
            yield dict(zip(self.shapes, opened[1:], strict=True)), opened[0]


FORMATS: dict[str, type[EmbeddingFormat]] = {form.suffix: form for form in (Parquet, Numpy)}


def as_text(name: str) -> str:
    """A file name as text that every reader accepts: bytes that are no UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _text(fact: object) -> str:
    return fact if isinstance(fact, str) else json.dumps(fact)


def _write_head(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Writes the head of a .npy file. numpy leaves room in it for more rows, so it can be written again."""
    end = file.tell()
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    if end:
        file.seek(end)
