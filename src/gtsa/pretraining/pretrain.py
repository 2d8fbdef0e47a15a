"""gtsa pretrain: from a folder of images to a trained vision transformer, with a verdict."""

from __future__ import annotations

import copy
import os
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from lightning_fabric import Fabric

from gtsa.core import files, stops
from gtsa.core.errors import UserError
from gtsa.core.extras import require
from gtsa.core.settings import Plan, with_keywords
from gtsa.core.settings_file import to_yaml
from gtsa.core.terminal import command, doing, say
from gtsa.core.types import Method
from gtsa.data import run_images
from gtsa.data.run_images import ImageSettings, RunImages
from gtsa.data.scan import count_deep
from gtsa.models.backbone import Backbone
from gtsa.models.card import Origin
from gtsa.models.export import write as write_export
from gtsa.pretraining import cost, micro_batches, plan, plan_table
from gtsa.pretraining.adaptation import build_method
from gtsa.pretraining.arguments import PretrainArguments
from gtsa.pretraining.batches import Batches
from gtsa.pretraining.monitor import Monitor
from gtsa.pretraining.online_eval import OnlineEvaluation
from gtsa.pretraining.open_run import open_run
from gtsa.pretraining.parts_of_run import begin_plan, continue_plan, optimizer_of, select
from gtsa.pretraining.report.report import write_at_end
from gtsa.pretraining.requested import describe, plain_values, requested_settings
from gtsa.pretraining.run_record import PLAN, plan_text
from gtsa.pretraining.settings import Pretrain
from gtsa.pretraining.verdict import Verdict, advice
from gtsa.training import loggers, sharding, threads
from gtsa.training.devices import launch_fabric, on_rank_zero
from gtsa.training.run_folder import RunFolder, note
from gtsa.training.trainer import Trainer, TrainerSettings

NOT_WRITTEN = {"resume": False, "overwrite": False, "plan": False, "shard": False}  # they are of one start of a run


@dataclass
class Trained:
    """What a run leaves: its folder, the exported model, the verdict, and which network was chosen for export."""

    folder: Path
    export: Path
    verdict: Verdict
    choice: str = ""  # empty without --eval


@with_keywords(Pretrain, skip=("data",))
@threads.considerate()
def pretrain(data: object = None, **settings: Unpack[PretrainArguments]) -> Trained:
    """Trains a vision transformer on images without labels.

    Args:
        data: folder, list file, tar shards, or any torch Dataset of images; None: the sample that comes with gtsa.
        settings: as in ``gtsa pretrain --help``; sections are dictionaries, e.g. ``views={"local_crops_number": 4}``.

    Raises:
        UserError: the user can correct what is wrong; ``code`` says of which kind it is (core.errors.EXIT_CODES).
    """
    # Settings: those given, over those of the sample or of the run that is resumed.
    requested = requested_settings({**settings} if data is None else {"data": describe(data), **settings})
    data = requested.data if data is None else data
    loggers.check_installed(requested.loggers)
    if requested.decoder == "simplejpeg":
        require("--decoder simplejpeg", "jpeg", "simplejpeg")

    # Device and initial weights, and the part of the plan that needs no image: mistakes show before a file is read.
    resolved, initial = begin_plan(requested)
    fabric = launch_fabric(resolved.settings, requested.shard)
    if requested.deterministic and fabric.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # The run folder: it is locked, and the first process alone writes into it. With --plan it is temporary.
    with open_run(resolved, fabric) as run:
        # Images: each is used, or named with its reason. The rest of the plan follows from their number.
        listed = on_rank_zero(fabric, partial(_list_images, data, resolved.settings, run)) or {}
        counted = on_rank_zero(fabric, lambda: run_images.count_images(listed, resolved.settings.out)) or 0
        count: int = fabric.broadcast(counted)
        continue_plan(resolved, count)

        # Networks, and the data of the evaluations during training. These are the last that can be refused.
        method, loaded = build_method(resolved.settings, initial)
        online = on_rank_zero(fabric, lambda: _online_evaluation(resolved.settings))
        if run:
            with stops.saving():
                run.begin({"config.yaml": _config(resolved.settings), **listed} if listed else {})
        fabric.barrier()

        # The cost of a step, measured on these images: micro-batches that fit, and the plan as the user sees it.
        images = RunImages(data, select(ImageSettings, resolved.settings), partial(note, run))
        _write_config(run, resolved.settings)
        batches = Batches(resolved.settings, images, method, fabric.device)
        expected = _measure_and_show(resolved, method, loaded, images, batches, fabric, requested, run)
        if requested.plan:
            return _result(Path(requested.out or "."), Verdict("planned", [], {}))
        final = resolved.settings
        _write_config(run, final)

        # Training, from step 0 or from the newest checkpoint. The monitor evaluates between steps.
        resume = f"{command()} pretrain --out {shlex.quote(final.out)} --resume{' --shard' if final.shard else ''}"
        trained = _shard(method, final, fabric) if final.shard else method
        trainer = Trainer(
            trained, optimizer_of(trained, final), select(TrainerSettings, final), fabric, run, resume, expected
        )
        batches.settings = final
        monitor = Monitor(trainer, method, final, images, online, batches.prepare)
        if run:
            run.open_loggers(final.loggers, plain_values(final))
        if final.resume:
            monitor.resume()
        stream = batches.from_step(trainer.first_step, fabric)
        trainer(stream, batches.prepare, images.account, monitor, monitor.state, monitor.begin)

        # Verdict and export.
        verdict, choice = monitor(final.steps), ""
        if run and verdict:
            network, choice = monitor.choose_network()
            with doing("exporting"), stops.saving():
                teacher = method.encoders["teacher"] is not method.encoders["student"]
                kind_of_network = "EMA teacher" if teacher else "student"
                origin = Origin(final.out, run.folder, network=kind_of_network, choice=choice)
                write_export(network, run.path("exports", "timm"), _model_name(final.data), origin)
            _announce(run, verdict, choice, images, network, bool(loaded))
            run.close_loggers(finished=True)
            if final.report:
                say(write_at_end(run.folder))
        fabric.barrier()
        return _result(Path(final.out), verdict or Verdict("see rank 0", [], {}), choice)


def _list_images(data: object, settings: Pretrain, run: RunFolder | None) -> dict[str, str]:
    """The files that list the images of a new run; none for a run that resumes, and in all processes but the first.

    Raises:
        UserError: the run's list of images is gone (4), and all that ``scan_images`` raises.
    """
    if run is None or (settings.resume and run.began):
        return {}
    if settings.resume and run.has_checkpoints:
        raise UserError(f"{settings.out} has checkpoints, but {files.IMAGES} is gone: {run_images.ADVICE}", 4)
    return run_images.scan_images(data, settings.data, settings.selection, settings.max_bad)


def _online_evaluation(settings: Pretrain) -> OnlineEvaluation | None:
    """The tasks of --eval, if there are any. With --init the start is a candidate too."""
    return OnlineEvaluation(settings, bool(settings.init)) if settings.eval else None


def _config(settings: Pretrain) -> str:
    """The text of config.yaml, for --resume and --config."""
    return files.sealed(to_yaml(settings.model_copy(update=NOT_WRITTEN)))


def _write_config(run: RunFolder | None, settings: Pretrain) -> None:
    if run:
        run.write("config.yaml", _config(settings))


def _measure_and_show(
    resolved: Plan[Pretrain],
    method: Method,
    loaded: str,
    images: RunImages,
    batches: Batches,
    fabric: Fabric,
    requested: Pretrain,
    run: RunFolder | None,
) -> tuple[float, float]:
    """Measures a step, resolves micro-batches and shows the plan; expected seconds of a step and of an evaluation."""

    def work() -> tuple[int, int, int, float, float]:
        settings, device = resolved.settings, fabric.device
        per_device = max(1, settings.batch_size // (settings.devices * settings.nodes))
        with doing(f"measuring a step of {settings.model} on {device}"):
            free, fewest = micro_batches.free_memory(device), plan.min_images_of(settings)
            measured = cost.probe(method.to(device), batches.views(), batches.prepare, fabric, per_device, free, fewest)
            fits = None  # one process alone could not hold what --shard spreads
            if not settings.shard:
                fits = micro_batches.trial(method, batches.views(), batches.prepare, fabric)
            micro_batches.resolve_accumulate(resolved, measured, micro_batches.free_memory(device), fits)
        plan.resolve_measured_workers(resolved, measured)
        plan.resolve_evaluation(resolved, measured, len(images.looked_at))
        for line in filter(None, (loaded, *(given.loaded for given in method.given.values()))):
            say(line)
        disk = _existing(Path(requested.out or ".").absolute())
        deep = bool(count_deep(files.read_json(Path(settings.out, "scan.json")) or {}))
        rows = plan_table.show(resolved, measured, method, len(images.train), len(images.held_out), loaded, disk, deep)
        if run and not (run.folder / PLAN).exists():  # a resumed run keeps the reasons with which it began
            run.write(PLAN, plan_text(rows))
        settings = resolved.settings
        times = measured.step(settings), measured.evaluation(settings)
        return settings.accumulate, settings.workers, settings.evaluate_images, *times

    nothing = 0, 0, 0, 0.0, 0.0
    accumulate, workers, evaluated, step, evaluation = fabric.broadcast(on_rank_zero(fabric, work) or nothing)
    resolved.settle({}, accumulate=accumulate, workers=workers, evaluate_images=evaluated)
    return step, evaluation


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _shard(method: Method, settings: Pretrain, fabric: Fabric) -> Method:
    """The method, spread over the processes. In the first one ``method`` itself stays whole, for the monitor."""
    method = copy.deepcopy(method.cpu()) if fabric.global_rank == 0 else method
    return sharding.shard(method, fabric.device, settings.precision == "bf16")


def _model_name(data: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in Path(data).name)[:40]


def _announce(
    run: RunFolder, verdict: Verdict, choice: str, images: RunImages, network: Backbone, adapted: bool
) -> None:
    """Verdict, choice, and where the results are, for the user and the run's log."""
    out = run.folder
    run.note(f"done: {verdict.label}. " + ". ".join(verdict.reasons))
    say(f"\nverdict: {verdict.label.upper()}")
    for reason in verdict.reasons:
        say(f"  - {reason}")
    if not choice:
        say(f"  -> {advice(verdict.label)}")
    if images.bad:
        say(f"  {len(images.bad)} images could not be read during the run; {out}/train.log names them")
    if choice:
        run.note(f"choice: {choice}")
        say(f"\nchoice: {choice}\n  -> this network is exported; {out}/best is a run that holds it")
    elif adapted:
        say("  -> no evaluation during training: with --eval and labelled images the better of both is exported")
    say(f"\npictures: {out}/pictures (feature maps of your images, at the start and now)")
    vector = {"mean": "mean of the patch tokens", "cls": "the CLS token"}[network.pooling]
    say(f'load it:  timm.create_model("local-dir:{out}/exports/timm", pretrained=True)  # model(x): {vector}')


def _result(out: Path, verdict: Verdict, choice: str = "") -> Trained:
    return Trained(out, out / "exports" / "timm", verdict, choice)
