"""What a job leaves, and reading it back."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gtsa.comparison.jobs import FREE, Job, digest_for, training_of
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.migration import SCHEMA
from gtsa.core.settings import flat
from gtsa.evaluation.evaluator import PerImage


def commit(job: Job, s: Any, result: Mapping[str, Any]) -> None:
    """Writes a job's result, all of it or nothing."""
    about = {
        "schema": SCHEMA,
        "row": job.row.name,
        "stage": job.stage,
        "number": job.number,
        "digest": digest_for(job, s),
    }
    text = json.dumps({**about, **result}, indent=1) + "\n"
    store(folder_of(job, s) / "result.json", text.encode())


def result_of(job: Job, s: Any) -> dict[str, Any] | None:
    """A job's result, if there is one. Raises UserError where it was made with other settings (4)."""
    file = folder_of(job, s) / "result.json"
    try:
        result: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it, and the job is done again", 4) from None
    if result.get("schema", 1) != SCHEMA:
        raise UserError(f"{file} was made by another version of gtsa; give another --out, or remove its folder", 4)
    if result.get("digest") != digest_for(job, s):
        why = _other(result, job, s)
        raise UserError(f"{file} was made with other settings ({why}); give another --out, or remove its folder", 4)
    return result


def _other(result: Mapping[str, Any], job: Job, s: Any) -> str:
    """What differs between a result's settings, where they were kept, and those that are asked for now."""
    if "settings" not in result or job.row.source is not None:
        then = now = {}
    else:
        then, now = (_compared(settings) for settings in (result["settings"], training_of(job, s)))
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


def answered(job: Job, s: Any) -> dict[str, Any] | None:
    """A job's result, if there is one and it is no failure."""
    result = result_of(job, s)
    return result if result and result["status"] == "done" else None


def said(result: Mapping[str, Any]) -> str:
    """What a job's run said of itself in the end, e.g. collapsing; nothing where there was none to say it."""
    words = [entry["verdict"] for entry in result.get("curve", ()) if "verdict" in entry]
    return words[-1] if words else ""


def write_per_image(job: Job, s: Any, per_image: Mapping[tuple[str, str], PerImage]) -> None:
    """Writes {(task, feature): per_image}, for intervals."""
    arrays: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    for (task, feature), found in per_image.items():
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
    store(folder_of(job, s) / "per_image.npz", packed.getvalue())
    if lists:
        store(folder_of(job, s) / "per_image.json", json.dumps(lists).encode())


def read_per_image(job: Job, s: Any) -> dict[tuple[str, str], PerImage]:
    """{(task, feature): per_image} of a job that is done, as it was kept."""
    place = folder_of(job, s)
    found: dict[tuple[str, str], PerImage] = {}
    with np.load(place / "per_image.npz") as arrays:
        for key, array in arrays.items():
            task, feature, name = key.split("/")
            found.setdefault((task, feature), {})[name] = torch.from_numpy(array)
    lists = place / "per_image.json"
    for key, values in (json.loads(lists.read_text()) if lists.exists() else {}).items():
        task, feature, name = key.split("/")
        found.setdefault((task, feature), {})[name] = values
    return found


def folder_of(job: Job, s: Any) -> Path:
    return Path(s.out) / "cells" / job.row.name / f"{job.stage}-{job.number}"
