"""Pure loss functions and metrics. Each returns one value per leading index, so that the caller chooses the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.compilation import compilable
from gtsa.methods.parts.geometry import pairs_of


@compilable
def region(student: Tensor, target: Tensor) -> Tensor:
    """Negative channel-wise cosine, mean over cells (GTSA, section 3.2).

    Args:
        student: [..., c, c, C] pooled predictions.
        target: [..., c, c, C] the teacher's pooled region, already in the student's orientation.

    Returns:
        [...]
    """
    return -(_unit(student) * _unit(target)).sum(-1).mean((-2, -1))


@compilable
def patch_correspondence(student: Tensor, teacher: Tensor, matches: int) -> Tensor:
    """Similar patches are pulled together, wherever they are (GTSA, section 3.4).

    Each student vector is matched with the most similar teacher vector. The ``matches`` best pairs count. The same is
    done from the teacher's side. The loss is the mean of both.

        s = cos(student, teacher)                     # [..., N, M]
        loss = - (mean(topk(max_m s)) + mean(topk(max_n s))) / 2

    Args:
        student: [..., N, C]; teacher: [..., M, C] (leading dimensions broadcast).
        matches: number of pairs that count on either side, at most min(N, M).

    Returns:
        [...]
    """
    similarity = _unit(student) @ _unit(teacher).transpose(-2, -1)
    of_student, of_teacher = (
        _lifted(similarity.max(dim).values.topk(matches, dim=-1).values).mean(-1) for dim in (-1, -2)
    )
    return -(of_student + of_teacher) / 2


def rotation(logits: Tensor, rotations: Tensor) -> Tensor:
    """Cross-entropy over the four rotations: logits [..., 4], rotations [...] -> [...]."""
    loss = F.cross_entropy(_lifted(logits).flatten(0, -2), rotations.flatten(), reduction="none")
    return loss.reshape(rotations.shape)


@compilable
def cross_view(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's prototype assignments against the teacher's (DINO, section 3.1).

        loss = - sum_k teacher_k log softmax(student)_k      # for every pair of views

    Args:
        student: [..., V, K] logits of an image's views, divided by the temperature.
        teacher: [..., G, K] probabilities of the same image's global crops.

    Returns:
        [..., V, G]
    """
    with torch.autocast(student.device.type, enabled=False):  # a sum over thousands of prototypes
        return -_lifted(student).log_softmax(-1) @ _lifted(teacher).transpose(-2, -1)


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of logits [M, K], divided by the temperature, against probabilities [M, K]: [M].

    It is not compiled: M differs from step to step.
    """
    with torch.autocast(student.device.type, enabled=False):
        return -(_lifted(student).log_softmax(-1) * _lifted(teacher)).sum(-1)


@compilable
def feature(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 distance to a teacher's standardised features (feature distillation, arXiv 2205.14141, section 3).

        d = | student - standardised(teacher) |
        loss = mean_c (d^2 / 4 where d < 2, else d - 1)

    Args:
        student, teacher: [..., C].

    Returns:
        [...]
    """
    return F.smooth_l1_loss(_lifted(student), standardised(teacher), reduction="none", beta=2.0).mean(-1)


def standardised(features: Tensor) -> Tensor:
    """Features [..., C] with mean 0 and variance 1 over the channels of each: LayerNorm without affine."""
    return F.layer_norm(_lifted(features), features.shape[-1:])


@compilable
def koleo(vectors: Tensor) -> Tensor:
    """KoLeo: spreads vectors evenly over the sphere (Sablayrolles et al. 2019, arXiv 1806.03198; DINOv2).

        d_n = min over m != n of || u_n - u_m ||      # u: unit vectors
        loss = - mean_n log d_n                       # Kozachenko-Leonenko: the entropy, but for constants

    Args:
        vectors: [..., N, D]. Of one vector the loss is 0: it has no neighbour.

    Returns:
        [...]
    """
    with torch.autocast(vectors.device.type, enabled=False):
        unit = _unit(vectors)
        if unit.shape[-2] < 2:
            return 0 * unit.sum((-2, -1))
        cosines = (unit @ unit.transpose(-2, -1)).detach()
        itself = torch.eye(unit.shape[-2], dtype=torch.bool, device=unit.device)
        nearest = cosines.masked_fill(itself, -2).argmax(-1)
        neighbours = unit.gather(-2, nearest[..., None].expand(unit.shape))
        distances: Tensor = torch.linalg.vector_norm(unit - neighbours, dim=-1)
        return -(distances + 1e-8).log().mean(-1)


@compilable
def gram(now: Tensor, start: Tensor) -> Tensor:
    """Mean squared change of the Gram matrix of an image's patches (DINOv3, Siméoni et al. 2025, section 4.2).

    Args:
        now, start: [..., h, w, D], of any widths.

    Returns:
        [...]
    """
    return (gram_matrix(now) - gram_matrix(start)).square().mean((-2, -1))


def agreement(now: Tensor, start: Tensor) -> Tensor:
    """Correlation of two Gram matrices of an image's patches, off the diagonal; 1: the same, 0: unrelated.

    Args:
        now, start: [..., h, w, D], of any widths, at least three patches.

    Returns:
        [...]
    """
    matrices = [gram_matrix(patches) for patches in (now, start)]
    count = matrices[0].shape[-1]
    rows, columns = torch.triu_indices(count, count, 1, device=now.device)
    a, b = (matrix[..., rows, columns] for matrix in matrices)
    return F.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1)


@compilable
def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414): do two maps relate patches alike?

        K = H S S^T H,  L = H T T^T H                 # Gram matrices, centred: H = I - 1 1^T / n
        result = sum(K L) / sqrt(sum(K K) sum(L L))   # HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)); products of entries

    It is 1 if one map is a rotation of the other, scaled or shifted, and at least 0. With few patches and many channels
    it is far above 0 for unrelated maps, too. A map whose patches are all alike has alignment 0.

    Args:
        student: [..., n, C] patches; teacher: [..., n, D], the same ones, of any width.

    Returns:
        [...]
    """
    with torch.autocast(student.device.type, enabled=False):
        centred = [_lifted(patches) - _lifted(patches).mean(-2, keepdim=True) for patches in (student, teacher)]
        of_student, of_teacher = ((x @ x.transpose(-2, -1)).flatten(-2) for x in centred)
        return F.cosine_similarity(of_student, of_teacher, dim=-1)


def gram_matrix(patches: Tensor) -> Tensor:
    """Cosine similarities [..., h * w, h * w] between all patches of [..., h, w, D]."""
    with torch.autocast(patches.device.type, enabled=False):
        unit = _unit(patches.flatten(-3, -2))
        return unit @ unit.transpose(-2, -1)


def entropy(probs: Tensor) -> Tensor:
    """A metric: entropy of probabilities [..., K] as shares of the largest possible, log K: [...]."""
    return -torch.xlogy(probs, probs).sum(-1) / math.log(probs.shape[-1])


def view_matching(students: Sequence[Tensor], teacher: Tensor) -> Tensor:
    """A metric: how well student and teacher outputs of two views of one image match, over views of other images.

    The cosine between the student's output for a view and the teacher's output for another view of the same image,
    minus the mean of the cosines with up to eight other images; mean over pairs of views. The mean vector over the
    batch is subtracted from both first.

    Args:
        students: [B, V, K] for each size of views. Global crops come first; these are the teacher's too.
        teacher: [B, G, K].

    Returns:
        [B]
    """
    target, gains = _centred(teacher), []
    for size, output in enumerate(students):
        student = _centred(output)
        pairs = pairs_of(size, student.shape[1], target.shape[1])
        cosines = [
            (student @ target.roll(shift, 0).transpose(-2, -1))[:, *pairs] for shift in range(min(len(target), 9))
        ]  # 0: the image itself, then up to eight others
        gains.append(cosines[0] - (torch.stack(cosines[1:]).mean(0) if cosines[1:] else 0))
    return torch.cat(gains, 1).mean(1)


def mutual_information(probs: Tensor) -> Tensor:
    """A metric: how much the teacher's prototype assignments depend on the image.

    The Kullback-Leibler divergence of an image's assignment from the mean assignment. Its mean over the batch is the
    mutual information of image and prototype. It is 0 if all images have the same assignment: a uniform one, or one
    prototype for all. These are the two ways to collapse (DINO, section 5.3).

    Args:
        probs: [B, G, K] probabilities.

    Returns:
        [B], as shares of the largest possible mean, log min(B, K); 0 for a batch of one image.
    """
    p = _lifted(probs).mean(1)  # [B, K]
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(-1) / math.log(max(2, min(p.shape)))


def _centred(vectors: Tensor) -> Tensor:
    """Unit vectors of [B, V, K] after the mean over all of them is subtracted, in float32 at least."""
    lifted = _lifted(vectors)
    return F.normalize(lifted - lifted.mean((0, 1)), dim=-1)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(_lifted(vectors), dim=-1)


def _lifted(values: Tensor) -> Tensor:
    """In float32 at least: half precisions lose too much in squares, exponentials and means."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
