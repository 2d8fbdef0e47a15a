"""The images of a pretraining run: training images, held-out images, and those that became unreadable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gtsa.core.drawing import squares
from gtsa.core.errors import UserError, escaped
from gtsa.core.files import IMAGES
from gtsa.core.seeds import Stream, generator
from gtsa.core.settings_file import read_yaml
from gtsa.core.terminal import say
from gtsa.core.types import Replaced, StepResult
from gtsa.data.frozen import Frozen, list_entry
from gtsa.data.loader import NoImageLeft
from gtsa.data.pixels import BadImage
from gtsa.data.scan import check_scan, describe_links, group_by_reason, list_images, scan
from gtsa.data.sources import Selection, open_source

ADVICE = "bring it back, or start another run"


@dataclass(frozen=True)
class ImageSettings:
    """The settings of a run that its images depend on."""

    out: str
    seed: int
    hold_out: int
    max_bad: float
    range16: tuple[float, float]
    data_root: str | None


def scan_images(data: object, name: str, selection: Selection, max_bad: float) -> dict[str, str]:
    """Scans the images of a new run and returns its files, {name: text}.

    Args:
        name: what to call data that are no path.
        max_bad: share of damaged images that is accepted.

    Raises:
        UserError: there are no images, or too many of them are damaged (3).
    """
    say(f"reading {data if isinstance(data, str) else name}")
    source = list_images(data, selection)
    result = scan(source, range16=selection.range16)
    check_scan(result, data, max_bad, selection)
    for line in group_by_reason(result.bad):
        say(f"left out: {line}")
    for line in [*([f"left out: {describe_links(result)}"] if result.outside else []), *result.remarks]:
        say(line)
    lines = [json.dumps(list_entry(source, i, result.sides.get(i))) for i in result.used]
    return {"scan.json": json.dumps(result.report(), indent=1) + "\n", IMAGES: "\n".join(lines) + "\n"}


def count_images(files: dict[str, str], out: str) -> int:
    """The number of images in a run, from its new files or from the list in ``out``. Raises as ``read_list``."""
    return files[IMAGES].count("\n") if files else len(read_list(out)[1])


def read_list(out: str) -> tuple[bytes, list[str]]:
    """Reads images.jsonl of a run: its bytes, and the names in it. Raises UserError where it is damaged (4)."""
    raw = Path(out, IMAGES).read_bytes()
    try:
        names = [str(json.loads(line)["name"]) for line in raw.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}/{IMAGES} is damaged ({error}); {ADVICE}", 4) from None
    used = len(names)
    with suppress(OSError, ValueError, KeyError, TypeError):  # nothing else depends on this report
        used = int(json.loads(Path(out, "scan.json").read_bytes())["used"])
    if used != len(names) or not raw.endswith(b"\n"):
        raise UserError(f"{out}/{IMAGES} was changed or cut short: it lists {len(names)} of {used} images; {ADVICE}", 4)
    return raw, names


class RunImages:
    """The usable images of a run by index, as the list in its folder froze them.

    Args:
        data: as given by the user.
        note: writes a line to the terminal and to the run's log.

    Attributes:
        train, held_out: indices of the training images and the held-out images.
        looked_at: indices of the images that evaluations during training use.
        digest: SHA-256 of the list.
        bad: {index: reason} of images that could not be read during training.
    """

    def __init__(self, data: object, settings: ImageSettings, note: Callable[[str], None]) -> None:
        raw, names = read_list(settings.out)
        order = generator(settings.seed, Stream.HELD_OUT).random(len(names)).argsort(kind="stable").tolist()
        selection = Selection(settings.range16, settings.data_root)
        self.source = Frozen(open_source(data, selection, files=names), raw)
        self.train, self.held_out = sorted(order[settings.hold_out :]), sorted(order[: settings.hold_out])
        self.looked_at = self.held_out or self.train[:64]
        self.digest = hashlib.sha256(raw).hexdigest()
        self.bad: dict[int, str] = {}
        self.allowed, self.note = max(1, settings.max_bad * len(self.train)), note

    def account(self, done: StepResult) -> None:
        """Reports images that could not be read in a step, and the images of a skipped step."""
        self.unreadable(done.replaced, f"step {done.step}: ")
        if done.skipped:
            names = ", ".join(escaped(self.source.name(i)) for i in done.skipped[:20])
            self.note(f"step {done.step - 1} was skipped for a non-finite number; its images: {names}")

    def unreadable(self, replaced: Iterable[Replaced], when: str) -> None:
        """Reports images that could not be read. Raises UserError (3) when there are too many."""
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
                f"{len(self.bad)} of {len(self.train)} images could not be read during training ({listed}); "
                "repair them and continue with --resume, or allow more with --max-bad",
                3,
            )

    def gallery(self, side: int) -> Tensor:
        """Up to four of the user's images as squares, [n, 3, side, side] in [0, 1], in steps of 1 / 255."""
        images: list[Tensor] = []
        for index in self.looked_at:
            if len(images) < 4:
                try:
                    images.append(self.source.read(index))
                except BadImage:
                    continue
        if not images:
            raise NoImageLeft
        return (255 * squares(images, side)).round() / 255


def open_images_of(folder: Path, note: Callable[[str], None]) -> RunImages:
    """The images of an earlier run, by its config.yaml. Raises UserError, OSError or ValueError where it is damaged."""
    config = read_yaml(folder / "config.yaml", schema=1)
    try:
        settings = ImageSettings(
            str(folder), config["seed"], config["hold_out"], config["max_bad"], tuple(config["range16"]),
            config["data_root"],
        )  # fmt: skip
        return RunImages(config["data"], settings, note)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.yaml is incomplete: {error}", 4) from None
