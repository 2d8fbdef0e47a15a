"""Settings of GTSA: which are refused, and what the parts of the loss are called above the progress."""

from __future__ import annotations

from collections.abc import Sequence

from gtsa.core.errors import UserError
from gtsa.training.schedules import Constant, Ramp, Schedule

COSINE = "negative cosine (best: -1)"
REGION = {
    "infonce": "cross-entropy over cells of other images (chance: the logarithm of their number)",
    "prototypes": "cross-entropy with the teacher's assignments (at first near log K)",
}
REGULARIZER = {
    "sigreg": "distance from a normal distribution (best: 1.06)",
    "vicreg": "variance and covariance of channels (best: 0)",
}


def legend_of(region_loss: str, regularizer: str, image: bool) -> str:
    """What the parts of the loss are, with their best value or chance."""
    entries = ["region, patch = " + COSINE]
    if region_loss != "cosine":
        entries = [f"region = {REGION[region_loss]}", "patch = " + COSINE]
    entries.append("rotation = cross-entropy (chance: 1.386, accuracy 25 %)")
    if regularizer != "none":
        entries.append(f"regularizer = {REGULARIZER[regularizer]}")
    if image:
        entries.append("image = cross-entropy of CLS tokens with the teacher (at first near log K)")
    return "; ".join(entries)


def decaying(weight: float, between: tuple[float, float] | None) -> Schedule:
    """``weight``, which falls to 0 linearly ``between`` two times."""
    return Constant(weight) if between is None else Ramp(weight, 0.0, between[1], between[0])


def check_settings(
    sizes: Sequence[int], weights: Sequence[float], temperatures: Sequence[float], momentum: float
) -> None:
    """Raises UserError where a setting of the networks or the losses has no meaning."""
    if min(sizes) < 1:
        raise UserError(
            "gtsa.projector_dim, out_dim, predictor_dim, num_prototypes, cells, matches: must be at least 1"
        )
    if min(weights) < 0:
        raise UserError(
            "gtsa.region_weight, patch_weight, rotation_weight, image_weight, regularizer_weight: must not be "
            "negative; 0 leaves a loss out"
        )
    if min(temperatures) <= 0:
        raise UserError("gtsa.region_temp, teacher_temp: must be above 0; usual are 0.02 to 0.2")
    if not 0 <= momentum <= 1:
        raise UserError(f"gtsa.momentum: from 0 to 1, not {momentum}; published is 0.996")


def check_rotation(channels: float, decay: tuple[float, float] | None) -> None:
    """Raises UserError where a setting of the rotation loss has no meaning."""
    if not 0 < channels <= 1:
        raise UserError(f"gtsa.rotation_channels: above 0 and at most 1 (all channels), not {channels}")
    if decay is not None and not 0 <= decay[0] < decay[1]:
        raise UserError(f"gtsa.rotation_decay: 0 <= start < end, not {decay[0]} {decay[1]}; 1 is the end of the run")


def check_cls_token(model: str, prefix_tokens: int) -> None:
    """Raises UserError where the model has no CLS token to read."""
    if not prefix_tokens:
        raise UserError(
            f"gtsa.rotation_tokens cls and gtsa.image_weight read the CLS token, and {model} has none; leave them out, "
            "or choose a model that has one"
        )
