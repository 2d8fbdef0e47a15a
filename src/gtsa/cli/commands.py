"""The verbs on the command line, one function each; what each is for stands in cli.VERBS.

Flags come from the same definitions as Python's arguments.
torch is imported by a verb, once its settings and paths can be right.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import gtsa
from gtsa.cli import early, flags
from gtsa.comparison.settings import Compare
from gtsa.core.errors import UserError
from gtsa.core.settings import read_yaml, validated
from gtsa.evaluation.settings import Evaluate
from gtsa.models.formats import OPENS, Format
from gtsa.pretraining.settings import METHODS, Pretrain

Patterns = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]


def pretrain(**flat: Any) -> None:
    given = flags.settings(flat, Pretrain)
    if given is not None:
        early.pretrain(given)
        gtsa.pretrain(**given)


pretrain.__signature__ = flags.signature(Pretrain)  # type: ignore[attr-defined]


def evaluate(weights: str, **flat: Any) -> None:
    given = flags.settings(flat, Evaluate, weights=weights)
    if given is not None:
        early.evaluate(given)
        gtsa.evaluate(**given)


evaluate.__signature__ = flags.signature(  # type: ignore[attr-defined]
    Evaluate,
    inspect.Parameter("weights", inspect.Parameter.POSITIONAL_ONLY, annotation=str),
    skip=("weights", "devices", "nodes"),
)


def compare(**flat: Any) -> None:
    given = flags.settings(flat, Compare)
    if given is not None:
        early.compare(given)
        gtsa.compare(**given)


compare.__signature__ = flags.signature(  # type: ignore[attr-defined]
    Compare, skip=("rows", "pretrain", "evaluate", "tasks")
)


def check(
    data: str,
    /,
    *,
    json: str | None = None,
    range16: Annotated[tuple[float, float], Parameter(negative=())] = (0, 65535),
    data_root: str | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    follow_links: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """
    Parameters
    ----------
    data
        Folder of images (nested), or a .txt file with one path a line.
    json
        File to write the whole account to.
    range16
        Values of 16-bit images that are taken as black and white.
    data_root
        For list files: the folder that paths are relative to and must lie in.
    include
        Patterns of paths below the folder; other images are left out.
    exclude
        Patterns of paths below the folder that are left out, e.g. masks '*_depth.png'.
    follow_links
        Follow symbolic links that lead out of the folder.
    """
    early.data(data)
    gtsa.check(data, json, range16, data_root, include, exclude, follow_links)


def preview(
    data: str,
    /,
    *,
    out: str = "preview.png",
    image: int = 0,
    epoch: int = 0,
    config_file: Annotated[str | None, flags.CONFIG] = None,
    model: str | None = None,
    seed: int | None = None,
    range16: Annotated[tuple[float, float] | None, Parameter(negative=())] = None,
    data_root: str | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    follow_links: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """
    Parameters
    ----------
    data
        Folder of images (nested), or a .txt file with one path a line.
    out
        PNG file to write.
    image
        Number of the image, in the order of the files.
    epoch
        Views differ from epoch to epoch.
    model
        Its patch decides the crop sizes.
    seed
        As for pretrain.
    range16
        Values of 16-bit images that are taken as black and white.
    data_root
        For list files: the folder that paths are relative to and must lie in.
    include
        Patterns of paths below the folder; other images are left out.
    exclude
        Patterns of paths below the folder that are left out.
    follow_links
        Follow symbolic links that lead out of the folder.
    """
    settings = read_yaml(config_file) if config_file else {}
    for name in ("data", "out"):
        settings.pop(name, None)
    validated(Pretrain, settings)  # a file may hold anything, e.g. names of preview's own arguments
    flagged = {"model": model, "seed": seed, "range16": range16, "data_root": data_root, "include": include}
    flagged |= {"exclude": exclude, "follow_links": follow_links}
    given = {name: value for name, value in flagged.items() if value not in (None, (), False)}
    early.data(data)
    gtsa.preview(data, out, image, epoch, **{**settings, **given})


def export(
    weights: str,
    /,
    *,
    out: str,
    to: Format = "timm",
    network: Literal["teacher", "student"] = "teacher",
    model: str | None = None,
) -> None:
    """
    Parameters
    ----------
    weights
        A run, an export, or any other weights that evaluate takes.
    out
        Folder to make; for dino the .pth file.
    to
        timm: a folder for timm.create_model; hf: a folder for Hugging Face's ViTModel (plain ViTs); dino: a .pth file
        of tensors under "teacher".
    network
        Where there are both: the teacher (as evaluated) or the student.
    model
        timm's name of the model, where the weights are a bare file that does not say.
    """
    early.weights(weights)
    place = gtsa.export(weights, out, to, network, model)
    print(f"{place}: open it with {OPENS[to].format(place)}")


def methods() -> None:
    for name, method in METHODS.items():
        print(f"{name:10} {method.summary}")


def models(pattern: str = "*", /) -> None:
    """
    Parameters
    ----------
    pattern
        A part of the name, e.g. vit_small; or a pattern with * and ?.
    """
    from gtsa.models.backbone import names

    found = names(pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    if not found:
        raise UserError(f"no vision transformer of timm has a name like {pattern!r}; 'gtsa models' lists all")
    print("\n".join(found))
