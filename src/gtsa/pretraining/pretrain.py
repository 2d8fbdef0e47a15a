"""gtsa pretrain: from a folder of images to a trained ViT, with a verdict."""

from __future__ import annotations

import io
import os
import shlex
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning_fabric import Fabric
from torch import Tensor

from gtsa import methods
from gtsa.core import files, stops
from gtsa.core.errors import Alone, UserError
from gtsa.core.seeds import Stream
from gtsa.core.settings import Plan, to_yaml
from gtsa.core.terminal import command, doing, say
from gtsa.core.types import Method, Views
from gtsa.data import augment, run_images
from gtsa.data.loader import StepSampler, ViewSet, loader
from gtsa.data.multicrop import MultiCrop
from gtsa.data.run_images import RunImages
from gtsa.evaluation.feature_maps import patch_maps, strip
from gtsa.methods.parts.teacher import copy_of
from gtsa.models import weights
from gtsa.models.backbone import Backbone
from gtsa.models.export import write as write_export
from gtsa.pretraining import cost, plan
from gtsa.pretraining.adaptation import Adaptation
from gtsa.pretraining.online_eval import OnlineEvaluation
from gtsa.pretraining.requested import described, requested_settings, written
from gtsa.pretraining.verdict import HealthMonitor, HealthSnapshot, Verdict, advice, verdict
from gtsa.training import checkpoint, threads
from gtsa.training.devices import disk_error, launch_fabric, on_rank_zero, resolve_device, resolve_workers
from gtsa.training.optim import ScheduledAdamW, by_dimension
from gtsa.training.run_folder import RunFolder
from gtsa.training.schedules import Cosine, Ramp, warmup_then
from gtsa.training.trainer import Kept, Trainer


@dataclass
class Trained:
    """What a run leaves: its folder, the exported model, the verdict, and which network was chosen for export."""

    folder: Path
    export: Path
    verdict: Verdict
    choice: str = ""  # empty where nothing was asked on the way


@threads.considerate()
def pretrain(data: Any = None, **settings: Any) -> Trained:
    """Learns a vision transformer from images without labels.

    Args:
        data: folder, list file, or any torch Dataset of images; None: the sample that comes with gtsa.
        settings: as listed by ``gtsa pretrain --help`` and in ``gtsa.pretraining.settings``; sections are
            dictionaries, e.g. ``views={"local_crops_number": 4}``.

    Raises:
        UserError: something is wrong that the user can mend; ``code`` says of which kind (core.errors.EXIT_CODES).
    """
    s = requested_settings(dict(settings) if data is None else {"data": described(data), **settings})
    ready = resolve_device(s)
    found = weights.find(s.init) if s.init else None
    plan.start(ready, weights.described(found, None if s.model == "auto" else s.model)[0] if found else None)
    plan.sizes(ready)
    fabric = launch_fabric(ready.settings)
    if s.deterministic and fabric.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    run = None
    try:
        if s.plan:
            return _planned_alone(s.data if data is None else data, found, ready, fabric)
        run = on_rank_zero(fabric, lambda: RunFolder(s.out, s.resume, s.overwrite))
        return _Pretraining(s.data if data is None else data, found, ready, fabric, run)()
    except (UserError, OSError, RuntimeError) as error:
        remedy = _remedy(error, s.out)
        if remedy is None:
            raise
        with suppress(OSError, UserError):  # the disk may be full for this as well
            if run and run.began:
                run.note(f"ended: {remedy}")
        raise remedy from None
    except stops.Stopped as stopped:
        with suppress(OSError, UserError):
            if run and run.began:
                run.note(f"ended by {stopped}")
        raise
    finally:
        if run:
            run.close()


def _planned_alone(data: Any, found: weights.Weights | None, ready: Plan, fabric: Fabric) -> Trained:
    """Shows the plan of a run in a folder that goes again."""
    asked_for = Path(ready.settings.out or ".").absolute()
    disk = next(place for place in (asked_for, *asked_for.parents) if place.is_dir())
    with tempfile.TemporaryDirectory(prefix="gtsa-plan-") as own:
        out = fabric.broadcast(own)
        ready.settle({}, out=out, resume=False, overwrite=False)
        run = on_rank_zero(fabric, lambda: RunFolder(out))
        try:
            _Pretraining(data, found, ready, fabric, run).show_plan(disk)
        finally:
            if run:
                run.close()
    return Trained(asked_for, asked_for / "exports" / "timm", Verdict("planned", [], {}))


def _remedy(error: Exception, out: str) -> UserError | None:
    """What the user can do about an error of the machine; None where it is a fault of ours."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return disk_error(error, out)
    if isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error):
        return Alone(
            "another process of this run ended, or its machine cannot be reached any more; what it printed last says "
            "why. Start all of them again with --resume",
            6,
        )
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return UserError("memory ran out; choose a smaller --model, or a smaller --batch-size or more --accumulate", 6)
    return None


class _Pretraining:
    """One run, from top to bottom: data, plan, networks, training, verdict. Called once."""

    def __init__(
        self, data: Any, found: weights.Weights | None, ready: Plan, fabric: Fabric, run: RunFolder | None
    ) -> None:
        self.plan, self.fabric, self.run = ready, fabric, run
        self.start: HealthSnapshot | None = (
            None  # the network at step 0, and its maps of the gallery: of the first process
        )
        self.start_maps: Tensor | None = None
        self.gallery: Tensor | None = None
        self.multicrop = MultiCrop(**ready.settings.views.model_dump())

        # Everything that can be refused is opened before anything is written, and before a run that was here goes.
        def scanned() -> dict[str, str]:
            return run_images.scanned(data, self.settings, run.began, run.has_checkpoints) if run else {}

        files = on_rank_zero(fabric, scanned) or {}
        images = fabric.broadcast(on_rank_zero(fabric, lambda: run_images.count(files, self.settings.out)) or 0)
        kind = methods.found()[self.settings.method]
        plan.method(ready, kind.auto_settings, images)
        plan.hold_out(ready, images)
        plan.budget(ready, images - self.settings.hold_out, kind.base_lr)
        self.method, self.loaded = self._networks(found)
        self.origin = self.method.start.fingerprint if isinstance(self.method, Adaptation) else ""
        resolve_workers(ready)
        self.online = on_rank_zero(
            fabric, lambda: OnlineEvaluation(self.settings, bool(found)) if self.settings.eval else None
        )
        if run:
            with stops.saving():
                run.begin({"config.yaml": self._kept_settings(), **files} if files else {})
        fabric.barrier()
        self.pool = RunImages(data, self.settings, lambda text: self.training.note(text))
        self._remember()

    def __call__(self) -> Trained:
        fabric = self.fabric
        expected = self.show_plan(Path(self.settings.out))
        self._remember()
        s = self.settings

        optimizer = ScheduledAdamW(
            self._learning(),
            warmup_then(Cosine(s.learning_rate, s.final_learning_rate), s.warmup, s.steps),
            Cosine(s.weight_decay, s.final_weight_decay),
            s.clip_grad,
            (0.9, s.beta2),
        )
        again = f"{command()} pretrain --out {shlex.quote(s.out)} --resume"
        training = self.training = Trainer(self.method, optimizer, s, fabric, self.run, again, expected)
        self.health = HealthMonitor(self._views(self.pool.looked_at, Stream.HELD_OUT), self._prepare)
        other = f"{s.out}/images.jsonl is not the one that the run was started with"
        if s.resume and (before := training.restore("images", self.pool.digest, other)):
            self._go_on(before)
        size, rank, ranks = len(self.pool.train), fabric.global_rank, fabric.world_size
        sampler = StepSampler(size, s.batch_size, s.steps, training.start, rank, ranks, s.accumulate)
        batches = loader(self._views(self.pool.train), sampler, s.workers, pin=fabric.device.type == "cuda")
        training(batches, self._prepare, self.pool.account, self._look, self._kept)
        return self._finish()

    @property
    def settings(self) -> Any:
        """As far as they are resolved."""
        return self.plan.settings

    def show_plan(self, disk: Path) -> tuple[float, float]:
        """Measures what a step costs, settles micro-batches and shows the plan; seconds of a step and of a look.

        Args:
            disk: a folder on the run's disk.
        """

        def work() -> tuple[int, float, float]:
            s, device, pool = self.settings, self.fabric.device, self.pool
            micro = max(1, s.batch_size // (s.devices * s.nodes))
            with doing(f"measuring a step of {s.model} on {s.device}"):
                views, free = self._views(pool.train), _free_memory(device)
                found = cost.probe(self.method.to(device), views, self._prepare, self.fabric, micro, free)
            plan.memory(self.plan, found, _free_memory(device))
            if self.loaded:
                say(self.loaded)
            plan.show(self.plan, found, self.method, len(pool.train), len(pool.held_out), self.loaded, disk)
            s = self.settings
            return s.accumulate, found.step(s), found.look(s, len(pool.looked_at))

        accumulate, step, look = self.fabric.broadcast(on_rank_zero(self.fabric, work) or (0, 0.0, 0.0))
        self.plan.settle({}, accumulate=accumulate)
        return step, look

    def _views(self, images: list[int], stream: int = Stream.VIEWS) -> ViewSet:
        return ViewSet(self.pool.source, images, self.multicrop, self.settings.seed, stream)

    def _prepare(self, views: Views) -> Views:
        """Brings views to the device, augmented."""
        student: Any = self.method.encoders["student"]
        return augment.apply(views, self.fabric.device, *student.normalisation)

    # Networks, and what a checkpoint holds beside them

    def _networks(self, found: weights.Weights | None) -> tuple[Method, str]:
        """The method with its initial weights, which follow from the seed, and what was loaded."""
        s, size = self.settings, self.multicrop.global_crops_size
        torch.manual_seed(s.seed)
        method: Any = methods.found()[s.method]
        if found is None:
            return method(Backbone(s.model, size, s.drop_path), **s.options), ""
        encoder, loaded = weights.built(found, s.model, size, s.drop_path)
        start = copy_of(encoder)
        return Adaptation(method(encoder, **s.options), start, s.gram_weight), loaded

    def _learning(self) -> list[dict[str, Any]]:
        """All that is trained. The encoder starts later and learns slower than the rest, where that was asked for.

        While it rests its learning rate is 0: it costs what it costs later, and the plan's time holds. What has rested
        has missed the warm-up, and has one of its own.
        """
        s, encoder = self.settings, self.method.encoders["student"]
        if (s.freeze_encoder, s.encoder_lr_scale, s.layer_decay) == (0, 1, 1):
            return by_dimension(self.method.parameters())
        assert isinstance(encoder, Backbone)
        risen = s.freeze_encoder + s.warmup if s.freeze_encoder else 0.0
        layers = [
            {**group, "rate": Ramp(0.0, s.encoder_lr_scale * share, risen, s.freeze_encoder)}
            for share, group in encoder.layers(s.layer_decay)
        ]
        slow = {id(p) for group in layers for p in group["params"]}
        return [*by_dimension(p for p in self.method.parameters() if id(p) not in slow), *layers]

    def _begin(self) -> None:
        """What the run is compared with: the network at step 0."""
        with doing(f"step 0: looking at {len(self.pool.looked_at)} images"):
            self.start = self.health(self.method)
            self.gallery = self.pool.gallery(2 * self.multicrop.global_crops_size)
            self.start_maps = patch_maps(self._teacher, self.gallery)
        self._judge(0)

    def _go_on(self, before: Kept) -> None:
        """Takes up again what ``_kept`` has kept."""
        tensors, state = before
        if state.get("origin", self.origin) != self.origin:
            raise UserError(f"--init {self.settings.init} is not what the run was started from; bring that back", 4)
        with checkpoint.understood(Path(self.settings.out, "checkpoints", checkpoint.name(state["step"]))):
            self._take_up(tensors, state)

    def _take_up(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        self.pool.bad = {int(k): v for k, v in state["unreadable"].items()}
        if self.online and state.get("best"):
            self.online.best = tuple(state["best"])
        kept = tensors["start"]
        scores = {k.removeprefix("score."): v for k, v in kept.items() if k.startswith("score.")}
        self.start = HealthSnapshot(scores, float(kept["rank"]), float(kept["spread"]), kept["images"])
        self.start_maps, self.gallery = kept["maps"], kept["gallery"].float() / 255

    def _kept(self) -> Kept:
        """What ``_go_on`` takes up again, and what opens the encoder."""
        state = {
            "encoder": {
                "model": self._teacher.model,
                "arguments": self._teacher.arguments,
                "normalisation": self._teacher.normalisation,
                "pooling": self._teacher.pooling,
            },
            "settings": written(self.settings),
            "origin": self.origin,
            "images": self.pool.digest,
            "unreadable": {str(k): v for k, v in self.pool.bad.items()},
            "best": self.online and self.online.best,
        }
        if self.start is None or self.start_maps is None or self.gallery is None:  # not the first process, which writes
            return {}, state
        return {
            "start": {
                **{f"score.{name}": values for name, values in self.start.scores.items()},
                "rank": torch.tensor(self.start.rank, dtype=torch.float64),
                "spread": torch.tensor(self.start.spread, dtype=torch.float64),
                "images": self.start.images,
                "maps": self.start_maps,
                "gallery": (255 * self.gallery).round().to(torch.uint8),
            }
        }, state

    @property
    def _teacher(self) -> Backbone:
        return self.method.encoders["teacher"]  # type: ignore[return-value]

    # What the user sees

    def _look(self, step: int) -> Verdict | None:
        """Health figures, feature maps and evaluations, logged and kept by the first process; at step 0 the start's.

        On the way a request to stop breaks it off.
        """
        return on_rank_zero(self.fabric, lambda: self._unless_stopped(step))

    def _unless_stopped(self, step: int) -> Verdict | None:
        before = (self.online.best, self.online.per_image) if self.online else None
        try:
            with stops.looking():
                if step:
                    return self._looked(step)
                self._begin()
        except stops.Broken:
            self.training.missed = True
            if self.online and before:  # it is taken again: what it found so far was not kept
                self.online.best, self.online.per_image = before
        return None

    def _looked(self, step: int) -> Verdict:
        assert self.run is not None
        assert self.start is not None
        assert self.start_maps is not None
        assert self.gallery is not None
        with doing(f"step {step}: looking at {len(self.pool.looked_at)} images"):
            now = self.health(self.method)
        self.pool.unreadable(now.replaced, f"look at step {step}: ")
        seen = verdict(now, self.start, step, bool(self.pool.held_out))
        self.run.log(step, seen.metrics, "health.jsonl", verdict=seen.word)
        maps = patch_maps(self._teacher, self.gallery)
        picture = io.BytesIO()
        strip(self.gallery, self.start_maps, maps, step).save(picture, "PNG")
        self.run.write(f"pictures/features-{step:08d}.png", picture.getvalue())
        self._judge(step)
        return seen

    def _judge(self, step: int) -> None:
        """Asks the teacher, logs the answers, and keeps this step's checkpoint if it is the best yet."""
        if self.online is None or self.run is None:
            return
        with doing(f"step {step}: evaluating by {', '.join(self.settings.eval)}"):
            metrics, better = self.online(step, self._teacher)
        self.run.log(step, metrics, "evaluations.jsonl")
        say(f"step {step}  " + "  ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
        if better:
            self.training.save(step, *self._kept(), folder=self.run.path("best", "checkpoints"))

    def _finish(self) -> Trained:
        s, out = self.settings, Path(self.settings.out)
        place = out / "exports" / "timm"
        seen = self._look(s.steps)
        if not self.run or seen is None:
            self.fabric.barrier()
            return Trained(out, place, Verdict("see rank 0", [], {}))
        name = "".join(c if c.isalnum() else "_" for c in Path(s.data).name)[:40]
        chosen, choice = self._chosen()
        with doing("exporting"), stops.saving():
            write_export(chosen, self.run.path("exports", "timm"), name)
        self.run.note(f"done: {seen.word}. " + ". ".join(seen.reasons))
        say(f"\nverdict: {seen.word.upper()}")
        for reason in seen.reasons:
            say(f"  - {reason}")
        if not choice:
            say(f"  -> {advice(seen.word)}")
        if bad := self.pool.bad:
            say(f"  {len(bad)} images could not be read in mid-run; {out}/train.log names them")
        if choice:
            self.run.note(f"choice: {choice}")
            say(f"\nchoice: {choice}\n  -> the export is that, and {out}/best a run of it")
        elif self.loaded:
            say(
                "  -> nothing was asked on the way: with --eval and labelled images start and result can be chosen from"
            )
        say(f"\npictures: {out}/pictures (your images as feature maps, at the start and now)")
        what = {"mean": "mean of the patch tokens", "cls": "the CLS token"}[self._teacher.pooling]
        say(f'load it:  timm.create_model("local-dir:{place}", pretrained=True)  # model(x): {what}')
        self.fabric.barrier()
        return Trained(out, place, seen, choice)

    def _chosen(self) -> tuple[Backbone, str]:
        """The network to export, and why it is that; the last one where nothing was asked."""
        if self.online is None or self.online.best is None:
            return self._teacher, ""
        best, _ = weights.built(weights.find(str(Path(self.settings.out) / "best")))
        best = best.to(self.fabric.device).eval()
        start = self.method.start if isinstance(self.method, Adaptation) else None
        return best, self.online.choice(start, best)

    def _remember(self) -> None:
        """config.yaml: what --resume goes on with, and what --config takes for another run."""
        if self.run:
            self.run.write("config.yaml", self._kept_settings())

    def _kept_settings(self) -> str:
        settled = {"resume": False, "overwrite": False, "plan": False}
        return files.sealed(to_yaml(self.settings.model_copy(update=settled)))


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
