"""What runs of earlier versions call their settings, and one function that brings these up to date.

This is for files that gtsa itself wrote: a run's config.yaml and the state of its checkpoints. Both hold their schema.
Flags, Python and YAML written by hand use the names of today; a name of before is answered with the one of today.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gtsa.core.errors import UserError

SCHEMA = 2  # of the settings that are written now; 1 wrote none
_HEAD = {
    "prototypes": "num_prototypes", "hidden": "hidden_dim", "bottleneck": "bottleneck_dim",
    "freeze": "freeze_last_layer", "student_temperature": "student_temp", "teacher_temperature": "teacher_temp",
    "temperature_warmup": "teacher_temp_warmup", "centre_momentum": "center_momentum", "mask_share": "mask_ratio",
}  # fmt: skip
RENAMED: dict[str, dict[str, str]] = {  # in schema 2: {section: {name before: name now}}
    "": {
        "head_start": "freeze_encoder", "encoder_rate": "encoder_lr_scale", "anchor": "gram_weight",
        "keep": "keep_checkpoints", "clip": "clip_grad",
    },
    "views": {
        "global_crops": "global_crops_number", "local_crops": "local_crops_number", "global_size": "global_crops_size",
        "local_size": "local_crops_size", "global_share": "global_crops_scale", "local_share": "local_crops_scale",
        "flip": "hflip", "jitter": "color_jitter", "grey": "grayscale", "blur": "gaussian_blur", "solarise": "solarize",
    },
    "dino": _HEAD,
    "ibot": _HEAD,
    "mae": {"mask_share": "mask_ratio"},
    "encoder": {"feature": "pooling"},
}  # fmt: skip


def migrated(values: Mapping[str, Any], schema: int, source: str) -> dict[str, Any]:
    """Settings, or the state of a checkpoint, under the names of today.

    Args:
        values: plain values; sections are dictionaries.
        schema: under which they were written.
        source: the file, for the message.

    Raises:
        UserError: the schema is none of this version's, as in files of a newer one (4).
    """
    if schema == SCHEMA:
        return dict(values)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(f"{source} has schema {schema!r}, and this gtsa reads schemas up to {SCHEMA}: update gtsa", 4)
    return {
        RENAMED[""].get(name, name): (
            {RENAMED[name].get(key, key): inner for key, inner in value.items()}
            if name in RENAMED and isinstance(value, Mapping)
            else value
        )
        for name, value in values.items()
    }


ADDED = {"ibot": {"teacher_patch_temp": "teacher_temp"}}  # {section: {new setting: the one whose value it had before}}


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, with those that its version lacked, at the values that these had then."""
    complete = dict(settings)
    for section, sources in ADDED.items():
        values = complete.get(section)
        if isinstance(values, Mapping):
            former = {name: values[source] for name, source in sources.items() if values.get(source, "auto") != "auto"}
            complete[section] = {**former, **values}
    return complete


def name_now(section: str, name: str) -> str | None:
    """What a setting is called today that an earlier version called ``name``, if it did."""
    return RENAMED.get(section, {}).get(name)
