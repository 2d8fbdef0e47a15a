"""Networks that are trained and wait for their evaluation, perhaps on another machine: settings, costs and weights."""

from __future__ import annotations

import json
import shutil
from typing import cast

from gtsa.comparison.jobs import Job, compute_training_digest
from gtsa.comparison.results import Result, describe_changes, folder_of, read_result
from gtsa.comparison.settings import Compare
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.migration import SCHEMA
from gtsa.models.backbone import Backbone
from gtsa.models.export import write
from gtsa.models.weights import load_backbone

FILE, WEIGHTS = "trained.json", "teacher"


def keep_trained(job: Job, settings: Compare, backbone: Backbone, training: Result) -> None:
    """Writes the weights, in half precision, then settings and costs of the training: then the network is trained."""
    folder = folder_of(job, settings)
    shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
    write(backbone, folder / WEIGHTS, job.row.name, half=True)
    identity = {"schema": SCHEMA, "job": job.name, "digest": compute_training_digest(job, settings)}
    store(folder / FILE, (json.dumps({**identity, "training": training}, indent=1) + "\n").encode())


def is_trained(job: Job, settings: Compare) -> bool:
    """Whether the network of a job waits for its evaluation."""
    return read_training(job, settings) is not None


def read_training(job: Job, settings: Compare) -> Result | None:
    """Settings and costs of a trained network; None if it is not trained.

    Raises:
        UserError: it was trained with other settings, or the file is damaged (4).
    """
    file = folder_of(job, settings) / FILE
    try:
        content = json.loads(file.read_text())
        training = cast(Result, content["training"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to train the network again", 4) from None
    if content.get("schema") != SCHEMA:
        raise UserError(f"{file} was made by another version of gtsa; give another --out, or remove its folder", 4)
    if content.get("digest") != compute_training_digest(job, settings):
        changes = describe_changes(training, job, settings)
        raise UserError(f"{file} was made with other settings ({changes}); give another --out, or remove its folder", 4)
    return training


def load_trained(job: Job, settings: Compare) -> Backbone:
    """The network of a job that is trained. Raises UserError if its weights are missing or damaged (4)."""
    folder = folder_of(job, settings) / WEIGHTS
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: bring it back, or remove {folder.parent / FILE} to train again", 4)
    return load_backbone(str(folder))[0]


def needs_work(job: Job, settings: Compare) -> bool:
    """Whether a job has anything left to do in the half that ``only`` names."""
    if read_result(job, settings) is not None:
        return False
    return not (settings.only == "training" and is_trained(job, settings))
