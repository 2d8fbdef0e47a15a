"""Going on from weights: what is held, what rests, what is chosen, and that good weights are not destroyed."""

import json
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import gtsa
from conftest import TINY, final_weights, run
from gtsa import checkpoint, losses, plan, strict, weights
from gtsa.adaptation import Adaptation
from gtsa.backbone import Backbone
from gtsa.config import Pretrain
from gtsa.core import Remedy
from gtsa.export import opened, write
from gtsa.methods.dino import DINO
from gtsa.methods.gtsa import GTSA
from gtsa.teacher import copy_of
from test_dino import views
from test_exact import kill_after

QUICK = {**TINY, "steps": 6, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def start(tmp_path_factory, scenes):
    """An export of a short run."""
    out = tmp_path_factory.mktemp("runs") / "start"
    return gtsa.pretrain(str(scenes), out=str(out), **{**TINY, "steps": 2}).export


# The anchor


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


def test_the_anchor_is_nothing_at_the_start_and_allows_turns_of_all_features():
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 3, 3, 6, generator=draw, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))[0]
    assert losses.gram(3 * patches @ turn, patches).abs().max() < 1e-20
    assert losses.agreement(3 * patches @ turn, patches).tolist() == pytest.approx([1, 1])


def adapting(anchor):
    torch.manual_seed(0)
    encoder = Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 2, "embed_dim": 48, "num_heads": 3})
    then = copy_of(encoder)
    return Adaptation(DINO(encoder, 32, 24, 8), then, anchor).double().train()


def test_the_anchor_joins_the_loss_of_the_student_alone():
    method, seen = adapting(2.0), views()
    assert method(seen, 0.5)["change"].item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        for p in method.encoders["student"].parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    parts, alone = method(seen, 0.5), method.method(seen, 0.5)
    pixels = seen.global_crops.pixels[:, 0]
    change = losses.gram(method.encoders["student"](pixels).patches, method.start(pixels).patches).mean()
    assert change > 1e-4
    assert parts["loss"].item() == pytest.approx(alone["loss"].item() + 2 * change.item(), rel=1e-9)
    parts["change"].backward()
    assert any(p.grad is not None and p.grad.any() for p in method.encoders["student"].parameters())
    assert all(p.grad is None for p in [*method.start.parameters(), *method.encoders["teacher"].parameters()])


def test_without_an_anchor_the_loss_is_the_methods_own():
    method, seen = adapting(0.0), views()
    assert set(method(seen, 0.5)) == set(method.method(seen, 0.5))


def test_a_checkpoint_is_the_methods_own():
    method = adapting(1.0)
    assert method.state_dict().keys() == method.method.state_dict().keys()
    assert not method.start.training


# The preset


@pytest.mark.parametrize(
    ("rests", "times"), [(0.2, {0.0: 0, 0.19: 0, 0.25: 0.5, 0.3: 1, 0.9: 1}), (0.0, {0.0: 1, 0.9: 1})]
)
def test_rates_of_a_run(start, scenes, tmp_path, monkeypatch, rests, times):
    """Blocks at 0.3, 0.15, ... of the heads' rate, the last one first; what rested has a warm-up of its own."""
    seen = []
    module = sys.modules["gtsa.pretrain"]  # the package has the function under this name

    class Seen(module.ScheduledAdamW):
        def __init__(self, groups, *rest):
            seen.append(groups)
            super().__init__(groups, *rest)

    monkeypatch.setattr(module, "ScheduledAdamW", Seen)
    gentle = {"head_start": rests, "encoder_rate": 0.3, "layer_decay": 0.5}
    run_ = gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), init=str(start), **gentle, **{**QUICK, "steps": 2})
    encoder, depth = opened(str(run_.export))[0].vit, 12
    shapes = {}
    for name, p in encoder.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth if "norm" in name else 0
        decayed = p.ndim > 1 and name not in ("pos_embed", "cls_token")
        shapes.setdefault((round(0.3 * 0.5 ** (depth - layer), 9), decayed), []).append(tuple(p.shape))
    (groups,) = seen
    free = [g for g in groups if "rate" not in g]
    slow = [g for g in groups if "rate" in g]
    found = {}
    for group in slow:
        full = group["rate"](1.0)
        assert [group["rate"](t) for t in times] == pytest.approx([full * share for share in times.values()])
        found[round(full, 9), group["decayed"]] = sorted(tuple(p.shape) for p in group["params"])
    assert found == {key: sorted(value) for key, value in shapes.items()}
    heads = sum(p.requires_grad for p in run_method(start).parameters()) - len(list(encoder.parameters()))
    assert sum(len(g["params"]) for g in free) == heads > 0


def run_method(start):
    """The method of QUICK, for its number of parameters."""
    return GTSA(opened(str(start))[0], **QUICK["gtsa"])


def test_the_encoder_rests_while_heads_learn(start, scenes, tmp_path):
    out = tmp_path / "run"
    gtsa.pretrain(str(scenes), out=str(out), init=str(start), head_start=0.99, **QUICK)
    begun = opened(str(start))[0].vit.state_dict()
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
    config.write_text(
        tiny_yaml.read_text().replace("model: vit_tiny_patch16_224\n", "").replace("steps: 12", "steps: 2")
    )
    out = tmp_path / "run"
    code, printed, err = run("pretrain", "--config", config, "--data", scenes, "--out", out, "--init", start)
    assert code == 0, err
    words = " ".join(printed.split())
    assert "vit_tiny_patch16_224, 5.5 M parameters weights as above" in words
    assert "150 of 150 tensors loaded" in words
    assert "encoder rests for 0 steps, then learns at 0.1 of" in words
    assert "0.75 of that a block below; anchor 1" in words
    assert "likenesses between patches agree to 1.00 with those of the start" in words
    assert "with --eval and labelled images start and result can be chosen from" in words
    kept = strict.read_yaml(out / "config.yaml")
    assert {k: kept[k] for k in plan.GENTLE} == plan.GENTLE


def test_from_scratch_nothing_is_gentle():
    ready = plan.Plan(strict.validated(Pretrain, {}), {})
    plan.start(ready, None)
    assert {k: getattr(ready.settings, k) for k in plan.GENTLE} == plan.FROM_SCRATCH
    assert ready.settings.model == "vit_small_patch16_224"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"anchor": 1.0}, "anchor: .*give --init"),
        ({"head_start": 1.0}, "head_start"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"encoder_rate": -1.0}, "encoder_rate"),
    ],
)
def test_mistakes_are_told(given, words):
    with pytest.raises(Remedy, match=words):
        strict.validated(Pretrain, given)


@pytest.mark.parametrize("model", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_architectures_of_published_weights_are_adapted(model, scenes, tmp_path):
    """As timm's own folder of such a model would: the weights are random, the route is that of real ones."""
    patch = 14 if "14" in model else 16
    write(Backbone(model, 4 * patch, arguments={"depth": 2}), tmp_path / "weights")
    sizes = {"views": {"global_size": 4 * patch, "local_size": 2 * patch, "local_crops": 2}}
    settings_ = {k: v for k, v in QUICK.items() if k != "model"} | sizes | {"steps": 2}
    run_ = gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), init=str(tmp_path / "weights"), **settings_)
    assert opened(str(run_.export))[0].model == model


# Killed, and gone on with


def test_killed_and_resumed(start, scenes, tmp_path, tiny_yaml):
    given = ["--config", tiny_yaml, "--data", scenes, "--init", start, "--head-start", 0.25, "--encoder-rate", 1]
    assert run("pretrain", "--out", tmp_path / "straight", *given)[0] == 0
    code, _ = kill_after(tmp_path / "run", 4, *given)
    assert code == -signal.SIGKILL
    code, printed, err = run("pretrain", "--out", tmp_path / "run", "--resume")
    assert code == 0, err
    assert "resumed from step-0000" in printed
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "straight")


def test_resume_notices_that_the_start_has_changed(start, scenes, tmp_path):
    place = tmp_path / "weights"
    encoder = weights.built(weights.find(str(start)))[0]
    write(encoder, place)
    gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), init=str(place), **QUICK)
    with torch.no_grad():
        encoder.vit.pos_embed += 1
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    write(encoder, place)
    with pytest.raises(Remedy, match="is not what the run was started from") as told:
        gtsa.pretrain(out=str(tmp_path / "run"), resume=True, steps=8)
    assert told.value.code == 4


# Good weights, and the choice


def stripes(kind, seed, side=64):
    """Stripes of 8 px in one of six directions, of any phase and any two colours, with noise."""
    rng = np.random.default_rng([kind, seed])
    y, x = np.mgrid[:side, :side]
    angle = np.pi * kind / 6
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / 8 + rng.uniform(0, 2 * np.pi))
    one, two = rng.uniform(0, 255, (2, 3))
    pixels = one + (two - one) * (wave[..., None] + 1) / 2 + rng.normal(0, 20, (side, side, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Weights that we trained ourselves, supervised, and the labelled images that show what they are worth."""
    root = tmp_path_factory.mktemp("good")
    for part, seeds in (("train", range(30)), ("val", range(1000, 1020))):
        for kind in range(6):
            (root / part / f"direction-{kind}").mkdir(parents=True)
            for seed in seeds:
                Image.fromarray(stripes(kind, seed)).save(root / part / f"direction-{kind}" / f"{seed}.png")
    torch.manual_seed(0)
    encoder = Backbone("test_vit", 64)
    head = torch.nn.Linear(encoder.width, 6)
    images = np.stack([stripes(kind, 2000 + i) for kind in range(6) for i in range(150)])
    mean, std = (torch.tensor(values)[:, None, None] for values in encoder.normalisation)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    truth, steps = torch.arange(6).repeat_interleave(150), 500
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 50) * (1 + np.cos(np.pi * step / steps)) / 2
        rows = torch.randint(len(pixels), (32,))
        loss = F.cross_entropy(head(encoder(pixels[rows]).patches.mean((1, 2))), truth[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write(encoder.eval(), root / "weights")
    (root / "eval.yaml").write_text("knn: {k: [10], resize: 64, crop: 64}\n")
    return root


def adapted(good, out, data, **changes):
    given = {
        "init": str(good / "weights"), "steps": 200, "batch_size": 8, "learning_rate": 5e-3, "hold_out": 3,
        "evaluate_every": 100, "method": "dino", "dino": {"hidden": 256, "bottleneck": 64, "momentum": 0.95},
        "views": {"global_size": 64, "local_size": 32, "local_crops": 2}, "eval": ("knn",),
        "eval_train": (str(good / "train"),), "eval_val": (str(good / "val"),), "eval_config": str(good / "eval.yaml"),
    }  # fmt: skip
    done = gtsa.pretrain(str(data), out=str(out), **given, **changes)
    lines = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 100, 200]
    return done, [line["knn: top1, k = 10"] for line in lines]


def test_the_preset_keeps_what_going_on_as_from_scratch_destroys(good, scenes, tmp_path):
    kept, with_preset = adapted(good, tmp_path / "preset", scenes)
    lost, naive = adapted(
        good, tmp_path / "naive", scenes, head_start=0.0, encoder_rate=1.0, layer_decay=1.0, anchor=0.0
    )
    assert with_preset[0] == naive[0] > 90  # chance is 16.7
    assert naive[-1] < naive[0] - 15
    assert min(with_preset) > with_preset[0] - 3

    # The choice: the start, where all looks were worse; and the export is that
    assert lost.choice.startswith("KEEP THE START: knn")
    assert opened(str(lost.export))[0].fingerprint == opened(str(good / "weights"))[0].fingerprint
    best = max(range(3), key=lambda i: (with_preset[i], -i))
    assert kept.choice.startswith("KEEP THE START" if best == 0 else f"take step {100 * best}: knn")
    kept_run = checkpoint.newest(tmp_path / "preset" / "best" / "checkpoints")[0]
    assert kept_run.name == f"step-{100 * best:08d}"
