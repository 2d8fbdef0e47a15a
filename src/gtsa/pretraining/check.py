"""gtsa check: what a data set holds, what is wrong with it, and which images pretraining would use."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gtsa.core.errors import UserError, escaped
from gtsa.core.terminal import say, table
from gtsa.data.images import damage
from gtsa.data.images.pixels import Range
from gtsa.data.scan import Scan, describe_links, group_by_reason, least_max_bad, list_images, no_images, scan
from gtsa.data.sources import Selection, check_range16

SHOWN = 50  # lines about unusable files


def check(
    data: object,
    json_file: str | None = None,
    range16: Range = (0, 65535),
    data_root: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow_links: bool = False,
) -> Scan:
    """Decodes every image once and reports on every file. ``gtsa pretrain`` does not check sound images again.

    Args:
        data: folder, list file, tar shards, or in Python any torch Dataset of images.
        json_file: file to write the whole report to.
        range16: values of 16-bit images that become black and white.
        data_root: for list files: the folder that paths are relative to.
        include: patterns of paths below the folder; other images are left out.
        exclude: patterns of paths below the folder that are left out.
        follow_links: follow symbolic links that lead out of the folder.

    Raises:
        UserError: images cannot be used (3); the report is printed first.
    """
    check_range16(range16)
    selection = Selection(range16, data_root, include, exclude, follow_links)
    source = list_images(data, selection)
    result = scan(source, decode=True, range16=range16)
    if json_file:
        try:
            Path(json_file).parent.mkdir(parents=True, exist_ok=True)
            Path(json_file).write_text(json.dumps(result.report(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written: {error.strerror}; give another file", 6) from None
    _show(result, data)
    if not result.total and not result.unreadable:
        raise no_images(result, data, selection)
    if result.bad or result.unreadable:
        images = f"{len(result.bad)} of {result.total} images cannot be used"
        folders = f"; {len(result.unreadable)} folders or shards cannot be read whole" if result.unreadable else ""
        raise UserError(f"{data}: {images}{folders}; repair or remove them{_in_pretraining(result)}", 3)
    return result


def _show(result: Scan, data: object) -> None:
    """Prints a table, unusable files by reason, and remarks."""
    report = result.report()
    width, height = report["width"], report["height"]
    formats = ", ".join(f"{count:,} {kind}" for kind, count in result.formats.most_common())
    rows = [
        ("images", f"{result.total:,}", f"{result.decoded:,} readable"),
        ("used", f"{len(result.used):,}", formats),
        ("width, px", f"{width['least']} to {width['most']}", f"median {width['median']}"),
        ("height, px", f"{height['least']} to {height['most']}", f"median {height['median']}"),
        ("several frames", result.frames, "the first one is used"),
        ("other files", f"{sum(result.ignored.values()):,}" if result.ignored else "", _kinds(result)),
        ("left out", len(result.bad), "listed below" if result.bad else ""),
    ]
    table(f"check {data}", [row for row in rows if row[1] or row[0] in ("images", "used", "left out")])
    lines = group_by_reason([*result.bad, *result.unreadable])
    for line in lines[:SHOWN]:
        say(f"  {line}")
    if len(lines) > SHOWN:
        say(f"  and {len(lines) - SHOWN} more: --json FILE lists all of them")
    for line in [*([f"left out: {describe_links(result)}"] if result.outside else []), *result.remarks]:
        say(line)
    if not damage.sees_warnings() and any(kind.startswith("JPEG") for kind in result.formats):
        say("holes in JPEGs: most are detected; nearly all with pip install 'gtsa[jpeg]'")


def _kinds(result: Scan) -> str:
    """The most frequent kinds of files that are not images."""
    kinds = Counter(result.ignored).most_common()
    more = [f"{sum(count for _, count in kinds[8:]):,} of other kinds"] if len(kinds) > 8 else []
    return ", ".join([f"{count:,} {escaped(kind)}" for kind, count in kinds[:8]] + more)


def _in_pretraining(result: Scan) -> str:
    """What pretraining would do with the unusable images."""
    if not result.bad or not result.used:
        return ""
    if len(result.bad) <= max(1, 0.01 * result.looked_at):
        return "; pretrain would leave them out"
    return f"; pretrain would refuse them, and leave them out with --max-bad {least_max_bad(result)}"
