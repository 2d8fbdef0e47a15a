"""Training of a probe, or fine-tuning, with the same loop and the same resume as pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from gtsa.core import compilation
from gtsa.core.errors import UserError
from gtsa.core.terminal import Progress, say
from gtsa.core.types import Objective
from gtsa.training.digest import digest_of
from gtsa.training.loop import Batch, fit
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.recent import means
from gtsa.training.run_folder import RunFolder
from gtsa.training.trainer import Trainer, TrainerSettings


def train(
    objective: Objective,
    optimizer: ScheduledAdamW,
    batches: Callable[[int], Iterable[Batch]],
    prepare: Callable[[Any], Any],
    *,
    steps: int,
    batch_size: int,
    fabric: Fabric,
    accumulate: int = 1,
    compile: str = "off",
    seed: int = 0,
    folder: Path | None = None,
    depends: Iterable[object] = (),
    log_every: int = 50,
    checkpoint_every: int = 500,
) -> None:
    """Trains a probe or fine-tunes a network. With a folder it resumes exactly, as pretraining does.

    Args:
        batches: given the number of steps done, returns the micro-batches from there on, ``accumulate`` per step. They
            follow from step and seed.
        prepare: brings a batch to the device, ready for the objective.
        compile: auto, on or off, as ``compilation.resolve`` has it. The batches then have the same shapes at each step:
            every other shape would be compiled anew.
        folder: folder of checkpoints and logs; the same call resumes from them. None: nothing is written.
        depends: values that decide the result, beside the objective's initial weights and the numbers given here. A
            folder of a training with other values is refused.

    Raises:
        UserError: the folder holds another training (4), stopped on request (75), and all that ``loop.fit`` raises.
    """
    compiled, _ = compilation.resolve(compile, fabric.device.type == "cuda", steps)
    if compiled:
        compilation.forget()
    if folder is None:
        module, wrapped = fabric.setup(objective, optimizer)
        results = fit(
            module, wrapped, batches(0), prepare, fabric=fabric, steps=steps, accumulate=accumulate, seed=seed,
            compiled=compiled, report=say,
        )  # fmt: skip
        progress, recent = Progress(steps, 0, batch_size), []
        try:
            for done in results:
                recent.append(done)
                progress.clock.step(done.seconds)
                if done.step % log_every == 0 or done.step == steps or progress.due:
                    progress.show(done.step, means(recent))
                    recent = []
        finally:
            progress.close()
        return
    digest = digest_of(objective, steps, batch_size, accumulate, seed, fabric.strategy.precision.precision, *depends)
    run = RunFolder(folder, resume=True)
    settings = TrainerSettings(
        steps, batch_size, accumulate, "on" if compiled else "off", seed, log_every, steps, checkpoint_every, 1,
        str(folder),
    )  # fmt: skip
    try:
        training = Trainer(objective, optimizer, settings, fabric, run, "the same command")
        other = f"--work: {folder} holds a training with other settings, weights or data; give another folder"
        training.restore("digest", digest, other)
        run.write("config.yaml", f"digest: {digest}\nsteps: {steps}\n")
        if training.first_step < steps:
            training(batches(training.first_step), prepare, _nothing, _nothing, lambda: ({}, {"digest": digest}))
    except OSError as error:
        message = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"--work: {message}; make room or repair it, then give the same command again", 6) from None
    finally:
        run.close()


def _nothing(_: object) -> None:
    return None
