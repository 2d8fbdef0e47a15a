"""Going on from weights: what is held, what rests, what is chosen, and that good weights are not destroyed."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dino import views
from test_exact import stopped_and_resumed
from test_online_eval import Asked as Answers
from test_online_eval import right

import gtsa
from conftest import TINY, run
from gtsa.core.errors import UserError
from gtsa.core.settings import Plan, validated
from gtsa.core.settings_file import read_yaml
from gtsa.evaluation import tasks
from gtsa.methods.dino import DINO
from gtsa.methods.gtsa import GTSA
from gtsa.methods.parts import losses
from gtsa.methods.parts.teacher import copy_of
from gtsa.models.backbone import Backbone
from gtsa.models.export import write
from gtsa.models.weight_sources import read_weights
from gtsa.models.weights import build_backbone, load_backbone
from gtsa.pretraining import plan
from gtsa.pretraining.adaptation import Adaptation
from gtsa.pretraining.settings import Pretrain
from gtsa.training import checkpoint

QUICK = {**TINY, "steps": 6, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def start(finished):
    """An export of a short run."""
    return finished / "exports" / "timm"


# The loss on the Gram matrix


def cosines_by_hand(patches):
    flat = patches.reshape(-1, patches.shape[-1])
    return np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in flat] for a in flat])


@settings(max_examples=20, deadline=None)
@given(h=st.integers(2, 4), w=st.integers(2, 3), seed=st.integers(0, 1000))
def test_gram_and_agreement_are_their_formulas(h, w, seed):
    draw = np.random.default_rng(seed)
    now, then = draw.normal(size=(2, h, w, 5)), draw.normal(size=(2, h, w, 7))  # of different widths
    for image, (gram, agreement) in enumerate(
        zip(
            losses.gram(*map(torch.tensor, (now, then))), losses.agreement(*map(torch.tensor, (now, then))), strict=True
        )
    ):
        a, b = cosines_by_hand(now[image]), cosines_by_hand(then[image])
        pairs = np.triu_indices(h * w, 1)
        assert gram.item() == pytest.approx(np.mean((a - b) ** 2), rel=1e-9)
        assert agreement.item() == pytest.approx(np.corrcoef(a[pairs], b[pairs])[0, 1], abs=1e-9)


def test_the_gram_loss_is_zero_at_the_start_and_for_rotations_of_all_features():
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 3, 3, 6, generator=draw, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))[0]
    assert losses.gram(3 * patches @ turn, patches).abs().max() < 1e-20
    assert losses.agreement(3 * patches @ turn, patches).tolist() == pytest.approx([1, 1])


def adapting(gram_weight):
    torch.manual_seed(0)
    encoder = Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 2, "embed_dim": 48, "num_heads": 3})
    then = copy_of(encoder)
    return Adaptation(DINO(encoder, 32, 24, 8), then, gram_weight).double().train()


def test_the_gram_loss_is_added_to_the_loss_of_the_student_alone():
    method, seen = adapting(2.0), views()
    assert method(seen, 0.5)["change"].item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        for p in method.encoders["student"].parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    parts, alone = method(seen, 0.5), method.method(seen, 0.5)
    pixels = seen.global_crops.pixels[:, 0]
    change = losses.gram(method.encoders["student"](pixels).patches, method.initial_encoder(pixels).patches).mean()
    assert change > 1e-4
    assert parts["loss"].item() == pytest.approx(alone["loss"].item() + 2 * change.item(), rel=1e-9)
    parts["change"].backward()
    assert any(p.grad is not None and p.grad.any() for p in method.encoders["student"].parameters())
    assert all(p.grad is None for p in [*method.initial_encoder.parameters(), *method.encoders["teacher"].parameters()])


def test_without_the_gram_loss_the_loss_is_the_methods_own():
    method, seen = adapting(0.0), views()
    assert set(method(seen, 0.5)) == set(method.method(seen, 0.5))


def test_a_checkpoint_is_the_methods_own():
    method = adapting(1.0)
    assert method.state_dict().keys() == method.method.state_dict().keys()
    assert not method.initial_encoder.training


# The preset


@pytest.mark.parametrize(
    ("rests", "times"), [(0.2, {0.0: 0, 0.19: 0, 0.25: 0.5, 0.3: 1, 0.9: 1}), (0.0, {0.0: 1, 0.9: 1})]
)
def test_rates_of_a_run(start, scenes, tmp_path, monkeypatch, rests, times):
    """Blocks at 0.3, 0.15, ... of the heads' rate, the last one first; what rested has a warm-up of its own."""
    seen = []
    module = sys.modules["gtsa.pretraining.parts_of_run"]

    class Seen(module.ScheduledAdamW):
        def __init__(self, groups, *rest):
            seen.append(groups)
            super().__init__(groups, *rest)

    monkeypatch.setattr(module, "ScheduledAdamW", Seen)
    gentle = {"freeze_encoder": rests, "encoder_lr_scale": 0.3, "layer_decay": 0.5}
    run_ = gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), init=str(start), **gentle, **{**QUICK, "steps": 2})
    encoder = load_backbone(str(run_.export))[0].vit
    depth = len(encoder.blocks)
    shapes = {}
    for name, p in encoder.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth if "norm" in name else 0
        decayed = p.ndim > 1 and name not in ("pos_embed", "cls_token")
        shapes.setdefault((round(0.3 * 0.5 ** (depth - layer), 9), decayed), []).append(tuple(p.shape))
    (groups,) = seen
    free = [g for g in groups if "rate" not in g]
    slow = [g for g in groups if "rate" in g]
    actual = {}
    for group in slow:
        full = group["rate"](1.0)
        assert [group["rate"](t) for t in times] == pytest.approx([full * share for share in times.values()])
        actual[round(full, 9), group["decayed"]] = sorted(tuple(p.shape) for p in group["params"])
    assert actual == {key: sorted(value) for key, value in shapes.items()}
    heads = sum(p.requires_grad for p in run_method(start).parameters()) - len(list(encoder.parameters()))
    assert sum(len(g["params"]) for g in free) == heads > 0


def run_method(start):
    """The method of QUICK, for its number of parameters."""
    return GTSA(load_backbone(str(start))[0], **QUICK["gtsa"])


def test_the_encoder_rests_while_heads_learn(start, scenes, tmp_path):
    out = tmp_path / "run"
    gtsa.pretrain(str(scenes), out=str(out), init=str(start), freeze_encoder=0.99, **QUICK)
    begun = load_backbone(str(start))[0].vit.state_dict()
    tensors, _ = checkpoint.read(checkpoint.newest(out / "checkpoints")[0])
    for network in ("student", "teacher"):
        now = {k.removeprefix(f"{network}.encoder.vit."): v for k, v in tensors["objective"].items() if network in k}
        assert all(torch.equal(now[k], v) for k, v in begun.items()), network
    first, _ = checkpoint.read(min((out / "checkpoints").glob("step-*")))
    heads = [k for k in first["objective"] if ".encoder." not in k]
    assert heads and all(
        not torch.equal(first["objective"][k], tensors["objective"][k]) for k in heads if "weight" in k
    )


def test_the_preset_is_printed_and_the_model_is_that_of_the_weights(start, scenes, tmp_path, tiny_yaml):
    config = tmp_path / "c.yaml"
    config.write_text(tiny_yaml.read_text().replace("model: test_vit\n", "").replace("steps: 12", "steps: 2"))
    out = tmp_path / "run"
    code, printed, err = run("pretrain", "--config", config, "--data", scenes, "--out", out, "--init", start)
    assert code == 0, err
    words = " ".join(printed.split())
    encoder = load_backbone(str(start))[0].vit
    millions, tensors = sum(p.numel() for p in encoder.parameters()) / 1e6, len(encoder.state_dict())
    assert f"test_vit, {millions:.1f} M parameters weights as above" in words
    assert f"{tensors} of {tensors} tensors loaded" in words
    assert (
        "encoder frozen for 0 steps, then rate x 0.1 preset for initial weights layer decay 0.75 per block below"
        in words
    )
    assert "Gram weight 1" in words and "export the last network" in words
    assert "the Gram matrix of the patches agrees to 1.00 with that of the start" in words
    assert "with --eval and labelled images the better of both is exported" in words
    kept = read_yaml(out / "config.yaml")
    assert {k: kept[k] for k in plan.GENTLE} == plan.GENTLE


def test_from_scratch_nothing_is_gentle():
    ready = Plan(validated(Pretrain, {}), {})
    plan.resolve_initial(ready, None)
    assert {k: getattr(ready.settings, k) for k in plan.GENTLE} == plan.FROM_SCRATCH
    assert ready.settings.model == "vit_small_patch16_224"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gram_weight": 1.0}, "gram_weight: .*give --init"),
        ({"freeze_encoder": 1.0}, "freeze_encoder"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"encoder_lr_scale": -1.0}, "encoder_lr_scale"),
    ],
)
def test_wrong_settings_are_reported(given, words):
    with pytest.raises(UserError, match=words):
        validated(Pretrain, given)


@pytest.mark.parametrize("model", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_architectures_of_published_weights_are_adapted(model, scenes, tmp_path):
    """As timm's own folder of such a model would: the weights are random, the route is that of real ones."""
    patch = 14 if "14" in model else 16
    write(Backbone(model, 4 * patch, arguments={"depth": 2}), tmp_path / "weights")
    sizes = {"views": {"global_crops_size": 4 * patch, "local_crops_size": 2 * patch, "local_crops_number": 2}}
    settings_ = {k: v for k, v in QUICK.items() if k != "model"} | sizes | {"steps": 2}
    run_ = gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), init=str(tmp_path / "weights"), **settings_)
    assert load_backbone(str(run_.export))[0].model == model


# Stopped and resumed


def test_stopped_and_resumed(start, scenes, tmp_path, monkeypatch):
    """See tests/long for kills at any moment."""
    stopped_and_resumed(scenes, tmp_path, monkeypatch, init=str(start), freeze_encoder=0.25, encoder_lr_scale=1.0)


def test_resume_notices_that_the_start_has_changed(start, scenes, tmp_path):
    path = tmp_path / "weights"
    encoder = build_backbone(read_weights(str(start)))[0]
    write(encoder, path)
    gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), init=str(path), **QUICK)
    with torch.no_grad():
        encoder.vit.pos_embed += 1
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    write(encoder, path)
    with pytest.raises(UserError, match="differs from the initial weights of this run") as caught:
        gtsa.pretrain(out=str(tmp_path / "run"), resume=True, steps=8)
    assert caught.value.code == 4


# The choice


class Asked(Answers):
    """A task of 50 images, of which a given number is classified correctly, evaluation by evaluation."""

    def __init__(self, counts):
        super().__init__()
        self.counts = iter(counts)

    def __call__(self, *_):
        return {"right": right(next(self.counts))}


@pytest.mark.parametrize(
    ("counts", "best", "words"),
    [((45, 30, 44), 0, "KEEP THE START: knn 90.00"), ((30, 45, 40), 2, "take step 2: knn 90.00, at the start 60.00")],
)
def test_the_best_is_exported_and_it_may_be_the_start(start, scenes, tmp_path, monkeypatch, counts, best, words):
    monkeypatch.setattr(tasks, "open_tasks", lambda _: [Asked(counts)])
    requested = {"eval": ("knn",), "eval_val": ("x",), "evaluate_every": 2}
    out = tmp_path / "run"
    done = gtsa.pretrain(str(scenes), out=str(out), init=str(start), **{**QUICK, **requested, "steps": 4})
    assert done.choice.startswith(words)
    assert checkpoint.newest(out / "best" / "checkpoints")[0].name == f"step-{best:08d}"
    chosen, before = (load_backbone(str(path))[0].fingerprint for path in (done.export, start))
    assert (chosen == before) is (best == 0)
    assert chosen == load_backbone(str(out / "best"))[0].fingerprint
