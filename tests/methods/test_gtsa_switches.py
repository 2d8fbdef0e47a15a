"""Switches of GTSA beyond the paper: each does what it says, teaches the student alone, and is off by default.

The plain loops and the small method are those of test_gtsa.
"""

import math

import pytest
import torch
from test_gtsa import CELLS, MATCHES, close, maps_of, patch_of_pair, region_of_pair, the_method, the_views, views_of

from gtsa.core import compilation
from gtsa.core.compilation import compiling
from gtsa.core.errors import UserError
from gtsa.methods.gtsa import GTSA
from gtsa.methods.parts.regularizers import variance_covariance
from gtsa.models.backbone import Backbone

SWITCHES = [  # and the parts of the loss that it changes or adds in the first step
    ({"center_targets": True}, set()),
    ({"region_loss": "infonce"}, {"region"}),
    ({"region_loss": "prototypes", "num_prototypes": 16}, {"region"}),
    ({"regularizer": "sigreg"}, {"regularizer"}),
    ({"regularizer": "vicreg"}, {"regularizer"}),
    ({"rotation_tokens": "cls"}, {"rotation"}),
    ({"rotation_channels": 0.25}, {"rotation"}),
    ({"rotation_decay": (0.2, 0.9)}, set()),
    ({"image_weight": 0.5, "num_prototypes": 16}, {"image"}),
]
every_switch = pytest.mark.parametrize(
    ("switch", "changed"), SWITCHES, ids=["-".join(map(str, switch)) for switch, _ in SWITCHES]
)


@every_switch
def test_every_switch_teaches_the_student_and_no_teacher(switch, changed):
    method = the_method(**switch).train()
    parts = method(the_views(2, 2), 0.5)
    assert all(part.ndim == 0 and part.isfinite() for part in parts.values())
    parts["loss"].backward()
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())
    for name, parameter in method.named_parameters():  # several processes wait for the gradient of each
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert method.student.encoder.vit.patch_embed.proj.weight.grad.abs().max() > 0


@every_switch
def test_every_switch_is_a_change_of_its_own_part_alone(switch, changed):
    published, switched, views = the_method(), the_method(**switch), the_views(2, 1)
    theirs, ours = published.state_dict(), switched.state_dict()
    shared = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    switched.load_state_dict({**ours, **shared})
    before, after = published(views, 0.15), switched(views, 0.15)
    assert set(before) <= set(after)
    for name in set(after) - {"loss", "rotation_accuracy"}:
        assert (name in before and torch.equal(before[name], after[name])) == (name not in changed), name
    named = {word for entry in switched.legend.split(";") for word in entry.partition("=")[0].replace(",", " ").split()}
    assert {part for part in after if part != "loss" and not part.endswith("_accuracy")} == named


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    compilation._failed.clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "switches",
    [
        {"center_targets": True, "region_loss": "infonce", "regularizer": "vicreg", "rotation_tokens": "cls"},
        {"region_loss": "prototypes", "regularizer": "sigreg", "image_weight": 0.5, "num_prototypes": 16},
    ],
    ids=["infonce", "prototypes"],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo
def test_switches_are_compiled_once_and_in_one_piece(dynamo, switches):
    method, views, losses, graphs = the_method(**switches).train(), the_views(2, 1), [], []
    for compiled in (False, True, True):
        torch.manual_seed(0)
        with compiling(compiled, pytest.fail, backend="eager"):
            losses.append(method(views, 0.5)["loss"].item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert losses[1:] == pytest.approx(2 * losses[:1], rel=1e-9)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs[0] == 0 < graphs[1] == graphs[2]


def test_without_switches_there_is_nothing_more():
    names = {name.partition(".")[0] for name in the_method().state_dict()}
    assert names == {"student", "teacher", "predictor", "rotation_head"}


# H1: centred targets


def test_centred_targets_are_those_of_the_plain_loops():
    method, views = the_method(center_targets=True).eval(), the_views(2, 2)
    offsets = torch.randn(2, 12, dtype=torch.float64)
    method.student_centre.value += offsets[0]
    method.teacher_centre.value += offsets[1]
    region, patch = [], []
    for b in range(2):
        maps = [(view, *maps_of(method, view)) for view in views_of(views, b)]
        for view, mine, *_ in maps:
            for seen, *_, reference in maps:
                if seen.size == 0 and (view.size, view.v) != (0, seen.v):
                    pair = mine - offsets[0], reference - offsets[1]
                    region.append(region_of_pair(*pair, view, seen, CELLS[view.size]))
                    patch.append(patch_of_pair(*pair, MATCHES[view.size]))
    parts = method(views, 1.0)
    close(parts["region"], torch.stack(region).mean())
    close(parts["patch"], torch.stack(patch).mean())
    assert not method.student_centre.accumulated.any()  # an evaluation changes no mean


def test_means_follow_the_maps_of_accepted_steps():
    method = the_method(center_targets=True).train()
    student, teacher = torch.zeros(2, 12, dtype=torch.float64)
    for step in range(3):
        micro = [the_views(2, 2, seed=2 * step), the_views(2, 2, seed=2 * step + 1)]
        maps = [(view.size, *maps_of(method, view)) for views in micro for b in range(2) for view in views_of(views, b)]
        for views in micro:
            method(views, 0.5)
        accepted = float(step != 1)
        means = (
            torch.cat([mine.flatten(0, 1) for _, mine, *_ in maps]).mean(0).detach(),
            torch.cat([target.flatten(0, 1) for size, _, _, target in maps if size == 0]).mean(0),
        )
        method.after_step(0.5, 1.0, torch.tensor(accepted))
        if accepted:
            student, teacher = 0.9 * student + 0.1 * means[0], 0.9 * teacher + 0.1 * means[1]
        close(method.student_centre.value, student)
        close(method.teacher_centre.value, teacher)


def test_a_vector_that_all_targets_share_is_no_longer_predicted_for_free(monkeypatch):
    """Maps with a large common vector: the cosine is near 1 at once, and near 0 once the means are known."""
    method, views = the_method(center_targets=True).train(), the_views(2, 2)
    targets = method.targets
    monkeypatch.setattr(method, "targets", lambda crops: (targets(crops)[0], targets(crops)[1] + 30))
    bias = method.predictor.proj.bias
    with torch.no_grad():
        bias += 30
    assert method(views, 0.0)["region"] < -0.9
    for _ in range(60):
        method(views, 0.0)
        method.after_step(0.5, 1.0)
    assert method(views, 0.0)["region"].abs() < 0.5


# H2: regularisers of projected patches


def test_the_regularizer_reads_projected_patches_of_all_views():
    method, views = the_method(regularizer="vicreg"), the_views(2, 1)
    vectors = torch.cat(
        [
            method.student.projector(method.student.encoder(view.pixels[None]).patches).flatten(0, 2)
            for b in range(2)
            for view in views_of(views, b)
        ]
    )
    close(method(views, 0.5)["regularizer"], variance_covariance(vectors))


@pytest.mark.parametrize(
    ("given", "weight"), [({}, 0.01), ({"regularizer_weight": 3.0}, 3.0), ({"regularizer_weight": 0.0}, 0.0)]
)
def test_weights_of_regularizers(given, weight):
    parts = the_method(regularizer="sigreg", **given)(the_views(2, 1), 0.5)
    rest = parts["region"] + 0.5 * parts["patch"] + 0.5 * parts["rotation"]
    close(parts["loss"], rest + weight * parts["regularizer"])
    assert the_method(regularizer="vicreg").regularizer_weight == 1


# H5: rotation from other tokens


@pytest.mark.parametrize(
    "switch",
    [{"rotation_tokens": "cls"}, {"rotation_channels": 0.25}, {"rotation_tokens": "cls", "rotation_channels": 0.5}],
)
def test_rotation_is_predicted_from_the_tokens_named(switch):
    method, views = the_method(**switch), the_views(2, 2)
    width = round(24 * switch.get("rotation_channels", 1))
    losses = []
    for b in range(2):
        for view in views_of(views, b):
            tokens = method.student.encoder(view.pixels[None])
            vector = tokens.prefix[:, 0] if "rotation_tokens" in switch else tokens.patches.flatten(1, 2).mean(1)
            logits = method.rotation_head(vector[:, :width])[0]
            losses.append(logits.exp().sum().log() - logits[view.rotations])
    close(method(views, 0.5)["rotation"], torch.stack(losses).mean())
    assert method.diagnose(views)["rotation_accuracy"].shape == (2,)


def test_the_cls_token_bends_no_patches_of_the_last_block():
    """With the rotation from the CLS token, the last block's patches have no gradient of the rotation loss."""
    for tokens, reached in (("mean", True), ("cls", False)):
        method = the_method(rotation_tokens=tokens, region_weight=0.0, patch_weight=0.0)
        predictions = method.predictions(the_views(2, 1).groups)
        for predicted in predictions:
            predicted.tokens.patches.retain_grad()
        torch.stack([p.rotation.square().mean() for p in predictions]).sum().backward()
        gradients = [p.tokens.patches.grad for p in predictions]
        assert all((gradient is not None) == reached for gradient in gradients)


# H6: an image loss


def test_the_image_loss_is_added_with_its_weight_and_the_export_pools_by_cls():
    method = the_method(image_weight=0.3, num_prototypes=16)
    parts = method(the_views(2, 1), 0.5)
    close(parts["loss"], parts["region"] + 0.5 * parts["patch"] + 0.5 * parts["rotation"] + 0.3 * parts["image"])
    assert [encoder.pooling for encoder in method.encoders.values()] == ["cls", "cls"]
    assert [encoder.pooling for encoder in the_method().encoders.values()] == ["mean", "mean"]


def test_its_teacher_and_centre_follow():
    method = the_method(image_weight=0.3, num_prototypes=16, momentum=0.5).train()
    method(the_views(2, 1), 0.5)
    with torch.no_grad():
        for parameter in method.image_loss.student_head.parameters():
            parameter += 1
    before = method.image_loss.teacher_head.prototypes.weight.clone()
    method.after_step(0.0, 0.0)
    close(method.image_loss.teacher_head.prototypes.weight, before + 0.5)
    assert method.image_loss.centre.value.any()


# H7: the weight of the rotation loss


def test_the_weight_falls_linearly():
    method, views = the_method(rotation_weight=0.4, rotation_decay=(0.5, 0.9), patch_weight=0), the_views(2, 1)
    for time, weight in ((0.0, 0.4), (0.5, 0.4), (0.7, 0.2), (0.8, 0.1), (0.9, 0.0), (1.0, 0.0)):
        assert method.rotation_weight(time) == pytest.approx(weight)
        parts = method(views, time)
        close(parts["loss"], parts["region"] + weight * parts["rotation"])
    assert the_method(rotation_weight=0.4).rotation_weight(1.0) == 0.4


# Refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"region_temp": 0.0}, "region_temp, teacher_temp: must be above 0"),
        ({"teacher_temp": -1.0}, "region_temp, teacher_temp: must be above 0"),
        ({"num_prototypes": 0}, "num_prototypes.* at least 1"),
        ({"image_weight": -0.1}, "image_weight.* must not be negative"),
        ({"regularizer_weight": -0.1}, "regularizer_weight: must not be negative"),
        ({"rotation_channels": 0.0}, "rotation_channels: above 0 and at most 1"),
        ({"rotation_channels": 1.5}, "rotation_channels: above 0 and at most 1"),
        ({"rotation_decay": (0.5, 0.5)}, "rotation_decay: 0 <= start < end, not 0.5 0.5"),
        ({"rotation_decay": (-0.5, 0.5)}, "rotation_decay"),
    ],
)
def test_settings_without_a_meaning_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        the_method(**wrong)


@pytest.mark.parametrize("switch", [{"rotation_tokens": "cls"}, {"image_weight": 0.1}])
def test_a_model_without_a_cls_token_is_refused(switch):
    arguments = {"depth": 1, "embed_dim": 24, "num_heads": 2, "class_token": False}
    encoder = Backbone("vit_small_patch8_224", 48, arguments=arguments)
    with pytest.raises(UserError, match="CLS token, and vit_small_patch8_224 has none"):
        GTSA(encoder, 8, 8, 8, **switch)
    GTSA(encoder, 8, 8, 8, **{**switch, "rotation_weight": 0.0, "image_weight": 0.0})


def test_the_logarithm_of_the_candidates_is_chance():
    """An untrained network is not far from chance: 2 images, 2 pairs of 16 cells for global views."""
    method = the_method(region_loss="infonce", region_temp=10.0)
    assert method(the_views(2, 0), 0.5)["region"].item() == pytest.approx(math.log(1 + 2 * 16), abs=0.1)
