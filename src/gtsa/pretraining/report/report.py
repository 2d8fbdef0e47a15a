"""gtsa report: one self-contained HTML page of a run, from the files in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from gtsa.core import stops
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.html import EMPTY, Markup
from gtsa.core.terminal import doing, say
from gtsa.pretraining.report import page
from gtsa.pretraining.run_record import RunRecord, read_run
from gtsa.training import threads

NAME = "report.html"


@threads.considerate()
def report(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, images: bool = True) -> Path:
    """Writes the page of a run, whether it is finished, in progress, stopped or dead.

    Args:
        run: the folder of the run.
        out: HTML file to write; None: report.html in the folder of the run.
        images: False leaves out all pixels of images, and all names of images but those that cannot be used.

    Returns:
        The file.

    Raises:
        UserError: ``run`` is not a run (2), nothing says its settings (4), or the file cannot be written (6).
    """
    folder = Path(run)
    text = _make(read_run(folder), images)
    path = Path(out) if out is not None else folder / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store(path, text.encode())
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}; give another file", 6) from None
    say(f"report: {path}")
    return path


def write_at_end(folder: Path) -> str:
    """Writes the page of a run that this process finishes; a line that says where it is, or why there is none.

    Nothing that goes wrong here costs the run: its results are written.
    """
    again = f"'gtsa report {folder}' writes it"
    try:
        with doing("writing the report"):
            store(folder / NAME, _make(read_run(folder, in_progress=False), images=True).encode())
    except stops.Stopped:
        return f"report: stopped before it was written; {again}"
    except Exception as error:
        return f"report: could not be written ({type(error).__name__}: {' '.join(str(error).split())}); {again}"
    return f"report: {folder / NAME}"


def _make(record: RunRecord, images: bool) -> str:
    learnt, views = _draw(record) if images else ([], EMPTY)
    return page.make_page(record, learnt, views, images)


def _draw(record: RunRecord) -> tuple[list[Markup], Markup]:
    """Sections of pictures, and the section of example views. ``record.missing`` says which cannot be drawn."""
    from gtsa.pretraining.report import network, pictures

    try:
        opened = network.open_network(record)
    except (UserError, OSError, RuntimeError) as error:
        record.missing.append(f"Pictures: the newest checkpoint cannot be opened ({error}).")
        return [], EMPTY
    if opened is None:
        record.missing.append("Pictures: there is no checkpoint yet.")
        return [], EMPTY
    return pictures.draw_learnt(opened, record.missing), pictures.draw_views(opened, record.missing)
