"""Doing a job: its network is made, asked everything, and committed."""

from __future__ import annotations

import fcntl
import json
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gtsa import methods
from gtsa.comparison import jobs
from gtsa.comparison.controls import CONTROLS
from gtsa.comparison.jobs import SEED, Job, read, tasks_of, training_of
from gtsa.comparison.results import commit, folder_of, result_of, write_per_image
from gtsa.core.drawing import squares
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.settings import Plan, plain_yaml, read_yaml, validated
from gtsa.core.stops import heard
from gtsa.core.types import Method, Views
from gtsa.data.multicrop import MultiCrop
from gtsa.data.pixels import BadImage
from gtsa.data.sources import open_source
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.feature_maps import maps_strip, patch_maps
from gtsa.evaluation.features import EvalContext
from gtsa.evaluation.settings import Evaluate
from gtsa.models.backbone import Backbone, patch_of
from gtsa.models.weights import load_backbone
from gtsa.pretraining import cost, plan
from gtsa.pretraining.pretrain import pretrain
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import launch_fabric, resolve_device, resolve_workers
from gtsa.training.threads import considerate


def run(job: Job, s: Any) -> None:
    """Trains and asks a job's network, and commits its result; a mistake or fault is a result too.

    Raises:
        UserError: stopped on request (75); the same call goes on.
    """
    place = folder_of(job, s)
    with _alone(place):
        if result_of(job, s) is not None:
            return
        for leftover in ("per_image.npz", "per_image.json", "maps.png"):
            (place / leftover).unlink(missing_ok=True)
        try:
            result = _run(job, s, place)
        except UserError as remedy:
            if remedy.code == 75:
                raise
            result = {"status": "failed", "reason": str(remedy)}
        except Exception as error:  # a fault of ours must not stop the other jobs; the log has its traceback
            traceback.print_exc()
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        commit(job, s, result)
        shutil.rmtree(place / "run" / "checkpoints", ignore_errors=True)


def _run(job: Job, s: Any, place: Path) -> dict[str, Any]:
    began = time.perf_counter()
    backbone, costs = _trained(job, s, place) if job.row.source is None else (_untrained(job, s), {})
    ready = resolve_device(validated(Evaluate, jobs.engine_of(s)))
    resolve_workers(ready)
    fabric = launch_fabric(ready.settings)
    backbone = backbone.to(fabric.device).eval()
    results = []
    per_image: dict[tuple[str, str], PerImage] = {}
    for feature, asked, question in tasks_of(job, s):
        work = place / "work" / f"{question.name}-{feature}"
        lab = EvalContext(fabric, asked.tokens, SEED, asked.batch_size, ready.settings.workers, work)
        found = per_image[question.name, feature] = question.per_image(backbone, lab)
        metrics = question.evaluator.metrics(found)
        result = {"task": question.name, "feature": feature, "metrics": metrics, "images": len(question.val)}
        results.append(result | ({"without": without} if (without := question.without(found, SEED)) else {}))
    if job.stage != "trial":
        write_per_image(job, s, per_image)
    if s.pictures and job.stage != "trial":
        _maps(backbone, s, place)
    shutil.rmtree(place / "work", ignore_errors=True)
    taken = {"seconds_in_all": time.perf_counter() - began}
    return {"status": "done", "reason": "", **costs, "weights": backbone.fingerprint, "results": results, **taken}


def _trained(job: Job, s: Any, place: Path) -> tuple[Any, dict[str, Any]]:
    """The exported network of a run, and what the run was and cost."""
    given = training_of(job, s)
    folder = place / "run"
    if s.evaluate_every and job.stage != "trial":
        given |= {"eval": jobs.primary_tasks(s), "eval_train": s.train, "eval_val": s.val, "eval_folds": s.folds}
        given |= {"evaluate_every": s.evaluate_every}
        if s.evaluate:
            store(place / "eval.yaml", plain_yaml(s.evaluate).encode())
            given["eval_config"] = str(place / "eval.yaml")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    pretrain(**given, out=str(folder), resume=True)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    backbone, _ = load_backbone(str(folder))
    used = validated(Pretrain, read_yaml(folder / "config.yaml"))
    return backbone, {
        "settings": json.loads(json.dumps(given)),
        "steps": used.steps,
        "images_seen": used.steps * used.batch_size,
        "flops_per_image": flops_per_image(used),
        "seconds": _seconds(folder),
        "peak_memory": memory,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and used.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "curve": _curve(folder),
    }


def _untrained(job: Job, s: Any) -> Any:
    source = job.row.source or ""
    if source in CONTROLS:
        return CONTROLS[source](patch_of(s.model))
    if source == "untrained":
        views = validated(Pretrain, {"model": s.model, **s.pretrain})
        ready = Plan(views, {})
        plan.start(ready, None)
        plan.sizes(ready)
        torch.manual_seed(job.number)  # as pretraining starts
        return Backbone(s.model, ready.settings.views.global_crops_size)
    return load_backbone(source)[0]


def flops_per_image(settings: Any) -> float:
    """Floating-point operations of a training step for one image, forward and backward; settings are resolved."""
    multicrop = MultiCrop(**settings.views.model_dump())
    method: Method = methods.found()[settings.method](
        Backbone(settings.model, multicrop.global_crops_size), **settings.options
    )
    method.train()
    groups = [
        cost.noise(multicrop, size, 2, torch.device("cpu")) for size in range(1 + (multicrop.local_crops_number > 0))
    ]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        method(Views.of(groups), 1.0)["loss"].backward()
    return float(counter.get_total_flops()) / 2


def _seconds(folder: Path) -> float:
    """Of all steps, whatever interrupted them."""
    total, before = 0.0, 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        total, before = total + entry["seconds"] * (entry["step"] - before), entry["step"]
    return total


def _curve(folder: Path) -> list[dict[str, Any]]:
    """Figures on the way, step by step: evaluations and health."""
    found: dict[int, dict[str, Any]] = {}
    for name in ("health.jsonl", "evaluations.jsonl"):
        file = folder / name
        for line in file.read_text().splitlines() if file.exists() else ():
            entry = json.loads(line)
            found.setdefault(entry["step"], {}).update(entry)
    return [found[step] for step in sorted(found)]


def _maps(backbone: Any, s: Any, place: Path) -> None:
    """Feature maps of the first images of the data, the same for every row."""
    source = open_source(s.data)
    images: list[Tensor] = []
    for index in range(len(source)):
        if len(images) < s.pictures:
            try:
                images.append(source.read(index))
            except BadImage:
                continue
    side = 16 * backbone.patch_size
    gallery = squares(images, side)
    maps_strip(gallery, patch_maps(backbone, gallery)).save(place / "maps.png")


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Waits until no other process works at this job, e.g. one that outlived a comparison that was killed."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def main(path: Path) -> None:
    """What a process does that was made for one job."""
    try:
        with heard(), considerate():
            run(*read(path))
    except UserError as remedy:
        print(f"gtsa: {remedy}", file=sys.stderr)
        sys.exit(remedy.code)
    except KeyboardInterrupt:
        print("gtsa: stopped on request", file=sys.stderr)
        sys.exit(75)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
