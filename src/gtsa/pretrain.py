"""gtsa pretrain: from a folder of images to a trained ViT, with a verdict."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning_fabric import Fabric

from gtsa import augment, config, judging, methods, plan, weights
from gtsa.backbone import Backbone
from gtsa.core import Method, Remedy, Replaced, Views
from gtsa.data import HELD_OUT, StepSampler, ViewSet, generator, loader
from gtsa.evals.health import Figures, Health, Verdict, advice, verdict
from gtsa.export import write as write_export
from gtsa.images import BadImage
from gtsa.loop import Done
from gtsa.optim import ScheduledAdamW
from gtsa.pictures import patch_maps, squares, strip
from gtsa.run import Run
from gtsa.scan import escaped, insist, scan
from gtsa.schedules import Cosine, warmup_then
from gtsa.sources import Source, open_source
from gtsa.terminal import say
from gtsa.training import Kept, Training
from gtsa.views import MultiCrop

SAMPLE = Path(__file__).parent / "sample"
FREE_TO_CHANGE = {  # on --resume; everything else decides what is learnt
    "out", "resume", "overwrite", "data", "data_root", "devices", "nodes", "device", "workers", "log_every",
    "checkpoint_every", "evaluate_every", "keep", "eval", "eval_train", "eval_val", "eval_folds", "eval_config",
    "keep_best", "max_bad", "steps", "epochs", "accumulate", "deterministic",
}  # fmt: skip


@dataclass
class Trained:
    """What a run leaves: its folder, the exported model, and the verdict."""

    folder: Path
    export: Path
    verdict: Verdict


def pretrain(data: Any = None, **settings: Any) -> Trained:
    """Learns a vision transformer from images without labels.

    Args:
        data: folder, list file, or any torch Dataset of images; None: the sample that comes with gtsa.
        settings: as listed by ``gtsa pretrain --help`` and in ``gtsa.config``; sections are dictionaries, e.g.
            ``views={"local_crops": 4}``.

    Raises:
        Remedy: something is wrong that the user can mend; ``code`` says of which kind (core.EXIT_CODES).
    """
    given = dict(settings) if data is None else {"data": _described(data), **settings}
    asked = _asked(given)
    ready = plan.engine(asked)
    plan.sizes(ready)
    fabric = plan.fabric_of(ready.settings)
    if asked.deterministic and fabric.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    run = Run(asked.out, asked.resume, asked.overwrite) if fabric.global_rank == 0 else None
    try:
        return _Pretraining(asked.data if data is None else data, ready, fabric, run)()
    except Remedy as remedy:
        if run:
            run.note(f"ended: {remedy}")
        raise
    finally:
        if run:
            run.close()


def _described(data: Any) -> str:
    """``data`` as config.yaml tells it: a path, from wherever it is resumed, or words for what is no path."""
    if isinstance(data, str | os.PathLike):
        return os.path.abspath(data) if os.path.exists(data) else os.fspath(data)
    return f"<{type(data).__name__} of {len(data)} items>"


def _asked(given: Mapping[str, Any]) -> Any:
    """Settings as asked for: over the demo where there is no data, over the run's own where it is resumed."""
    base: dict[str, Any] = {}
    where = Path(given["out"]) / "config.yaml" if given.get("out") else None
    if given.get("resume") and where and where.is_file():
        base = config.read_yaml(where)
        new = config.validated(config.Pretrain, config.merged(base, given))
        old = config.validated(config.Pretrain, base)
        changes = config.differences(old, new)
        if differing := [line for line in changes if line.split(":")[0] not in FREE_TO_CHANGE]:
            raise Remedy(
                "--resume goes on with the same settings; these differ:\n  "
                + "\n  ".join(differing)
                + "\nleave them out, or start another run with --init and another --out"
            )
        for line in changes:
            if line.split(":")[0] not in ("out", "resume") and os.environ.get("RANK", "0") == "0":
                say(f"changed: {line}")
        return new
    if given.get("data") is None:
        base = config.read_yaml(SAMPLE / "demo.yaml") | {"data": str(SAMPLE / "images")}
    asked = config.validated(config.Pretrain, config.merged(base, given))
    if asked.out is None:
        raise Remedy("--out is missing: name a folder for the run")
    return asked


class _Pretraining:
    """One run, from top to bottom: data, plan, networks, training, verdict. Called once."""

    def __init__(self, data: Any, ready: plan.Plan, fabric: Fabric, run: Run | None) -> None:
        self.plan, self.fabric, self.run = ready, fabric, run
        self._remember(ready.settings)  # as asked, before anything else: a run killed here can be resumed too
        self.source, self.train, self.held_out = self._images(data)
        plan.budget(ready, len(self.train))
        s = self.settings = ready.settings
        self.multicrop = MultiCrop(**s.views.model_dump())
        self.judged = self._questions()
        self.best: tuple[int, float] | None = None  # step and figure of --keep-best
        self.method, self.loaded = self._networks()
        self.bad: dict[int, str] = {}

    def __call__(self) -> Trained:
        fabric = self.fabric
        if fabric.global_rank == 0:
            s = self.settings
            micro = max(1, s.batch_size // (s.devices * s.nodes))
            cost = plan.probe(self.method.to(fabric.device), self.multicrop, fabric, micro)
            plan.memory(self.plan, cost, _free_memory(fabric.device))
            if self.loaded:
                say(self.loaded)
            plan.show(self.plan, cost, self.method, len(self.train), len(self.held_out), self.loaded)
        accumulate = fabric.broadcast(self.plan.settings.accumulate)
        s = self.settings = self.plan.settings.model_copy(update={"accumulate": accumulate})
        self._remember(s)

        optimizer = ScheduledAdamW(
            self.method,
            warmup_then(Cosine(s.learning_rate, s.final_learning_rate), s.warmup, s.steps),
            Cosine(s.weight_decay, s.final_weight_decay),
            s.clip,
        )
        again = f"gtsa pretrain --out {s.out} --resume"
        training = self.training = Training(self.method, optimizer, s, fabric, self.run, again)
        student: Any = self.method.encoders["student"]
        mean, std = student.normalisation

        def prepare(views: Views) -> Views:
            return augment.apply(views, fabric.device, mean, std)

        looked_at = self.held_out or self.train[:64]
        self.health = Health(ViewSet(self.source, looked_at, self.multicrop, s.seed, HELD_OUT), prepare)
        self.gallery = squares(self._gallery(looked_at), 2 * self.multicrop.global_size)
        other = f"{s.out}/images.jsonl is not the one that the run was started with"
        self._begin(training.restore("images", self.digest, other) if s.resume else None)
        views = ViewSet(self.source, self.train, self.multicrop, s.seed)
        sampler = StepSampler(
            len(self.train), s.batch_size, s.steps, training.start, fabric.global_rank, fabric.world_size, s.accumulate
        )
        batches = loader(views, sampler, s.workers, pin=fabric.device.type == "cuda")
        training(batches, prepare, self._account, self._look, self._kept)
        return self._finish()

    # Data

    def _images(self, data: Any) -> tuple[Source, list[int], list[int]]:
        """The source, restricted to usable images, and which of them train and which are held out."""
        s = self.plan.settings
        options = {"range16": s.range16, "data_root": s.data_root}
        if self.run:
            manifest = self.run.path("images.jsonl")
            if not (s.resume and manifest.exists()):
                say(f"reading {data if isinstance(data, str) else s.data}")
                source = open_source(data, **options)
                found = scan(source, range16=s.range16)
                self.run.write("scan.json", json.dumps(found.report(), indent=1) + "\n")
                insist(found, data, s.max_bad)
                for name, reason in found.bad:
                    say(f"left out: {escaped(name)}: {reason}")
                lines = [json.dumps({"name": source.name(i), "bytes": source.size(i)}) for i in found.used]
                self.run.write("images.jsonl", "\n".join(lines) + "\n")
        self.fabric.barrier()
        frozen = Path(s.out, "images.jsonl").read_bytes()
        self.digest = hashlib.sha256(frozen).hexdigest()
        names = [json.loads(line)["name"] for line in frozen.splitlines()]
        plan.hold_out(self.plan, len(names))
        count = self.plan.settings.hold_out
        order = generator(s.seed, HELD_OUT).random(len(names)).argsort(kind="stable").tolist()
        return open_source(data, files=names, **options), sorted(order[count:]), sorted(order[:count])

    def _account(self, done: Done) -> None:
        """Names images that could not be read in mid-run, and steps that were skipped."""
        note = self.training.note
        for image, reason, by in (Replaced(*r) for r in done.replaced):
            if image not in self.bad:
                self.bad[image] = reason
                note(
                    f"step {done.step}: {escaped(self.source.name(image))} could not be read ({reason}); "
                    f"{escaped(self.source.name(by))} took its place"
                )
        if done.skipped:
            names = ", ".join(escaped(self.source.name(i)) for i in done.skipped[:20])
            note(f"step {done.step - 1} was skipped for a non-finite number; its images: {names}")
        if len(self.bad) > max(1, self.settings.max_bad * len(self.train)):
            listed = "; ".join(f"{escaped(self.source.name(i))}: {why}" for i, why in list(self.bad.items())[:5])
            raise Remedy(
                f"{len(self.bad)} of {len(self.train)} images could not be read in mid-run ({listed}); "
                "mend them and go on with --resume, or allow more with --max-bad",
                3,
            )

    # Networks, and what a checkpoint holds beside them

    def _networks(self) -> tuple[Method, str]:
        """The method with its initial weights, which follow from the seed."""
        s = self.settings
        found = weights.find(s.init) if s.init else None
        torch.manual_seed(s.seed)
        known = {"normalisation": found.normalisation} if found and found.normalisation else {}
        encoder = Backbone(s.model, self.multicrop.global_size, s.drop_path, **known)  # type: ignore[arg-type]
        loaded = weights.load(found, encoder) if found else ""
        options = s.options
        if not s.views.rotations:
            options["rotation_weight"] = 0.0  # nothing to predict where nothing is turned
        return methods.found()[s.method](encoder, **options), loaded

    def _begin(self, before: Kept | None) -> None:
        """What the run is compared with: the network at step 0, looked at now or kept by the checkpoint."""
        if before is None:
            self.start = self.health(self.method) if self.run else None
            self.start_maps = patch_maps(self._teacher, self.gallery) if self.run else None
            return
        tensors, state = before
        self.bad = {int(k): v for k, v in state["unreadable"].items()}
        self.best = tuple(state["best"]) if state["best"] else None
        first = tensors["start"]
        scores = {k.removeprefix("score."): v for k, v in first.items() if k.startswith("score.")}
        self.start = Figures(scores, float(first["rank"]), float(first["spread"]))
        self.start_maps = first["maps"]

    def _kept(self) -> Kept:
        """What ``_begin`` takes up again, and what opens the encoder."""
        state = {
            "encoder": {
                "model": self._teacher.model,
                "arguments": self._teacher.arguments,
                "normalisation": self._teacher.normalisation,
            },
            "images": self.digest,
            "unreadable": {str(k): v for k, v in self.bad.items()},
            "best": self.best,
        }
        if self.start is None or self.start_maps is None:  # not the first process, which alone writes
            return {}, state
        scores = {f"score.{k}": v for k, v in self.start.scores.items()}
        kept = {"rank": torch.tensor(self.start.rank), "spread": torch.tensor(self.start.spread)}
        return {"start": {**scores, **{k: v.double() for k, v in kept.items()}, "maps": self.start_maps}}, state

    @property
    def _teacher(self) -> Backbone:
        return self.method.encoders["teacher"]  # type: ignore[return-value]

    # What the user sees

    def _look(self, step: int) -> Verdict | None:
        """Health figures and the strip of feature maps, logged and kept."""
        if not self.run or self.start is None or self.start_maps is None:
            return None
        seen = verdict(self.health(self.method), self.start, step, bool(self.held_out))
        self.run.log(step, seen.figures, "health.jsonl", verdict=seen.word)
        now = patch_maps(self._teacher, self.gallery)
        strip(self.gallery, self.start_maps, now, step).save(self.run.path("pictures", f"features-{step:08d}.png"))
        self._judge(step)
        return seen

    # Evaluations on the way

    def _questions(self) -> list[judging.Question]:
        """What --eval asks, with its data checked before anything is trained. The first process asks alone."""
        s = self.settings
        if not s.eval or not self.run:
            return []
        more = config.read_yaml(s.eval_config) if s.eval_config else {}
        given = {"task": s.eval, "train": s.eval_train, "val": s.eval_val, "folds": s.eval_folds}
        shared = {"weights": s.out, "seed": s.seed, "workers": s.workers, "precision": s.precision, "device": s.device}
        asked = {**shared, **more, **{key: value for key, value in given.items() if value}}
        self.judge = config.validated(config.Evaluate, asked, "--eval")
        return judging.questions(self.judge)

    def _judge(self, step: int) -> None:
        """Asks the teacher, logs the answers, and keeps this step's checkpoint if it is the best yet."""
        s = self.settings
        for question in self.judged:
            figures = question(self._teacher, plan.fabric_of(self.judge), self.judge)
            named = {f"{question.name}: {name}": value for name, value in figures.items()}
            assert self.run is not None
            self.run.log(step, named, "evaluations.jsonl")
            say(f"step {step}  " + "  ".join(f"{name} {value:.2f}" for name, value in named.items()))
            task, _, figure = (s.keep_best or "").partition(":")
            if task == question.name:
                if figure and figure not in figures:
                    raise Remedy(f"--keep-best {s.keep_best}: {task} has no such figure; it has {', '.join(figures)}")
                value = figures[figure] if figure else next(iter(figures.values()))
                if self.best is None or value > self.best[1]:
                    self.best = step, value
                    self.training.save(step, *self._kept(), folder=self.run.path("best", "checkpoints"))

    def _finish(self) -> Trained:
        s, out = self.settings, Path(self.settings.out)
        place = out / "exports" / "timm"
        seen = self._look(s.steps)
        if not self.run or seen is None:
            self.fabric.barrier()
            return Trained(out, place, Verdict("see rank 0", [], {}))
        name = "".join(c if c.isalnum() else "_" for c in Path(s.data).name)[:40]
        place.parent.mkdir(parents=True, exist_ok=True)
        write_export(self._teacher, place, name)
        self.run.note(f"done: {seen.word}. " + ". ".join(seen.reasons))
        say(f"\nverdict: {seen.word.upper()}")
        for reason in seen.reasons:
            say(f"  - {reason}")
        say(f"  -> {advice(seen.word)}")
        if self.bad:
            say(f"  {len(self.bad)} images could not be read in mid-run; {out}/train.log names them")
        if self.best:
            say(f"\nbest:     {s.keep_best} {self.best[1]:.2f} at step {self.best[0]}, kept as a run in {out}/best")
        say(f"\npictures: {out}/pictures (your images as feature maps, at the start and now)")
        say(f'load it:  timm.create_model("local-dir:{place}", pretrained=True)  # model(x): mean of the patch tokens')
        self.fabric.barrier()
        return Trained(out, place, seen)

    def _gallery(self, indices: list[int]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for index in indices:
            if len(found) < 4:
                try:
                    found.append(self.source.read(index))
                except BadImage:
                    continue
        return found

    def _remember(self, settings: Any) -> None:
        """config.yaml: what --resume goes on with, and what --config takes for another run."""
        if self.run:
            kept = settings.model_copy(update={"resume": False, "overwrite": False})
            self.run.write("config.yaml", config.to_yaml(kept))


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
