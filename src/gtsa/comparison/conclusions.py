"""The conclusions of a comparison in plain words, and the protocol behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from gtsa.comparison.jobs import STAGES
from gtsa.comparison.settings import CONTROLS, Compare
from gtsa.comparison.summary import Interval, RowSummary, SmallestDifference
from gtsa.comparison.tuning import Choice
from gtsa.evaluation import intervals


def describe_verdicts(reference: str, rows: Sequence[RowSummary]) -> list[str]:
    """The reference against every other row on the primary metric, as HTML.

    Order: collapse, or not distinguishable from untrained; losses; gains; all others.
    """
    lines: list[tuple[int, str]] = []
    for row in rows:
        lines += _describe_collapse(row)
        difference = row.get("less_reference", {}).get("primary")
        if difference is not None:
            lines += _describe_difference(escape(reference), row, difference)
    lines.sort(key=lambda line: line[0])
    return [text for _, text in lines] or [f"There is no row yet to compare {escape(reference)} with."]


def _describe_collapse(row: RowSummary) -> Iterator[tuple[int, str]]:
    runs = row["costs"].get("verdicts", {})
    if collapsed := runs.get("collapsing"):
        name = _name_row(row)
        count = f"{collapsed} of {sum(runs.values())} runs of {name} collapsed"
        yield 0, f"<b class=bad>{count}</b>: its metrics say nothing about {name} without collapse."


def _describe_difference(reference: str, row: RowSummary, difference: Interval) -> Iterator[tuple[int, str]]:
    """(rank, sentence) of the reference minus a row.

    Args:
        difference: the row minus the reference.
    """
    name, mean = _name_row(row), -difference["mean"]
    if difference["low"] is None or difference["high"] is None:
        yield 3, f"{reference} minus {name}: {mean:+.2f}, with one seed: no interval, so it is no evidence."
        return
    low, high = -difference["high"], -difference["low"]
    value = f"{mean:+.2f} (95 % interval {low:+.2f} to {high:+.2f})"
    match intervals.verdict(low, high):
        case "better":
            yield 2, f"<b>{reference} is significantly better than {name}</b> on the primary metric: {value}."
        case "worse":
            yield 1, f"<b class=bad>{reference} is significantly worse than {name}</b> on the primary metric: {value}."
        case "not distinguishable" if row["row"] == "untrained":
            text = f"<b>{reference} is not distinguishable from untrained on the primary metric</b>: {value}."
            yield 0, f"{text} Longer runs, more images, or more evaluation images are needed."
        case "not distinguishable":
            yield 3, f"{reference} is not distinguishable from {name} on the primary metric: {value}."


def _name_row(row: RowSummary) -> str:
    return escape(row["row"]) + ("" if row["stage"] == "images" else f" at {STAGES[row['stage']]}")


def describe_power(smallest: SmallestDifference) -> str:
    """Which difference the comparison is able to see."""
    return (
        f"{smallest['seeds']} seeds see a true difference of {smallest['value']:.2f} on the primary metric with a "
        f"probability of 80 % (95 % interval excludes 0), by the variance over seeds and images of "
        f"{smallest['pairs']} pair{'s' * (smallest['pairs'] != 1)} of trained rows."
    )


def describe_disagreements(choices: Sequence[Choice]) -> list[str]:
    """Choices of settings on which the folds disagree, and what that means."""
    lines = []
    for choice in choices:
        row, taken, of_folds = choice["row"], choice["taken"], choice["of_folds"]
        if others := [f"trial {best} (fold {fold})" for fold, best in enumerate(of_folds, start=1) if best != taken]:
            agreeing = f"{len(of_folds) - len(others)} of {len(of_folds)} folds"
            lines.append(
                f"{row} uses the settings of trial {taken}, chosen by {agreeing}. Without their own images the other "
                f"folds choose {', '.join(others)}: the images of these folds influenced the choice."
            )
    return lines


def describe_protocol(settings: Compare) -> Iterator[str]:
    """How the comparison was made, as HTML."""
    yield f"Primary metric, fixed beforehand: {escape(settings.primary)}. {_describe_tuning(settings)}"
    yield (
        f"Every run sees the same {settings.steps:,} x {settings.batch_size} images in the same order. Differences are "
        "paired: same seed, same images. Intervals cover both seeds (their variance) and images (a bootstrap)."
    )
    missing = [name for name in CONTROLS if name not in settings.controls]
    missing += [] if settings.weights else ["published weights"]
    if missing:
        yield f"Rows not included: {', '.join(missing)}."


def _describe_tuning(settings: Compare) -> str:
    if not settings.trials:
        return "The settings were used as given, without tuning."
    choice = (
        "within the training images."
        if settings.val
        else "for each fold by inner folds of the other images. The settings chosen by most folds are used for all "
        "(see Trials)."
    )
    return (
        f"Learning rate and the search space of each method were tuned with {settings.trials} trials per method, its "
        f"preset and random settings, {choice} Variants and further rows use the settings chosen for their method, "
        "except where they set their own."
    )
