"""The pictures of a report: what the network of a run's newest checkpoint makes of the images kept in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core import html
from gtsa.core.html import Markup
from gtsa.core.types import Views
from gtsa.data import augment
from gtsa.evaluation.feature_maps import centred_directions, feature_colours, resized
from gtsa.evaluation.loading import normalised
from gtsa.methods.gtsa import GTSA
from gtsa.methods.parts import losses
from gtsa.methods.parts.geometry import pairs_of, regions
from gtsa.models.attention import attention_maps
from gtsa.pretraining import preview_picture
from gtsa.pretraining.report.drawing import SIDE, contrasting, framed, heated, tile, tile_image
from gtsa.pretraining.report.network import Network

MOST_HEADS = 8  # of attention that are drawn
UNIFORM = 1.5  # attention whose largest value is below this multiple of the mean is nearly uniform
Parts = Sequence[Markup]  # of a section, below its title


def draw_learnt(network: Network, problems: list[str]) -> list[Markup]:
    """The sections on what was learnt. ``problems`` gets a sentence on each that cannot be drawn; the others stay."""
    makers: dict[str, Callable[[Network], Parts]] = {"Feature maps": feature_maps, "Similar patches": similar_patches}
    if isinstance(network.method, GTSA):
        if network.method.rotation_head is not None:
            makers["Rotation prediction"] = rotation_prediction
        makers["Targets and predictions"] = targets
    makers["Attention"] = attention
    return [_attempt(title, make, network, problems, level=3) for title, make in makers.items()]


def draw_views(network: Network, problems: list[str]) -> Markup:
    """The section of example views."""
    return _attempt("Example views", example_views, network, problems, level=2)


@torch.no_grad()
def _attempt(title: str, make: Callable[[Network], Parts], network: Network, problems: list[str], level: int) -> Markup:
    try:
        return html.section(title, *make(network), level=level)
    except Exception as error:  # a picture must not cost the report
        problems.append(f"{title}: could not be drawn ({type(error).__name__}: {error}).")
        return html.EMPTY


# What was learnt


def feature_maps(network: Network) -> Parts:
    at_start, now = feature_colours([network.at_start, network.now], network.gallery, SIDE)
    figures = []
    for n, image in enumerate(resized(network.gallery, SIDE)):
        parts = (
            (image, f"Image {n + 1}", network.title(n)),
            (at_start[n], f"Feature map of image {n + 1} at step 0", "step 0"),
            (now[n], f"Feature map of image {n + 1} at step {network.step}", f"step {network.step:,}"),
        )
        figures.append(html.strip([tile(*part) for part in parts]))
    return [
        html.paragraph(
            "Patches with similar features have similar colours. The three strongest principal components of the "
            "patch tokens are lightness and two axes of hue. They are computed over all images and both steps "
            "together, after each step's mean is subtracted. Both steps have the same scale: duller colours mean that "
            "patches differ less."
        ),
        html.grid(figures),
    ]


def similar_patches(network: Network) -> Parts:
    """For one patch of each image: the similarity of all patches, at the start and now."""
    figures = []
    count, grid = len(network.gallery), network.now.shape[1]
    for n, (row, column) in enumerate(contrasting(network.gallery, grid)):
        strips = []
        order = [n, *(i for i in range(count) if i != n)]
        for maps, step in ((network.at_start, 0), (network.now, network.step)):
            directions = centred_directions(maps)
            similarity = directions @ directions[n, row, column]  # [n, h, w]
            tiles = []
            for i in order:
                here = (row, column) if i == n else divmod(int(similarity[i].argmax()), grid)
                picture = framed(heated(network.gallery[i], similarity[i]), here, grid, i == n)
                words = "with the chosen patch marked" if i == n else "with its most similar patch marked"
                alt = f"Similarity of the patches of image {i + 1} to a patch of image {n + 1} at step {step}, {words}"
                tiles.append(tile(picture, alt, f"image {i + 1}, step {step:,}"))
            strips.append(html.strip(tiles))
        figures.append(html.figure(html.join(strips), f"Patch {n + 1}, chosen in image {n + 1}."))
    return [
        html.paragraph(
            "One patch of each image is chosen for its contrast and marked in white. The colours are the cosine "
            "similarity of every other patch, after the mean is subtracted: from 0 (grey) to 1 (yellow). In the other "
            "images the most similar patch is marked."
        ),
        html.grid(figures),
    ]


def rotation_prediction(network: Network) -> Parts:
    """The student's rotation head on four rotations of each image; the first image is shown."""
    method, settings = network.method, network.settings
    assert isinstance(method, GTSA) and method.rotation_head is not None
    side = settings.views.global_crops_size
    images = F.interpolate(network.gallery, (side, side), mode="bilinear", antialias=True)
    student, device = method.student.encoder, network.device
    rotated = torch.stack([torch.rot90(images, k, (-2, -1)) for k in range(4)], 1)  # [n, 4, 3, side, side]
    tokens = student(normalised(rotated.flatten(0, 1), student, device)).patches
    shares = method.rotation_head(tokens.mean((1, 2))).softmax(-1).cpu().unflatten(0, (-1, 4))  # [n, 4, 4]
    correct = int((shares.argmax(-1) == torch.arange(4)).sum())
    tiles = []
    for k, picture in enumerate(resized(rotated[0], SIDE)):
        best = int(shares[0, k].argmax())
        words = html.unbroken(f"predicted {90 * best}° ({100 * shares[0, k, best]:.0f} %)")
        caption = Markup("rotated {}°: {}").format(90 * k, html.marked(words, "good" if best == k else "bad"))
        tiles.append(tile(picture, f"Image 1 rotated by {90 * k} degrees, {words}", caption))
    rows = [
        [f"image {n + 1}, {90 * k}°", *(html.unbroken(f"{100 * share:.0f} %") for share in shares[n, k])]
        for n in range(len(images))
        for k in range(4)
    ]
    table = html.table(
        "Predicted probability of each rotation", ["rotated by", *(f"{90 * k}°" for k in range(4))], rows
    )
    return [
        html.paragraph(
            "The student predicts by how many quarter-turns an image was rotated, counter-clockwise. Of the "
            f"{4 * len(images)} rotations of the {len(images)} images here {correct} are predicted correctly; by "
            f"chance it would be {len(images)}. The verdict uses more images and random crops."
        ),
        html.grid([html.strip(tiles)]),
        html.details("all probabilities", table),
    ]


def targets(network: Network) -> Parts:
    """A teacher's crop, its pooled cells as the target, the student's cells, and the student's view."""
    method = network.method
    assert isinstance(method, GTSA)
    views = network.draw_views()
    finished = augment.apply(views, network.device, *network.teacher.normalisation)
    teacher = method.teacher_maps(finished.global_crops)
    figures = []
    for size, crops in enumerate(finished.groups):
        maps, _ = method.student_maps(crops)
        pooled = method.pooled(maps, teacher, crops, finished.global_crops, size)  # [B, V, G, c, c, C] each
        pairs = pairs_of(size, crops.count, finished.global_crops.count)
        view, seen = (int(indices[0]) for indices in pairs)
        predicted, target = (cells[:, view, seen].float().cpu() for cells in pooled)  # [B, c, c, C]
        if predicted.shape[1] < 2:  # the ablation without regions has one cell
            continue
        colours = feature_colours([target, predicted], network.gallery, SIDE, smooth=False, common=False)
        cosines = similarities_of_images(predicted, target)
        for n in range(min(2, len(cosines))):
            pictures = [maps_of_images[n] for maps_of_images in colours]
            row = _pair(views, size, view, seen, pictures, n)
            words = f"{network.title(n)}. {_named(size, view)} against {_named(0, seen)}; the shared region is framed. "
            figures.append(html.figure(row, words + describe_similarity(cosines, n)))
    return [
        html.paragraph(
            "The teacher sees a global crop (G), the student another view of the same image (G or L). The region that "
            "both share is pooled into cells; the teacher's are rotated into the student's orientation. The student is "
            "trained to predict them. A similar pattern of colours in the second and the third picture means that it "
            "does. Each has a scale of its own. The cosine similarity of prediction and target is a mean over cells. "
            "By chance it is as high as with the targets of other images."
        ),
        html.grid(figures),
    ]


def similarities_of_images(predicted: Tensor, target: Tensor) -> Tensor:
    """Cosine similarities [B, B] of predicted cells [B, c, c, C] with the targets of all images, mean over cells."""
    return -losses.region(predicted[:, None], target[None])


def describe_similarity(cosines: Tensor, image: int) -> str:
    """A sentence: an image's own cosine similarity in [B, B], and the mean of those with the other images."""
    own, others = cosines[image, image], torch.cat([cosines[image, :image], cosines[image, image + 1 :]])
    chance = f"; with the targets of other images {others.mean():.2f}" if len(others) else ""
    return f"Cosine similarity {own:.2f}{chance}."


def _named(size: int, crop: int) -> str:
    """The name of a crop, e.g. G1 or L3."""
    return f"{'GL'[size]}{crop + 1}"


def _pair(views: Views, size: int, view: int, seen: int, colours: list[Tensor], image: int) -> Markup:
    """Four pictures: what the teacher sees, the target, the student's cells, and what the student sees."""
    crops, globals_ = views.groups[size], views.global_crops
    in_view, in_seen = regions(crops, globals_)
    student = preview_picture.rotated(crops)[image, view]
    teacher = preview_picture.rotated(globals_)[image, seen]
    hue = (255, 200, 0)
    parts = (
        (preview_picture.boxed(teacher, in_seen[image, seen, view], hue, 1), f"{_named(0, seen)}, seen by the teacher"),
        (colours[0], "target: the teacher's cells"),
        (colours[1], "the student's cells"),
        (
            preview_picture.boxed(student, in_view[image, view, seen], hue, 1),
            f"{_named(size, view)}, seen by the student",
        ),
    )
    tiles = [tile(picture, f"Image {image + 1}: {caption}", caption) for picture, caption in parts]
    return html.strip(tiles)


def attention(network: Network) -> Parts:
    query = "the CLS token" if network.teacher.pooling == "cls" else "the mean over all patches"
    device = network.device
    figures = []
    for n, image in enumerate(network.gallery[:2]):
        weights = attention_maps(network.teacher, normalised(image[None], network.teacher, device))
        if weights is None:
            text = f"{network.settings.model} does not give its attention weights, so they are not shown."
            return [html.paragraph(text)]
        heads = weights[0].cpu()
        chosen = [("all heads", heads.mean(0)), *((f"head {h + 1}", m) for h, m in enumerate(heads[:MOST_HEADS]))]
        peaks = [float(m.max() / m.mean()) for _, m in chosen]
        tiles = [
            tile(heated(image, m / m.max()), f"Attention to image {n + 1}, {name}", f"{name}: {peak:.1f} x mean")
            for (name, m), peak in zip(chosen, peaks, strict=True)
        ]
        flat = sum(peak < UNIFORM for peak in peaks)
        caption = f"{network.title(n)}. {flat} of {len(peaks)} maps are nearly uniform."
        figures.append(html.figure(html.grid(tiles, "tiles small"), caption))
    more = f" Of {len(heads)} heads the first {MOST_HEADS} are shown." if len(heads) > MOST_HEADS else ""
    return [
        html.paragraph(
            f"Where the last block attends to, by head; the query is {query}. Each map is scaled to its largest "
            f"value, which the caption gives as a multiple of the mean. Below {UNIFORM} attention is nearly uniform, "
            f"and the map shows small differences only.{more}"
        ),
        html.grid(figures),
    ]


# How images are seen


def example_views(network: Network) -> Parts:
    """The first image with its crops, and the crops as the student sees them."""
    views = network.draw_views()
    first = views.each(lambda crops: crops.each(lambda tensor: tensor[:1]))
    finished = augment.apply(first, torch.device("cpu"), *network.teacher.normalisation)
    mean, std = (torch.tensor(values)[:, None, None] for values in network.teacher.normalisation)
    hues = preview_picture.make_hues(sum(crops.count for crops in first.groups))
    names = [name for name, *_ in preview_picture.list_crops(first, hues)]
    first_image = (255 * network.gallery[0]).round().to(torch.uint8)
    boxes = preview_picture.draw_boxes(first_image, first, hues, 2 * SIDE / first_image.shape[-1])
    tiles: list[Markup] = []
    for crops in finished.groups:
        for n in range(crops.count):
            name, degrees = names[len(tiles)], 90 * int(crops.rotations[0, n])
            picture = (crops.pixels[0, n] * std + mean).clamp(0, 1).permute(1, 2, 0)
            tiles.append(tile(picture, f"View {name}, rotated by {degrees} degrees", f"{name}, rotated {degrees}°"))
    return [
        html.paragraph(
            "Crops of the first image (G global, L local), and the crops as the student sees them: colours augmented, "
            "rotated counter-clockwise. 'gtsa preview' draws those of any image."
        ),
        html.grid(
            [
                html.figure(
                    tile_image(boxes, "The first image with the boxes of its crops", 2 * SIDE), f"{network.title(0)}."
                ),
                html.figure(html.grid(tiles, "tiles small"), "Its views."),
            ]
        ),
    ]
