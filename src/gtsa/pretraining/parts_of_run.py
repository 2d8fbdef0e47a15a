"""What a run is made of, from its settings: the plan and the optimiser."""

from __future__ import annotations

from dataclasses import fields
from typing import TypeVar

from gtsa import methods
from gtsa.core.settings import Plan
from gtsa.core.types import Method
from gtsa.data.run_images import ImageSettings
from gtsa.models.weight_sources import Weights, check_present, read_weights
from gtsa.models.weights import facts_of
from gtsa.pretraining import plan
from gtsa.pretraining.adaptation import parameter_groups
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import check_shard, resolve_device
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Cosine, warmup_then
from gtsa.training.trainer import TrainerSettings

T = TypeVar("T", ImageSettings, TrainerSettings)


def begin_plan(requested: Pretrain) -> tuple[Plan[Pretrain], Weights | None]:
    """The part of the plan that needs no image, and the initial weights."""
    resolved = resolve_device(requested)
    plan.check_batch(resolved.settings)
    if requested.shard:
        check_shard(resolved.settings)
    for spec in requested.given_weights.values():
        check_present(spec)
    initial = read_weights(requested.init) if requested.init else None
    given_model = None if requested.model == "auto" else requested.model
    plan.resolve_initial(resolved, *(facts_of(initial, given_model) if initial else (None,)))
    plan.resolve_sizes(resolved)
    return resolved, initial


def continue_plan(resolved: Plan[Pretrain], count: int) -> None:
    """The part of the plan that follows from the number of images."""
    kind = methods.load_all()[resolved.settings.method]
    plan.resolve_method(resolved, kind.auto_settings, count)
    plan.resolve_hold_out(resolved, count)
    plan.resolve_budget(resolved, count - resolved.settings.hold_out, kind.base_lr)
    plan.resolve_compile(resolved)


def optimizer_of(method: Method, settings: Pretrain) -> ScheduledAdamW:
    """AdamW with the schedules of the run."""
    return ScheduledAdamW(
        parameter_groups(method, settings),
        warmup_then(Cosine(settings.learning_rate, settings.final_learning_rate), settings.warmup, settings.steps),
        Cosine(settings.weight_decay, settings.final_weight_decay),
        settings.clip_grad,
        (0.9, settings.beta2),
    )


def select(kind: type[T], settings: Pretrain) -> T:
    """The settings that a part of the run needs: the fields of the dataclass ``kind``."""
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})
