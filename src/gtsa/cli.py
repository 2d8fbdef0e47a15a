"""The verbs on the command line. Flags come from the same definitions as Python's arguments."""

from __future__ import annotations

import inspect
import os
import sys
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import cyclopts
from cyclopts import Group, Parameter
from cyclopts.exceptions import CycloptsError

import gtsa
from gtsa import config, methods, strict
from gtsa.backbone import names
from gtsa.cells import ABLATIONS
from gtsa.core import Remedy
from gtsa.export import OPENS, Format
from gtsa.terminal import say

app = cyclopts.App(
    name="gtsa",
    version=gtsa.__version__,
    help="Learn dense visual features from your own scenes. The weights are yours.",
    help_on_error=False,
)


def _flags(model: Any, group: Group, prefix: str = "", skip: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """A keyword for every setting of a model; sections become dotted flags (--views.local-crops)."""
    flags, sections = [], []
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        if hasattr(field.annotation, "model_fields"):
            section = Group(f"--{name}.*", help=field.description or "", sort_key=2)
            sections += _flags(field.annotation, section, f"{name}.")
            continue
        flag = f"--{prefix}{name}".replace("_", "-")
        off = (f"--{prefix}no-{name}",) if field.default is True else ()
        words = " ".join((field.description or "").split())
        bare = _bare(field.annotation)
        many = get_origin(bare) is tuple and get_args(bare)[-1] is Ellipsis  # --task knn linear
        text = words[:1].upper() + words[1:]
        shown = Parameter(name=flag, group=group, help=text, negative=off, consume_multiple=many)
        kind = Annotated[bare, shown]  # type: ignore[valid-type]
        flags.append(_keyword(f"{prefix}{name}".replace(".", "__"), kind, field.default))
    return flags + sections


def _bare(kind: Any) -> Any:
    """A type without its limits: these are checked for flags, YAML and Python alike, in strict.validated."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        kinds: Any = tuple(map(_bare, get_args(kind)))
        return reduce(or_, kinds)
    return kind


def _keyword(name: str, kind: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"views__local_crops": 4} -> {"views": {"local_crops": 4}}"""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[key] = value
    return values


def _pretrain(**flat: Any) -> None:
    """Learn a vision transformer from a folder of images, without labels.

    Without --data it runs on the sample that comes with gtsa (the demo, at most four minutes on two CPU cores).
    """
    given = _given(flat, config.Pretrain)
    if given is not None:
        gtsa.pretrain(**given)


def _given(flat: dict[str, Any], model: Any, more: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The settings of a command line: flags on top of --config; None where --print-config has shown them."""
    file, stop = flat.pop("config_file", None), flat.pop("print_config", False)
    given = strict.merged(strict.read_yaml(file) if file else {}, {**_nested(flat), **(more or {})})
    if stop:
        print(strict.to_yaml(strict.validated(model, given)), end="")
        return None
    return given


CONFIG = Parameter(name="--config", help="YAML file of settings; flags come on top.")
PRINT = Parameter(negative=(), help="Print the settings as YAML and stop.")
YAML = [
    _keyword("config_file", Annotated[str | None, CONFIG]),
    _keyword("print_config", Annotated[bool, PRINT], False),
]
_pretrain.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [*_flags(config.Pretrain, Group("Settings", sort_key=1)), *YAML]
)
app.command(_pretrain, name="pretrain")


def _evaluate(weights: str, **flat: Any) -> None:
    """Ask one question or several of a backbone, on labelled images.

    WEIGHTS is a run, an export, timm:NAME, random:NAME, a timm or Hugging Face ViT folder, a .safetensors or .pth file.
    """
    given = _given(flat, config.Evaluate, {"weights": weights})
    if given is not None:
        gtsa.evaluate(**given)


_evaluate.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("weights", inspect.Parameter.POSITIONAL_ONLY, annotation=str),
        *_flags(config.Evaluate, Group("Settings", sort_key=1), skip=("weights", "devices", "nodes")),
        *YAML,
    ]
)
app.command(_evaluate, name="evaluate")


def _compare(**flat: Any) -> None:
    """Train methods with several seeds on the same images, ask all networks the same questions, and report.

    The same command goes on after any end: what is done is not done again. Variants for --ablate: VARIANTS.

    A YAML file (--config) can say more: pretrain (settings of every run), evaluate (of every question), tasks (of
    single ones), rows (further rows: {name: settings of gtsa pretrain}). See docs/compare.md.
    """
    given = _given(flat, config.Compare)
    if given is not None:
        gtsa.compare(**given)


_compare.__doc__ = (_compare.__doc__ or "").replace("VARIANTS", ", ".join(ABLATIONS))
_compare.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [*_flags(config.Compare, Group("Settings", sort_key=1), skip=("rows", "pretrain", "evaluate", "tasks")), *YAML]
)
app.command(_compare, name="compare")


@app.command
def check(
    data: str,
    /,
    *,
    json: str | None = None,
    range16: Annotated[tuple[float, float], Parameter(negative=())] = (0, 65535),
    data_root: str | None = None,
) -> None:
    """Decode every image once: what is in this data, what is wrong with it, what would we do with it.

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
    """
    gtsa.check(data, json, range16, data_root)


@app.command
def preview(
    data: str,
    /,
    *,
    out: str = "preview.png",
    image: int = 0,
    epoch: int = 0,
    config_file: Annotated[str | None, CONFIG] = None,
    model: str | None = None,
    seed: int | None = None,
) -> None:
    """Draw the views of one image as the model sees them: boxes, rotations, colours, and the pooled targets.

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
    """
    settings = strict.read_yaml(config_file) if config_file else {}
    for name in ("data", "out"):
        settings.pop(name, None)
    given = {name: value for name, value in (("model", model), ("seed", seed)) if value is not None}
    gtsa.preview(data, out, image, epoch, **{**settings, **given})


@app.command
def export(
    weights: str,
    /,
    *,
    out: str,
    to: Format = "timm",
    network: Literal["teacher", "student"] = "teacher",
    model: str | None = None,
) -> None:
    """Write the trained encoder as others can open it, with the same numbers.

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
    place = gtsa.export(weights, out, to, network, model)
    say(f"{place}: open it with {OPENS[to].format(place)}")


@app.command(name="methods")
def list_methods() -> None:
    """List the methods that there are."""
    for name, method in methods.found().items():
        print(f"{name:10} {(inspect.getdoc(inspect.getmodule(method)) or '').splitlines()[0]}")


@app.command
def models(pattern: str = "*", /) -> None:
    """List timm's plain vision transformers, all or those whose names hold a word.

    Parameters
    ----------
    pattern
        A part of the name, e.g. vit_small; or a pattern with * and ?.
    """
    found = names(pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    if not found:
        raise Remedy(f"no vision transformer of timm has a name like {pattern!r}; 'gtsa models' lists all")
    print("\n".join(found))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and ends the process with a code of core.EXIT_CODES; users never see a traceback of ours."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """The exit code of a command line."""
    try:
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs)
        return 0
    except CycloptsError as error:
        print(f"gtsa: {_flat(error)}; see gtsa {_verb(arguments)}--help", file=sys.stderr)
        return 2
    except Remedy as remedy:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one tells
            print(f"gtsa: {remedy}", file=sys.stderr)
        return remedy.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away, e.g. head
        return 0
    except KeyboardInterrupt:
        print(f"gtsa: stopped at once; {_way_on(arguments)}", file=sys.stderr)
        return 130


def _way_on(arguments: list[str] | None) -> str:
    """What to do after a stop."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["evaluate"]:
        return "with --work FOLDER long trainings can be gone on with; without it nothing was kept"
    if given[:1] == ["compare"]:
        return "the same command goes on"
    return "go on from the last checkpoint with --resume"


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _verb(arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return (
        f"{given[0]} "
        if given and given[0] in ("pretrain", "evaluate", "compare", "check", "preview", "export")
        else ""
    )
