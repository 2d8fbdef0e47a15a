"""The model card of an export: README.md with the front matter that the Hugging Face hub reads.

Every fact is from the weights or from the files of the run. The data are named by a fingerprint, never by a path.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm

from gtsa.core.errors import UserError, escaped
from gtsa.core.files import IMAGES
from gtsa.core.settings_file import read_yaml
from gtsa.models.backbone import Backbone
from gtsa.models.card_snippets import snippet
from gtsa.models.formats import ELSEWHERE, Format
from gtsa.training import checkpoint

CARD = "README.md"
LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}  # as the hub names them
TRAINING = "## Training\n"  # this section and those after it are about the run, not about the file
LICENCE = """## Licence

The weights are yours, and so is the choice of their licence. Name it in the first lines of this file.
"""
SETTINGS = (
    "method", "model", "steps", "batch_size", "learning_rate", "final_learning_rate", "warmup", "weight_decay",
    "final_weight_decay", "drop_path", "precision", "freeze_encoder", "encoder_lr_scale", "layer_decay", "gram_weight",
    "seed",
)  # fmt: skip
_MARK = re.compile(r"<!-- gtsa: sha256 of the lines above: ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class Origin:
    """Where exported weights come from.

    Attributes:
        source: as the user named it.
        run: the folder of its run, if it has one.
        step: of the checkpoint; None: the end of the run.
        network: of the run: EMA teacher or student; empty if not known.
        choice: why this network of the run was exported.
    """

    source: str
    run: Path | None = None
    step: int | None = None
    network: str = ""
    choice: str = ""


def origin_of(source: str, resolved: str, network: str = "") -> Origin:
    """The origin of weights: ``source`` as the user named it, ``resolved`` as it was read (a checkpoint of the run)."""
    if source.startswith(ELSEWHERE):
        return Origin(source)
    path = Path(resolved).absolute()
    run = next((p for p in (path, *path.parents[:4]) if (p / IMAGES).is_file() and (p / "config.yaml").is_file()), None)
    step = checkpoint.NAME.fullmatch(path.name)
    return Origin(source, run, int(step[1]) if step else None, network)


def model_card(backbone: Backbone, to: Format, file: str, origin: Origin) -> str:
    """The text of a card. ``file`` is the name of an exported file; folders are opened where the card lies."""
    parts = [_front_matter(to, origin), _title(backbone, origin), _how_to_load(backbone, to, file), _model(backbone)]
    parts.append(_carried(origin) or _training(origin, backbone))
    text = "\n".join(parts)
    return f"{text}\n<!-- gtsa: sha256 of the lines above: {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_unchanged(text: str) -> bool:
    """Whether a card is as gtsa wrote it."""
    mark = _MARK.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start() - 1].encode()).hexdigest() == mark[1]


def _front_matter(to: Format, origin: Origin) -> str:
    lines = ["---"]
    if to in LIBRARIES:
        lines.append(f"library_name: {LIBRARIES[to]}")
    lines += ["pipeline_tag: image-feature-extraction", "tags:", "- gtsa", "- vision-transformer"]
    lines.append("- self-supervised-learning")
    for start in _starts(origin):
        if start.startswith("timm:") and (hub := getattr(_timm_entry(start), "hf_hub_id", None)):
            lines.append(f"base_model: {hub}")
    lines += ["# license: the choice is yours. Remove the # and name it, e.g. license: apache-2.0", "---", ""]
    return "\n".join(lines)


def _title(backbone: Backbone, origin: Origin) -> str:
    method = f", pretrained with {_config(origin.run).get('method', 'gtsa')}" if origin.run else ""
    return (
        f"# {backbone.model}{method}\n\n"
        "A vision transformer for dense features: one vector for each patch of an image, and one for the whole image.\n"
    )


def _how_to_load(backbone: Backbone, to: Format, file: str) -> str:
    code = snippet(backbone, to, file)
    return f"## Load it\n\nRun this beside this file, with an image `photo.jpg`:\n\n```python\n{code}```\n"


def _model(backbone: Backbone) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in backbone.normalisation)
    black, white = backbone.range16
    rows = {
        "model of timm": f"`{backbone.model}`",
        "parameters": f"{sum(p.numel() for p in backbone.parameters()):,}",
        "patch size": f"{backbone.patch_size} px",
        "image size": f"{backbone.arguments['img_size']} px; position embeddings are resampled for others",
        "tokens": f"{backbone.num_prefix_tokens} before the patches; {backbone.embed_dim} values each",
        "vector of an image": "the CLS token" if backbone.pooling == "cls" else "the mean of the patch tokens",
        "normalisation": f"mean {mean}; standard deviation {std}; of RGB in 0 to 1",
        "16-bit images": f"values from {black:g} (black) to {white:g} (white) are scaled to 0 to 1 first",
        "fingerprint of the weights": f"`{backbone.fingerprint}`",
        "written by": f"gtsa {version('gtsa')}",
    }
    return f"## The model\n\n{_table(rows)}"


def _table(rows: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


# What the run's files say


def _training(origin: Origin, backbone: Backbone) -> str:
    """The sections about training, verdict, evaluations and licence."""
    if origin.run is None:
        text = "Nothing is recorded with these weights about how they were trained."
        source = origin.source if origin.source.startswith(ELSEWHERE) else Path(origin.source).name
        return f"{TRAINING}\n{text} They were read from {_code(source)}.\n\n{_licence(origin)}"
    config = _config(origin.run)
    step = config.get("steps") if origin.step is None else origin.step
    rows = {name: _code(_value(config[name])) for name in SETTINGS if name in config}
    rows |= _sections(config)
    head = f"{TRAINING}\nExported after step {step}. {_network(origin, backbone)}".rstrip()
    sections = [f"{head}\n", _table(rows), f"## Data\n\n{_data(origin.run, config)}"]
    if verdict := _last(origin.run / "health.jsonl", step):
        reasons = "".join(f"* {reason}\n" for reason in verdict.get("reasons", ()))
        sections.append(
            f"## Verdict\n\n**{verdict['verdict']}** (step {verdict['step']:.0f}), on held-out images:\n\n{reasons}"
        )
    if choice := origin.choice:
        sections.append(f"Choice of the network: {choice}\n")
    if evaluations := _evaluations(origin.run, step):
        sections.append(f"## Evaluations\n\n{evaluations}")
    return "\n".join([*sections, _licence(origin)])


def _network(origin: Origin, backbone: Backbone) -> str:
    """Which network of the run this is, and whether the method trained its CLS token."""
    network = f"The network is the {origin.network}. " if origin.network else ""
    if not backbone.num_prefix_tokens:
        return network.strip()
    trained = backbone.pooling == "cls"
    return network + ("The CLS token was trained." if trained else "The loss does not use the CLS token.")


def _sections(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings of the method and of the views."""
    sections = {name: config.get(name) for name in (str(config.get("method")), "views")}
    return {
        name: "; ".join(_code(f"{key} {_value(value)}") for key, value in values.items())
        for name, values in sections.items()
        if isinstance(values, Mapping)
    }


def _value(value: object) -> str:
    """A setting in words: null is one that the method decides."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "automatic" if value is None else str(value)


def _data(run: Path, config: Mapping[str, Any]) -> str:
    raw = (run / IMAGES).read_bytes()
    count, held_out = raw.count(b"\n"), int(config.get("hold_out", 0))
    rows = {"images for training": f"{count - held_out:,}", "held out for the verdict": f"{held_out:,}"}
    with suppress(OSError, ValueError, KeyError, TypeError):  # the report of the scan is gone
        rows["left out as damaged"] = f"{len(json.loads((run / 'scan.json').read_bytes())['bad']):,}"
    rows["fingerprint of the list"] = f"`{hashlib.sha256(raw).hexdigest()[:16]}`"
    return _table(rows)


def _evaluations(run: Path, step: int | None) -> str:
    """Metrics of --eval at step 0 and at the exported step, or the last one before it."""
    chosen = {line["step"]: line for line in (_last(run / "evaluations.jsonl", at) for at in (0, step)) if line}
    if not chosen:
        return ""
    names = [name for name in next(reversed(chosen.values())) if name != "step"]
    head = "| metric |" + "".join(f" step {at:.0f} |" for at in chosen)
    lines = [
        f"| {_text(name)} |" + "".join(f" {_number(line.get(name))} |" for line in chosen.values()) for name in names
    ]
    return "\n".join([head, "|---|" + "---|" * len(chosen), *lines, ""])


def _last(log: Path, step: int | None) -> dict[str, Any] | None:
    """The last line of a log up to a step."""
    return max(
        (line for line in _lines(log) if step is None or line["step"] <= step),
        key=lambda line: line["step"],
        default=None,
    )


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    try:
        raw = log.read_bytes().splitlines()
    except OSError:
        return
    for entry in raw:
        try:
            line = json.loads(entry)
            float(line["step"])
        except (ValueError, KeyError, TypeError):
            continue  # an interrupted write
        yield line


def _licence(origin: Origin) -> str:
    """The choice is the user's; the licence of the initial weights applies, too."""
    text = LICENCE
    for start in _starts(origin):
        entry = _timm_entry(start)
        listed = f" timm lists it as `{entry.license}`." if entry is not None and entry.license else ""
        began = "Training started from" if origin.run else "These are the published weights"
        name = _code(start if start.startswith("timm:") else Path(start).name)
        text += f"\n{began} {name}. Their licence applies, too.{listed}\n"
    if teacher := _teacher(origin):
        text += f"\nThe network was distilled from {_code(teacher)}. Read the licence of these weights, too.\n"
    return text


def _starts(origin: Origin) -> list[str]:
    """The weights that training started from, and those that these started from."""
    if origin.source.startswith("timm:"):
        return [origin.source]
    starts: list[str] = []
    run = origin.run
    while run is not None and len(starts) < 8 and (init := _config(run).get("init")):
        starts.append(str(init))
        run = None if str(init).startswith(ELSEWHERE) else origin_of(str(init), str(init)).run
    return [start for start in starts if not start.startswith("random:")]


def _teacher(origin: Origin) -> str:
    """The weights that the network was distilled from; empty if it was not."""
    config = _config(origin.run)
    return str(config["distill"]["teacher"]) if config.get("method") == "distill" else ""


def _timm_entry(start: str) -> Any:
    """timm's own entry about published weights; it needs no network. None where there is none."""
    return timm.get_pretrained_cfg(start.removeprefix("timm:")) if start.startswith("timm:") else None


def _config(run: Path | None) -> dict[str, Any]:
    try:
        return read_yaml(run / "config.yaml", schema=1) if run else {}
    except UserError:  # a card is no reason to refuse weights that were read
        return {}


def _carried(origin: Origin) -> str:
    """The sections about training from the card of an earlier export, if the weights are one."""
    if origin.run or origin.source.startswith(ELSEWHERE):
        return ""
    path = Path(origin.source)
    try:
        text = (path / CARD if path.is_dir() else path.with_name(f"{path.name}.md")).read_text()
    except (OSError, ValueError):
        return ""
    return TRAINING + _MARK.sub("", text.partition(TRAINING)[2]).removesuffix("\n") if _MARK.search(text) else ""


def _code(text: str) -> str:
    return f"`{escaped(text).replace('`', '').replace('|', '/')}`"


def _text(text: str) -> str:
    return escaped(text).replace("|", "/").replace("_", " ")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
