"""The verbs on the command line, one function each; cli.main.VERBS says what each is for.

Flags come from the same definitions as Python's arguments. A verb imports torch after settings and paths are checked.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Literal

from cyclopts import Parameter

import gtsa
from gtsa.cli import early, flags
from gtsa.cli.data_commands import check as check
from gtsa.cli.data_commands import shard as shard
from gtsa.cli.selection import ALL, Data, Selection
from gtsa.comparison.settings import Compare
from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.core.terminal import doing
from gtsa.evaluation.settings import Evaluate
from gtsa.models.formats import OPENS, Format
from gtsa.pretraining.settings import METHODS, NOT_PROFILED, Pretrain


def pretrain(**flat: object) -> None:
    given = flags.settings(flat, Pretrain)
    if given is not None:
        early.pretrain(given)
        with doing("loading PyTorch", log=False):
            verb = gtsa.pretrain
        verb(**given)


pretrain.__signature__ = flags.signature(Pretrain)  # type: ignore[attr-defined]


def evaluate(weights: str, **flat: object) -> None:
    given = flags.settings(flat, Evaluate, weights=weights)
    if given is not None:
        early.evaluate(given)
        gtsa.evaluate(**given)


evaluate.__signature__ = flags.signature(  # type: ignore[attr-defined]
    Evaluate,
    inspect.Parameter("weights", inspect.Parameter.POSITIONAL_ONLY, annotation=str),
    skip=("weights", "devices", "nodes"),
)


def profile(json: str | None = None, measured_steps: int = 5, **flat: object) -> None:
    given = flags.settings(flat, Pretrain)
    if given is not None:
        given = {name: value for name, value in given.items() if name not in NOT_PROFILED}  # of a --config of pretrain
        early.pretrain({**given, "plan": True})
        with doing("loading PyTorch", log=False):
            verb = gtsa.profile
        verb(json_file=json, measured_steps=measured_steps, **given)


profile.__signature__ = flags.signature(  # type: ignore[attr-defined]
    Pretrain,
    flags.keyword("json", Annotated[str | None, Parameter(help="File to write the report to.")]),
    flags.keyword("measured_steps", Annotated[int, Parameter(help="Steps that are measured, of each kind.")], 5),
    skip=NOT_PROFILED,
)


def compare(**flat: object) -> None:
    given = flags.settings(flat, Compare)
    if given is not None:
        early.compare(given)
        gtsa.compare(**given)


compare.__signature__ = flags.signature(  # type: ignore[attr-defined]
    Compare, skip=("rows", "pretrain", "evaluate", "tasks")
)


# Arguments of export, embed and explore

Weights = Annotated[str, Parameter(help="A run, an export, or any other weights that evaluate accepts.")]
Network = Annotated[
    Literal["teacher", "student"], Parameter(help="The EMA teacher, or the student, if the weights hold both.")
]
Model = Annotated[str | None, Parameter(help="Name of the timm model, if the weights do not hold it.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], Parameter(help="Where features are computed; auto: the GPU if there is one.")
]
Kind = Literal["mean", "cls", "patches"]


def preview(
    data: Data,
    /,
    *,
    out: str = "preview.png",
    image: int = 0,
    epoch: int = 0,
    config_files: flags.Files = (),
    model: str | None = None,
    seed: int | None = None,
    selection: Selection = ALL,
) -> None:
    """
    Parameters
    ----------
    out
        PNG file to write.
    image
        Number of the image, from 0, in the order of the files.
    epoch
        Number of the epoch, from 0; views differ from epoch to epoch.
    model
        Model whose patch size decides the crop sizes.
    seed
        Seed of the views, as in gtsa pretrain.
    """
    settings = flags.read_files(config_files)
    for name in ("data", "out"):
        settings.pop(name, None)
    validated(Pretrain, settings)  # a file may hold anything, e.g. names of preview's own arguments
    model_and_seed = {name: value for name, value in (("model", model), ("seed", seed)) if value is not None}
    early.data(data)
    gtsa.preview(data, out, image, epoch, **{**settings, **model_and_seed, **selection.given})


def report(
    run: str,
    /,
    *,
    out: str | None = None,
    images: Annotated[bool, Parameter(name="--images", negative="--no-images", show_default=False)] = True,
) -> None:
    """
    Parameters
    ----------
    run
        The folder of the run.
    out
        HTML file to write. Default: report.html in the folder of the run.
    images
        --no-images is for private data: no pixels of images, and no file names but those of images that cannot be used.
    """
    early.run(run)
    gtsa.report(run, out, images=images)


def explore(
    weights: Weights,
    /,
    *,
    data: Data,
    against: str | None = None,
    size: int = 224,
    cache: str | None = None,
    port: int | None = None,
    browser: bool = True,
    model: Model = None,
    against_model: str | None = None,
    network: Network = "teacher",
    device: Device = "auto",
    selection: Selection = ALL,
) -> None:
    """
    Parameters
    ----------
    against
        Further weights, shown beside the first.
    size
        Long side of the images for the network, px. The whole image is used. Larger: finer maps, more time and space.
    cache
        Folder for features; default: gtsa/features in your cache folder. To free the space, remove it.
    port
        Port of the page; default: the first free one from 8765 on.
    browser
        Open the page in a browser, if there is a display.
    against_model
        The same for the weights of --against.
    """
    given = {name: value for name, value in locals().items() if name not in ("weights", "data", "selection")}
    early.explore({**given, "weights": weights, "data": data})
    gtsa.explore(weights, data, **given, **selection.given)


def export(
    weights: Weights,
    /,
    *,
    out: str,
    to: Format = "timm",
    network: Network = "teacher",
    model: Model = None,
) -> None:
    """
    Parameters
    ----------
    out
        Folder to write; for dino the .pth file, for onnx the .onnx file.
    to
        timm: a folder for timm.create_model; hf: a folder for Hugging Face's ViTModel (plain ViTs); dino: a .pth file
        of tensors under "teacher"; onnx: an .onnx file, compared with PyTorch by onnxruntime (extra onnx).
    """
    early.weights(weights)
    path = gtsa.export(weights, out, to, network, model)
    print(f"{path}: open it with {OPENS[to].format(path)}")


def embed(
    weights: Weights,
    /,
    *,
    data: Data,
    out: str,
    tokens: Annotated[tuple[Kind, ...], Parameter(consume_multiple=True, negative=())] = (),
    dtype: Literal["float32", "float16"] = "float32",
    size: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())] = (),
    shard_size: int | None = None,
    network: Network = "teacher",
    model: Model = None,
    batch_size: int = 32,
    workers: Annotated[int | None, Parameter(help="Processes that read images. Default: by cores and device.")] = None,
    device: Device = "auto",
    max_bad: float = 0.01,
    selection: Selection = ALL,
) -> None:
    """
    Parameters
    ----------
    out
        A .parquet file (extra embed), or a .npy file with the names beside it.
    tokens
        One or several of: mean of the patch tokens, CLS token, all patches. Default: the vector that was trained.
    dtype
        Type of the vectors in the file; they are computed in float32.
    size
        Side, or height and width, of the network's input, px. Default: that of the weights.
    shard_size
        Images a shard; --out is then a folder of shards, which pandas and pyarrow read as one table.
    batch_size
        Images a forward pass.
    max_bad
        Share of unreadable images that is accepted; one always is. They are left out and recorded.
    """
    given = {name: value for name, value in locals().items() if name not in ("workers", "selection")}
    given |= {"workers": "auto" if workers is None else workers, **selection.given}
    early.embed(given)
    gtsa.embed(**given)


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

    matching = names(pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    if not matching:
        raise UserError(f"timm has no vision transformer with a name like {pattern!r}; 'gtsa models' lists all")
    print("\n".join(matching))
