"""gtsa explore: a local page that shows the features of patches."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from gtsa.core.errors import UserError
from gtsa.core.files import cache_folder
from gtsa.core.terminal import doing, gib, say
from gtsa.data.images.pixels import Range
from gtsa.data.scan import open_images
from gtsa.data.sources import Selection, check_range16
from gtsa.evaluation.explore.extraction import Extraction
from gtsa.evaluation.explore.gallery import Images, Network
from gtsa.evaluation.explore.requirements import PORT, check_arguments
from gtsa.evaluation.feature_cache import FeatureCache, FileDigests
from gtsa.models.backbone import Backbone
from gtsa.models.formats import weights_path
from gtsa.models.weights import load_backbone
from gtsa.training import threads
from gtsa.training.digest import digest_of

PORTS = 20  # tried after the usual one
FORMAT = 1  # of cached features; raised when they are computed in another way


@threads.considerate()
def explore(
    weights: str | os.PathLike[str],
    data: object,
    *,
    against: str | os.PathLike[str] | None = None,
    size: int = 224,
    cache: str | os.PathLike[str] | None = None,
    port: int | None = None,
    browser: bool = True,
    model: str | None = None,
    against_model: str | None = None,
    network: Literal["teacher", "student"] = "teacher",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    range16: Range | None = None,
    data_root: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow_links: bool = False,
) -> None:
    """Serves a page on this machine that shows what the features of patches are similar to. Returns when it is stopped.

    Features of all images are computed while the page is in use, and kept in a cache on disk.

    Args:
        weights: a run, an export, or any other weights that ``gtsa evaluate`` accepts.
        data: folder, list file, or in Python any torch Dataset of images.
        against: further weights, shown beside the first.
        size: long side of the images for the network, px. The whole image is used; its aspect is kept up to half a
            patch.
        cache: folder for features; default: ``gtsa/features`` in the user's cache folder. To free the space, remove it.
        port: of the page; default: the first free one from 8765 on.
        browser: open the page in a browser, if there is a display.
        model, against_model: timm's name of the model, if the weights do not name it.
        network: the teacher (as evaluated) or the student, if the weights hold both.
        device: where features are computed; auto: the GPU if there is one.
        range16: values of 16-bit images that become black and white; None: as in the training of ``weights``.
        data_root: for list files: the folder that paths are relative to.
        include: patterns of paths below the folder; other images are left out.
        exclude: patterns of paths below the folder that are left out.
        follow_links: follow symbolic links that lead out of the folder.

    Raises:
        UserError: no images (3); weights (4); a missing library, a busy port, a folder that cannot be written (6).
    """
    specs = [weights_path(weights), *([] if against is None else [weights_path(against, "against")])]
    check_arguments(size, port)
    check_range16(range16)
    target = _device(device)
    folder = Path(cache) if cache is not None else cache_folder() / "features"
    digests = FileDigests(folder / f"files-{digest_of(os.path.abspath(str(data)))[:16]}.json")
    with _listening(port) as listener:
        opened = [_load(spec, network, name) for spec, name in zip(specs, (model, against_model), strict=False)]
        black, white = opened[0][1].range16 if range16 is None else range16
        if any((black, white) != backbone.range16 for _, backbone in opened):
            say(f"16-bit images are read with --range16 {black:g} {white:g} for all weights")
        source = open_images(data, Selection((black, white), data_root, include, exclude, follow_links))
        images = Images(source, digests, salt=f"{black:g} {white:g}")
        networks = [
            Network(images, backbone, name, _open_cache(folder / _key(backbone, size)), size, target)
            for name, backbone in opened
        ]
        _show_cache(folder, networks, len(images))
        extraction = Extraction(images, networks, digests)
        _serve(listener, extraction, str(data), browser)


def _device(device: str) -> torch.device:
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UserError("--device cuda: no GPU is visible to PyTorch; leave it at auto, or repair the driver", 6)
    return torch.device("cuda" if gpu and device != "cpu" else "cpu")


def _load(weights: str, network: str, model: str | None) -> tuple[str, Backbone]:
    """The name of weights for the page, and the backbone."""
    backbone, description = load_backbone(weights, network, model)
    say(description)
    return weights if network == "teacher" else f"{weights} ({network})", backbone


def _key(backbone: Backbone, size: int) -> str:
    """The folder of the features of a network at a size: of everything that changes them."""
    what = (backbone.fingerprint, backbone.arguments, backbone.normalisation, backbone.num_prefix_tokens, size, FORMAT)
    return f"{backbone.model}-{size}px-{digest_of(*what)[:16]}"


def _open_cache(folder: Path) -> FeatureCache:
    try:
        cache = FeatureCache(folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; give another folder with --cache", 6) from None
    for name in cache.removed:
        say(f"{folder / name} was damaged and has been removed; its features are computed again")
    return cache


def _show_cache(folder: Path, networks: Sequence[Network], images: int) -> None:
    most = sum(2 * images * (one.size // one.backbone.patch_size) ** 2 * one.backbone.embed_dim for one in networks)
    held = sum(file.stat().st_size for one in networks for file in one.cache.folder.iterdir())
    say(f"features of {images:,} images: at most {gib(most)} in {folder}, {gib(held)} of these are computed.")
    say("To free the space, remove this folder: features are then computed again.")


def _listening(port: int | None) -> socket.socket:
    """A socket on the loopback device. Raises UserError (6) if the port cannot be used."""
    problem = ""
    for number in range(PORT, PORT + PORTS) if port is None else [port]:
        listener = socket.socket()
        try:
            if sys.platform != "win32":  # there it would share a busy port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", number))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            busy = error.errno == errno.EADDRINUSE
            problem = "it is in use by another program" if busy else error.strerror or str(error)
    where = f"--port {port}" if port is not None else f"ports {PORT} to {PORT + PORTS - 1}"
    raise UserError(f"{where}: {problem}; give another one with --port, or leave it out", 6)


def _serve(listener: socket.socket, extraction: Extraction, data: str, browser: bool) -> None:
    """Serves the page until a signal ends it. Features that were computed by then are kept."""
    import uvicorn

    from gtsa.evaluation.explore.server import Explorer

    port = listener.getsockname()[1]
    token = secrets.token_urlsafe(24)
    app = Explorer(extraction.images, extraction.networks, extraction, data).app(token, f"gtsa-{port}")
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/?token={token}"
    extraction.start()
    try:
        say(f"{address}\nOpen this address in a browser on this machine. Ctrl-C ends gtsa explore.")
        if browser and _has_display():
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        with doing("keeping the features that were computed", log=False):
            extraction.stop()
    # Elsewhere uvicorn has raised the signal again. Here it was ignored, as a shell does for a job in the background.
    say("explore: stopped; the same command continues with the features that were computed")


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
