"""gtsa check: what is in this data, what is wrong with it, and what pretraining would do with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gtsa.core.errors import UserError, escaped
from gtsa.core.terminal import Count, say, table
from gtsa.data import damage
from gtsa.data.pixels import Range
from gtsa.data.scan import Scan, enough, links, no_images, scan, summed
from gtsa.data.sources import open_source

SHOWN = 50  # lines of files that cannot be used


def check(
    data: Any,
    json_file: str | None = None,
    range16: Range = (0, 65535),
    data_root: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow_links: bool = False,
) -> Scan:
    """Decodes every image once and accounts for every file; ``gtsa pretrain`` then knows what was decoded well.

    Args:
        data: folder, list file, or in Python any torch Dataset of images.
        json_file: where to write the whole account.
        range16: values of 16-bit images that are taken as black and white.
        data_root: for list files, the folder that paths are relative to.
        include, exclude: patterns of paths below the folder, to take and to leave out.
        follow_links: also out of the folder.

    Raises:
        UserError: images cannot be used (3); the report comes first.
    """
    if range16[0] >= range16[1]:
        raise UserError(f"--range16 {range16[0]:g} {range16[1]:g}: black must be below white")
    with Count("listed") as count:
        source = open_source(
            data,
            range16=range16,
            data_root=data_root,
            include=include,
            exclude=exclude,
            follow_links=follow_links,
            progress=count,
        )
    found = scan(source, decode=True, range16=range16)
    if json_file:
        try:
            Path(json_file).parent.mkdir(parents=True, exist_ok=True)
            Path(json_file).write_text(json.dumps(found.report(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written: {error.strerror}; give another file", 6) from None
    _show(found, data)
    if not found.total and not found.unreadable:
        raise no_images(found, data)
    if found.bad or found.unreadable:
        many = f"{len(found.bad)} of {found.total} images cannot be used"
        lists = f"; {len(found.unreadable)} folders cannot be listed" if found.unreadable else ""
        raise UserError(
            f"{data}: {many}{lists}; mend or remove them{_otherwise(found)}",
            3,
        )
    return found


def _show(found: Scan, data: Any) -> None:
    """A table, what cannot be used by its reasons, and what is remarked on."""
    report = found.report()
    width, height = report["width"], report["height"]
    formats = ", ".join(f"{count:,} {kind}" for kind, count in found.formats.most_common())
    rows = [
        ("images", f"{found.total:,}", f"{found.decoded:,} decoded whole and used"),
        ("used", f"{len(found.used):,}", formats),
        ("width, px", f"{width['least']} to {width['most']}", f"median {width['median']}"),
        ("height, px", f"{height['least']} to {height['most']}", f"median {height['median']}"),
        ("several frames", found.frames, "the first one is used"),
        ("other files", f"{sum(found.ignored.values()):,}" if found.ignored else "", _kinds(found)),
        ("left out", len(found.bad), "named below" if found.bad else ""),
    ]
    table(f"check {data}", [row for row in rows if row[1] or row[0] in ("images", "used", "left out")])
    lines = summed([*found.bad, *found.unreadable])
    for line in lines[:SHOWN]:
        say(f"  {line}")
    if len(lines) > SHOWN:
        say(f"  and {len(lines) - SHOWN} more: all of them are in the file that --json names")
    for line in [*([f"left out: {links(found)}"] if found.outside else []), *found.remarks]:
        say(line)
    if not damage.warned() and any(kind.startswith("JPEG") for kind in found.formats):
        say("holes in JPEGs: most are found; nearly all of them with pip install 'gtsa[jpeg]'")


def _kinds(found: Scan) -> str:
    """The most frequent kinds of files that are not read."""
    kinds = Counter(found.ignored).most_common()
    more = [f"{sum(count for _, count in kinds[8:]):,} of other kinds"] if len(kinds) > 8 else []
    return ", ".join([f"{count:,} {escaped(kind)}" for kind, count in kinds[:8]] + more)


def _otherwise(found: Scan) -> str:
    """What pretraining would do with data of which some are bad."""
    if not found.bad or not found.used:
        return ""
    if len(found.bad) <= max(1, 0.01 * found.looked_at):
        return "; pretrain would leave them out"
    return f"; pretrain would refuse them, and leave them out with --max-bad {enough(found)}"
