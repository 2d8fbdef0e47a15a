"""The verbs that work on images alone."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

import gtsa
from gtsa.cli import early
from gtsa.cli.selection import ALL, Data, Selection


def check(data: Data, /, *, json: str | None = None, selection: Selection = ALL) -> None:
    """
    Parameters
    ----------
    json
        File to write the whole report to.
    """
    early.data(data)
    gtsa.check(data, json, **selection.given)


def shard(
    data: Data,
    /,
    *,
    out: str,
    shard_size: str = "1GB",
    images_per_shard: int | None = None,
    keep_bad: Annotated[bool, Parameter(negative=())] = False,
    selection: Selection = ALL,
) -> None:
    """
    Parameters
    ----------
    out
        Folder to write: 000000.tar, ..., an index beside each, and shards.json, which names the images left out.
    shard_size
        Largest size of a shard, e.g. 500MB or 1GiB.
    images_per_shard
        Images a shard, instead of --shard-size.
    keep_bad
        Pack every file unseen, damaged images too. Otherwise each image is decoded once.
    """
    early.shard(data, out, shard_size, images_per_shard)
    gtsa.shard(data, out, shard_size, images_per_shard, keep_bad, **selection.given)
