"""Evaluations during pretraining: the same tasks at the start and at every evaluation, and the choice of the best."""

from __future__ import annotations

from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.core.settings_file import read_yaml
from gtsa.core.terminal import say
from gtsa.evaluation import intervals, tasks
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.settings import Evaluate
from gtsa.models.backbone import Backbone
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import launch_fabric


class OnlineEvaluation:
    """The tasks of --eval. Their data are opened and checked before training starts.

    Args:
        settings: resolved settings of pretraining.
        start_counts: the network at step 0 may be chosen, because it has initial weights.

    Attributes:
        best: step and metric of the best network so far.
        per_image: {step: results} of the task that decides, at step 0 and at the best step.
    """

    def __init__(self, settings: Pretrain, start_counts: bool) -> None:
        shared = {"weights": settings.out, "seed": settings.seed, "workers": settings.workers}
        shared |= {"precision": settings.precision, "device": settings.device}
        from_file = read_yaml(settings.eval_config) if settings.eval_config else {}
        flags = ("task", settings.eval), ("train", settings.eval_train), ("val", settings.eval_val)
        given = {name: value for name, value in (*flags, ("folds", settings.eval_folds)) if value}
        requested = validated(Evaluate, {**shared, **from_file, **given}, "--eval")
        if requested.compile == "on":
            say(f"--eval-config {settings.eval_config}: compile has no effect during a run, whose own steps it serves")
        self.settings = requested.model_copy(update={"compile": "off"})
        self.tasks = tasks.open_tasks(self.settings)
        self.keep_best, self.start_counts = settings.keep_best or "", start_counts
        self.best: tuple[int, float] | None = None
        self.per_image: dict[int, PerImage] = {}

    def __call__(self, step: int, backbone: Backbone) -> tuple[dict[str, float], bool]:
        """All metrics, by task and name, and whether this network is the best yet."""
        all_metrics: dict[str, float] = {}
        better = False
        for task in self.tasks:
            per_image = task(backbone, launch_fabric(self.settings), self.settings)
            metrics = task.evaluator.metrics(per_image)
            all_metrics |= {f"{task.name}: {name}": value for name, value in metrics.items()}
            if task.name == self._task:
                value = metrics[self._metric(metrics)]
                better = (self.best is None or value > self.best[1]) and (step > 0 or self.start_counts)
                if better:
                    self.best = step, value
                if better or step == 0:
                    self.per_image = {s: e for s, e in self.per_image.items() if s == 0} | {step: per_image}
        return all_metrics, better

    def choice(self, start: Backbone | None, best: Backbone) -> str:
        """A sentence: which network is chosen, and how certain the gain is.

        Results that are missing, because the run was resumed, are computed again.

        Args:
            start: the initial network, if it may be chosen.
            best: the network that was best.
        """
        assert self.best is not None
        step, value = self.best
        if start is None:
            return f"take step {step}: {self.keep_best} {value:.2f}"
        if step == 0:
            return f"KEEP THE START: {self.keep_best} {value:.2f}; no later evaluation was better"
        task = next(t for t in self.tasks if t.name == self._task)
        for at, network in ((step, best), (0, start)):
            if at not in self.per_image:
                self.per_image[at] = task(network, launch_fabric(self.settings), self.settings)
        now, before = self.per_image[step], self.per_image[0]
        metric = self._metric(task.evaluator.metrics(now))
        value_before = task.evaluator.metrics(before)[metric]
        sentence = f"take step {step}: {self.keep_best} {value:.2f}, at the start {value_before:.2f}"
        if not task.evaluator.bootstrap:
            return sentence
        try:
            seed = self.settings.seed
            samples = [tasks.bootstrap_metrics(task, per_image, [metric], seed) for per_image in (now, before)]
            gain = intervals.of_images((samples[0] - samples[1])[0])
        except UserError:  # the metric is not defined for some samples of the images
            return sentence
        remark = {
            "better": "",
            "worse": "; worse than the start",
            "not distinguishable": "; not significantly different from the start",
        }[intervals.verdict(gain.low, gain.high)]
        return f"{sentence}; {gain.mean:+.2f} (95 % interval over images {gain.low:+.2f} to {gain.high:+.2f}){remark}"

    @property
    def _task(self) -> str:
        return self.keep_best.partition(":")[0]

    def _metric(self, metrics: dict[str, float]) -> str:
        """The name of the metric that decides. Raises UserError where the task has no such metric."""
        name = self.keep_best.partition(":")[2]
        if name and name not in metrics:
            raise UserError(
                f"--keep-best {self.keep_best}: {self._task} has no such metric; it has {', '.join(metrics)}"
            )
        return name or next(iter(metrics))
