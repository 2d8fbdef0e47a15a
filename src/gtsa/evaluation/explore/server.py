"""The explorer's page and its answers in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from gtsa.data.images.pixels import BadImage
from gtsa.evaluation.explore import similarity
from gtsa.evaluation.explore.extraction import Extraction
from gtsa.evaluation.explore.gallery import Images, Network
from gtsa.evaluation.explore.guard import Guard

PAGE = 12  # images a page of the gallery
SIDES = (320, 960)  # px of the long side of pictures: in the gallery, and above it
ASSETS = {  # path: package, file, content type
    "/": ("gtsa.evaluation.explore", "explore.html", "text/html"),
    "/explore.js": ("gtsa.evaluation.explore", "explore.js", "text/javascript"),
    "/explore.css": ("gtsa.evaluation.explore", "explore.css", "text/css"),
    "/page.css": ("gtsa.core", "page.css", "text/css"),
}


class BadRequest(Exception):
    """A request that the page does not make; the message says what is wrong."""


@dataclass(frozen=True)
class Choice:
    """The chosen patch of an image, after a rotation, by one of the networks."""

    network: Network
    image: int
    rotation: int
    upright: Tensor  # [h, w, D]
    rotated: Tensor  # [h, w, D] or [w, h, D]; ``upright`` without a rotation
    patch: similarity.Patch  # of the upright image
    query: Tensor  # [D], of the rotated image

    @property
    def rotated_patch(self) -> similarity.Patch:
        return similarity.rotated_patch(self.patch, _grid(self.upright), self.rotation)


class Explorer:
    """The answers of the server.

    Args:
        data: --data, for the page.
    """

    def __init__(self, images: Images, networks: Sequence[Network], extraction: Extraction, data: str) -> None:
        self.images, self.networks, self.extraction, self.data = images, networks, extraction, data

    def app(self, token: str, cookie: str) -> Guard:
        routes = [Route(path, _asset(*asset)) for path, asset in ASSETS.items()]
        answers = (self.session, self.progress, self.find, self.look, self.gallery)
        routes += [Route(f"/api/{answer.__name__}", answer) for answer in answers]
        routes += [Route("/image", self.image), Route("/favicon.ico", lambda request: Response(status_code=204))]
        handlers = {BadRequest: _refused(400), BadImage: _refused(422), OSError: _refused(500)}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), token, cookie)

    def session(self, request: Request) -> Response:
        """What is explored."""
        networks = [
            {
                "name": network.name,
                "model": network.backbone.model,
                "patch_size": network.backbone.patch_size,
                "embed_dim": network.backbone.embed_dim,
            }
            for network in self.networks
        ]
        return _json({"data": self.data, "size": self.networks[0].size, "networks": networks})

    def progress(self, request: Request) -> Response:
        """How many images have features, and which were left out."""
        left_out = [
            {"name": self.images.names[index], "reason": reason}
            for index, reason in sorted(self.images.left_out.items())
        ]
        return _json(
            {
                "images": len(self.images),
                "ready": [len(network.ready) for network in self.networks],
                "left_out": left_out,
                "finished": self.extraction.finished,
                "error": self.extraction.error,
            }
        )

    def find(self, request: Request) -> Response:
        """The image of a name, or the first one that can be read; and its neighbours in the order of names."""
        name = request.query_params.get("name")
        index = self.images.find(name) if name is not None else self._first()
        if index is None:
            return _json({"image": None, "name": None, "previous": None, "next": None})
        return _json(
            {
                "image": index,
                "name": self.images.names[index],
                "previous": self._next(range(index - 1, -1, -1)),
                "next": self._next(range(index + 1, len(self.images))),
            }
        )

    def _first(self) -> int | None:
        """The first image that can be read."""
        for index in range(len(self.images)):
            with suppress(BadImage):
                self.images.read(index, 1)
                return index
        return None

    def _next(self, candidates: Iterable[int]) -> str | None:
        """The name of the first of some images that is not known to be bad."""
        return next((self.images.names[index] for index in candidates if index not in self.images.left_out), None)

    def image(self, request: Request) -> Response:
        """A JPEG of an image."""
        side = _number(request, "side")
        if side not in SIDES:
            raise BadRequest(f"side: one of {SIDES}")
        picture = self.images.picture(self._image(request), _number(request, "rotation", 4), side)
        return Response(picture, media_type="image/jpeg")

    def look(self, request: Request) -> Response:
        """The similarity of the image's patches with the chosen one, and what a rotation changes."""
        choice = self._choice(request)
        answer: dict[str, object] = {
            "image": choice.image,
            "name": self.images.names[choice.image],
            "patch": choice.patch,
            "upright": _map(similarity.similarity_map(choice.upright, choice.upright[choice.patch])),
            "rotated": None,
        }
        if choice.rotation:
            follows = similarity.equivariance(choice.upright, choice.rotated, choice.rotation, choice.patch)
            answer["rotated"] = {
                "patch": choice.rotated_patch,
                "map": _map(similarity.similarity_map(choice.rotated, choice.query)),
                "against_upright": _map(similarity.similarity_map(choice.rotated, choice.upright[choice.patch])),
                "same_place": _map(follows.same_place),
                "here": _rounded(follows.here),
                "mean": _rounded(follows.mean),
                "elsewhere": _rounded(follows.elsewhere),
                "found_again": _rounded(follows.found_again),
                "agreement": None if follows.agreement is None else _rounded(follows.agreement),
            }
        return _json(answer)

    def gallery(self, request: Request) -> Response:
        """A page of images, nearest first or by name, with similarities or with PCA colours."""
        choice, pca = self._choice(request), _one_of(request, "show", ("similarity", "pca")) == "pca"
        word, page = request.query_params.get("filter", "").lower(), max(0, _number(request, "page"))
        ready = [index for index in sorted(choice.network.ready) if word in self.images.names[index].lower()]
        ranks = page * PAGE, (page + 1) * PAGE
        if nearest := _one_of(request, "order", ("nearest", "name")) == "nearest":
            ready = [index for index in ready if index != choice.image]
            numbers = choice.network.nearest(choice.query, ready, *ranks)
        else:
            numbers = ready[slice(*ranks)]
        shown = [(index, choice.network.patches(index)) for index in numbers]
        tiles = [self._tile(index, patches, choice, with_map=not pca) for index, patches in shown]
        answer: dict[str, object] = {"tiles": tiles, "images": len(ready), "page": page, "nearest": nearest}
        answer["pages"] = -(-len(ready) // PAGE)
        if pca:
            maps = [choice.upright, *([choice.rotated] if choice.rotation else []), *(patches for _, patches in shown)]
            colours, share = _colours(maps)
            answer["variance"] = share
            answer["upright"] = colours.pop(0)
            answer["rotated"] = colours.pop(0) if choice.rotation else None
            for tile, values in zip(tiles, colours, strict=True):
                tile["colours"] = values
        return _json(answer)

    def _tile(self, index: int, patches: Tensor, choice: Choice, with_map: bool) -> dict[str, object]:
        values = similarity.similarity_map(patches, choice.query)
        best = divmod(int(values.argmax()), values.shape[1])
        tile = {"image": index, "name": self.images.names[index], "grid": _grid(patches), "best": best}
        return {**tile, "similarity": _rounded(float(values.max())), **({"map": _map(values)} if with_map else {})}

    def _choice(self, request: Request) -> Choice:
        """The choice in a request. Raises BadRequest, BadImage."""
        network = self.networks[_number(request, "network", len(self.networks))]
        index, rotation = self._image(request), _number(request, "rotation", 4)
        upright = network.patches(index)
        y, x = (_fraction(request, name) for name in ("y", "x"))
        patch = similarity.patch_at(y, x, _grid(upright))
        rotated = network.patches(index, rotation) if rotation else upright
        query = rotated[similarity.rotated_patch(patch, _grid(upright), rotation)].float()
        return Choice(network, index, rotation, upright, rotated, patch, query)

    def _image(self, request: Request) -> int:
        return _number(request, "image", len(self.images))


def _colours(maps: Sequence[Tensor]) -> tuple[list[list[list[list[int]]]], float]:
    """Colours 0 to 255 of each map [h, w, D], by components that all maps share; the components' share of variance."""
    colours, share = similarity.principal_colours(torch.cat([features.flatten(0, 1) for features in maps]))
    values = (colours * 255).round().int()
    parts, first = [], 0
    for height, width in map(_grid, maps):
        parts.append(values[first : first + height * width].reshape(height, width, 3).tolist())
        first += height * width
    return parts, _rounded(share)


def _grid(patches: Tensor) -> tuple[int, int]:
    return patches.shape[0], patches.shape[1]


def _map(values: Tensor) -> list[list[float]]:
    return [[_rounded(value) for value in row] for row in values.tolist()]


def _rounded(value: float) -> float:
    return round(value, 5)


def _json(content: Mapping[str, object]) -> Response:
    return Response(json.dumps(content), media_type="application/json")


def _asset(package: str, name: str, kind: str) -> Callable[[Request], Response]:
    content = files(package).joinpath(name).read_bytes()
    return lambda request: Response(content, media_type=kind)


def _refused(code: int) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        return Response(json.dumps({"error": str(error)}), code, media_type="application/json")

    return answer


# Parts of a request


def _number(request: Request, name: str, limit: int = 2**31) -> int:
    """A number from 0 to below ``limit``."""
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) < limit):
        raise BadRequest(f"{name}: a number from 0 to {limit - 1} is needed")
    return int(text)


def _fraction(request: Request, name: str) -> float:
    try:
        value = float(request.query_params.get(name, "0.5"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise BadRequest(f"{name}: a number from 0 to 1 is needed")
    return value


def _one_of(request: Request, name: str, values: Sequence[str]) -> str:
    value = request.query_params.get(name, values[0])
    if value not in values:
        raise BadRequest(f"{name}: one of {', '.join(values)} is needed")
    return value
