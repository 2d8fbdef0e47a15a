"""How long does a full-size training step take, and how much of the machine's matrix rate does it reach?

    python benchmarks/step.py --json runs/step.json

One step is what pretraining does: ViT-S/16, 2 x 224 + 8 x 96 px, forward, backward, clipping, AdamW, moving average.
``--profile FILE`` writes what the time of one step goes into, operation by operation, augmentation included, and adds
to the result the time of each phase and of each kind of kernel. ``--compile`` compiles what gtsa marks for it.
``--reference`` measures in turn with it a plain eager implementation of the same step (reference.py), with the same
loss.
share_of_matrix_rate = (FLOPs of the step / its time) / (FLOPs of a square matrix product / its time), both measured
alternately in this process at the same precision, medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import lightning_fabric
import numpy as np
import timm
import torch
from lightning_fabric import Fabric
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode

import gtsa
import reference
from gtsa.core.compilation import compiling
from gtsa.core.types import Crops, Views
from gtsa.data.batches.loader import collate
from gtsa.data.views import augment
from gtsa.data.views.multicrop import MultiCrop
from gtsa.methods.gtsa import GTSA
from gtsa.models.backbone import Backbone
from gtsa.training import loop
from gtsa.training.devices import PRECISIONS
from gtsa.training.loop import train_step
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant

KINDS = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cut_of(batch: int) -> Views:
    """Grey crops with real geometry and colour recipes: what the workers hand to augment.apply."""
    cut = MultiCrop()
    image = torch.full((3, 427, 640), 128, dtype=torch.uint8)
    return collate([cut(image, np.random.default_rng(i)) for i in range(batch)])


def views_of(cut: Views, device: torch.device) -> Views:
    """Noise with the geometry of crops as they were cut: what augment.apply hands to a method."""

    def finish(crops: Crops) -> Crops:
        noise = torch.randn(crops.pixels.shape, device=device)
        return Crops(noise, crops.boxes.to(device), crops.rotations.to(device), crops.colours)

    return cut.each(finish)


def seconds(work, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


KERNELS = {  # the first pattern that a kernel's name matches says what it is
    "attention": r"flash|fmha|attention|softmax",
    "convolution": r"conv|implicit|cudnn|nchw|nhwc|winograd|xmma",
    "matrix product": r"gemm|nvjet|cutlass|cublas|splitk",
    "normalisation": r"layer_norm|layernorm|batch_norm",
    "optimiser and teacher": r"multi_tensor|foreach|adam|lpnorm",
    "copies and casts": r"copy|memcpy|memset|\\bto\\b",
    "indexing": r"index|gather|scatter|nonzero|topk|sort",
    "reductions": r"reduce",
    "elementwise": r"elementwise",
    "compiled": r"^triton",
}


def profile(step, table: Path, device: torch.device) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Writes a table of operations of one step by the device's own time, and its trace.

    Returns:
        Milliseconds of the device in each phase of the step and in each kind of kernel, and their number.
    """
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as seen:
        taken = seconds(step, device)
    table.parent.mkdir(parents=True, exist_ok=True)
    order = f"self_{device.type}_time_total"
    table.write_text(seen.key_averages().table(sort_by=order, row_limit=80, max_name_column_width=90) + "\n")
    seen.export_chrome_trace(str(table.with_suffix(".json.gz")))
    kernels: Counter[str] = Counter()
    launches = 0
    for event in seen.events():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            name = next((kind for kind, known in KERNELS.items() if re.search(known, event.name.lower())), "other")
            kernels[name] += event.self_device_time_total / 1000
            launches += 1
    phases: dict[str, dict[str, float]] = {}
    for entry in seen.key_averages():
        if entry.key.startswith("step: "):
            phase = phases.setdefault(entry.key.removeprefix("step: "), {})
            if entry.device_type == DeviceType.CPU:
                phase["host"] = entry.cpu_time_total / 1000
            else:  # from its first kernel to its last
                phase["device"] = entry.device_time_total / 1000
    return {
        "profiled_seconds": taken,
        "kernels": launches,
        "kernel_milliseconds": dict(kernels.most_common()),
        "phase_milliseconds": phases,
    }


def named(owner: object, attribute: str, phase: str) -> None:
    """From now on a profile shows the calls of a function as a phase of the step."""
    inner = getattr(owner, attribute)

    def outer(*args: object, **kwargs: object) -> object:
        with record_function(f"step: {phase}"):
            return inner(*args, **kwargs)

    setattr(owner, attribute, outer)


def plain_step(given: argparse.Namespace, views: Views, fabric: Fabric):  # type: ignore[no-untyped-def]
    """A step of the plain implementation, after it was compared with ours: the same loss on the same crops."""
    method = GTSA(Backbone(given.model, 224, drop_path=0.0)).to(fabric.device).train()
    optimizer = torch.optim.AdamW(
        [p for p in method.parameters() if p.requires_grad], lr=1e-5, foreach=False, fused=False
    )
    with torch.no_grad(), fabric.autocast():
        ours, plain = float(method(views, 1.0)["loss"]), float(reference.loss_of(method, views))
    if abs(ours - plain) > (1e-4 if given.precision == ["32"] else 2e-2):
        raise SystemExit(f"the plain implementation has another loss: {plain}, not {ours}")

    def step() -> None:
        reference.step(method, optimizer, views, fabric)

    step()
    return step


def measure(given: argparse.Namespace, precision: str, batch: int, device: str) -> dict[str, object]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator=device, devices=1, precision=PRECISIONS[precision])
    method = GTSA(Backbone(given.model, 224, drop_path=0.0 if given.reference else given.drop_path))
    method.student.encoder.recompute = given.activation_checkpointing
    if given.channels_last:
        for head in (method.student.projector, method.teacher.projector, method.predictor):
            head.to(memory_format=torch.channels_last)
    optimizer = ScheduledAdamW(method, Constant(1e-5), Constant(0.04))
    module, wrapped = fabric.setup(method, optimizer)
    module.train()
    cut = cut_of(batch)
    views = views_of(cut, fabric.device)

    def step() -> None:
        with compiling(given.compile, print):
            train_step(module, wrapped, [views], 1, fabric, 0.5, 0.5)

    plain = plain_step(given, views, fabric) if given.reference else None
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=fabric.device, dtype=KINDS[precision]) for _ in range(2))
    first = seconds(step, fabric.device)
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops() if not given.compile else None  # operations that are compiled are not counted
    torch.mm(a, b)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, products, references = [], [], []
    for _ in range(given.repeats):
        times.append(seconds(step, fabric.device))
        references += [seconds(plain, fabric.device)] if plain else []
        products += [seconds(lambda: torch.mm(a, b), fabric.device) for _ in range(3)]
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    step_time, product_time = statistics.median(times), statistics.median(products)
    rate = 2 * side**3 / product_time
    row = {
        "model": given.model,
        "views": "2 x 224 + 8 x 96",
        "precision": precision,
        "batch": batch,
        "compiled": given.compile,
        "activation_checkpointing": given.activation_checkpointing,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if given.compile else 0,
        "channels_last": given.channels_last,
        "drop_path": 0.0 if given.reference else given.drop_path,
        "first_step_seconds": first,
        "step_seconds": step_time,
        "images_per_second": batch / step_time,
        "step_tflop": flops and flops / 1e12,
        "matrix_tflop_per_second": rate / 1e12,
        "share_of_matrix_rate": flops and flops / step_time / rate,
        "peak_memory_gib": memory,
        "repeats": given.repeats,
    }
    if references:
        row["reference_seconds"] = statistics.median(references)
        pairs = zip(references, times, strict=True)
        row["times_as_fast_as_reference"] = statistics.median(plain / ours for plain, ours in pairs)
    if given.profile:
        mean, std = method.encoders["student"].normalisation  # type: ignore[misc]
        named(augment, "apply", "augmentation")
        named(method, "forward", "forward")
        named(fabric, "backward", "backward")
        named(loop, "clip_each", "clipping")
        named(wrapped, "step", "optimiser")
        named(method, "after_step", "teacher")

        def whole() -> None:
            with compiling(given.compile, print):
                augment.apply(cut, fabric.device, mean, std)
            step()

        seconds(whole, fabric.device)
        row["step_and_augmentation_seconds"] = statistics.median(seconds(whole, fabric.device) for _ in range(3))
        table = given.profile.with_stem(f"{given.profile.stem}-{precision}")
        row |= profile(whole, table, fabric.device)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--precision", nargs="+", choices=list(KINDS), default=["32", "bf16"])
    parser.add_argument("--batch", type=int, default=0, help="images; 0: 4 on CPU, 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="file for a table of operations; the precision joins its name")
    parser.add_argument("--compile", action="store_true", help="torch.compile of regions, as --compile on of gtsa")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--channels-last", action="store_true", help="weights of the convolutional heads, too")
    parser.add_argument("--reference", action="store_true", help="measure a plain eager implementation, too")
    parser.add_argument("--drop-path", type=float, default=0.1)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = given.batch or (4 if device == "cpu" else 128)
    rows = [measure(given, precision, batch, device) for precision in given.precision]
    result = {
        "command": "python benchmarks/step.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "versions": {
            "gtsa": gtsa.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "timm": timm.__version__, "lightning_fabric": lightning_fabric.__version__,
        },
        "rows": rows,
    }  # fmt: skip
    for row in rows:
        share = row["share_of_matrix_rate"]
        told = "" if share is None else f", {100 * share:.0f} % of the matrix rate"  # type: ignore[operator]
        if given.reference:
            told += f", {row['times_as_fast_as_reference']:.2f} times as fast as a plain implementation"
        print(f"{row['model']} {row['precision']:>4}: {row['step_seconds']:.4f} s a step of {batch} images{told}")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
