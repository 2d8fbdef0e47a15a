"""The monitor of a run: what is evaluated between steps, and what of it a checkpoint keeps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core import stops
from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream
from gtsa.core.terminal import doing, say
from gtsa.core.types import Method, Views
from gtsa.data.batches.loader import ViewSet
from gtsa.data.run_images import RunImages
from gtsa.evaluation.feature_maps import SHIFTS, patch_maps, strip
from gtsa.models.backbone import Backbone
from gtsa.models.weight_sources import read_weights
from gtsa.models.weights import build_backbone
from gtsa.pretraining.adaptation import Adaptation
from gtsa.pretraining.online_eval import OnlineEvaluation
from gtsa.pretraining.requested import plain_values
from gtsa.pretraining.settings import Pretrain
from gtsa.pretraining.verdict import HealthMonitor, HealthSnapshot, Verdict, choose_images, usual_images, verdict
from gtsa.training import checkpoint
from gtsa.training.devices import on_rank_zero
from gtsa.training.run_folder import RunFolder
from gtsa.training.trainer import Kept, Trainer

T = TypeVar("T")


@dataclass
class StepZero:
    """The network at step 0, which later ones are compared with."""

    health: HealthSnapshot
    gallery: Tensor  # [n, 3, side, side] in [0, 1]: images whose feature maps are drawn
    shown: Tensor  # [n]: which images these are; empty in runs of early versions
    maps: Tensor  # [n, h, w, D] float16: their patch tokens; of early versions float32, and one for each patch


class Monitor:
    """Evaluates a run at step 0, every ``evaluate_every`` steps and at the end: health, pictures, --eval.

    Health and pictures of step 0 follow after the first step, from a copy of the network: the user sees training begin.

    Args:
        method: with its initial weights.
        online: the evaluations of --eval, in the first process.
        prepare: brings views to the device, as for training.
    """

    def __init__(
        self,
        trainer: Trainer,
        method: Method,
        settings: Pretrain,
        images: RunImages,
        online: OnlineEvaluation | None,
        prepare: Callable[[Views], Views],
    ) -> None:
        self.trainer, self.method, self.settings = trainer, method, settings
        self.images, self.online = images, online
        self.step_zero: StepZero | None = None  # in the first process
        self.initial = copy.deepcopy(method).cpu() if trainer.run else None  # until step 0 was evaluated
        self.better = False  # in the first process: the last evaluation was the best of --eval
        evaluated, draws = choose_images(images.looked_at, settings.evaluate_images)
        views = ViewSet(images.source, evaluated, settings.multicrop, settings.seed, Stream.HELD_OUT)
        self.health = HealthMonitor(views, prepare, draws)
        self.shifts = SHIFTS if settings.evaluate_images >= usual_images(len(images.looked_at)) else 1
        self.origin = method.origin if isinstance(method, Adaptation) else ""

    def __call__(self, step: int) -> Verdict | None:
        """Evaluates the network after ``step`` steps; the verdict, in the first process. At step 0 there is none.

        A request to stop breaks an evaluation off; the trainer then repeats it when the run is resumed.
        """
        return self._keep_best(step, lambda: self._evaluate_unless_stopped(step))

    def begin(self) -> None:
        """Before the first step: evaluates with --eval. The network with its initial weights may be the best."""
        if self.settings.eval:
            self._keep_best(0, lambda: self._evaluate_online(0))

    def _keep_best(self, step: int, evaluate: Callable[[], T]) -> T | None:
        """The result of an evaluation in the first process. All save a network that is the best."""
        if self.settings.shard:
            self._update_method()
        self.better = False
        result = on_rank_zero(self.trainer.fabric, evaluate)
        if self.trainer.fabric.broadcast(self.better):
            self.trainer.save(step, *self.state(), folder=("best", "checkpoints"))
        if self.settings.shard and self.trainer.run and step < self.settings.steps:
            self.method.cpu()  # its memory on the device is for training
        return result

    def _update_method(self) -> None:
        """Of a sharded training: brings the whole method up to date, which the first process keeps for evaluations."""
        weights = self.trainer.weights()
        if self.trainer.run:
            self.method.load_state_dict(weights)
            self.method.to(self.trainer.fabric.device)

    def _evaluate_unless_stopped(self, step: int) -> Verdict | None:
        before = (self.online.best, self.online.per_image) if self.online else None
        try:
            with stops.interruptible():
                if step == 0:
                    self._evaluate_step_zero()
                elif self.step_zero:  # else that was broken off just now
                    return self._evaluate(step)
        except stops.EvaluationStopped:
            self.trainer.missed, self.better = True, False
            if self.online and before:  # it will run again: this step's best checkpoint was not saved
                self.online.best, self.online.per_image = before
        return None

    def _evaluate_step_zero(self) -> None:
        if self.initial is None:  # done before the run was stopped
            return
        method = self.initial.to(self.trainer.fabric.device)
        with doing(f"step 0: evaluating on {len(self.health.views)} images"):
            health = self.health(method)
        with doing("step 0: computing feature maps", log=False):
            gallery, shown = self.images.gallery(2 * self.settings.multicrop.global_crops_size)
            maps = patch_maps(teacher_of(method), gallery, self.shifts).half()
        self.step_zero, self.initial = StepZero(health, gallery, shown, maps), None

    def _evaluate(self, step: int) -> Verdict:
        run, step_zero = self._run, self.step_zero
        assert step_zero is not None
        with doing(f"step {step}: evaluating on {len(self.health.views)} images"):
            health = self.health(self.method)
        self.images.unreadable(health.replaced, f"evaluation at step {step}: ")
        shifts = step_zero.maps.shape[1] * self.teacher.patch_size // step_zero.gallery.shape[-1]
        with doing(f"step {step}: computing feature maps", log=False):
            maps = patch_maps(self.teacher, step_zero.gallery, shifts)
        similarity = float(F.cosine_similarity(maps, step_zero.maps.float(), dim=-1).mean())
        result = verdict(health, step_zero.health, step, bool(self.images.held_out), similarity)
        run.log(step, result.metrics, "health.jsonl", verdict=result.label, reasons=result.reasons)
        picture = io.BytesIO()
        strip(step_zero.gallery, step_zero.maps, maps, step).save(picture, "PNG")
        run.write(f"pictures/features-{step:08d}.png", picture.getvalue())
        self._evaluate_online(step)
        return result

    def _evaluate_online(self, step: int) -> None:
        """Evaluates the teacher with --eval; ``better`` then says whether it is the best yet."""
        if self.online is None:
            return
        with doing(f"step {step}: evaluating with {', '.join(self.settings.eval)}"):
            metrics, better = self.online(step, self.teacher)
        self._run.log(step, metrics, "evaluations.jsonl")
        say(f"step {step}  " + "  ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
        self.better = better

    def choose_network(self) -> tuple[Backbone, str]:
        """The network to export, and why; without --eval the last teacher, with no reason."""
        if self.online is None or self.online.best is None:
            return self.teacher, ""
        best, _ = build_backbone(read_weights(str(Path(self.settings.out) / "best")))
        best = best.to(self.trainer.fabric.device).eval()
        initial = self.method.initial_encoder if isinstance(self.method, Adaptation) else None
        return best, self.online.choice(initial, best)

    @property
    def teacher(self) -> Backbone:
        return teacher_of(self.method)

    @property
    def _run(self) -> RunFolder:
        assert self.trainer.run is not None  # the first process alone evaluates
        return self.trainer.run

    # What a checkpoint keeps

    def state(self) -> Kept:
        """Tensors and plain values for a checkpoint: what ``resume`` restores, and what opens the encoder."""
        values = {
            "encoder": {
                "model": self.teacher.model,
                "arguments": self.teacher.arguments,
                "normalisation": self.teacher.normalisation,
                "pooling": self.teacher.pooling,
            },
            "settings": plain_values(self.settings),
            "origin": self.origin,
            "given_weights": {name: given.fingerprint for name, given in self.method.given.items()},
            "images": self.images.digest,
            "unreadable": {str(number): reason for number, reason in self.images.bad.items()},
            "best": self.online and self.online.best,
            "step_zero": self.step_zero is not None,
        }
        if self.step_zero is None:  # not the first process, which writes; or stopped before
            return {}, values
        health = self.step_zero.health
        tensors = {
            **{f"score.{name}": scores for name, scores in health.scores.items()},
            "rank": torch.tensor(health.rank, dtype=torch.float64),
            "spread": torch.tensor(health.spread, dtype=torch.float64),
            "images": health.images,
            "maps": self.step_zero.maps,
            "gallery": (255 * self.step_zero.gallery).round().to(torch.uint8),
            "shown": self.step_zero.shown,
        }
        return {"start": tensors}, values

    def resume(self) -> None:
        """Restores trainer and monitor from the newest checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is of other images, initial weights or given weights, or is damaged (4).
        """
        other = f"{self.settings.out}/images.jsonl is not the one that the run was started with"
        restored = self.trainer.restore("images", self.images.digest, other)
        if restored is None:
            return
        tensors, values = restored
        if values.get("origin", self.origin) != self.origin:
            raise UserError(
                f"--init {self.settings.init} differs from the initial weights of this run; pass the original ones", 4
            )
        for name, fingerprint in values.get("given_weights", {}).items():
            if self.method.given[name].fingerprint != fingerprint:
                flag, spec = f"--{self.settings.method}.{name}".replace("_", "-"), self.settings.options[name]
                raise UserError(f"{flag} {spec}: its weights are not those that this run began with; restore them", 4)
        with checkpoint.understood(Path(self.settings.out, "checkpoints", checkpoint.name(values["step"]))):
            self._restore(tensors, values)

    def _restore(self, saved: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        self.images.bad = {int(number): reason for number, reason in values["unreadable"].items()}
        if self.online and values.get("best"):
            self.online.best = tuple(values["best"])
        if not values.get("step_zero", True):  # stopped before it was evaluated
            return
        tensors = saved["start"]
        scores = {k.removeprefix("score."): v for k, v in tensors.items() if k.startswith("score.")}
        health = HealthSnapshot(scores, float(tensors["rank"]), float(tensors["spread"]), tensors["images"])
        shown = tensors.get("shown", torch.zeros(0, dtype=torch.int64))
        self.step_zero = StepZero(health, tensors["gallery"].float() / 255, shown, tensors["maps"])
        self.initial = None


def teacher_of(method: Method) -> Backbone:
    """The encoder that is evaluated and exported."""
    teacher = method.encoders["teacher"]
    assert isinstance(teacher, Backbone)
    return teacher
