"""What do the patch tokens of networks hold? Looks behind the figures of a comparison, without training anything.

    python tools/tokens.py OUT/cells/gtsa/images-0/run OUT/cells/dino/images-0/run untrained:test_vit:0 \
        --images labelled/images --masks masks --ignore 255 --json runs/tokens.json

Of the central square of every image that has a mask, 6-fold over images (image i is judged in fold i mod 6). Masks are
read as ``gtsa evaluate`` reads them; --ignore is the value that counts for nothing.

* ``linear``, ``accuracy``: multinomial logistic regression of a patch's class (that of most of its pixels, where that
  is more than half of them) on its standardised token, trained to convergence (L-BFGS), at several
  strengths of L2; mIoU over classes, and accuracy of patches, in per cent. A probe that stops early asks how easy
  something is to find as well; this one asks what there is.
* ``neighbours``: mIoU of the majority of the 30 nearest tokens by cosine.
* ``light``, ``hue``, ``edges``: R2 of ridge regression on the token: the patch's mean brightness, mean colour less
  brightness, and gradients in eight orientations.
* ``around``, ``image``: R2, with the patch's own mean colour given as well, of the mean colour of the ring that is
  three patches away, and of the whole image. ``own`` are these for the own colour alone.
* ``between``: share of the tokens' variance that lies between images. ``rank``: effective rank of the tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gtsa.core.errors import UserError
from gtsa.data.labels import IGNORE, Labelled, open_labelled
from gtsa.evaluation.evaluators.health import rank_me
from gtsa.models.backbone import Backbone
from gtsa.models.weights import load_backbone

SIDE, FOLDS = 224, 6
STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2)


def central(data: Labelled) -> tuple[Tensor, Tensor]:
    """Images [N, 3, S, S] in 0..1 and classes [N, S, S] of their central squares."""

    def square(image: Tensor, how: transforms.InterpolationMode) -> Tensor:
        height, width = image.shape[-2:]
        short = min(height, width)
        cut = transforms.crop(image, (height - short) // 2, (width - short) // 2, short, short)
        return transforms.resize(cut, [SIDE, SIDE], how)

    pixels = [square(data.read(i), transforms.InterpolationMode.BILINEAR) for i in range(len(data))]
    classes = [square(data.target(i)[None], transforms.InterpolationMode.NEAREST)[0] for i in range(len(data))]
    return torch.stack(pixels) / 255, torch.stack(classes)


def in_patches(maps: Tensor, patch: int) -> Tensor:
    """[N, C, S, S] to [N, patches, C, pixels of a patch]."""
    n, channels, side, _ = maps.shape
    grid = side // patch
    cut = maps.reshape(n, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(n, grid * grid, channels, patch * patch)


def class_of_patches(classes: Tensor, patch: int) -> Tensor:
    """[N, patches]: the class of more than half of the pixels, IGNORE where there is none."""
    cut = in_patches(classes[:, None], patch)[:, :, 0]  # [N, patches, pixels]
    middle = cut.median(-1).values  # whatever more than half of them are
    return torch.where((cut == middle[..., None]).sum(-1) > patch * patch // 2, middle, IGNORE)


def contents(pixels: Tensor, patch: int) -> dict[str, Tensor]:
    """What a patch shows, and its surroundings: [N, patches, values] each."""
    mean = in_patches(pixels, patch).mean(-1)
    light = mean.mean(-1, keepdim=True)
    grey = F.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    bins = (torch.atan2(down, across) % math.pi / math.pi * 8).long().clamp(max=7)
    oriented = F.one_hot(bins[:, 0], 8).permute(0, 3, 1, 2) * torch.hypot(across, down)
    grid = pixels.shape[-1] // patch
    maps = mean.transpose(1, 2).unflatten(-1, (grid, grid))
    whole = mean.mean(1, keepdim=True).expand_as(mean)
    return {
        "light": light,
        "hue": mean - light,
        "edges": in_patches(oriented, patch).mean(-1).sqrt(),
        "own": mean,
        "around": ring(maps, 3),
        "image": whole,
    }


def ring(maps: Tensor, away: int) -> Tensor:
    """[N, patches, C]: mean over the cells at a chessboard distance of exactly ``away``, of those inside the image."""

    def within(radius: int) -> tuple[Tensor, Tensor]:
        side = 2 * radius + 1
        summed = [
            F.avg_pool2d(F.pad(values, (radius,) * 4), side, 1) * side**2 for values in (maps, torch.ones_like(maps))
        ]
        return summed[0], summed[1]

    (total, cells), (inner, fewer) = within(away), within(away - 1)
    return ((total - inner) / (cells - fewer)).flatten(2).transpose(1, 2)


def folded(tokens: Tensor, answer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Answers [N, patches, ...] from ``answer(learns, judged)``, masks over images, fold by fold."""
    fold = torch.arange(len(tokens)) % FOLDS
    answers = [answer(fold != number, fold == number) for number in range(FOLDS)]
    whole = torch.empty(tokens.shape[0], *answers[0].shape[1:], dtype=answers[0].dtype)
    for number, found in enumerate(answers):
        whole[fold == number] = found
    return whole


def scores(found: Tensor, classes: Tensor) -> tuple[float, float]:
    """mIoU over the classes that occur, and accuracy, in per cent."""
    known = classes != IGNORE
    found, truth = found[known], classes[known]
    each = [((found == c) & (truth == c)).sum() / ((found == c) | (truth == c)).sum() for c in truth.unique()]
    return 100 * float(torch.stack(each).mean()), 100 * float((found == truth).float().mean())


def linear(tokens: Tensor, classes: Tensor, strength: float) -> tuple[float, float]:
    names, width = classes[classes != IGNORE].unique(), tokens.shape[-1]

    def answer(learns: Tensor, judged: Tensor) -> Tensor:
        known = classes[learns] != IGNORE
        inputs, truth = tokens[learns][known], torch.searchsorted(names, classes[learns][known])
        mean, deviation = inputs.mean(0), inputs.std(0) + 1e-6
        inputs = (inputs - mean) / deviation
        weights = torch.zeros(width + 1, len(names), requires_grad=True)
        solver = torch.optim.LBFGS(
            [weights], max_iter=300, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(inputs @ weights[:-1] + weights[-1], truth)
            value = value + strength * weights[:-1].square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            solver.step(loss)  # type: ignore[no-untyped-call,arg-type]
        fitted = weights.detach()
        return names[(((tokens[judged] - mean) / deviation) @ fitted[:-1] + fitted[-1]).argmax(-1)]

    return scores(folded(tokens, answer), classes)


def neighbours(tokens: Tensor, classes: Tensor, k: int = 30) -> float:
    unit = F.normalize(tokens, dim=-1)

    def answer(learns: Tensor, judged: Tensor) -> Tensor:
        known = classes[learns] != IGNORE
        memory, truth = unit[learns][known], classes[learns][known]
        return torch.stack([truth[(image @ memory.T).topk(k).indices].mode(-1).values for image in unit[judged]])

    return scores(folded(tokens, answer), classes)[0]


def explained(inputs: Tensor, values: Tensor) -> float:
    """R2 of ridge regression of ``values`` on standardised ``inputs``, both [N, patches, ...]."""
    inputs, values = inputs.double(), values.double()

    def answer(learns: Tensor, judged: Tensor) -> Tensor:
        x, y = inputs[learns].flatten(0, 1), values[learns].flatten(0, 1)
        mean, deviation, middle = x.mean(0), x.std(0) + 1e-6, y.mean(0)
        x = (x - mean) / deviation
        fitted = torch.linalg.solve(x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - middle))
        return (inputs[judged] - mean) / deviation @ fitted + middle

    rest = (folded(inputs, answer) - values).square().sum()
    return 1 - float(rest / (values - values.mean((0, 1))).square().sum())


def held(tokens: Tensor, shown: dict[str, Tensor], classes: Tensor) -> dict[str, float | list[float]]:
    """All that the page's head names, of tokens [N, patches, width]."""
    probes = [linear(tokens, classes, strength) for strength in STRENGTHS]
    centred = tokens - tokens.mean((0, 1))
    with_own = torch.cat([tokens, shown["own"]], -1)
    return {
        "linear": [probe[0] for probe in probes],
        "accuracy": [probe[1] for probe in probes],
        "neighbours": neighbours(tokens, classes),
        **{name: explained(tokens, shown[name]) for name in ("light", "hue", "edges")},
        **{name: explained(with_own, shown[name]) for name in ("around", "image")},
        "between": float(centred.mean(1).square().sum() * tokens.shape[1] / centred.square().sum()),
        "rank": rank_me(centred.flatten(0, 1)),
    }


def network(name: str) -> Backbone:
    if name.startswith("untrained:"):
        _, model, seed = name.split(":") if name.count(":") == 2 else ("", "", "")
        if not seed.isdigit():
            raise UserError(f"{name}: write untrained:MODEL:SEED, e.g. untrained:test_vit:0")
        torch.manual_seed(int(seed))
        return Backbone(model, SIDE).eval()
    return load_backbone(name)[0].eval()


def tokens_of(backbone: Backbone, pixels: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in backbone.normalisation)
    return torch.cat([backbone((some - mean) / deviation).patches.flatten(1, 2) for some in pixels.split(16)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="what gtsa opens, or untrained:MODEL:SEED")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--masks", required=True, help="folder of masks with the images' names")
    parser.add_argument("--ignore", type=int, help="value of the masks that counts for nothing")
    parser.add_argument("--json", type=Path, help="file for the results")
    given = parser.parse_args()
    try:
        tell(given)
    except UserError as remedy:
        sys.exit(f"tokens: {remedy}")


def tell(given: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    networks = {name: network(name) for name in given.networks}
    pixels, classes = central(open_labelled(given.images, given.masks, "masks", ignore=given.ignore))
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, backbone in networks.items():
        if SIDE % backbone.patch_size:
            raise UserError(f"{name}: its patches of {backbone.patch_size} px do not fill {SIDE} px")
        shown = contents(pixels, backbone.patch_size)
        if "own" not in found:
            found["own"] = {what: explained(shown["own"], shown[what]) for what in ("around", "image")}
        found[name] = held(tokens_of(backbone, pixels), shown, class_of_patches(classes, backbone.patch_size))
        print(name, json.dumps(found[name], default=float), flush=True)
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
