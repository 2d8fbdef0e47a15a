"""What a comparison is made of: rows, and cells, each of them one network of a row, trained and asked everything.

A cell leaves a folder ``OUT/cells/ROW/STAGE-NUMBER`` with all that the report needs:

result.json             settings, figures, costs, or why it failed; it is written last, and only then the cell is done
evidence.npz            what the figures follow from, image by image, for intervals; trials have none
maps.png                feature maps of the same images for every row
run/                    logs and export of the pretraining; its checkpoints go once the cell is done
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gtsa import config, evals, judging
from gtsa.config import ABLATIONS
from gtsa.core.errors import Remedy
from gtsa.core.files import store
from gtsa.core.settings import flat, merged, validated
from gtsa.core.types import Evaluator, Evidence
from gtsa.data.sources import open_source
from gtsa.training.trainer import digest_of

STAGES = {"images": "equal images", "flops": "equal operations"}  # of what the report tells
TRIED = 1_000  # seed of all trials: the same start and images for all settings, and those of no run
FREE = ("device", "workers", "devices", "precision")  # settings that decide no more than the last digits
LONGEST = 200  # characters of a folder's name
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
        method = settings.get("method", "gtsa")
        if method not in tuple(config.METHODS):  # of whatever type
            raise Remedy(f"rows: {name}.method: there is no {method!r:.100}; there is {', '.join(config.METHODS)}")
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith(".") or len(name) > LONGEST:
            raise Remedy(
                f"rows: {name[:100]!r} is to name a folder: letters, digits, - _ and . alone, at most {LONGEST}"
            )
        rows.append(Row(name, {"method": method, **settings}, tuned_as=method))
    rows += [Row(name, source=name) for name in s.controls]
    rows += [Row(_name(source), source=source) for source in s.weights]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Remedy(f"two rows are called {twice[0]}; name each once")
    return rows


def _name(source: str) -> str:
    """Of the row of these weights: it names a folder, too."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in source)[-LONGEST:]
    return name if name.strip(".") else "weights"


# What a cell is to do


def training_of(cell: Cell, s: Any) -> dict[str, Any]:
    """Settings of gtsa pretrain for a cell."""
    given: dict[str, Any] = {
        "model": s.model, "steps": s.steps, "batch_size": s.batch_size, "precision": s.precision, "device": s.device,
        "workers": s.workers, "devices": 1,
    }  # fmt: skip
    steps = {"steps": cell.changes["steps"]} if "steps" in cell.changes else {}
    for more in (s.pretrain, cell.changes, cell.row.settings, steps):  # a row's own words count more than its trials
        given = merged(given, more)
    given |= {"data": s.data, "seed": cell.number if cell.stage != "trial" else TRIED}
    sections = {"views", given["method"]}
    return {k: v for k, v in given.items() if k not in config.METHODS or k in sections}


def questions_of(
    cell: Cell, s: Any, opened: judging.Opened | None = None
) -> Iterator[tuple[str, Any, judging.Question]]:
    """(feature, settings, question) of all that a cell is asked; a trial is asked the primary tasks alone.

    Args:
        opened: labels that were opened for other cells; what is opened here joins them.
    """
    opened = {} if opened is None else opened
    wanted = primary_tasks(s) if cell.stage == "trial" else s.task
    for task in s.task:
        if task not in wanted:
            continue
        shared = told_of(task, s)
        if cell.stage == "trial" and shared["val"]:  # settings are chosen within the training images
            shared |= {"val": (), "folds": shared["folds"] or 5}
        given = {k: v for k, v in shared.items() if v is not None and v != ()}
        vector = task in ("knn", "linear", "finetune", "rotation")
        for tokens in s.tokens if vector and cell.stage != "trial" else s.tokens[:1]:  # of several the first decides
            more = {"tokens": tokens, "seed": SEED, "precision": s.precision, "device": s.device, "workers": s.workers}
            asked = validated(config.Evaluate, {"weights": "-", "task": (task,), **more, **given}, f"--task {task}")
            for question in judging.questions(asked, opened):
                pairs = cell.stage == "trial" and bool(question.folds) and not told_of(task, s)["val"]
                yield tokens if vector else "patches", asked, replace(question, pairs=pairs)


def told_of(task: str, s: Any) -> dict[str, Any]:
    """Settings of gtsa evaluate for a task: the common ones, and over these its own."""
    return {"train": s.train, "val": s.val, "folds": s.folds, **s.evaluate, **s.tasks.get(task, {})}


def evaluator_of(task: str, s: Any) -> Evaluator:
    given = validated(config.EvaluatorSettings[task], told_of(task, s).get(task, {}), f"--task {task}")
    return evals.found()[task](**dict(given))


def primary_tasks(s: Any) -> tuple[str, ...]:
    """The tasks that the primary figure is of, each once."""
    return tuple(dict.fromkeys(part.split(":")[0] for part in s.primary.split("+")))


def looked(s: Any) -> dict[str, Any]:
    """Settings of gtsa evaluate for what is asked during training."""
    shared = {"train": s.train, "val": s.val, "folds": s.folds}
    given = {"weights": "-", "task": primary_tasks(s), **s.evaluate, **shared}
    return {k: v for k, v in given.items() if v is not None and v != ()}


def engine_of(s: Any) -> dict[str, Any]:
    """Settings of gtsa evaluate that say where it runs."""
    on = {"precision": s.precision, "device": s.device, "workers": s.workers}
    return {"weights": "-", "task": ("health",), "val": ("-",), **on}


def digest_for(cell: Cell, s: Any) -> str:
    """Of all that decides a cell's figures: a result that was made for something else is not taken."""
    told = {"source": cell.row.source, "model": s.model}
    if cell.row.source is None:
        told = training_of(cell, s) | {"data": _images(s.data)}
    asked = (s.task, s.train, s.val, s.folds, s.tokens, s.evaluate, s.tasks)
    primary = (s.primary, "inner folds") if cell.stage == "trial" else ""
    whole = cell.name, {k: v for k, v in told.items() if k not in FREE}, asked, primary
    return digest_of(json.dumps(whole, sort_keys=True))[:16]  # as JSON, which knows no tuples: YAML has none either


@functools.cache
def _images(data: str) -> str:
    """Digest of the images' names, so that a comparison can go on wherever its data lie."""
    source = open_source(data)
    return digest_of(*(source.name(index) for index in range(len(source))))


# What it leaves


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
        why = _other(result, cell, s)
        raise Remedy(f"{file} was made with other settings ({why}); give another --out, or remove its folder", 4)
    return result


def _other(result: Mapping[str, Any], cell: Cell, s: Any) -> str:
    """What differs between a result's settings, where they were kept, and those that are asked for now."""
    if "settings" not in result or cell.row.source is not None:
        then = now = {}
    else:
        then, now = (_compared(settings) for settings in (result["settings"], training_of(cell, s)))
    differ = [
        f"{name}: {then.get(name, 'not given')}, now {now.get(name, 'not given')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    return "; ".join(differ) or "its images, its questions, or settings that were not kept"


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of pretraining by their dotted names, as JSON has them, without places and looks."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return flat({k: v for k, v in plain.items() if k not in (*FREE, "data", "out") and not k.startswith("eval")})


def answered(cell: Cell, s: Any) -> dict[str, Any] | None:
    """A cell's result, if there is one and it is no failure."""
    result = done(cell, s)
    return result if result and result["status"] == "done" else None


def said(result: Mapping[str, Any]) -> str:
    """What a cell's run said of itself in the end, e.g. collapsing; nothing where there was none to say it."""
    words = [entry["verdict"] for entry in result.get("curve", ()) if "verdict" in entry]
    return words[-1] if words else ""


def keep_evidence(cell: Cell, s: Any, evidence: Mapping[tuple[str, str], Evidence]) -> None:
    """Writes {(task, feature): evidence}, for intervals."""
    arrays: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    for (task, feature), found in evidence.items():
        for name, values in found.items():
            key = f"{task}/{feature}/{name}"
            if isinstance(values, Tensor):
                arrays[key] = values.cpu().numpy()
            elif values and all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values):
                arrays[key] = torch.stack(list(values)).cpu().numpy()
            else:
                lists[key] = values
    packed = io.BytesIO()  # confusions of single images are mostly zeros
    np.savez_compressed(packed, **arrays)
    store(folder_of(cell, s) / "evidence.npz", packed.getvalue())
    if lists:
        store(folder_of(cell, s) / "evidence.json", json.dumps(lists).encode())


def evidence_of(cell: Cell, s: Any) -> dict[tuple[str, str], Evidence]:
    """{(task, feature): evidence} of a cell that is done, as it was kept."""
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
