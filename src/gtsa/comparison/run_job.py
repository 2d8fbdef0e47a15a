"""Runs one job: trains its network, evaluates it on all tasks, and stores the result."""

from __future__ import annotations

import fcntl
import json
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gtsa import methods
from gtsa.comparison import jobs
from gtsa.comparison.controls import CONTROLS
from gtsa.comparison.jobs import EVALUATION_SEED, Job, read_job
from gtsa.comparison.results import CurveEntry, Result, TaskResult, commit, folder_of, write_per_image
from gtsa.comparison.settings import Compare, list_tasks_of
from gtsa.comparison.trained import keep_trained, load_trained, needs_work, read_training
from gtsa.core.drawing import squares
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.settings import Plan, validated
from gtsa.core.settings_file import plain_yaml, read_yaml
from gtsa.core.stops import handle_signals
from gtsa.core.types import Views
from gtsa.data.images.pixels import BadImage
from gtsa.data.sources import open_source
from gtsa.data.views.multicrop import MultiCrop
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.feature_maps import maps_strip, patch_maps
from gtsa.evaluation.settings import Evaluate
from gtsa.evaluation.token_cache import TokenCache
from gtsa.models.backbone import Backbone, Encoder
from gtsa.models.weights import load_backbone
from gtsa.pretraining import cost, plan
from gtsa.pretraining.adaptation import make_untrained
from gtsa.pretraining.pretrain import pretrain
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import launch_fabric, resolve_device, resolve_workers
from gtsa.training.threads import considerate


def run(job: Job, settings: Compare) -> None:
    """Runs a job and stores its result. Errors of the user and faults of gtsa are stored as failures.

    Raises:
        UserError: stopped on request (75); the same call resumes the job.
    """
    folder = folder_of(job, settings)
    with _lock(folder):
        if not needs_work(job, settings):
            return
        for leftover in ("per_image.npz", "per_image.json", "maps.png"):
            (folder / leftover).unlink(missing_ok=True)
        result: Result | None
        try:
            result = _train_and_evaluate(job, settings, folder)
        except UserError as error:
            if error.code == 75:
                raise
            result = {"status": "failed", "reason": str(error)}
        except Exception as error:  # a fault of gtsa must not stop the other jobs; the log has the traceback
            traceback.print_exc()
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        if result is not None:
            commit(job, settings, result)
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)


def _train_and_evaluate(job: Job, settings: Compare, folder: Path) -> Result | None:
    """The result of a job; None with --only training: then its network is kept for the evaluation."""
    started = time.perf_counter()
    backbone: Encoder
    if job.row.source is not None:
        backbone, training = _open_reference(job.row.source, job.number, settings), Result()
    elif settings.only == "training":
        keep_trained(job, settings, *_train(job, settings, folder))
        return None
    elif (kept := read_training(job, settings)) is not None:
        backbone, training = load_trained(job, settings), kept
    else:
        backbone, training = _train(job, settings, folder)
    backbone.range16 = jobs.range16_of(settings)  # alike in all rows
    results, per_image = _evaluate(backbone, job, settings, folder / "work")
    if job.stage != "trial":
        write_per_image(job, settings, per_image)
    if settings.pictures and job.stage != "trial":
        _draw_feature_maps(backbone, settings, folder / "maps.png")
    shutil.rmtree(folder / "work", ignore_errors=True)
    return {
        "status": "done",
        "reason": "",
        **training,
        "weights": backbone.fingerprint,
        "results": results,
        "seconds_in_all": time.perf_counter() - started,
    }


# The network


def _train(job: Job, settings: Compare, folder: Path) -> tuple[Backbone, Result]:
    """Trains a network, or resumes its training. Returns the exported network, and settings and costs of the run."""
    options = jobs.make_pretrain_settings(job, settings)
    if settings.evaluate_every and job.stage != "trial":
        options |= _make_online_evaluation_options(settings, folder)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run_folder = folder / "run"
    pretrain(**{"range16": jobs.range16_of(settings), **options}, out=str(run_folder), resume=True, report=False)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    backbone, _ = load_backbone(str(run_folder))
    resolved = validated(Pretrain, read_yaml(run_folder / "config.yaml"))
    return backbone, {
        "settings": json.loads(json.dumps(options)),
        "steps": resolved.steps,
        "images_seen": resolved.steps * resolved.batch_size,
        "flops_per_image": count_flops_per_image(resolved),
        "seconds": _sum_seconds(run_folder),
        "peak_memory": memory,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and resolved.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "curve": _read_curve(run_folder),
    }


def _make_online_evaluation_options(settings: Compare, folder: Path) -> dict[str, object]:
    """Settings of gtsa pretrain for evaluations during training."""
    options: dict[str, object] = {
        "eval": list_tasks_of(settings.primary),
        "eval_train": settings.train,
        "eval_val": settings.val,
        "eval_folds": settings.folds,
        "evaluate_every": settings.evaluate_every,
    }
    if settings.evaluate:
        store(folder / "eval.yaml", plain_yaml(settings.evaluate).encode())
        options["eval_config"] = str(folder / "eval.yaml")
    return options


def _open_reference(source: str, seed: int, settings: Compare) -> Encoder:
    """A control, an untrained network, or given weights."""
    if source in CONTROLS:
        return CONTROLS[source](_resolve_network(settings).patch_size)
    if source == "untrained":
        torch.manual_seed(seed)  # the same initial weights as in pretraining
        return make_untrained(_resolve_network(settings))
    return load_backbone(source)[0]


def _resolve_network(settings: Compare) -> Pretrain:
    """Common settings of pretraining, with patch and crop sizes resolved."""
    resolved = Plan(validated(Pretrain, {"model": settings.model, **settings.pretrain}), {})
    plan.resolve_initial(resolved, None)
    plan.resolve_sizes(resolved)
    return resolved.settings


def count_flops_per_image(resolved: Pretrain) -> float:
    """Floating-point operations of a training step per image, forward and backward.

    Args:
        resolved: settings without auto.
    """
    multicrop = MultiCrop(**resolved.views.model_dump())
    encoder = make_untrained(resolved)
    method = methods.load_all()[resolved.method](encoder, **resolved.options)
    method.train()
    sizes = 1 + (multicrop.local_crops_number > 0)
    images = max(2, method.min_images)
    groups = [cost.noise(multicrop, size, images, torch.device("cpu")) for size in range(sizes)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        method(Views.of(groups), 1.0)["loss"].backward()
    return float(counter.get_total_flops()) / images


def _sum_seconds(run_folder: Path) -> float:
    """Training time of all steps, without interruptions."""
    total, last_step = 0.0, 0
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        total, last_step = total + entry["seconds"] * (entry["step"] - last_step), entry["step"]
    return total


def _read_curve(run_folder: Path) -> list[CurveEntry]:
    """Metrics during training by step: health and evaluations."""
    entries: dict[int, CurveEntry] = {}
    for name in ("health.jsonl", "evaluations.jsonl"):
        file = run_folder / name
        for line in file.read_text().splitlines() if file.exists() else ():
            entry = json.loads(line)
            entries.setdefault(entry["step"], {}).update(entry)
    return [entries[step] for step in sorted(entries)]


# Evaluation


def _evaluate(
    backbone: Encoder, job: Job, settings: Compare, work: Path
) -> tuple[list[TaskResult], dict[tuple[str, str], PerImage]]:
    """Evaluates a network on all tasks of the job: metrics of every task, and the results of every image."""
    resolved = resolve_device(validated(Evaluate, jobs.make_device_settings(settings)))
    resolve_workers(resolved)
    fabric = launch_fabric(resolved.settings)
    backbone = backbone.to(fabric.device).eval()
    cache = TokenCache(work / "tokens") if settings.cache_tokens else None
    results: list[TaskResult] = []
    per_image: dict[tuple[str, str], PerImage] = {}
    for feature, evaluate, task in jobs.open_tasks(job, settings):
        folder = work / f"{task.name}-{feature}"
        workers = resolved.settings.workers
        options = (evaluate.tokens, EVALUATION_SEED, evaluate.batch_size, workers, folder)
        context = EvalContext(fabric, *options, compile=evaluate.compile, cache=cache)
        of_task = per_image[task.name, feature] = task.per_image(backbone, context)
        metrics = task.evaluator.metrics(of_task)
        result = TaskResult(task=task.name, feature=feature, metrics=metrics, images=len(task.val))
        if groups := task.groups(EVALUATION_SEED):
            result["groups"] = groups
        if without := task.metrics_without_each_fold(of_task, EVALUATION_SEED):
            result["without"] = without
        results.append(result)
    return results, per_image


def _draw_feature_maps(backbone: Encoder, settings: Compare, file: Path) -> None:
    """Draws feature maps of the first readable images of the data, the same for every row."""
    source = open_source(settings.data, replace(jobs.select_images(settings), range16=backbone.range16))
    images: list[Tensor] = []
    for index in range(len(source)):
        if len(images) == settings.pictures:
            break
        with suppress(BadImage):
            images.append(source.read(index))
    gallery = squares(images, 16 * backbone.patch_size)
    maps_strip(gallery, patch_maps(backbone, gallery)).save(file)


# The process


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Waits until no other process runs this job, e.g. one that outlived a killed comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def main(path: Path) -> None:
    """Entry point of the process of a job."""
    try:
        with handle_signals(), considerate():
            run(*read_job(path))
    except UserError as error:
        print(f"gtsa: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("gtsa: stopped on request", file=sys.stderr)
        sys.exit(75)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
