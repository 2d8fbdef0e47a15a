"""A training that can be stopped and gone on with: what happens between the steps of the loop."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gtsa.core import stops
from gtsa.core.errors import UserError
from gtsa.core.terminal import Clock, Progress, doing, lasting, say
from gtsa.core.types import Objective, StepResult
from gtsa.training import checkpoint
from gtsa.training.loop import Batch, fit
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.run_folder import RunFolder

Kept = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any]]  # tensors and plain values of a checkpoint


class Trainer:
    """An objective and its optimiser, with logs, checkpoints, looks on the way, and requests to stop.

    Args:
        objective: what is trained; moved to the device.
        optimizer: over its parameters.
        settings: ``steps``, ``batch_size``, ``accumulate``, ``seed``, ``log_every``, ``evaluate_every``,
            ``checkpoint_every``, ``keep_checkpoints`` and ``out``.
        fabric: the engine.
        run: the folder of logs and checkpoints; None in all processes but the first.
        again: the command that goes on with a training that was stopped.
        expected: seconds of a step and of a look, where somebody has measured them.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: ScheduledAdamW,
        settings: Any,
        fabric: Fabric,
        run: RunFolder | None,
        again: str,
        expected: tuple[float | None, float] = (None, 0.0),
    ) -> None:
        self.objective, self.optimizer, self.again = objective, optimizer, again
        self.settings, self.fabric, self.run = settings, fabric, run
        self.wrapped = fabric.setup(objective, optimizer)
        self.start = 0  # steps that were done before
        self.skips: deque[int] = deque()
        self.recent: list[StepResult] = []  # steps since the last line of the log
        self.missed = False  # the look at this step, which a request to stop has broken off
        self.clock = Clock(settings.steps, settings.evaluate_every, settings.checkpoint_every, *expected)

    def restore(self, key: str, value: str, otherwise: str) -> Kept | None:
        """Goes back to the newest whole checkpoint and returns all that it holds; None where there is none.

        Args:
            key, value: what the checkpoint must say of itself.
            otherwise: the message where it says something else.

        Raises:
            UserError: it is another training's or another version's, or there are checkpoints and none of them is whole
                (4); more steps are done than there are to be (2).
        """
        place, problems = checkpoint.newest(Path(self.settings.out) / "checkpoints")
        if place is None:
            if problems:
                told = f"no whole checkpoint in {self.settings.out}: {'; '.join(problems)}"
                raise UserError(f"{told}; start anew in another folder, or with --overwrite", 4)
            return None
        for problem in problems:
            self.note(f"{problem}: going on from {place.name}")
        tensors, state = checkpoint.read(place)
        if state.get(key) != value:
            raise UserError(otherwise, 4)
        if state["step"] > self.settings.steps:
            raise UserError(f"{state['step']} steps are done: --steps must be at least that, not {self.settings.steps}")
        with checkpoint.understood(place):
            self._take_up(tensors, state)
        self.note(f"resumed from {place.name}")
        return tensors, state

    def _take_up(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        self.objective.load_state_dict(tensors["objective"])
        saved = self.optimizer.state_dict()
        for moment, tensor in tensors["optimizer"].items():
            index, name = moment.split(".")
            saved["state"].setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(saved)
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if state["threads"] != torch.get_num_threads():
            torch.set_num_threads(state["threads"])  # sums depend on it
        self.start, self.skips = state["step"], deque(state["skips"])
        self.missed = state.get("missed", False) and self.start < self.settings.steps
        window = [StepResult(step, {}, seconds, waited) for step, seconds, waited in state.get("recent", ())]
        for key, tensor in tensors.get("recent", {}).items():
            number, name = key.split(".", 1)
            window[int(number)].parts[name] = tensor.to(self.fabric.device)
        self.recent = window

    def __call__(
        self,
        batches: Iterable[Batch],
        prepare: Callable[[Any], Any],
        account: Callable[[StepResult], None],
        look: Callable[[int], Any],
        kept: Callable[[], Kept],
    ) -> None:
        """Trains to the last step.

        Args:
            batches, prepare: as for ``loop.fit``.
            account: told of every step.
            look: told of step 0, and of every ``evaluate_every``-th step but the last; it sets ``missed`` where it was
                broken off.
            kept: what else a checkpoint is to hold.

        Raises:
            UserError: stopped on request, with a checkpoint (75), and all that ``loop.fit`` raises.
        """
        s = self.settings
        module, optimizer = self.wrapped
        self._make_way()
        steps = fit(
            module, optimizer, batches, prepare,
            fabric=self.fabric, steps=s.steps, start=self.start, accumulate=s.accumulate, seed=s.seed, skips=self.skips,
        )  # fmt: skip
        if self.run:
            self.run.start_logs(self.start, done=self.start == s.steps or self.missed)
        if self.start == 0 or self.missed:
            self.missed = False
            self._timed("look", look, self.start)
        self._announce()
        progress = Progress(s.steps, self.start, s.batch_size, clock=self.clock) if self.run else None
        with stops.requests() as asked:
            try:
                for done in steps:
                    self.recent.append(done)
                    self.clock.step(done.seconds)
                    stopping = self._shared(done, bool(asked))
                    account(done)
                    if done.step % s.log_every == 0 or done.step == s.steps:
                        self._log(progress)
                    elif progress and progress.due:
                        progress.show(done.step, means(self.recent))
                    self._between(done.step, stopping, asked, look, kept)
            finally:
                if progress:
                    progress.close()

    def _between(
        self, step: int, stopping: bool, asked: list[int], look: Callable[[int], Any], kept: Callable[[], Kept]
    ) -> None:
        """Looks, saves, and stops where that was asked for; what was asked meanwhile does not wait for another step."""
        s = self.settings
        looks, saves = (
            step % s.evaluate_every == 0 and step < s.steps,
            step % s.checkpoint_every == 0 or step == s.steps,
        )
        if looks:
            self._timed("look", look, step)
        if saves:
            self._timed("save", self.save, step, *kept())
        if (looks or saves) and not stopping:
            stopping = self._agreed(bool(asked))
        if not stopping:
            return
        if not saves:
            self.save(step, *kept())
        rest = "" if step < s.steps else ", what follows the last step is to come"
        raise UserError(
            f"stopped on request at step {step} of {s.steps}, checkpoint saved{rest}; go on with: {self.again}", 75
        )

    def _timed(self, kind: str, work: Callable[..., Any], *arguments: Any) -> None:
        began = time.perf_counter()
        work(*arguments)
        self.clock.seconds[kind] = time.perf_counter() - began

    def _announce(self) -> None:
        """The first line of progress can be long in coming."""
        s = self.settings
        if self.run and self.clock.expected is not None and self.start < s.steps:
            say(f"training from step {self.start} to {s.steps:,}, in all about {lasting(self.clock.left(self.start))}")

    def note(self, text: str) -> None:
        """Tells the user, and the run's log."""
        if self.run:
            self.run.note(text)
            say(text)

    @property
    def _scaler(self) -> Any:
        return getattr(self.fabric.strategy.precision, "scaler", None)

    @doing("saving a checkpoint", log=False)
    @stops.saving()
    def save(
        self, step: int, more: Mapping[str, Mapping[str, Tensor]], words: Mapping[str, Any], folder: Path | None = None
    ) -> None:
        """Writes a checkpoint with all that the next step needs, to where checkpoints are kept or to ``folder``."""
        if self.run:
            if not all(torch.isfinite(p).all() for p in self.objective.parameters()):
                raise UserError("training diverged: weights are not finite; start anew with a lower --learning-rate", 5)
            moments = {
                f"{index}.{name}": value
                for index, entry in self.optimizer.state_dict()["state"].items()
                for name, value in entry.items()
            }
            state = {
                "skips": list(self.skips),
                "missed": self.missed,
                "scaler": self._scaler.state_dict() if self._scaler else None,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "recent": [(done.step, done.seconds, done.waited) for done in self.recent],
                **words,
            }
            tensors = {"objective": self.objective.state_dict(), "optimizer": moments, **self._window(), **more}
            checkpoint.write(
                folder or self.run.checkpoints, step, tensors, state, 1 if folder else self.settings.keep_checkpoints
            )
        if not folder:
            self.fabric.barrier()

    def _window(self) -> dict[str, dict[str, Tensor]]:
        """What the next line of the log is a mean of, so far: a resumed run writes the same line."""
        parts = {f"{n}.{name}": part for n, done in enumerate(self.recent) for name, part in done.parts.items()}
        return {"recent": parts} if parts else {}

    def _make_way(self) -> None:
        """Names what lies among the checkpoints and is none. Raises UserError where one is to be written there (8)."""
        for place in checkpoint.strangers(Path(self.settings.out) / "checkpoints"):
            step = checkpoint.NAME.fullmatch(place.name)
            if step and self.start < int(step[1]) <= self.settings.steps:
                raise UserError(checkpoint.in_the_way(place), 8)
            self.note(f"{place} is no checkpoint of gtsa; it is left alone")

    def _log(self, progress: Progress | None) -> None:
        recent, self.recent = self.recent, []
        if not self.run or progress is None:
            return
        values = means(recent)
        self.run.log(recent[-1].step, values)
        progress.show(recent[-1].step, values)

    def _agreed(self, asked: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.fabric.world_size == 1:
            return asked
        here = torch.tensor(asked, dtype=torch.float32, device=self.fabric.device)
        return bool(cast(Tensor, self.fabric.all_reduce(here, reduce_op="sum")))

    def _shared(self, done: StepResult, asked: bool) -> bool:
        """Brings what went wrong in any process to all of them; returns whether any was asked to stop."""
        if self.fabric.world_size == 1:
            return asked
        here = torch.tensor(
            [asked, bool(done.replaced or done.skipped)], dtype=torch.float32, device=self.fabric.device
        )
        stopping, news = cast(Tensor, self.fabric.all_reduce(here, reduce_op="sum")).tolist()
        if news:
            told: list[Any] = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(told, (done.replaced, done.skipped))
            done.replaced = [entry for replaced, _ in told for entry in replaced]
            done.skipped = [image for _, skipped in told for image in skipped]
        return bool(stopping)


def means(recent: list[StepResult]) -> dict[str, float]:
    """Of the parts of some steps, and of their seconds; the share of these that went into waiting for data."""
    values = {}
    for name in recent[-1].parts:
        found = [done.parts[name] for done in recent if name in done.parts]
        values[name] = float(sum(found) / len(found))
    seconds = sum(done.seconds for done in recent)
    return values | {"seconds": seconds / len(recent), "waited": sum(done.waited for done in recent) / seconds}


def teach(
    objective: Objective,
    optimizer: ScheduledAdamW,
    batches: Callable[[int], Iterable[Batch]],
    prepare: Callable[[Any], Any],
    *,
    steps: int,
    batch_size: int,
    fabric: Fabric,
    accumulate: int = 1,
    seed: int = 0,
    folder: Path | None = None,
    depends: Iterable[Any] = (),
    log_every: int = 50,
    checkpoint_every: int = 500,
) -> None:
    """Trains a probe or fine-tunes a network; with a folder, exactly as pretraining is done and gone on with.

    Args:
        batches: from the number of steps done before to the micro-batches from there on, ``accumulate`` a step; they
            follow from step and seed.
        prepare: brings a batch to the device, ready for the objective.
        folder: for checkpoints and logs; the same call goes on from them. None: nothing is kept.
        depends: what decides the outcome beside the objective's first weights and the numbers given here; a folder of
            a training that depends on something else is refused.

    Raises:
        UserError: the folder holds another training (4), stopped on request (75), and all that ``loop.fit`` raises.
    """
    if folder is None:
        module, wrapped = fabric.setup(objective, optimizer)
        taught = fit(module, wrapped, batches(0), prepare, fabric=fabric, steps=steps, accumulate=accumulate, seed=seed)
        progress, recent = Progress(steps, 0, batch_size), []
        try:
            for done in taught:
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
    settings = SimpleNamespace(
        steps=steps, batch_size=batch_size, accumulate=accumulate, seed=seed, log_every=log_every, evaluate_every=steps,
        checkpoint_every=checkpoint_every, keep_checkpoints=1, out=str(folder),
    )  # fmt: skip
    try:
        training = Trainer(objective, optimizer, settings, fabric, run, "the same command")
        other = f"--work: {folder} holds a training with other settings, weights or data; give another folder"
        training.restore("digest", digest, other)
        run.write("config.yaml", f"digest: {digest}\nsteps: {steps}\n")
        if training.start < steps:
            training(batches(training.start), prepare, _nothing, _nothing, lambda: ({}, {"digest": digest}))
    except OSError as error:
        told = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"--work: {told}; make room or mend it, then give the same command again", 6) from None
    finally:
        run.close()


def digest_of(*parts: Any) -> str:
    """SHA-256 of networks (their weights), tensors and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            tensors = sorted(part.state_dict().items())
        else:
            tensors = [("", part)] if isinstance(part, Tensor) else []
            digest.update(repr(None if tensors else part).encode())
        for name, tensor in tensors:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _nothing(_: Any) -> None:
    return None
