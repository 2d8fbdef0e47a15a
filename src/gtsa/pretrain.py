"""gtsa pretrain: from a folder of images to a trained ViT, with a verdict."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from lightning_fabric import Fabric

from gtsa import augment, config, plan, strict, weights
from gtsa.adaptation import Adaptation
from gtsa.backbone import Backbone
from gtsa.core import Method, Remedy, Replaced, Views
from gtsa.data import HELD_OUT, NoImageLeft, StepSampler, ViewSet, generator, loader
from gtsa.evals.health import Figures, Health, Verdict, advice, verdict
from gtsa.export import write as write_export
from gtsa.images import BadImage
from gtsa.loop import Done
from gtsa.online import Online
from gtsa.optim import ScheduledAdamW, by_dimension
from gtsa.pictures import patch_maps, squares, strip
from gtsa.run import Run
from gtsa.scan import escaped, insist, scan
from gtsa.schedules import Cosine, Ramp, warmup_then
from gtsa.sources import Source, open_source
from gtsa.teacher import copy_of
from gtsa.terminal import say
from gtsa.training import Kept, Training
from gtsa.views import MultiCrop

T = TypeVar("T")
SAMPLE = Path(__file__).parent / "sample"
FREE_TO_CHANGE = {  # on --resume; everything else decides what is learnt
    "out", "resume", "overwrite", "data", "data_root", "devices", "nodes", "device", "workers", "log_every",
    "checkpoint_every", "evaluate_every", "keep", "eval", "eval_train", "eval_val", "eval_folds", "eval_config",
    "keep_best", "max_bad", "steps", "epochs", "accumulate", "deterministic",
}  # fmt: skip


@dataclass
class Trained:
    """What a run leaves: its folder, the exported model, the verdict, and which network was chosen for export."""

    folder: Path
    export: Path
    verdict: Verdict
    choice: str = ""  # empty where nothing was asked on the way


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
    found = weights.find(asked.init) if asked.init else None
    plan.start(ready, weights.described(found, None if asked.model == "auto" else asked.model)[0] if found else None)
    plan.sizes(ready)
    fabric = plan.fabric_of(ready.settings)
    if asked.deterministic and fabric.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    run = first(fabric, lambda: Run(asked.out, asked.resume, asked.overwrite))
    try:
        return _Pretraining(asked.data if data is None else data, found, ready, fabric, run)()
    except (Remedy, OSError, RuntimeError) as error:
        remedy = _remedy(error, asked.out)
        if remedy is None:
            raise
        if run and run.began:
            run.note(f"ended: {remedy}")
        raise remedy from None
    finally:
        if run:
            run.close()


def first(fabric: Fabric, work: Callable[[], T]) -> T | None:
    """``work`` done by the first process alone; a Remedy there ends all of them."""
    done, told = None, None
    if fabric.global_rank == 0:
        try:
            done = work()
        except Remedy as remedy:
            told = str(remedy), remedy.code
    told = fabric.broadcast(told)
    if told is not None:
        raise Remedy(*told)
    return done


def _remedy(error: Exception, out: str) -> Remedy | None:
    """What the user can do about an error of the machine; None where it is a fault of ours."""
    if isinstance(error, Remedy):
        return error
    if isinstance(error, OSError):
        where = error.filename or out
        return Remedy(f"{where}: {error.strerror or error}; make room or mend it, then go on with --resume", 6)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return Remedy("memory ran out; choose a smaller --model, or a smaller --batch-size or more --accumulate", 6)
    return None


def _described(data: Any) -> str:
    """``data`` as config.yaml tells it: a path, from wherever it is resumed, or words for what is no path."""
    if isinstance(data, str | os.PathLike):
        return os.path.abspath(data) if os.path.exists(data) else os.fspath(data)
    if not hasattr(data, "__len__"):
        raise Remedy(f"data: a folder, a list file or a map-style dataset, not a {type(data).__name__}")
    return f"<{type(data).__name__} of {len(data)} items>"


def _asked(given: Mapping[str, Any]) -> Any:
    """Settings as asked for: over the demo where there is no data, over the run's own where it is resumed."""
    base: dict[str, Any] = {}
    out = given.get("out")
    where = None
    if isinstance(out, str | os.PathLike):
        where, given = Path(out) / "config.yaml", {**given, "out": os.fspath(out)}
    if given.get("resume") and where and where.is_file():
        base, given = strict.read_yaml(where), _settled(given)
        new = strict.validated(config.Pretrain, strict.merged(base, given))
        old = strict.validated(config.Pretrain, base)
        changes = strict.differences(old, new)
        if differing := [line for line in changes if line.split(":")[0] not in FREE_TO_CHANGE]:
            raise Remedy(
                "--resume goes on with the same settings; these differ:\n  "
                + "\n  ".join(differing)
                + "\nleave them out, or start another run with --init and another --out"
            )
        for line in changes:
            if line.split(":")[0] not in ("out", "resume") and os.environ.get("LOCAL_RANK", "0") == "0":
                say(f"changed: {line}")
        return new
    if given.get("resume") and given.get("data") is None:
        raise Remedy(f"--resume: there is no run in {out}; mind its name, or give --data to start one")
    if given.get("data") is None:
        base = strict.read_yaml(SAMPLE / "demo.yaml") | {"data": str(SAMPLE / "images")}
    asked = strict.validated(config.Pretrain, strict.merged(base, given))
    if asked.out is None:
        raise Remedy("--out is missing: name a folder for the run")
    for name in ("data", "init"):
        place = os.path.realpath(getattr(asked, name) or os.devnull)
        if asked.overwrite and os.path.commonpath([place, os.path.realpath(asked.out)]) == os.path.realpath(asked.out):
            raise Remedy(
                f"--{name} {getattr(asked, name)} lies inside --out, which is to be overwritten; move either", 8
            )
    return asked


def _settled(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without what is left to us: that was resolved when the run began, and stays as it was."""
    found = {key: _settled(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    return {key: value for key, value in found.items() if not (isinstance(value, str) and value == "auto")}


class _Pretraining:
    """One run, from top to bottom: data, plan, networks, training, verdict. Called once."""

    def __init__(
        self, data: Any, found: weights.Weights | None, ready: plan.Plan, fabric: Fabric, run: Run | None
    ) -> None:
        self.plan, self.fabric, self.run = ready, fabric, run
        self.settings = ready.settings
        self.multicrop = MultiCrop(**ready.settings.views.model_dump())
        files = first(fabric, lambda: self._scanned(data))  # everything that can be refused is opened before
        plan.method(ready, config.METHODS[self.settings.method].sized, self._count(files))  # anything is written, and
        self.settings = ready.settings  # before a run that was here goes
        self.method, self.loaded = self._networks(found)
        self.origin = self.method.start.fingerprint if isinstance(self.method, Adaptation) else ""
        plan.workers(ready)
        self.settings = ready.settings
        self.online = first(fabric, lambda: Online(self.settings, bool(found)) if self.settings.eval else None)
        if run:
            run.begin(files or {})
        self.source, self.train, self.held_out = self._images(data)
        plan.budget(ready, len(self.train), config.METHODS[self.settings.method].rate)
        self.settings = ready.settings
        self._remember(ready.settings)
        self.bad: dict[int, str] = {}

    def __call__(self) -> Trained:
        fabric = self.fabric
        first(fabric, self._planned)
        accumulate = fabric.broadcast(self.plan.settings.accumulate)
        s = self.settings = self.plan.settings.model_copy(update={"accumulate": accumulate})
        self._remember(s)

        optimizer = ScheduledAdamW(
            self._learning(),
            warmup_then(Cosine(s.learning_rate, s.final_learning_rate), s.warmup, s.steps),
            Cosine(s.weight_decay, s.final_weight_decay),
            s.clip,
            (0.9, s.beta2),
        )
        again = f"gtsa pretrain --out {s.out} --resume"
        training = self.training = Training(self.method, optimizer, s, fabric, self.run, again)
        student: Any = self.method.encoders["student"]
        mean, std = student.normalisation

        def prepare(views: Views) -> Views:
            return augment.apply(views, fabric.device, mean, std)

        self.looked_at = self.held_out or self.train[:64]
        self.health = Health(ViewSet(self.source, self.looked_at, self.multicrop, s.seed, HELD_OUT), prepare)
        other = f"{s.out}/images.jsonl is not the one that the run was started with"
        self._begin(training.restore("images", self.digest, other) if s.resume else None)
        views = ViewSet(self.source, self.train, self.multicrop, s.seed)
        sampler = StepSampler(
            len(self.train), s.batch_size, s.steps, training.start, fabric.global_rank, fabric.world_size, s.accumulate
        )
        batches = loader(views, sampler, s.workers, pin=fabric.device.type == "cuda")
        training(batches, prepare, self._account, self._look, self._kept)
        return self._finish()

    def _planned(self) -> None:
        """Measures what a step costs and shows the plan."""
        s, fabric = self.settings, self.fabric
        micro = max(1, s.batch_size // (s.devices * s.nodes))
        cost = plan.probe(self.method.to(fabric.device), self.multicrop, fabric, micro)
        plan.memory(self.plan, cost, _free_memory(fabric.device))
        if self.loaded:
            say(self.loaded)
        plan.show(self.plan, cost, self.method, len(self.train), len(self.held_out), self.loaded)

    # Data

    def _scanned(self, data: Any) -> dict[str, str]:
        """Looks through the images; {name: text} of the files that a new run starts with."""
        s = self.settings
        if s.resume and self.run and self.run.began:
            return {}
        if s.resume and self.run and any(self.run.checkpoints.glob("step-*")):
            raise Remedy(f"{s.out} has checkpoints, but images.jsonl is gone: bring it back, or start another run", 4)
        say(f"reading {data if isinstance(data, str) else s.data}")
        source = open_source(data, range16=s.range16, data_root=s.data_root)
        found = scan(source, range16=s.range16)
        insist(found, data, s.max_bad)
        for name, reason in found.bad:
            say(f"left out: {escaped(name)}: {reason}")
        lines = [json.dumps({"name": source.name(i), "bytes": source.size(i)}) for i in found.used]
        return {
            "scan.json": json.dumps(found.report(), indent=1) + "\n",
            "config.yaml": self._kept_settings(s),
            "images.jsonl": "\n".join(lines) + "\n",
        }

    def _count(self, files: Mapping[str, str] | None) -> int:
        """How many images the run is about, in every process."""
        frozen = Path(self.settings.out, "images.jsonl")
        known = 0 if files is None else files["images.jsonl"].count("\n") if files else frozen.read_text().count("\n")
        return int(self.fabric.broadcast(known))

    def _images(self, data: Any) -> tuple[Source, list[int], list[int]]:
        """The source, restricted to usable images, and which of them train and which are held out."""
        s = self.plan.settings
        options = {"range16": s.range16, "data_root": s.data_root}
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
        self._unreadable(done.replaced, f"step {done.step}: ")
        if done.skipped:
            names = ", ".join(escaped(self.source.name(i)) for i in done.skipped[:20])
            self.training.note(f"step {done.step - 1} was skipped for a non-finite number; its images: {names}")

    def _unreadable(self, replaced: Iterable[Replaced], when: str) -> None:
        """Names images that could not be read, and ends the run where they are too many."""
        for image, reason, by in (Replaced(*entry) for entry in replaced):
            if image not in self.bad:
                self.bad[image] = reason
                self.training.note(
                    f"{when}{escaped(self.source.name(image))} could not be read ({reason}); "
                    f"{escaped(self.source.name(by))} took its place"
                )
        if len(self.bad) > max(1, self.settings.max_bad * len(self.train)):
            listed = "; ".join(f"{escaped(self.source.name(i))}: {why}" for i, why in list(self.bad.items())[:5])
            raise Remedy(
                f"{len(self.bad)} of {len(self.train)} images could not be read in mid-run ({listed}); "
                "mend them and go on with --resume, or allow more with --max-bad",
                3,
            )

    # Networks, and what a checkpoint holds beside them

    def _networks(self, found: weights.Weights | None) -> tuple[Method, str]:
        """The method with its initial weights, which follow from the seed, and what was loaded."""
        s, size = self.settings, self.multicrop.global_size
        torch.manual_seed(s.seed)
        if found is None:
            return config.METHODS[s.method](Backbone(s.model, size, s.drop_path), **s.options), ""
        encoder, loaded = weights.built(found, s.model, size, s.drop_path)
        start = copy_of(encoder)
        return Adaptation(config.METHODS[s.method](encoder, **s.options), start, s.anchor), loaded

    def _learning(self) -> list[dict[str, Any]]:
        """All that is trained. The encoder starts later and learns slower than the rest, where that was asked for.

        While it rests its learning rate is 0: it costs what it costs later, and the plan's time holds. What has rested
        has missed the warm-up, and has one of its own.
        """
        s, encoder = self.settings, self.method.encoders["student"]
        if (s.head_start, s.encoder_rate, s.layer_decay) == (0, 1, 1):
            return by_dimension(self.method.parameters())
        assert isinstance(encoder, Backbone)
        risen = s.head_start + s.warmup if s.head_start else 0.0
        layers = [
            {**group, "rate": Ramp(0.0, s.encoder_rate * share, risen, s.head_start)}
            for share, group in encoder.layers(s.layer_decay)
        ]
        slow = {id(p) for group in layers for p in group["params"]}
        return [*by_dimension(p for p in self.method.parameters() if id(p) not in slow), *layers]

    def _begin(self, before: Kept | None) -> None:
        """What the run is compared with: the network at step 0, looked at now or kept by the checkpoint."""
        if before is None:
            self.start = first(self.fabric, lambda: self.health(self.method))
            self.gallery = first(self.fabric, self._gallery)
            self.start_maps = None if self.gallery is None else patch_maps(self._teacher, self.gallery)
            return
        tensors, state = before
        if state.get("origin", self.origin) != self.origin:
            raise Remedy(f"--init {self.settings.init} is not what the run was started from; bring that back", 4)
        self.bad = {int(k): v for k, v in state["unreadable"].items()}
        if self.online and state.get("best"):
            self.online.best = tuple(state["best"])
        kept = tensors["start"]
        scores = {k.removeprefix("score."): v for k, v in kept.items() if k.startswith("score.")}
        self.start = Figures(scores, float(kept["rank"]), float(kept["spread"]), kept["images"])
        self.start_maps, self.gallery = kept["maps"], kept["gallery"].float() / 255

    def _kept(self) -> Kept:
        """What ``_begin`` takes up again, and what opens the encoder."""
        state = {
            "encoder": {
                "model": self._teacher.model,
                "arguments": self._teacher.arguments,
                "normalisation": self._teacher.normalisation,
                "feature": self._teacher.feature,
            },
            "origin": self.origin,
            "images": self.digest,
            "unreadable": {str(k): v for k, v in self.bad.items()},
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
        """Health figures, feature maps and evaluations, logged and kept by the first process; at the start the last."""
        if step == 0:
            first(self.fabric, lambda: self._judge(0))
            return None
        return first(self.fabric, lambda: self._looked(step))

    def _looked(self, step: int) -> Verdict:
        assert self.run is not None
        assert self.start is not None
        assert self.start_maps is not None
        assert self.gallery is not None
        now = self.health(self.method)
        self._unreadable(now.replaced, f"look at step {step}: ")
        seen = verdict(now, self.start, step, bool(self.held_out))
        self.run.log(step, seen.figures, "health.jsonl", verdict=seen.word)
        maps = patch_maps(self._teacher, self.gallery)
        strip(self.gallery, self.start_maps, maps, step).save(self.run.path("pictures", f"features-{step:08d}.png"))
        self._judge(step)
        return seen

    def _judge(self, step: int) -> None:
        """Asks the teacher, logs the answers, and keeps this step's checkpoint if it is the best yet."""
        if self.online is None or self.run is None:
            return
        figures, better = self.online(step, self._teacher)
        self.run.log(step, figures, "evaluations.jsonl")
        say(f"step {step}  " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
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
        place.parent.mkdir(parents=True, exist_ok=True)
        chosen, choice = self._chosen()
        write_export(chosen, place, name)
        self.run.note(f"done: {seen.word}. " + ". ".join(seen.reasons))
        say(f"\nverdict: {seen.word.upper()}")
        for reason in seen.reasons:
            say(f"  - {reason}")
        if not choice:
            say(f"  -> {advice(seen.word)}")
        if self.bad:
            say(f"  {len(self.bad)} images could not be read in mid-run; {out}/train.log names them")
        if choice:
            self.run.note(f"choice: {choice}")
            say(f"\nchoice: {choice}\n  -> the export is that, and {out}/best a run of it")
        elif self.loaded:
            say(
                "  -> nothing was asked on the way: with --eval and labelled images start and result can be chosen from"
            )
        say(f"\npictures: {out}/pictures (your images as feature maps, at the start and now)")
        what = {"mean": "mean of the patch tokens", "cls": "the CLS token"}[self._teacher.feature]
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

    def _gallery(self) -> torch.Tensor:
        """Four of the user's images as squares, [n, 3, s, s] in [0, 1], in steps of 1 / 255."""
        found: list[torch.Tensor] = []
        for index in self.looked_at:
            if len(found) < 4:
                try:
                    found.append(self.source.read(index))
                except BadImage:
                    continue
        if not found:
            raise NoImageLeft
        return (255 * squares(found, 2 * self.multicrop.global_size)).round() / 255

    def _remember(self, settings: Any) -> None:
        """config.yaml: what --resume goes on with, and what --config takes for another run."""
        if self.run:
            self.run.write("config.yaml", self._kept_settings(settings))

    @staticmethod
    def _kept_settings(settings: Any) -> str:
        return strict.to_yaml(settings.model_copy(update={"resume": False, "overwrite": False}))


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
