"""The images of a pretraining run: which there are, which teach, which are held out, which went bad on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from gtsa.core.drawing import squares
from gtsa.core.errors import UserError, escaped
from gtsa.core.files import IMAGES
from gtsa.core.seeds import Stream, generator
from gtsa.core.terminal import Count, say
from gtsa.core.types import Replaced, StepResult
from gtsa.data.frozen import Frozen, frozen
from gtsa.data.loader import NoImageLeft
from gtsa.data.pixels import BadImage
from gtsa.data.scan import insist, links, scan, summed
from gtsa.data.sources import open_source

MEND = "bring it back, or start another run"


def scanned(data: Any, settings: Any, begun: bool, checkpoints: bool) -> dict[str, str]:
    """Looks through the images; {name: text} of the files that tell what a new run found, nothing for one that goes on.

    Args:
        begun, checkpoints: whether the run's folder has a list of images, and checkpoints.

    Raises:
        UserError: there are no images, too many of them are damaged (3), or a run has lost its list of them (4).
    """
    s = settings
    if s.resume and begun:
        return {}
    if s.resume and checkpoints:
        raise UserError(f"{s.out} has checkpoints, but {IMAGES} is gone: bring it back, or start another run", 4)
    say(f"reading {data if isinstance(data, str) else s.data}")
    with Count("listed") as listed:
        source = open_source(data, **selection(s), progress=listed)
    found = scan(source, range16=s.range16)
    insist(found, data, s.max_bad)
    for line in summed(found.bad):
        say(f"left out: {line}")
    for line in [*([f"left out: {links(found)}"] if found.outside else []), *found.remarks]:
        say(line)
    lines = [json.dumps(frozen(source, i, found.sides.get(i))) for i in found.used]
    return {"scan.json": json.dumps(found.report(), indent=1) + "\n", IMAGES: "\n".join(lines) + "\n"}


def selection(settings: Any) -> dict[str, Any]:
    """What a source is told of the settings."""
    return {name: getattr(settings, name) for name in ("range16", "data_root", "include", "exclude", "follow_links")}


def count(files: dict[str, str], out: str) -> int:
    """How many images a run is about, whose files these are or lie in ``out`` already. Raises as ``image_list``."""
    return files[IMAGES].count("\n") if files else len(image_list(out)[1])


def image_list(out: str) -> tuple[bytes, list[str]]:
    """images.jsonl of a run, and the names in it. Raises UserError where it is damaged (4)."""
    raw = Path(out, IMAGES).read_bytes()
    try:
        names = [str(json.loads(line)["name"]) for line in raw.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}/{IMAGES} is damaged ({error}); {MEND}", 4) from None
    used = len(names)
    with suppress(OSError, ValueError, KeyError, TypeError):  # nothing else depends on this report
        used = int(json.loads(Path(out, "scan.json").read_bytes())["used"])
    if used != len(names) or not raw.endswith(b"\n"):
        raise UserError(f"{out}/{IMAGES} was changed or cut short: it lists {len(names)} of {used} images; {MEND}", 4)
    return raw, names


class RunImages:
    """Usable images by number, as the run's folder lists them.

    Args:
        data: as given by the user.
        settings: of pretraining, resolved.
        note: tells the user, and the run's log.

    Attributes:
        train, held_out: numbers of the images that teach, and that do not.
        looked_at: those that figures on the way are of.
        digest: of the list.
        bad: {number: reason} of those that could not be read in mid-run.
    """

    def __init__(self, data: Any, settings: Any, note: Callable[[str], None]) -> None:
        s = settings
        raw, names = image_list(s.out)
        order = generator(s.seed, Stream.HELD_OUT).random(len(names)).argsort(kind="stable").tolist()
        self.source = Frozen(open_source(data, files=names, range16=s.range16, data_root=s.data_root), raw)
        self.train, self.held_out = sorted(order[s.hold_out :]), sorted(order[: s.hold_out])
        self.looked_at = self.held_out or self.train[:64]
        self.digest = hashlib.sha256(raw).hexdigest()
        self.bad: dict[int, str] = {}
        self.allowed, self.note = max(1, s.max_bad * len(self.train)), note

    def account(self, done: StepResult) -> None:
        """Names images that could not be read in a step, and those of a step that was skipped."""
        self.unreadable(done.replaced, f"step {done.step}: ")
        if done.skipped:
            names = ", ".join(escaped(self.source.name(i)) for i in done.skipped[:20])
            self.note(f"step {done.step - 1} was skipped for a non-finite number; its images: {names}")

    def unreadable(self, replaced: Iterable[Replaced], when: str) -> None:
        """Names images that could not be read. Raises UserError where they are too many by now (3)."""
        for image, reason, by in (Replaced(*entry) for entry in replaced):
            if image not in self.bad:
                self.bad[image] = reason
                self.note(
                    f"{when}{escaped(self.source.name(image))} could not be read ({reason}); "
                    f"{escaped(self.source.name(by))} took its place"
                )
        if len(self.bad) > self.allowed:
            listed = "; ".join(f"{escaped(self.source.name(i))}: {why}" for i, why in list(self.bad.items())[:5])
            raise UserError(
                f"{len(self.bad)} of {len(self.train)} images could not be read in mid-run ({listed}); "
                "mend them and go on with --resume, or allow more with --max-bad",
                3,
            )

    def gallery(self, side: int) -> Tensor:
        """Four of the user's images as squares, [n, 3, side, side] in [0, 1], in steps of 1 / 255."""
        found: list[Tensor] = []
        for index in self.looked_at:
            if len(found) < 4:
                try:
                    found.append(self.source.read(index))
                except BadImage:
                    continue
        if not found:
            raise NoImageLeft
        return (255 * squares(found, side)).round() / 255
