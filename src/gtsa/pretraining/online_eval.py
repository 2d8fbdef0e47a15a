"""Evaluations during pretraining: the same questions at the start and at every look, and the choice of the best."""

from __future__ import annotations

from typing import Any

from gtsa.core.errors import UserError
from gtsa.core.settings import read_yaml, validated
from gtsa.evaluation import intervals, tasks
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.settings import Evaluate
from gtsa.models.backbone import Backbone
from gtsa.training.devices import launch_fabric


class OnlineEvaluation:
    """What --eval asks. Its data are opened and checked before anything is trained.

    Args:
        settings: of pretraining, resolved.
        start_counts: the start is one to choose from, because it is worth something.
    """

    def __init__(self, settings: Any, start_counts: bool) -> None:
        s = settings
        more = read_yaml(s.eval_config) if s.eval_config else {}
        given = {"task": s.eval, "train": s.eval_train, "val": s.eval_val, "folds": s.eval_folds}
        shared = {"weights": s.out, "seed": s.seed, "workers": s.workers, "precision": s.precision, "device": s.device}
        asked = {**shared, **more, **{key: value for key, value in given.items() if value}}
        self.settings = validated(Evaluate, asked, "--eval")
        self.questions = tasks.open_tasks(self.settings)
        self.named, self.start_counts = s.keep_best or "", start_counts
        self.best: tuple[int, float] | None = None  # step and figure
        self.per_image: dict[int, PerImage] = {}  # of the figure that is chosen by, at the start and at its best

    def __call__(self, step: int, backbone: Backbone) -> tuple[dict[str, float], bool]:
        """All figures, by task and name, and whether this is the best yet."""
        found: dict[str, float] = {}
        better = False
        for question in self.questions:
            per_image = question(backbone, launch_fabric(self.settings), self.settings)
            metrics = question.evaluator.metrics(per_image)
            found |= {f"{question.name}: {name}": value for name, value in metrics.items()}
            if question.name == self._task:
                value = metrics[self._figure(metrics)]
                better = (self.best is None or value > self.best[1]) and (step > 0 or self.start_counts)
                if better:
                    self.best = step, value
                if better or step == 0:
                    self.per_image = {s: e for s, e in self.per_image.items() if s == 0} | {step: per_image}
        return found, better

    def choice(self, start: Backbone | None, best: Backbone) -> str:
        """Which network to take, and how sure that is; networks are asked again where a run was gone on with.

        Args:
            start: what training started from, where it is one to choose from.
            best: the network that was best.
        """
        assert self.best is not None
        step, value = self.best
        if start is None:
            return f"take step {step}: {self.named} {value:.2f}"
        if step == 0:
            return f"KEEP THE START: {self.named} {value:.2f}; no look was better"
        question = next(q for q in self.questions if q.name == self._task)
        both = []
        for at, network in ((step, best), (0, start)):
            if at not in self.per_image:
                self.per_image[at] = question(network, launch_fabric(self.settings), self.settings)
            both.append(self.per_image[at])
        names = [self._figure(question.evaluator.metrics(both[0]))]
        before = question.evaluator.metrics(both[1])[names[0]]
        told = f"take step {step}: {self.named} {value:.2f}, at the start {before:.2f}"
        if not question.evaluator.bootstrap:
            return told
        try:
            drawn = [tasks.bootstrap_metrics(question, each, names) for each in both]
            gain = intervals.of_images((drawn[0] - drawn[1])[0])
        except UserError:  # a choice of images that shows nothing
            return told
        sure = {
            "better": "",
            "worse": "; worse than the start",
            "not distinguishable": "; not distinguishable from the start: other images could say otherwise",
        }[intervals.verdict(gain.low, gain.high)]
        return f"{told}; {gain.mean:+.2f} (95 % interval over images {gain.low:+.2f} to {gain.high:+.2f}){sure}"

    @property
    def _task(self) -> str:
        return self.named.partition(":")[0]

    def _figure(self, metrics: dict[str, float]) -> str:
        """The name of the figure that is chosen by. Raises UserError where there is no such figure."""
        figure = self.named.partition(":")[2]
        if figure and figure not in metrics:
            raise UserError(f"--keep-best {self.named}: {self._task} has no such figure; it has {', '.join(metrics)}")
        return figure or next(iter(metrics))
