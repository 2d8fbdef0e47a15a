"""The published training maths, number by number, through the program's own method, optimiser and step."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from gtsa.core.types import Crops, Views
from gtsa.methods.gtsa import GTSA
from gtsa.methods.parts.geometry import regions
from gtsa.models.backbone import Backbone
from gtsa.training.loop import train_step
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Cosine, warmup_then

FOLDER = Path(os.environ.get("GTSA_GOLDEN", Path(__file__).parent))
CASES = sorted(FOLDER.glob("*.json"))
PARTS = {
    "encoder": "student.encoder.vit",
    "projector": "student.projector",
    "predictor": "predictor",
    "rotation head": "rotation_head",
    "teacher encoder": "teacher.encoder.vit",
    "teacher projector": "teacher.projector",
}


def our_name(part, name):
    if part == "predictor":
        name = name.replace("blocks.0.0.", "block.conv.")
    if "projector" in part:
        name = name.replace("blocks.0.0.", "blocks.0.conv.").replace("blocks.1.0.", "blocks.1.conv.")
    if part.startswith("teacher "):
        name = name.removeprefix("teacher ")
    return f"{PARTS[part]}.{name}"


def the_method(case):
    config = case["config"]
    encoder = Backbone(
        "vit_small_patch16_224",
        image_size=config["crop_sizes_px"][0],
        drop_path=config["drop_path"],
        arguments={
            "depth": config["depth"],
            "embed_dim": config["embed_dim"],
            "num_heads": config["num_heads"],
            "patch_size": config["patch_size"],
            "mlp_ratio": config["mlp_ratio"],
        },
    )
    momentum = case["schedule"]["teacher_momentum"]
    method = GTSA(
        encoder,
        projector_dim=config["projector_dim"],
        out_dim=config["out_dim"],
        predictor_dim=config["predictor_dim"],
        cells=tuple(config["pool_sizes"]),
        matches=tuple(config["num_matches"]),
        patch_weight=config["pc_weight"],
        rotation_weight=config["rotation_weight"],
        patch_start=0.0,
        momentum=momentum["start"],
    ).double()
    state = {}
    for entry in case["parameters"]:
        value = 0.05 * np.random.RandomState(config["seed0"] + entry["index"]).standard_normal(entry["shape"])
        value += "layernorm weight" in entry["kind"]
        state[our_name(entry["part"], entry["name"])] = torch.from_numpy(value)
    method.load_state_dict(state, strict=True)
    return method


def the_views(case):
    config = case["config"]
    pixels = [
        torch.from_numpy(
            np.random.RandomState(config["seed0"] + 5000 + j).standard_normal((config["batch"], 3, side, side))
        )
        for j, side in enumerate(np.repeat(config["crop_sizes_px"], config["num_crops"]))
    ]
    boxes = torch.tensor(case["crop_boxes_xyxy_in_image_px"], dtype=torch.float64)
    rotations = torch.tensor(case["rotations_degrees_ccw"]) // 90
    groups = [
        Crops(torch.stack(pixels[part], 1), boxes[:, part], rotations[:, part], torch.empty(0))
        for part in (slice(config["num_crops"][0]), slice(config["num_crops"][0], None))
    ]
    return Views.of(groups)


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_every_number(path, device):
    case = json.loads(path.read_text())
    config, schedule = case["config"], case["schedule"]
    method, views = the_method(case), the_views(case)

    groups = [regions(crops, views.global_crops) for crops in views.groups]
    mine = torch.cat([g[0] for g in groups], 1)
    reference = torch.cat([g[1] for g in groups], 2)
    for boxes, key in (
        (mine, "view_overlap_boxes_xyxy_in_view_px[b][view][teacher]"),
        (reference, "teacher_overlap_boxes_xyxy_in_view_px[b][teacher][view]"),
    ):
        torch.testing.assert_close(boxes, torch.tensor(case[key], dtype=torch.float64), rtol=1e-6, atol=1e-9)

    steps, first = schedule["total_steps"], schedule["first_step"]
    rate, decay = schedule["learning_rate"], schedule["weight_decay"]
    optimizer = ScheduledAdamW(
        method,
        warmup_then(Cosine(rate["peak"], rate["final"]), rate["warmup_steps"] / steps, steps),
        Cosine(decay["start"], decay["final"]),
        clip=config["clip_each_parameter_to"],
        betas=tuple(config["adamw_betas"]),
    )
    fabric = Fabric(accelerator=device, devices=1, precision="64-true")
    module, wrapped = fabric.setup(method, optimizer)
    views = views.each(lambda crops: crops.each(lambda tensor: tensor.to(fabric.device)))
    module.train()

    norms = {}
    for part, prefix in PARTS.items():
        if not part.startswith("teacher"):
            watch_gradients(optimizer, method, part, prefix, norms)

    method.after_step(0.0, first / steps)  # the teacher of the case is no copy: its first update shows
    for expected in case["steps"]:
        step = first + expected["step"]
        teacher = {p: norm(method, prefix) for p, prefix in PARTS.items() if p.startswith("teacher")}
        norms.clear()
        parts, accepted, *_ = train_step(module, wrapped, [views], 1, fabric, step / steps, (step + 1) / steps)
        assert accepted == 1
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected["learning_rate"], rel=1e-6)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected["weight_decay"], rel=1e-6)
        assert method.momentum(step / steps) == pytest.approx(expected["teacher_momentum"], rel=1e-6)
        actual = {
            "crop_loss": parts["region"],
            "patch_correspondence_loss": parts["patch"],
            "rotation_loss": parts["rotation"],
            "total_loss": parts["loss"],
        }
        for name, value in actual.items():
            assert value.item() == pytest.approx(expected[name], rel=1e-6), name
        for part, value in expected["gradient_l2_before_clipping"].items():
            assert norms[part] == pytest.approx(value, rel=1e-6), part
        for part, value in expected["parameter_l2_after_step"].items():
            assert teacher.get(part, norm(method, PARTS[part])) == pytest.approx(value, rel=1e-6), part

    after = case["after_last_step"]
    method.eval()
    with torch.no_grad():
        for size, crops in enumerate(views.groups):
            tokens = method.student.encoder(crops.pixels.flatten(0, 1)).patches
            maps, _ = method.student_maps(crops)
            for tensor, key in ((tokens, "student_tokens_mean"), (maps, "predictor_map_mean_std")):
                mean, std = after[f"{key}_per_view_group"][size]
                assert tensor.mean().item() == pytest.approx(mean, rel=1e-6), key
                assert tensor.std().item() == pytest.approx(std, rel=1e-6), key


def norm(method, prefix):
    return torch.cat([p.flatten() for n, p in method.named_parameters() if n.startswith(f"{prefix}.")]).norm().item()


def watch_gradients(optimizer, method, part, prefix, norms):
    """Notes the gradient norm of one part as it is before clipping, when each last gradient has been accumulated."""
    for name, parameter in method.named_parameters():
        if name.startswith(f"{prefix}."):

            def note(p, part=part):
                norms[part] = (norms.get(part, 0.0) ** 2 + p.grad.norm().item() ** 2) ** 0.5

            parameter.register_post_accumulate_grad_hook(note)


def test_the_golden_case_exists():
    assert CASES, f"no golden case in {FOLDER}"
