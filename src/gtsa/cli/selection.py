"""Flags of which images are used, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True)
class Selection:
    """Flags of check, preview, explore, embed and shard: which images of the data are used, and how they are read."""

    range16: Annotated[
        tuple[float, float] | None,
        Parameter(
            negative=(),
            help="Values of 16-bit images that become black and white. Default: those of the weights, or 0 65535.",
        ),
    ] = None
    data_root: Annotated[
        str | None, Parameter(help="List files: the folder that paths are relative to and must lie in.")
    ] = None
    include: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Patterns of paths below the folder; other images are left out.",
        ),
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Patterns of paths below the folder that are left out, e.g. masks '*_depth.png'.",
        ),
    ] = ()
    follow_links: Annotated[bool, Parameter(negative=(), help="Follow symbolic links that lead out of the folder.")] = (
        False
    )

    @property
    def given(self) -> dict[str, Any]:
        """The flags that were given."""
        return {name: value for name, value in vars(self).items() if value not in (None, (), False)}


Data = Annotated[
    str,
    Parameter(
        help="Folder of images (nested), a .txt file with one path a line, or tar shards (folder, pattern, URL)."
    ),
]
ALL = Selection()
