"""Checks a comparison before hours of training."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence

import torch

from gtsa import methods
from gtsa.comparison import jobs, tuning
from gtsa.comparison.jobs import Job
from gtsa.comparison.rows import Row
from gtsa.comparison.settings import CONTROLS, Compare, list_tasks_of
from gtsa.core.errors import UserError
from gtsa.core.settings import Plan, is_auto, validated
from gtsa.data.sources import open_source
from gtsa.evaluation import tasks
from gtsa.evaluation.settings import Evaluate
from gtsa.models.weights import load_backbone
from gtsa.pretraining import plan
from gtsa.pretraining.adaptation import make_untrained
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import resolve_device

# Settings that the comparison itself sets
OF_PRETRAIN = ("data", "out", "seed", "resume", "overwrite")
OF_EVALUATE = (
    "weights", "task", "tokens", "seed", "network", "model", "out", "predictions", "pictures", "work", "device",
    "devices", "nodes", "precision", "workers", "range16",
)  # fmt: skip


def check(rows: Sequence[Row], settings: Compare) -> dict[str, Pretrain]:
    """Opens everything once: images, settings and weights of every row, settings and labels of every task.

    Returns:
        Resolved settings of pretraining of every row that is trained.

    Raises:
        UserError: anything is wrong.
    """
    _check_reserved_settings(settings)
    if not (images := len(open_source(settings.data, jobs.select_images(settings)))):
        raise UserError(f"--data {settings.data}: no images", 3)
    resolve_device(validated(Evaluate, jobs.make_device_settings(settings)))
    resolved: dict[str, Pretrain] = {}
    for row in rows:
        if row.source is None:
            try:
                resolved[row.name] = _check_trained_row(row, settings, images)
            except UserError as error:
                raise UserError(f"row {row.name}: {error}", error.code) from None
        elif row.source not in CONTROLS and settings.only != "training":
            load_backbone(row.source)
    check_cells(rows, settings)
    if settings.only != "training":
        _check_labels(rows, settings)
    for task in settings.task:
        jobs.make_evaluator(task, settings)
    return resolved


def check_cells(rows: Sequence[Row], settings: Compare) -> None:
    """Raises UserError if a pattern of --cells matches no network."""
    counts = {"images": settings.seeds, "flops": settings.seeds, "trial": settings.trials}
    names = [f"{row.name}/{stage}-{n}" for row in rows for stage, count in counts.items() for n in range(count)]
    for pattern in settings.cells:
        if not fnmatch.filter(names, pattern):
            rows_named = ", ".join(row.name for row in rows)
            raise UserError(
                f"--cells {pattern}: there is no such network; give ROW/images-SEED, e.g. {names[0]}, or "
                f"'ROW/*'; the rows are {rows_named}"
            )


def _check_labels(rows: Sequence[Row], settings: Compare) -> None:
    """Opens the labels of every task once."""
    labels: tasks.Opened = {}
    list(jobs.open_tasks(Job(rows[0], "images", 0), settings, labels))
    if settings.evaluate_every:
        if named := [name for name in list_tasks_of(settings.primary) if settings.evaluator_of(name) != name]:
            raise UserError(
                f"evaluate_every: {named[0]} is a name of this comparison; evaluations during training need a primary "
                "metric of tasks with their own names. Leave evaluate_every out"
            )
        online = validated(Evaluate, jobs.make_online_evaluation_settings(settings), "evaluate_every")
        tasks.open_tasks(online, labels)
    if settings.trials:
        of_trial = jobs.open_tasks(Job(rows[0], "trial", 0), settings, labels)
        tuning.check_tasks((task for *_, task in of_trial), settings)


def _check_reserved_settings(settings: Compare) -> None:
    """Raises UserError if a section has settings that the comparison itself sets."""
    sections: list[tuple[str, Mapping[str, object], Collection[str]]] = [
        ("pretrain", settings.pretrain, (*OF_PRETRAIN, "method")),
        ("evaluate", settings.evaluate, OF_EVALUATE),
        *((f"rows: {name}", section, OF_PRETRAIN) for name, section in settings.rows.items()),
        *((f"tasks: {name}", section, OF_EVALUATE) for name, section in settings.tasks.items()),
    ]
    if wrong := [f"{name}: {key}" for name, section, reserved in sections for key in section if key in reserved]:
        raise UserError("\n".join(f"{name} is set by the comparison; remove it here" for name in wrong))


def _check_trained_row(row: Row, settings: Compare, images: int) -> Pretrain:
    pretrain = validated(Pretrain, jobs.make_pretrain_settings(Job(row, "images", 0), settings) | {"out": settings.out})
    plan.check_batch(pretrain)
    resolved = Plan(pretrain, {})
    model, patch = _read_model(pretrain)
    plan.resolve_initial(resolved, model, jobs.range16_of(settings), patch)
    plan.resolve_sizes(resolved)
    method = methods.load_all()[pretrain.method]
    plan.resolve_method(resolved, method.auto_settings, images)
    plan.resolve_hold_out(resolved, images)
    plan.resolve_budget(resolved, images - resolved.settings.hold_out, method.base_lr)
    with torch.device("meta"):  # the constructor checks the options of the method; no memory is used
        encoder = make_untrained(resolved.settings)
        method(encoder, **resolved.settings.options)
    if settings.trials and row.tuned_as not in settings.methods:
        raise UserError(f"it takes its settings from the trials of {row.tuned_as}: add {row.tuned_as} to --methods")
    if settings.trials and row.seed_offset <= jobs.TRIAL_SEED < row.seed_offset + settings.seeds:
        raise UserError(
            f"seed_offset: no final run may have seed {jobs.TRIAL_SEED}, which the trials have; give another"
        )
    return resolved.settings


def _read_model(pretrain: Pretrain) -> tuple[str | None, int]:
    """Model and patch size of the initial weights of a row, if it has them.

    Raises:
        UserError: they do not fit the model of the row (4).
    """
    if not pretrain.init:
        return None, 0
    backbone = load_backbone(pretrain.init, model=None if is_auto(pretrain.model) else pretrain.model)[0]
    return backbone.model, backbone.patch_size
