"""Training from good weights: the preset keeps their quality, settings for scratch destroy it, and the better is chosen."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import gtsa
from gtsa.models.backbone import Backbone
from gtsa.models.export import write
from gtsa.models.weights import load_backbone
from gtsa.training import checkpoint

pytestmark = pytest.mark.long


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
    head = torch.nn.Linear(encoder.embed_dim, 6)
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
        "evaluate_every": 100, "method": "dino", "dino": {"hidden_dim": 256, "bottleneck_dim": 64, "momentum": 0.95},
        "views": {"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 2}, "eval": ("knn",),
        "eval_train": (str(good / "train"),), "eval_val": (str(good / "val"),), "eval_config": str(good / "eval.yaml"),
    }  # fmt: skip
    done = gtsa.pretrain(str(data), out=str(out), **given, **changes)
    lines = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 100, 200]
    return done, [line["knn: top1, k = 10"] for line in lines]


def test_the_preset_keeps_features_that_training_as_from_scratch_destroys(good, scenes, tmp_path):
    kept, with_preset = adapted(good, tmp_path / "preset", scenes)
    lost, naive = adapted(
        good, tmp_path / "naive", scenes, freeze_encoder=0.0, encoder_lr_scale=1.0, layer_decay=1.0, gram_weight=0.0
    )
    assert with_preset[0] == naive[0] > 90  # chance is 16.7
    assert naive[-1] < naive[0] - 15
    assert min(with_preset) > with_preset[0] - 3

    # The choice: the start, if all evaluations were worse; and it is exported
    assert lost.choice.startswith("KEEP THE START: knn")
    assert load_backbone(str(lost.export))[0].fingerprint == load_backbone(str(good / "weights"))[0].fingerprint
    best = max(range(3), key=lambda i: (with_preset[i], -i))
    assert kept.choice.startswith("KEEP THE START" if best == 0 else f"take step {100 * best}: knn")
    kept_run = checkpoint.newest(tmp_path / "preset" / "best" / "checkpoints")[0]
    assert kept_run.name == f"step-{100 * best:08d}"
