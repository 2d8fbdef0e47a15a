"""The images of a pretraining run: training images, held-out images, and those that became unreadable."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gtsa.core.drawing import squares
from gtsa.core.errors import UserError, escaped
from gtsa.core.files import IMAGES
from gtsa.core.seeds import Stream, generator
from gtsa.core.settings_file import read_yaml
from gtsa.core.terminal import Count, say
from gtsa.core.types import Replaced, StepResult
from gtsa.data.batches.loader import NoImageLeft
from gtsa.data.frozen import Frozen, ImageList, list_line, parse_list
from gtsa.data.images.pixels import BadImage
from gtsa.data.scan import Scan, check_scan, describe_links, group_by_reason, list_images, scan
from gtsa.data.sources import EVERY, Selection, Source, open_source

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
    decoder: str = "pillow"


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
    for line in group_by_reason([*result.bad, *result.unreadable]):
        say(f"left out: {line}")
    for line in [*([f"left out: {describe_links(result)}"] if result.outside else []), *result.remarks]:
        say(line)
    return {"scan.json": json.dumps(result.report(), indent=1) + "\n", IMAGES: _write_list(source, result)}


def _write_list(source: Source, result: Scan) -> str:
    """A line for each usable image. Reading the sizes of a million files can take minutes on network storage."""
    text = io.StringIO()
    with Count("sizes read:", len(result.used)) as count:
        for done, index in enumerate(result.used):
            text.write(list_line(source, index, result.sides.get(index)))
            if done % EVERY == 0:
                count(done)
    return text.getvalue()


def count_images(files: dict[str, str], out: str) -> int:
    """The number of images in a run, from its new files or from the list in ``out``. Raises as ``read_list``."""
    return files[IMAGES].count("\n") if files else len(read_list(out)[1].names)


def read_list(out: str) -> tuple[str, ImageList]:
    """Reads images.jsonl of a run: its SHA-256, and what it lists. Raises UserError where it is damaged (4)."""
    raw = Path(out, IMAGES).read_bytes()
    try:
        listed = parse_list(raw)
    except ValueError as error:
        raise UserError(f"{out}/{IMAGES} is damaged ({error}); {ADVICE}", 4) from None
    used = count = len(listed.names)
    with suppress(OSError, ValueError, KeyError, TypeError):  # nothing else depends on this report
        used = int(json.loads(Path(out, "scan.json").read_bytes())["used"])
    if used != count or not raw.endswith(b"\n"):
        raise UserError(f"{out}/{IMAGES} was changed or cut short: it lists {count} of {used} images; {ADVICE}", 4)
    return hashlib.sha256(raw).hexdigest(), listed


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
        self.digest, listed = read_list(settings.out)
        order = generator(settings.seed, Stream.HELD_OUT).random(len(listed.names)).argsort(kind="stable").tolist()
        selection = Selection(settings.range16, settings.data_root, decoder=settings.decoder)
        with Count("opened") as count:
            self.source = Frozen(open_source(data, selection, listed.names, count), listed.sizes)
        self.train, self.held_out = sorted(order[settings.hold_out :]), sorted(order[: settings.hold_out])
        self.looked_at = self.held_out or self.train[:64]
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

    def sides(self) -> Iterator[tuple[str, int, int]]:
        """Name, width and height of each training image; 0 x 0 where the list does not have them."""
        for index in self.train:
            width, height = self.source.sizes[index, 1:].tolist()
            yield self.source.name(index), width, height

    def gallery(self, side: int) -> tuple[Tensor, Tensor]:
        """Up to four of the user's images as squares, and their indices.

        Returns:
            images [n, 3, side, side] in [0, 1], in steps of 1 / 255; indices [n].
        """
        images: list[Tensor] = []
        indices: list[int] = []
        for index in self.looked_at:
            if len(images) < 4:
                try:
                    images.append(self.source.read(index))
                except BadImage:
                    continue
                indices.append(index)
        if not images:
            raise NoImageLeft
        return (255 * squares(images, side)).round() / 255, torch.tensor(indices)


def open_images_of(folder: Path, note: Callable[[str], None]) -> RunImages:
    """The images of an earlier run, by its config.yaml. Raises UserError, OSError or ValueError where it is damaged."""
    config = read_yaml(folder / "config.yaml", schema=1)
    try:
        settings = ImageSettings(
            str(folder), config["seed"], config["hold_out"], config["max_bad"], tuple(config["range16"]),
            config["data_root"], config.get("decoder", "pillow"),
        )  # fmt: skip
        return RunImages(config["data"], settings, note)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.yaml is incomplete: {error}", 4) from None
