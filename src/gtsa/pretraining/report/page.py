"""The page of a run: verdict, curves, data, plan. Pictures are made by pictures.py."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gtsa.core import html
from gtsa.core.errors import escaped
from gtsa.core.html import Markup
from gtsa.core.settings import flat
from gtsa.core.terminal import lasting
from gtsa.data.scan import count_deep
from gtsa.data.sources import ALL
from gtsa.pretraining.report.curves import curves, durations, throughput
from gtsa.pretraining.run_record import RunRecord
from gtsa.pretraining.settings import METHODS
from gtsa.pretraining.verdict import advice

KINDS = {"learning": "good", "too short to tell": "warn", "stalled": "warn", "collapsing": "bad"}  # of verdicts


def make_page(record: RunRecord, learnt: Sequence[Markup], views: Markup, images: bool) -> str:
    """The whole page.

    Args:
        learnt: sections of pictures that show what was learnt.
        views: the section of example views.
        images: whether pictures and names of images are allowed on the page.
    """
    name = record.folder.resolve().name
    return html.page(
        Markup("Report of the run {}").format(html.code(name)),
        _status(record, images),
        _verdict(record),
        html.section("What was learnt", *learnt),
        html.section("Curves", html.grid(curves(record), "charts")),
        throughput(record),
        _data(record, images),
        views,
        _plan(record),
        _log(record) if images else html.EMPTY,
    )


def _status(record: RunRecord, images: bool) -> Markup:
    settings, where = record.settings, f"step {record.step:,} of {record.settings.steps:,}"
    folder = shlex.quote(str(record.folder))
    resume = Markup(" {} continues it.").format(html.code(f"gtsa pretrain --out {folder} --resume"))
    again = Markup(" {} brings this page up to date.").format(html.code(f"gtsa report {folder}"))
    text = {
        "finished": Markup("Finished: {} steps.").format(f"{settings.steps:,}"),
        "in progress": Markup("In progress: {} when this page was written.{}").format(where, again),
        "stopped": Markup("Ended early, after {}: {}.{}").format(where, record.end.rstrip("."), resume),
        "interrupted": Markup("Ended early, after {}, without a message: its process may have been killed.{}").format(
            where, resume
        ),
    }[record.state]
    missing = list(record.missing)
    if not images:
        missing.append(
            "--no-images: the page has no pixels of images, and no file names but those of images that cannot be used. "
            "The log of the run is left out, because it can name images."
        )
    hue = {"finished": "hue-1", "in progress": "hue-3"}.get(record.state, "hue-2")
    return html.join(
        [
            Markup('<p class="status {}">{}</p>').format(hue, text),
            html.facts(_facts(record)),
            html.section("What is missing", html.bullets(missing), level=3),
        ],
        "\n",
    )


def _facts(record: RunRecord) -> Iterator[tuple[str, str]]:
    settings = record.settings
    used = record.scan.get("used", len(record.images))
    yield "method", settings.method
    yield "model", settings.model
    yield "images", f"{used:,}, {settings.hold_out:,} of them held out"
    yield "steps", f"{settings.steps:,}, each of {settings.batch_size:,} images"
    if record.metrics:
        yield "training time", lasting(sum(seconds for _, seconds in durations(record.metrics)))
    yield "device", f"{settings.devices * settings.nodes} x {settings.device}, precision {settings.precision}"
    yield "page written", time.strftime("%Y-%m-%d %H:%M")


def _verdict(record: RunRecord) -> Markup:
    if not record.health:
        text = f"There is none yet: the first evaluation is after step {record.settings.evaluate_every:,}."
        return html.section("Verdict", html.paragraph(text))
    last = record.health[-1]
    label = str(last.get("verdict", ""))
    at = "" if record.state == "finished" else f" (at step {last['step']:,}, the last evaluation)"
    reasons = last.get("reasons") or [text for text in [record.noted("done").partition(". ")[2]] if text]
    parts = [
        Markup('<p class="verdict {}">{}{}</p>').format(KINDS.get(label, "quiet"), label.capitalize(), at),
        html.bullets(map(_sentence, reasons)),
    ]
    if not reasons:
        parts.append(html.paragraph("The sentences behind it were not kept. The curves have its metrics.", "quiet"))
    if label in KINDS:
        parts.append(html.paragraph(_sentence(f"what to do: {advice(label)}")))
    if choice := record.noted("choice"):
        parts.append(html.paragraph(Markup("<b>Exported network:</b> {}.").format(choice)))
    if (record.folder / "exports" / "timm").is_dir():
        export = f"{record.folder}/exports/timm"
        parts.append(html.paragraph("Load the exported network:"))
        parts.append(html.preformatted(f'timm.create_model("local-dir:{export}", pretrained=True)'))
    return html.section("Verdict", *parts)


def _sentence(text: str) -> str:
    words = html.unbroken(text)
    return f"{words[:1].upper()}{words[1:].rstrip('.')}."


# Data and plan


def _data(record: RunRecord, images: bool) -> Markup:
    scan = record.scan
    bad = [(str(b["name"]), str(b["reason"]), "before training") for b in scan.get("bad", ())]
    names = dict(enumerate(record.images))
    bad += [
        (names.get(index, f"image {index}"), reason, "during training") for index, reason in record.unreadable.items()
    ]
    bad += [(str(f["name"]), str(f["reason"]), "not read whole") for f in scan.get("folders_not_listed", ())]
    parts = [html.facts([*_scan_facts(scan), *_range_fact(record)])] if scan else []
    if bad:
        rows = [(html.code(name), escaped(reason), when) for name, reason, when in bad]
        parts.append(html.table("Files that could not be used", ["file", "reason", "when"], rows, words=True))
    elif scan:
        parts.append(html.paragraph("Every image could be used."))
    if links := scan.get("links_not_followed", ()):
        reasons = html.bullets(html.code(f"{link['name']}: {link['reason']}") for link in (links if images else ()))
        parts.append(html.details(f"{len(links):,} links lead out of the folder and were not followed", reasons))
    parts.append(html.bullets(escaped(remark) for remark in scan.get("remarks", ())))
    return html.section("Data", *parts)


def _scan_facts(scan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "images", f"{scan.get('images', 0):,}"
    yield "used", f"{scan.get('used', 0):,}"
    yield "formats", ", ".join(f"{count:,} {kind}" for kind, count in scan.get("formats", {}).items()) or "-"
    for side in ("width", "height"):
        if values := scan.get(side):
            yield f"{side}, px", f"{values['least']} to {values['most']}, median {values['median']}"
    if others := sum(scan.get("other_files", {}).values()):
        yield "other files", f"{others:,}"


def _range_fact(record: RunRecord) -> Iterator[tuple[str, str]]:
    """--range16, where it has an effect or was given."""
    black, white = record.settings.range16
    if (black, white) != ALL.range16 or count_deep(record.scan):
        yield "16-bit values, black to white", f"{black:g} to {white:g}"


def _plan(record: RunRecord) -> Markup:
    settings = record.settings.model_dump()
    others = [name for name in METHODS if name != record.settings.method]
    rows = [
        (html.code(name), html.code(_value(value)))
        for name, value in flat({k: v for k, v in settings.items() if k not in others}).items()
    ]
    parts = []
    if record.plan:
        parts.append(html.table("The plan, as the run began", ["setting", "value", "reason"], record.plan, words=True))
    table = html.table("Resolved settings", ["setting", "value"], rows, words=True)
    return html.section("Plan and settings", *parts, html.details("all settings", table))


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else "-" if value is None else str(value)


def _log(record: RunRecord) -> Markup:
    if not record.notes:
        return html.EMPTY
    text = "\n".join(map(escaped, record.notes))
    return html.section("Log", html.details("train.log", html.preformatted(text)))
