"""What can be wrong with a comparison, told before hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gtsa import methods
from gtsa.comparison import jobs, tuning
from gtsa.comparison.jobs import Job
from gtsa.comparison.rows import Row
from gtsa.comparison.settings import CONTROLS
from gtsa.core.errors import UserError
from gtsa.core.settings import Plan, validated
from gtsa.data.sources import open_source
from gtsa.evaluation import tasks
from gtsa.evaluation.settings import Evaluate
from gtsa.models.backbone import Backbone
from gtsa.models.weights import load_backbone
from gtsa.pretraining import plan
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import resolve_device

OURS = ("data", "out", "seed", "resume", "overwrite")  # settings of gtsa pretrain that a comparison makes itself
ASKED = (  # and of gtsa evaluate
    "weights", "task", "tokens", "seed", "network", "model", "out", "predictions", "pictures", "work", "device",
    "devices", "nodes", "precision", "workers",
)  # fmt: skip


def check(rows: Sequence[Row], s: Any) -> None:
    """Opens everything once: images, settings and weights of every row, settings and labels of every question.

    Raises:
        UserError: something is wrong, of whatever kind.
    """
    _settled_elsewhere(s)
    if not (images := len(open_source(s.data))):
        raise UserError(f"--data {s.data}: no images", 3)
    resolve_device(validated(Evaluate, jobs.engine_of(s)))
    for row in rows:
        if row.source is None:
            try:
                _trainable(row, s, images)
            except UserError as remedy:
                raise UserError(f"row {row.name}: {remedy}", remedy.code) from None
        elif row.source not in CONTROLS:
            load_backbone(row.source)
    labels: tasks.Opened = {}
    list(jobs.tasks_of(Job(rows[0], "images", 0), s, labels))
    for task in s.task:
        jobs.evaluator_of(task, s)
    if s.evaluate_every:
        tasks.open_tasks(validated(Evaluate, jobs.looked(s), "evaluate_every"), labels)
    if s.trials:
        tuning.checked((question for *_, question in jobs.tasks_of(Job(rows[0], "trial", 0), s, labels)), s)


def _settled_elsewhere(s: Any) -> None:
    """Raises UserError for settings of files that a comparison makes itself, or that have no meaning in it."""
    lists = [("pretrain", s.pretrain, (*OURS, "method")), ("evaluate", s.evaluate, ASKED)]
    lists += [(f"rows: {name}", settings, OURS) for name, settings in s.rows.items()]
    lists += [(f"tasks: {name}", settings, ASKED) for name, settings in s.tasks.items()]
    if wrong := [f"{where}: {key}" for where, settings, ours in lists for key in settings if key in ours]:
        raise UserError("\n".join(f"{line} is set by the comparison itself; leave it out here" for line in wrong))


def _trainable(row: Row, s: Any, images: int) -> None:
    told = validated(Pretrain, jobs.training_of(Job(row, "images", 0), s) | {"out": s.out})
    ready = Plan(told, {})
    plan.start(ready, _model(told))
    plan.sizes(ready)
    method: Any = methods.found()[told.method]
    plan.method(ready, method.auto_settings, images)
    plan.hold_out(ready, images)
    plan.budget(ready, images - ready.settings.hold_out, method.base_lr)
    with torch.device("meta"):  # its constructor checks its options
        encoder = Backbone(ready.settings.model, ready.settings.views.global_crops_size)
        method(encoder, **ready.settings.options)
    if s.trials and row.tuned_as not in s.methods:
        raise UserError(f"it takes the settings of {row.tuned_as}, which is not tried: add it to --methods")


def _model(told: Any) -> str | None:
    """The model of the weights that a row starts from. Raises UserError where they are not of the row's own (4)."""
    return load_backbone(told.init, model=None if told.model == "auto" else told.model)[0].model if told.init else None
