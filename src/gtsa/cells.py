"""What a comparison is made of: rows, and cells, each of them one network of a row, trained and asked everything.

A cell leaves a folder ``OUT/cells/ROW/STAGE-NUMBER`` with all that the report needs:

result.json             settings, figures, costs, or why it failed; it is written last, and only then the cell is done
evidence.npz            what the figures follow from, image by image, for intervals
maps.png                feature maps of the same images for every row
run/                    logs and export of the pretraining; its checkpoints go once the cell is done
"""

from __future__ import annotations

import fcntl
import functools
import io
import json
import resource
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gtsa import config, judging, pictures, plan, strict
from gtsa.backbone import Backbone, patch_of
from gtsa.checkpoint import store
from gtsa.controls import CONTROLS
from gtsa.core import Evidence, Method, Remedy, Views
from gtsa.export import opened
from gtsa.features import Lab
from gtsa.images import BadImage
from gtsa.pretrain import pretrain
from gtsa.sources import open_source
from gtsa.training import digest_of
from gtsa.views import MultiCrop

GTSA_VIEWS = MultiCrop()
ABLATIONS: dict[str, dict[str, Any]] = {
    "gtsa-no-rotation": {"method": "gtsa", "views": {"rotations": False}},
    "gtsa-no-rotation-prediction": {"method": "gtsa", "gtsa": {"rotation_weight": 0.0}},
    "gtsa-no-region-target": {"method": "gtsa", "gtsa": {"region_target": "global"}},
    "gtsa-no-patch-correspondence": {"method": "gtsa", "gtsa": {"patch_weight": 0.0}},
    "gtsa-no-multi-crop": {"method": "gtsa", "views": {"local_crops": 0}},
    "dino-gtsa-views": {
        "method": "dino",
        "views": {
            name: getattr(GTSA_VIEWS, name)
            for name in (
                "rotations", "flip", "global_share", "local_share", "global_overlap", "local_overlap", "brightness",
                "contrast", "saturation", "hue", "blur", "solarise",
            )
        },
    },
    "dino-rotations": {"method": "dino", "views": {"rotations": True}},
}  # fmt: skip
SEED = 0  # of all evaluations: every network is asked alike, so that images and folds pair up


@dataclass(frozen=True)
class Row:
    """A line of the comparison.

    Attributes:
        settings: of gtsa pretrain, for a row that is trained.
        source: weights or control, for a row that is not.
        tuned_as: the method whose trials choose its settings.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    tuned_as: str | None = None

    @property
    def varies(self) -> bool:
        """Whether another seed gives another network."""
        return self.source is None or self.source == "untrained"


@dataclass(frozen=True)
class Cell:
    """One network of a row. ``stage``: trial, images (the common number of images) or flops (of operations)."""

    row: Row
    stage: str
    number: int  # the seed; of a trial its number
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the row's settings

    @property
    def name(self) -> str:
        return f"{self.row.name}/{self.stage}-{self.number}"


def rows_of(s: Any) -> list[Row]:
    """All rows, in the order of the report. Raises Remedy where a name is not known or there twice."""
    rows = [Row(name, {"method": name}, tuned_as=name) for name in s.methods]
    for name in s.ablate:
        if name not in ABLATIONS:
            raise Remedy(f"--ablate: there is no {name!r}; there is {', '.join(ABLATIONS)}")
        rows.append(Row(name, ABLATIONS[name], tuned_as=str(ABLATIONS[name]["method"])))
    for name, settings in s.rows.items():
        method = str(settings.get("method", "gtsa"))
        if not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise Remedy(f"rows: {name!r} is to name a folder: letters, digits, - _ and . alone")
        rows.append(Row(name, {"method": method, **settings}, tuned_as=method))
    rows += [Row(name, source=name) for name in s.controls]
    rows += [Row("".join(c if c.isalnum() or c in "-_." else "_" for c in w), source=w) for w in s.weights]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Remedy(f"two rows are called {twice[0]}; name each once")
    return rows


# What a cell is to do


def training_of(cell: Cell, s: Any) -> dict[str, Any]:
    """Settings of gtsa pretrain for a cell."""
    given: dict[str, Any] = {
        "model": s.model, "steps": s.steps, "batch_size": s.batch_size, "precision": s.precision, "device": s.device,
        "workers": s.workers, "devices": 1,
    }  # fmt: skip
    steps = {"steps": cell.changes["steps"]} if "steps" in cell.changes else {}
    for more in (s.pretrain, cell.changes, cell.row.settings, steps):  # a row's own words count more than its trials
        given = strict.merged(given, more)
    given |= {"data": s.data, "seed": cell.number if cell.stage != "trial" else 1_000 + cell.number}
    sections = {"views", given["method"]}
    return {k: v for k, v in given.items() if k not in config.METHODS or k in sections}


def questions_of(cell: Cell, s: Any) -> Iterator[tuple[str, Any, judging.Question]]:
    """(feature, settings, question) of all that a cell is asked; a trial is asked the primary tasks alone."""
    wanted = {part.split(":")[0] for part in s.primary.split("+")} if cell.stage == "trial" else set(s.task)
    for task in s.task:
        if task not in wanted:
            continue
        shared = {"train": s.train, "val": s.val, "folds": s.folds, **s.evaluate, **s.tasks.get(task, {})}
        if cell.stage == "trial" and shared["val"]:  # settings are chosen within the training images
            shared |= {"val": (), "folds": shared["folds"] or 5}
        given = {k: v for k, v in shared.items() if v is not None and v != ()}
        for tokens in s.tokens if task in ("knn", "linear", "finetune", "rotation") else s.tokens[:1]:
            more = {"tokens": tokens, "seed": SEED, "precision": s.precision, "device": s.device, "workers": s.workers}
            asked = strict.validated(config.Evaluate, {"weights": "-", "task": (task,), **more, **given}, task)
            feature = tokens if task in ("knn", "linear", "finetune", "rotation") else "patches"
            for question in judging.questions(asked):
                yield feature, asked, question


def digest_for(cell: Cell, s: Any) -> str:
    """Of all that decides a cell's figures: a result that was made for something else is not taken."""
    told = {"source": cell.row.source, "model": s.model}
    if cell.row.source is None:
        told = training_of(cell, s) | {"data": _images(s.data)}
    free = ("device", "workers", "devices", "precision")  # they decide no more than the last digits
    asked = (s.task, s.train, s.val, s.folds, s.tokens, s.evaluate, s.tasks)
    primary = s.primary if cell.stage == "trial" else ""
    whole = cell.name, {k: v for k, v in told.items() if k not in free}, asked, primary
    return digest_of(json.dumps(whole, sort_keys=True))[:16]  # as JSON, which knows no tuples: YAML has none either


@functools.cache
def _images(data: str) -> str:
    """Digest of the images' names, so that a comparison can go on wherever its data lie."""
    source = open_source(data)
    return digest_of(*(source.name(index) for index in range(len(source))))


# Doing it


def run(cell: Cell, s: Any) -> None:
    """Trains and asks a cell's network, and commits its result; a mistake or fault is a result too.

    Raises:
        Remedy: stopped on request (75); the same call goes on.
    """
    place = folder_of(cell, s)
    with _alone(place):
        if done(cell, s) is not None:
            return
        for leftover in ("evidence.npz", "maps.png"):
            (place / leftover).unlink(missing_ok=True)
        try:
            result = _run(cell, s, place)
        except Remedy as remedy:
            if remedy.code == 75:
                raise
            result = {"status": "failed", "reason": str(remedy)}
        except Exception as error:  # a fault of ours must not stop the other cells; the log has its traceback
            traceback.print_exc()
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        commit(cell, s, result)
        shutil.rmtree(place / "run" / "checkpoints", ignore_errors=True)


def commit(cell: Cell, s: Any, result: Mapping[str, Any]) -> None:
    """Writes a cell's result, all of it or nothing."""
    about = {"row": cell.row.name, "stage": cell.stage, "number": cell.number, "digest": digest_for(cell, s)}
    text = json.dumps({**about, **result}, indent=1) + "\n"
    store(folder_of(cell, s) / "result.json", text.encode())


def done(cell: Cell, s: Any) -> dict[str, Any] | None:
    """A cell's result, if there is one. Raises Remedy where it was made with other settings (4)."""
    file = folder_of(cell, s) / "result.json"
    try:
        result: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Remedy(f"{file} cannot be read ({error}); remove it, and the cell is done again", 4) from None
    if result.get("digest") != digest_for(cell, s):
        raise Remedy(f"{file} was made with other settings; give another --out, or remove its folder", 4)
    return result


def evidence_of(cell: Cell, s: Any) -> dict[tuple[str, str], Evidence]:
    """{(task, feature): evidence} of a cell that is done."""
    place = folder_of(cell, s)
    found: dict[tuple[str, str], Evidence] = {}
    with np.load(place / "evidence.npz") as arrays:
        for key, array in arrays.items():
            task, feature, name = key.split("/")
            found.setdefault((task, feature), {})[name] = torch.from_numpy(array)
    lists = place / "evidence.json"
    for key, values in (json.loads(lists.read_text()) if lists.exists() else {}).items():
        task, feature, name = key.split("/")
        found.setdefault((task, feature), {})[name] = values
    return found


def folder_of(cell: Cell, s: Any) -> Path:
    return Path(s.out) / "cells" / cell.row.name / f"{cell.stage}-{cell.number}"


def _run(cell: Cell, s: Any, place: Path) -> dict[str, Any]:
    began = time.perf_counter()
    result: dict[str, Any] = {"status": "done", "reason": ""}
    if cell.row.source is None:
        backbone, result = _trained(cell, s, place, result)
    else:
        backbone = _untrained(cell, s)
    fabric = plan.fabric_of(plan.engine(strict.validated(config.Evaluate, _engine(s))).settings)
    backbone = backbone.to(fabric.device).eval()
    result |= {"weights": backbone.fingerprint, "results": []}
    tensors: dict[str, Tensor] = {}
    lists: dict[str, Any] = {}
    for feature, asked, question in questions_of(cell, s):
        lab = Lab(fabric, asked.tokens, SEED, asked.batch_size, 0, place / "work" / f"{question.name}-{feature}")
        evidence = question.evidence(backbone, lab)
        figures = question.evaluator.figures(evidence)
        result["results"].append(
            {"task": question.name, "feature": feature, "figures": figures, "images": len(question.val)}
        )
        for name, values in evidence.items():
            key = f"{question.name}/{feature}/{name}"
            if isinstance(values, Tensor):
                tensors[key] = values
            elif values and all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values):
                tensors[key] = torch.stack(list(values))
            else:
                lists[key] = values
    if lists:
        store(place / "evidence.json", json.dumps(lists).encode())
    arrays: dict[str, Any] = {key: tensor.cpu().numpy() for key, tensor in tensors.items()}
    packed = io.BytesIO()  # confusions of single images are mostly zeros
    np.savez_compressed(packed, **arrays)
    store(place / "evidence.npz", packed.getvalue())
    if s.pictures and cell.stage != "trial":
        _maps(backbone, s, place)
    shutil.rmtree(place / "work", ignore_errors=True)
    return result | {"seconds_in_all": time.perf_counter() - began}


def _engine(s: Any) -> dict[str, Any]:
    return {"weights": "-", "task": ("health",), "val": ("-",), "precision": s.precision, "device": s.device}


def _trained(cell: Cell, s: Any, place: Path, result: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    given = training_of(cell, s)
    folder = place / "run"
    if s.looks and cell.stage != "trial":
        tasks = tuple(dict.fromkeys(part.split(":")[0] for part in s.primary.split("+")))
        given |= {"eval": tasks, "eval_train": s.train, "eval_val": s.val, "eval_folds": s.folds}
        given |= {"evaluate_every": max(1, given["steps"] // s.looks)}
        if s.evaluate:
            store(place / "eval.yaml", strict.plain_yaml(s.evaluate).encode())
            given["eval_config"] = str(place / "eval.yaml")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    pretrain(**given, out=str(folder), resume=True)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    backbone, _ = opened(str(folder))
    used = strict.validated(config.Pretrain, strict.read_yaml(folder / "config.yaml"))
    return backbone, result | {
        "settings": json.loads(json.dumps(given)),
        "steps": used.steps,
        "images_seen": used.steps * used.batch_size,
        "flops_per_image": flops_per_image(used),
        "seconds": _seconds(folder),
        "peak_memory": memory,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and used.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "curve": _curve(folder),
    }


def _untrained(cell: Cell, s: Any) -> Any:
    source = cell.row.source or ""
    if source in CONTROLS:
        return CONTROLS[source](patch_of(s.model))
    if source == "untrained":
        views = strict.validated(config.Pretrain, {"model": s.model, **s.pretrain})
        ready = plan.Plan(views, {})
        plan.start(ready, None)
        plan.sizes(ready)
        torch.manual_seed(cell.number)  # as pretraining starts
        return Backbone(s.model, ready.settings.views.global_size)
    return opened(source)[0]


def flops_per_image(settings: Any) -> float:
    """Floating-point operations of a training step for one image, forward and backward; settings are resolved."""
    multicrop = MultiCrop(**settings.views.model_dump())
    method: Method = config.METHODS[settings.method](
        Backbone(settings.model, multicrop.global_size), **settings.options
    )
    method.train()
    groups = [plan.noise(multicrop, size, 2, torch.device("cpu")) for size in range(1 + (multicrop.local_crops > 0))]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        method(Views.of(groups), 1.0)["loss"].backward()
    return float(counter.get_total_flops()) / 2


def _seconds(folder: Path) -> float:
    """Of all steps, whatever interrupted them."""
    total, before = 0.0, 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        total, before = total + entry["seconds"] * (entry["step"] - before), entry["step"]
    return total


def _curve(folder: Path) -> list[dict[str, Any]]:
    """Figures on the way, step by step: evaluations and health."""
    found: dict[int, dict[str, Any]] = {}
    for name in ("health.jsonl", "evaluations.jsonl"):
        file = folder / name
        for line in file.read_text().splitlines() if file.exists() else ():
            entry = json.loads(line)
            found.setdefault(entry["step"], {}).update(entry)
    return [found[step] for step in sorted(found)]


def _maps(backbone: Any, s: Any, place: Path) -> None:
    """Feature maps of the first images of the data, the same for every row."""
    source = open_source(s.data)
    images: list[Tensor] = []
    for index in range(len(source)):
        if len(images) < s.pictures:
            try:
                images.append(source.read(index))
            except BadImage:
                continue
    side = 16 * backbone.patch
    gallery = pictures.squares(images, side)
    pictures.maps_strip(gallery, pictures.patch_maps(backbone, gallery)).save(place / "maps.png")


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Waits until no other process works at this cell, e.g. one that outlived a comparison that was killed."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
