"""Training that can be stopped and resumed: what happens between the steps of the loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from gtsa.core import stops
from gtsa.core.errors import UserError
from gtsa.core.terminal import Clock, Progress, doing, lasting, say
from gtsa.core.types import Objective, StepResult
from gtsa.training import checkpoint, recent, sharding
from gtsa.training.devices import on_rank_zero
from gtsa.training.exchange import Exchange
from gtsa.training.loop import Batch, fit
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.run_folder import RunFolder, note

CHECKPOINTS = ("checkpoints",)
Kept = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any]]  # tensors and plain values of a checkpoint


@dataclass(frozen=True)
class TrainerSettings:
    """The settings that a trainer needs. Intervals are in steps."""

    steps: int
    batch_size: int
    accumulate: int
    compile: str
    seed: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    out: str


class Trainer:
    """An objective and its optimiser, with logs, checkpoints, evaluations between steps, and requests to stop.

    Args:
        objective, optimizer: what is trained, moved to the device, and the optimiser of its parameters.
        fabric: the engine.
        run: the folder of logs and checkpoints; None in all processes but the first.
        resume: the command that resumes a training that was stopped.
        expected: seconds of a step and of an evaluation, where they were measured.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: ScheduledAdamW,
        settings: TrainerSettings,
        fabric: Fabric,
        run: RunFolder | None,
        resume: str,
        expected: tuple[float | None, float] = (None, 0.0),
    ) -> None:
        self.objective, self.optimizer, self.resume = objective, optimizer, resume
        self.settings, self.fabric, self.run = settings, fabric, run
        self.wrapped = fabric.setup(objective, optimizer)
        self.first_step = 0  # numbered from 0, so it is also the number of steps done before
        self.skips: deque[int] = deque()
        self.recent: list[StepResult] = []  # steps since the last line of the log
        self.exchange = Exchange(fabric)
        self.missed = False  # the evaluation at this step was interrupted and must be repeated
        self.clock = Clock(settings.steps, settings.evaluate_every, settings.checkpoint_every, *expected)

    def restore(self, key: str, value: str, mismatch: str) -> Kept | None:
        """Restores the newest whole checkpoint and returns all that it holds; None where there is none.

        Args:
            key, value: an entry that the checkpoint's state must have.
            mismatch: error message where the stored value differs.

        Raises:
            UserError: the checkpoint belongs to another training or version, or every checkpoint is damaged (4); it
                has more steps than the settings (2).
        """
        path, problems = checkpoint.newest(Path(self.settings.out) / "checkpoints")
        if path is None:
            if problems:
                raise UserError(
                    f"no whole checkpoint in {self.settings.out}: {'; '.join(problems)}; start anew in another folder, "
                    "or with --overwrite",
                    4,
                )
            return None
        for problem in problems:
            self.note(f"{problem}: resuming from {path.name}")
        tensors, state = checkpoint.read(path)
        if state.get(key) != value:
            raise UserError(mismatch, 4)
        if state["step"] > self.settings.steps:
            raise UserError(f"{state['step']} steps are done: --steps must be at least that, not {self.settings.steps}")
        with checkpoint.understood(path):
            self._restore(tensors, state)
        self.note(f"resumed from {path.name}")
        return tensors, state

    def _restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        self.objective.load_state_dict(sharding.spread(tensors["objective"], self.objective.state_dict()))
        saved = self.optimizer.state_dict()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        like = {moment: trained[int(moment.split(".")[0])] for moment, t in tensors["optimizer"].items() if t.ndim}
        for moment, tensor in sharding.spread(tensors["optimizer"], like).items():
            index, name = moment.split(".")
            saved["state"].setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(saved)
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if state["threads"] != torch.get_num_threads():
            torch.set_num_threads(state["threads"])  # sums depend on it
        self.first_step, self.skips = state["step"], deque(state["skips"])
        self.missed = state.get("missed", False)
        self.recent = recent.restored(tensors, state, self.fabric.device)

    def __call__(
        self,
        batches: Iterable[Batch],
        prepare: Callable[[Any], Any],
        account: Callable[[StepResult], None],
        evaluate: Callable[[int], object],
        state: Callable[[], Kept],
        begin: Callable[[], object] = tuple,
    ) -> None:
        """Trains to the last step.

        Args:
            batches, prepare: as for ``loop.fit``.
            account: called with every step's result.
            evaluate: called after every ``evaluate_every`` steps but the last, with their number, and after the first
                with 0: the user sees training begin before. It sets ``missed`` where it was broken off.
            state: returns what else a checkpoint has to hold.
            begin: called before the first step of a new training, with the logs open.

        Raises:
            UserError: stopped on request, with a checkpoint (75), and all that ``loop.fit`` raises.
        """
        settings, (module, optimizer) = self.settings, self.wrapped
        for path in checkpoint.foreign(Path(settings.out) / "checkpoints", self.first_step, settings.steps):
            self.note(f"{path} is not a checkpoint of gtsa; it stays as it is")
        if self.run:
            self.run.start_logs(self.first_step, done=self.first_step == settings.steps or self.missed)
        if self.first_step == 0:
            begin()
        if self.missed:
            self._evaluate(self.first_step, evaluate)
        self._announce()
        shown = settings.steps, self.first_step, settings.batch_size
        progress = Progress(*shown, clock=self.clock) if self.run else None
        with stops.requests() as requests:
            steps = fit(
                module, optimizer, batches, prepare, fabric=self.fabric, steps=settings.steps, start=self.first_step,
                accumulate=settings.accumulate, seed=settings.seed, skips=self.skips, compiled=settings.compile == "on",
                report=self.note, stopping=lambda: bool(requests),
            )  # fmt: skip
            try:
                for done in steps:
                    self.recent.append(done)
                    self.clock.step(done.seconds)
                    stopping = self.exchange.share(done, bool(requests), now=any(self._due(done.step)))
                    account(done)
                    if done.step % settings.log_every == 0 or done.step == settings.steps:
                        self._log(progress)
                    elif progress and (progress.due or done.step == 1):
                        progress.show(done.step, recent.means(self.recent))
                    self._between(done.step, stopping, requests, evaluate, state)
            finally:
                if progress:
                    progress.close()

    def _between(
        self,
        step: int,
        stopping: bool,
        requests: list[int],
        evaluate: Callable[[int], object],
        state: Callable[[], Kept],
    ) -> None:
        """Evaluates, saves, and stops on request; a request that came meanwhile does not wait for another step.

        Whoever requests to stop does not wait for an evaluation either: it is made when the training resumes.
        """
        evaluates, saves = self._due(step)
        if evaluates and stopping:
            self.missed = True
        elif evaluates:
            self._timed("evaluation", self._evaluate, step, evaluate)
        if saves:
            self._timed("save", self.save, step, *state())
        if (evaluates or saves) and not stopping:
            stopping = self.exchange.any_process(bool(requests))
        if not stopping:
            return
        if not saves:
            self.save(step, *state())
        rest = "" if step < self.settings.steps else "; verdict and export are still to do"
        saved = f"stopped on request at step {step} of {self.settings.steps}, checkpoint saved"
        raise UserError(f"{saved}{rest}; resume with: {self.resume}", 75)

    def _evaluate(self, step: int, evaluate: Callable[[int], object]) -> None:
        """The evaluations that follow a step."""
        self.missed = False
        for of in self._evaluated_after(step):
            evaluate(of)

    def _evaluated_after(self, step: int) -> list[int]:
        """Of which steps an evaluation follows this one: that of step 0 follows step 1."""
        ordinary = step % self.settings.evaluate_every == 0 and step < self.settings.steps
        return [0] * (step == 1) + [step] * ordinary

    def _due(self, step: int) -> tuple[bool, bool]:
        """Whether an evaluation follows a step, and a checkpoint."""
        saves = step % self.settings.checkpoint_every == 0 or step == self.settings.steps
        return bool(self._evaluated_after(step)), saves

    def _timed(self, kind: str, work: Callable[..., object], *arguments: object) -> None:
        began = time.perf_counter()
        work(*arguments)
        self.clock.seconds[kind] = time.perf_counter() - began

    def _announce(self) -> None:
        """Shows how long training takes (the first line of progress may come late), and what that line will show."""
        first, steps = self.first_step, self.settings.steps
        if self.run and self.clock.expected is not None and first < steps:
            of_step_zero = 0.0 if first else self.clock.seconds["evaluation"]
            left = lasting(self.clock.left(first) + of_step_zero)
            say(f"training from step {first} to {steps:,}, in all about {left}")
            if self.settings.compile == "on":
                say("the first steps take longer: their operations are compiled")
            if self.objective.legend:
                say(f"legend: data = share of time spent waiting for images; {self.objective.legend}")

    def note(self, text: str) -> None:
        """Tells the user, and the run's log."""
        note(self.run, text)

    @property
    def _scaler(self) -> Any:
        return getattr(self.fabric.strategy.precision, "scaler", None)

    @doing("saving a checkpoint", log=False)
    @stops.saving()
    def save(
        self,
        step: int,
        more: Mapping[str, Mapping[str, Tensor]],
        values: Mapping[str, Any],
        folder: tuple[str, ...] = CHECKPOINTS,
    ) -> None:
        """Writes a checkpoint with all that the next step needs. All processes must call it; the first one writes."""
        moments = {
            f"{index}.{name}": value
            for index, entry in self.optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        tensors = {"objective": self.weights(), "optimizer": sharding.gathered(moments, self.run is not None)}

        def write() -> None:
            assert self.run is not None
            if not all(torch.isfinite(t).all() for t in tensors["objective"].values()):
                raise UserError("training diverged: weights are not finite; start anew with a lower --learning-rate", 5)
            state = {
                "skips": list(self.skips),
                "missed": self.missed,
                "scaler": self._scaler.state_dict() if self._scaler else None,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "recent": recent.values_of(self.recent),
                **values,
            }
            keep = self.settings.keep_checkpoints if folder == CHECKPOINTS else 1
            whole = {**tensors, **recent.tensors_of(self.recent), **more}
            checkpoint.write(self.run.path(*folder), step, whole, state, keep)

        on_rank_zero(self.fabric, write)

    def weights(self) -> dict[str, Tensor]:
        """The objective's state, whole, in the first process; all must call it."""
        return sharding.gathered(self.objective.state_dict(), self.run is not None)

    def _log(self, progress: Progress | None) -> None:
        steps, self.recent = self.recent, []
        if not self.run or progress is None:
            return
        values = recent.means(steps)
        self.run.log(steps[-1].step, values)
        progress.show(steps[-1].step, values)
