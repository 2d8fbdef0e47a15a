"""What gtsa embed needs, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from gtsa.core.errors import UserError
from gtsa.core.extras import require
from gtsa.core.files import check_writable
from gtsa.data.sources import check_range16

PARQUET, NUMPY = ".parquet", ".npy"
TOKENS = ("mean", "cls", "patches")
DTYPES = ("float32", "float16")
JOB = "_job.json"  # in the folder of unfinished work; readers of Parquet folders pass over names that begin with _


def check_arguments(
    out: Path,
    tokens: Sequence[str],
    dtype: str,
    size: Sequence[int],
    shard_size: int | None,
    batch_size: int,
    workers: int | str,
    max_bad: float,
    range16: tuple[float, float] | None,
) -> None:
    """Raises UserError if an argument is wrong, ``out`` exists or a library is missing (2).

    Also if ``out`` cannot be written (6). What depends on the weights is checked once they are open.
    """
    problems = []
    if out.suffix not in (PARQUET, NUMPY):
        problems.append(f"--out {out}: the name has to end with {PARQUET} or {NUMPY}")
    problems += [f"--tokens {kind}: choose from {', '.join(TOKENS)}" for kind in tokens if kind not in TOKENS]
    if dtype not in DTYPES:
        problems.append(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if len(size) > 2 or any(side < 1 for side in size):
        sides = " ".join(map(str, size))
        problems.append(f"--size {sides}: give one side, or height and width, as multiples of the patch, e.g. 224")
    if shard_size is not None and shard_size < 1:
        problems.append(f"--shard-size {shard_size}: give at least 1 image a shard, or leave it out for one file")
    if batch_size < 1:
        problems.append(f"--batch-size {batch_size}: give at least 1")
    if isinstance(workers, int) and workers < 0:
        problems.append(f"--workers {workers}: give 0 (no further process) or more")
    if not 0 <= max_bad <= 1:
        problems.append(f"--max-bad {max_bad:g}: give a share of the images, from 0 to 1")
    if problems:
        raise UserError("\n".join(problems))
    check_range16(range16)
    if out.suffix == PARQUET:
        require("--out FILE.parquet", "embed", "pyarrow")
    check_new(out, [out, *outputs_of(out, tokens)])
    _check_writable(out)


def outputs_of(out: Path, tokens: Sequence[str]) -> list[Path]:
    """All files that are written for ``out``, the last of them last: where it is, all are whole.

    Args:
        tokens: their kinds; none: a single one.
    """
    if out.suffix == PARQUET:
        return [out]
    kinds = dict.fromkeys(tokens)
    arrays = [out] if len(kinds) < 2 else [out.with_suffix(f".{kind}{NUMPY}") for kind in kinds]
    return [*arrays, out.with_suffix(".json"), out.with_suffix(".images.jsonl")]


def unfinished(out: Path) -> Path:
    """The folder of finished parts beside ``out``."""
    return out.with_name(f".{out.name}.unfinished")


def check_new(out: Path, outputs: Iterable[Path]) -> None:
    """Raises UserError (2) where one of ``outputs`` exists, unless an interrupted command wrote it."""
    exists = [file for file in outputs if file.exists() or file.is_symlink()]
    if exists and not (unfinished(out) / JOB).is_file():
        raise UserError(f"--out {exists[0]} exists already; give another file, or remove it first")


def _check_writable(out: Path) -> None:
    """Raises UserError (6) where ``out`` cannot be written."""
    try:
        check_writable(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give a file in another folder", 6) from None
