"""The testbed T1 (recipes/scenes): a labelled set as gtsa reads it, and results that are kept.

    python benchmarks/scenes.py prepare DATA WORK      # DATA: the data set `scenes`; WORK: a new folder of links
    python benchmarks/scenes.py unpack ARCHIVE... WORK # networks that benchmarks/gpu_queue.sh brought back
    python benchmarks/scenes.py keep WORK              # results -> benchmarks/results/scenes, without weights

WORK then has unlabelled/, voc21/, street8/ and aerial15/, each of these with train/ and val/ (images/, masks/,
classes.json), street8/ and aerial15/ also groups.csv; it is the folder that the recipes are run in. Networks and
results are in WORK/compare/cells.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import tarfile
from pathlib import Path

SETS = ("voc21", "street8", "aerial15")
GROUPED = ("street8", "aerial15")  # the places of street8, the overlapping tiles of aerial15
KEPT = Path(__file__).parent / "results" / "scenes" / "cells"
OF_RESULT = ("trained.json", "result.json", "per_image.npz", "per_image.json")


def prepare(data: Path, work: Path) -> None:
    """Links to the images and masks of every part, with the names of its classes, and groups of its images."""
    work.mkdir(parents=True)
    (work / "unlabelled").symlink_to((data / "unlabelled").resolve())
    with open(data / "labelled" / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in SETS:
        source = (data / "labelled" / name).resolve()
        for part in ("train", "val"):
            _link(source, work / name / part, (source / f"{part}.txt").read_text().split())
        if name in GROUPED:
            lines = [(Path(row["file"]).name, row["group"]) for row in rows if row["set"] == name]
            with open(work / name / "groups.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([("path", "group"), *lines])


def _link(source: Path, target: Path, stems: list[str]) -> None:
    for folder, suffix in (("images", ".webp"), ("masks", ".png")):
        (target / folder).mkdir(parents=True)
        for stem in stems:
            (target / folder / f"{stem}{suffix}").symlink_to(source / folder / f"{stem}{suffix}")
    given = json.loads((source / "classes.json").read_text())
    classes = {"classes": given["classes"], "ignore_index": given["ignore"]}
    classes |= {"report_classes": given["report_classes"]} if "report_classes" in given else {}
    (target / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")


def unpack(archives: list[Path], work: Path) -> None:
    """Networks of archives, each of one cell: ROW/images-SEED/..."""
    for archive in archives:
        with tarfile.open(archive) as packed:
            packed.extractall(work / "compare" / "cells", filter="data")
            print(f"{archive.name}: {min(packed.getnames(), key=len)}")


def keep(work: Path) -> None:
    """Copies what the report depends on, of every finished network."""
    for folder in sorted((work / "compare" / "cells").glob("*/*")):
        files = [folder / name for name in OF_RESULT if (folder / name).exists()]
        target = KEPT / folder.parent.name / folder.name
        for file in files:
            target.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".json":
                (target / file.name).write_text(_without_paths(file.read_text()))
            else:
                shutil.copyfile(file, target / file.name)
        if files:
            print(f"{folder.parent.name}/{folder.name}: {', '.join(file.name for file in files)}")


def _without_paths(text: str) -> str:
    """A result without the place of the images on the machine. The report does not depend on it."""
    content = json.loads(text)
    settings = content.get("training", content).get("settings", {})
    if "data" in settings:
        settings["data"] = Path(settings["data"]).name
    return json.dumps(content, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "unpack", "keep"))
    parser.add_argument("paths", type=Path, nargs="+")
    given = parser.parse_args()
    if given.verb == "prepare" and len(given.paths) == 2:
        prepare(*given.paths)
    elif given.verb == "unpack" and len(given.paths) >= 2:
        unpack(given.paths[:-1], given.paths[-1])
    elif given.verb == "keep" and len(given.paths) == 1:
        keep(given.paths[0])
    else:
        sys.exit(f"{given.verb}: other paths are needed; see --help")


if __name__ == "__main__":
    main()
