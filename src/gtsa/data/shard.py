"""gtsa shard: images as tar shards in the layout of WebDataset, with an index beside each."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import tarfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from gtsa.core.errors import UserError
from gtsa.core.files import clear_drafts, drafted
from gtsa.core.terminal import Count, command, gib, say
from gtsa.data.images.blobs import open_file
from gtsa.data.images.pixels import BadImage, Range
from gtsa.data.scan import CheckImage, DecodedCache, group_by_reason, open_images
from gtsa.data.shards.shard_index import write_index
from gtsa.data.shards.shard_plan import RECORD, Record, check_folder, limits_of, read_record, shard_name, split
from gtsa.data.sources import Selection, Source, check_range16
from gtsa.data.threaded import map_in_order

SHOWN = 20  # lines about images that are left out


def shard(
    data: object,
    out: str,
    shard_size: str = "1GB",
    images_per_shard: int | None = None,
    keep_bad: bool = False,
    range16: Range = (0, 65535),
    data_root: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow_links: bool = False,
) -> Path:
    """Packs images into tar files. The same images and settings give the same bytes.

    The bytes of the files are not changed. Every image is decoded once; a damaged one is left out and listed in
    ``shards.json``. Shards that are complete are kept when the same call is made again. Returns the folder.

    Args:
        data: folder, list file, or tar shards.
        out: folder to write; it must be new, empty, or hold shards of the same images.
        shard_size: largest size of a shard with its unit, e.g. ``500MB``. A larger image has a shard of its own.
        images_per_shard: images a shard, instead of ``shard_size``.
        keep_bad: pack damaged images, too; no image is decoded then.
        range16: values of 16-bit images that become black and white.
        data_root: for list files: the folder that paths are relative to.
        include: patterns of paths below the folder; other images are left out.
        exclude: patterns of paths below the folder that are left out.
        follow_links: follow symbolic links that lead out of the folder.

    Raises:
        UserError: no image can be used (3); ``out`` holds other files, or shards of other images (8).
    """
    check_range16(range16)
    limits, folder = limits_of(shard_size, images_per_shard), Path(out)
    check_folder(folder)
    source = open_images(data, Selection(range16, data_root, include, exclude, follow_links))
    sizes = [source.size(index) for index in range(len(source))]
    plan = split(sizes, limits)
    record = _begin(folder, _digest(source, sizes, (*limits, keep_bad)), len(plan))
    with closing(_Pack(source, keep_bad, range16)) as pack, Count("packed", len(source)) as count:
        for number in range(len(record.shards), len(plan)):
            pack(folder / shard_name(number), plan[number], record, count)
            record.save(folder)
    _report(source, folder, record)
    return folder


def _begin(folder: Path, job: str, planned: int) -> Record:
    """The record to continue from. Raises UserError (8) where the folder holds shards of another job."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_drafts(folder, "*.tar", "*.index", RECORD)
    record = read_record(folder)
    if record is None:
        record = Record(job, planned)
        record.save(folder)
    elif record.job != job:
        raise UserError(
            f"--out {folder} holds shards of other images or settings, or the images have changed since: "
            "choose another --out, or remove it",
            8,
        )
    for number, entry in enumerate(record.shards):
        path = folder / shard_name(number)
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path} is missing or was changed: restore it, or remove {folder} and start again", 8)
    if record.shards:
        say(f"{len(record.shards):,} of {planned:,} shards are complete")
    return record


def _digest(source: Source, sizes: Sequence[int], settings: tuple[object, ...]) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for index, size in enumerate(sizes):
        digest.update(os.fsencode(source.name(index)) + f"\0{size}\0".encode())
    return digest.hexdigest()


class _Pack:
    """Writes shards. ``close`` keeps the record of the images that were decoded."""

    def __init__(self, source: Source, keep_bad: bool, range16: Range) -> None:
        self.source = source
        self.cache = None if keep_bad else DecodedCache(source, range16)
        self.check = CheckImage(source, self.cache)

    def __call__(self, path: Path, images: range, record: Record, count: Count) -> None:
        """Writes the shard of ``images``, its index, and its entry in the record."""
        packed, left_out = 0, []
        with drafted(path) as draft, tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as archive:
            for index, content in map_in_order(self._read, images):
                if isinstance(content, str):
                    left_out.append({"name": self.source.name(index), "reason": content})
                else:
                    member = tarfile.TarInfo(self.source.name(index))  # its defaults: time 0, owner 0, mode 644
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                    packed += 1
                count(index + 1, f"shard {path.name}")
        write_index(path)
        record.shards.append({"name": path.name, "images": packed, "bytes": path.stat().st_size})
        record.left_out += left_out

    def close(self) -> None:
        if self.cache:
            self.cache.save()

    def _read(self, index: int) -> tuple[int, bytes | str]:
        """The bytes of an image file, or why it is left out."""
        if self.cache and (reason := self.check(index)[2]):
            return index, reason
        try:
            file = self.source.file(index)
            if file is None:
                return index, "not a file"
            with open_file(file) as opened:
                content = opened.read()
        except (BadImage, OSError) as error:
            return index, getattr(error, "strerror", None) or str(error)
        if len(content) != self.source.size(index):
            return index, "changed while it was read"
        return index, content


def _report(source: Source, folder: Path, record: Record) -> None:
    """Prints what was written and what was not, and the next command."""
    lines = group_by_reason((entry["name"], entry["reason"]) for entry in record.left_out)
    for line in lines[:SHOWN]:
        say(f"left out: {line}")
    if len(lines) > SHOWN:
        say(f"and {len(lines) - SHOWN} more reasons: {folder}/{RECORD} has all of them")
    if source.ignored:
        say("not packed: " + ", ".join(f"{count:,} {kind}" for kind, count in Counter(source.ignored).most_common(8)))
    images, size = (sum(entry[key] for entry in record.shards) for key in ("images", "bytes"))
    if not images:
        raise UserError(f"none of {len(source):,} images can be used; {folder}/{RECORD} says why", 3)
    say(f"{folder}: {images:,} images in {len(record.shards):,} shards, {gib(size)}")
    say(f"next: {command()} pretrain --data {shlex.quote(str(folder))} --out runs/first")
