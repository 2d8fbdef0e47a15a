"""Weights & Biases and MLflow beside a run's own logs. They never stop or change a run.

A logger that fails is reported once and left out from then on. Its run's id is kept in the run folder, with the steps
that it was given, so a resumed run continues there and gives no step twice.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gtsa.core import files
from gtsa.core.extras import require

RECORD = "loggers.json"  # in the run folder: {logger: {"run": id, "steps": {log file: last step}}}
PROJECT = "gtsa"  # of W&B, and experiment of MLflow, unless their environment variables name another
LONGEST = 500  # characters of a setting that MLflow stores in any version


class Logger(Protocol):
    """A connection to one tool."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


class WeightsAndBiases:
    """A run of W&B. Its files lie in the run folder; ``WANDB_*`` variables count, e.g. WANDB_MODE=offline."""

    def __init__(self, folder: Path, run: str, resumed: bool, config: Mapping[str, Any]) -> None:
        import wandb

        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=run,
            resume="allow" if resumed else None,
            dir=os.environ.get("WANDB_DIR", str(folder)),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, in MLFLOW_EXPERIMENT_NAME; without these in the run folder."""

    def __init__(self, folder: Path, run: str, resumed: bool, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        store = (folder / "mlflow").resolve().as_uri()
        if "MLFLOW_TRACKING_URI" not in os.environ:  # MLflow 3 asks for this where the store is a folder
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.client: Any = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", store))
        found = self.client.search_runs([self._experiment()], f"tags.gtsa_run = '{run}'", max_results=1)
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        created = self.client.create_run(self._experiment(), run_name=folder.resolve().name, tags={"gtsa_run": run})
        self.id = created.info.run_id
        params = [Param(name, str(value)[:LONGEST]) for name, value in config.items()]
        self.client.log_batch(self.id, params=params)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        return str(experiment.experiment_id if experiment else self.client.create_experiment(name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


LOGGERS: dict[str, Callable[[Path, str, bool, Mapping[str, Any]], Logger]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError (2) where the library of a logger is missing."""
    for name in names:
        require(f"--loggers {name}", name, name)


class Loggers:
    """The loggers of a run, in its first process.

    Args:
        folder: of the run.
        logs: names of the run's log files, whose last lines say which steps loggers were given.
        config: settings of the run.
        note: reports a problem to the user and in the run's log.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        logs: Sequence[str],
        config: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self.note, self.open = note, dict[str, Logger]()
        record = _read(folder / RECORD)
        self.given = {name: _steps(record.get(name, {}), folder, logs) for name in names}
        runs = {name: str(record.get(name, {}).get("run") or uuid.uuid4().hex[:12]) for name in names}
        if names:
            now = {name: {"run": runs[name], "steps": self.given[name]} for name in names}
            files.store(folder / RECORD, (json.dumps({**record, **now}, indent=1) + "\n").encode())
        for name in names:
            self._try(name, partial(self._start, name, folder, runs[name], name in record, config))

    def _start(self, name: str, folder: Path, run: str, resumed: bool, config: Mapping[str, Any]) -> None:
        self.open[name] = LOGGERS[name](folder, run, resumed, config)

    def log(self, file: str, step: int, values: Mapping[str, float]) -> None:
        """Gives finite numbers to every logger, unless it has those of this step already."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for name, logger in list(self.open.items()):
            if step > self.given[name].get(file, -1):
                self._try(name, partial(logger.log, step, finite))

    def close(self, finished: bool) -> None:
        """Ends the loggers' runs: finished, or stopped and to be resumed."""
        for name, logger in list(self.open.items()):
            self._try(name, partial(logger.close, finished))
        self.open.clear()

    def _try(self, name: str, work: Callable[[], None]) -> None:
        """A logger that fails is reported and left out."""
        try:
            work()
        except Exception as error:  # of the network, a disk, a server, the library
            self.open.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.note(f"--loggers {name}: {reason}; the run continues without it, and its own logs are complete")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        return {name: entry for name, entry in record.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _steps(entry: Mapping[str, Any], folder: Path, logs: Sequence[str]) -> dict[str, float]:
    """The last step of each log that this logger was given: by its record, or by the log, where it was open before."""
    if not entry:
        return {}
    steps = {str(log): float(step) for log, step in dict(entry.get("steps", {})).items()}
    for log in logs:
        for line in (folder / log).read_bytes().splitlines() if (folder / log).is_file() else ():
            try:
                steps[log] = max(steps.get(log, -1.0), float(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue  # an interrupted write
    return steps
