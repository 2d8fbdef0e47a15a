"""gtsa explore: what its server answers, against own computations; who gets an answer; what is kept."""

import math
import shutil
import signal
import socket

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr

from conftest import make_scenes, run, scene
from exploring import Server, explorer
from forking import Forked, command_line
from gtsa import explore
from gtsa.data.sources import open_source
from gtsa.evaluation.explore import extraction, requirements, similarity
from gtsa.evaluation.explore.extraction import Extraction
from gtsa.evaluation.explore.gallery import Images, Network, Recent, grid_of
from gtsa.evaluation.explore.similarity import exact_ranks
from gtsa.evaluation.feature_cache import FeatureCache, FileDigests
from gtsa.models.export import write
from gtsa.models.weights import load_backbone

SIZE = 96
ODD = "<b onclick=alert(1)>&amp; 'x'.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = make_scenes(tmp_path_factory.mktemp("explored") / "images", 14)
    scene(50, 60, 90).save(place / ODD)
    (place / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return place


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("features")
    with explorer("random:test_vit", "--data", folder, "--size", SIZE, "--cache", cache) as started:
        started.finish()
        started.cache = cache
        yield started


@pytest.fixture(scope="module")
def features(folder):
    """Unit vectors by file name, by timm's own network: [h, w, D], after each rotation."""
    ours, _ = load_backbone("random:test_vit")
    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, img_size=224)
    vit.load_state_dict(ours.vit.state_dict())
    vit.eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in ours.normalisation)
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name == "broken.jpg":
            continue
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        h, w = pixels.shape[1:]
        rows, columns = round(h * SIZE / max(h, w) / 16), round(w * SIZE / max(h, w) / 16)
        small = F.interpolate(pixels[None], (rows * 16, columns * 16), mode="bicubic", antialias=True)
        for k in range(4):
            x = torch.rot90((small / 255 - mean) / std, k, (2, 3))
            with torch.no_grad():
                tokens = vit.forward_features(x)[0, vit.num_prefix_tokens :]
            found[path.name, k] = F.normalize(tokens, dim=-1).reshape(x.shape[2] // 16, x.shape[3] // 16, -1)
    return found


def index_of(server, name):
    return server.ask("find", name=name)["image"]


def test_the_similarities_are_those_of_the_network(server, features):
    for name in ("scene_03.png", ODD):
        mine = features[name, 0]
        rows, columns = mine.shape[:2]
        for row, column in ((0, 0), (1, 3), (rows - 1, columns - 1)):
            look = server.ask("look", image=index_of(server, name), y=(row + 0.5) / rows, x=(column + 0.5) / columns)
            assert look["name"] == name and look["patch"] == [row, column] and look["rotated"] is None
            expected = torch.einsum("hwd,d->hw", mine, mine[row, column]).numpy()
            values = np.array(look["upright"])
            assert values == pytest.approx(expected, abs=3e-3)
            assert np.unravel_index(values.argmax(), values.shape) == (row, column)


@pytest.mark.parametrize("rotation", [1, 2, 3])
def test_a_rotation_is_compared_place_by_place(server, features, rotation):
    upright, rotated = (features["scene_04.jpg", k].double() for k in (0, rotation))
    rows, columns = upright.shape[:2]
    answer = server.ask(
        "look", image=index_of(server, "scene_04.jpg"), y=1.5 / rows, x=2.5 / columns, rotation=rotation
    )
    numbers = np.rot90(np.arange(rows * columns).reshape(rows, columns), rotation)  # where each patch went
    where = {int(number): place for place, number in np.ndenumerate(numbers)}
    follows, there = answer["rotated"], where[1 * columns + 2]
    assert tuple(follows["patch"]) == there
    assert np.array(follows["map"]) == pytest.approx((rotated @ rotated[there]).numpy(), abs=3e-3)
    assert np.array(follows["against_upright"]) == pytest.approx((rotated @ upright[1, 2]).numpy(), abs=3e-3)
    same = [float(upright.reshape(-1, upright.shape[-1])[n] @ rotated[place]) for n, place in sorted(where.items())]
    for n, place in where.items():
        assert follows["same_place"][place[0]][place[1]] == pytest.approx(same[n], abs=3e-3)
    assert follows["mean"] == pytest.approx(np.mean(same), abs=3e-3)
    assert follows["here"] == pytest.approx(same[columns + 2], abs=3e-3)
    pairs = upright.reshape(rows * columns, -1) @ rotated.reshape(rows * columns, -1).T
    others = (pairs.sum() - sum(same)) / (pairs.numel() - len(same))
    assert follows["elsewhere"] == pytest.approx(float(others), abs=3e-3)
    maps = (upright @ upright[1, 2]).flatten(), [float(rotated[where[n]] @ rotated[there]) for n in range(len(same))]
    assert follows["agreement"] == pytest.approx(np.corrcoef(*map(np.asarray, maps))[0, 1], abs=3e-3)


def test_the_nearest_images_are_those_with_the_nearest_patch(server, features):
    query = features["scene_05.png", 0][2, 2]
    best = {name: float((value @ query).max()) for (name, k), value in features.items() if k == 0}
    del best["scene_05.png"]
    rows, columns = features["scene_05.png", 0].shape[:2]
    given = {"image": index_of(server, "scene_05.png"), "y": 2.5 / rows, "x": 2.5 / columns}
    pages = [server.ask("gallery", **given, page=page) for page in (0, 1)]
    tiles = [tile for page in pages for tile in page["tiles"]]
    assert pages[0]["images"] == len(best) == len(tiles) and pages[0]["pages"] == 2
    assert {tile["name"] for tile in tiles} == set(best)
    for tile in tiles:
        values = (features[tile["name"], 0] @ query).numpy()
        assert np.array(tile["map"]) == pytest.approx(values, abs=3e-3)
        assert tile["similarity"] == pytest.approx(best[tile["name"]], abs=3e-3)
        assert tile["map"][tile["best"][0]][tile["best"][1]] == tile["similarity"] == np.max(tile["map"])
    similarities = [tile["similarity"] for tile in tiles]
    assert similarities == sorted(similarities, reverse=True)


def test_images_by_name_and_by_a_part_of_the_name(server, features):
    names = sorted({name for name, _ in features}, key=lambda name: name.encode())
    tiles = server.ask("gallery", order="name")["tiles"]
    assert [tile["name"] for tile in tiles] == names[:12]
    assert [tile["name"] for tile in server.ask("gallery", order="name", filter="ONCLICK")["tiles"]] == [ODD]
    assert server.ask("gallery", filter="no such")["tiles"] == []


def test_pca_colours_share_their_components(server, features):
    answer = server.ask("gallery", order="name", show="pca", image=index_of(server, "scene_00.jpg"), rotation=1)
    shown = [features["scene_00.jpg", 0], features["scene_00.jpg", 1]]
    shown += [features[tile["name"], 0] for tile in answer["tiles"]]
    rows = np.concatenate([one.reshape(-1, one.shape[-1]).numpy() for one in shown]).astype(float)
    centred = rows - rows.mean(0)
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    assert answer["variance"] == pytest.approx(variances[:3].sum() / variances.sum(), abs=3e-3)
    scores = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
    maps = [answer["upright"], answer["rotated"], *(tile["colours"] for tile in answer["tiles"])]
    colours = np.concatenate([np.array(one).reshape(-1, 3) for one in maps])
    assert [np.array(one).shape[:2] for one in maps] == [one.shape[:2] for one in shown]
    inside = ((colours > 0) & (colours < 255)).all(1)
    lab = oklab(colours[inside] / 255)
    for axis in range(3):  # lightness, green to red, blue to yellow
        assert abs(spearmanr(lab[:, axis], scores[inside, axis]).statistic) > 0.98


def oklab(srgb):
    """OKLab of colours [n, 3] in [0, 1], by the published matrices (B. Ottosson, 2020)."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.transpose(to_lms)) @ np.transpose(to_lab)


def test_a_picture_is_the_whole_image_rotated(server, folder):
    import io

    index = index_of(server, "scene_01.png")
    for rotation, size in ((0, (96, 72)), (1, (72, 96)), (2, (96, 72))):
        status, headers, content = server.get("/image", token=server.token, image=index, rotation=rotation, side=320)
        assert status == 200 and headers["content-type"] == "image/jpeg"
        picture = Image.open(io.BytesIO(content))
        assert picture.size == size
        expected = np.rot90(np.array(Image.open(folder / "scene_01.png")), rotation)
        assert np.abs(np.array(picture, float) - expected).mean() < 8


def test_a_bad_file_is_named_on_the_page_and_in_the_terminal(server):
    progress = server.ask("progress")
    assert [entry["name"] for entry in progress["left_out"]] == ["broken.jpg"]
    assert progress["left_out"][0]["reason"]
    assert any("broken.jpg" in line and "left out" in line for line in server.output.splitlines())
    status, _, content = server.get("/api/look", token=server.token, image=index_of(server, "broken.jpg"))
    assert status == 422 and b"broken.jpg" in content
    assert progress["ready"] == [15] and progress["images"] == 16


# Who gets an answer


def test_only_the_token_opens_the_page(server):
    assert server.get("/")[0] == server.get("/api/session")[0] == server.get("/explore.js")[0] == 403
    assert server.get("/", token="x")[0] == server.get("/api/session", token=f"{server.token}x")[0] == 403
    assert server.get("/", token="\u00e9")[0] == server.get("/api/session", cookie="gtsa-1=\u0001; ;=")[0] == 403
    status, headers, _ = server.get("/", token=server.token)
    assert status == 303 and headers["location"] == "/"
    assert "HttpOnly" in headers["set-cookie"] and "samesite=lax" in headers["set-cookie"].lower()
    cookie = headers["set-cookie"].split(";")[0]
    assert server.get("/", cookie=cookie)[0] == server.get("/api/session", cookie=cookie)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost@evil:1"])
def test_another_host_is_refused(server, host):
    assert server.get("/", host=host, token=server.token)[0] == 403
    assert server.get("/api/session", host=host, token=server.token)[0] == 403


def test_a_forwarded_port_is_accepted(server):
    for host in ("localhost:9000", "127.0.0.1:9000", "localhost", "[::1]:9000"):
        assert server.get("/api/session", host=host, token=server.token)[0] == 200


def test_headers_keep_the_page_to_itself(server):
    for path in ("/", "/api/session", "/explore.js", "/nowhere"):
        _, headers, _ = server.get(path, token=server.token)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"] and headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/api/look", {"image": 16}),
        ("/api/look", {"image": -1}),
        ("/api/look", {"image": "9" * 5000}),
        ("/api/look", {"image": "\u0663"}),
        ("/api/look", {"y": "nan"}),
        ("/api/look", {"x": 1.01}),
        ("/api/look", {"network": 1}),
        ("/api/look", {"rotation": 4}),
        ("/api/gallery", {"order": "size"}),
        ("/image", {"side": 5000}),
    ],
)
def test_a_wrong_request_is_refused(server, path, query):
    status, _, content = server.get(path, token=server.token, **query)
    assert status == 400 and b"error" in content


# What is kept


def test_ctrl_c_ends_it_and_the_next_start_continues(server, folder, tmp_path):
    cache = shutil.copytree(server.cache, tmp_path / "cache")
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    shards = [file for file in before if file.suffix == ".safetensors"]
    assert shards
    with explorer("random:test_vit", "--data", folder, "--size", SIZE, "--cache", cache) as again:
        assert again.finish()["ready"] == [15]
        assert again.port != server.port and str(cache) in again.output
        code, error = again.stop()
    assert code == 130 and "the same command continues" in error and "Traceback" not in error
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == before


def network_of(images, folder):
    backbone, _ = load_backbone("random:test_vit")
    return Network(images, backbone, "random", FeatureCache(folder), SIZE, torch.device("cpu"))


def test_a_stopped_extraction_continues_with_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "COMMIT", 0.0)
    digests = FileDigests(tmp_path / "files.json")
    images = Images(open_source(str(folder)), digests, "")
    first = network_of(images, tmp_path / "cache")
    begun, compute, computed = Extraction(images, [first], digests), first.compute, []

    def count_and_stop(pixels, urgent=False):
        computed.append(len(pixels))
        begun._stopping.set()
        return compute(pixels, urgent)

    monkeypatch.setattr(first, "compute", count_and_stop)
    begun.start()
    begun.join()
    assert not begun.finished and 0 < len(first.ready) == sum(computed) < 15

    again = network_of(Images(open_source(str(folder)), FileDigests(tmp_path / "files.json"), ""), tmp_path / "cache")
    rest, later = Extraction(again.images, [again], digests), []
    compute_again = again.compute
    monkeypatch.setattr(
        again, "compute", lambda pixels, urgent=False: (later.append(len(pixels)), compute_again(pixels))[1]
    )
    rest.start()
    rest.join()
    assert rest.finished and sorted(again.ready) == [i for i in range(16) if again.images.names[i] != "broken.jpg"]
    assert sum(later) == 15 - sum(computed)


def test_features_are_searched_once_before_the_user_does(folder, tmp_path, monkeypatch):
    digests = FileDigests(tmp_path / "files.json")
    images = Images(open_source(str(folder)), digests, "")
    network, searched = network_of(images, tmp_path / "cache"), []
    maxima = network.cache.maxima
    monkeypatch.setattr(network.cache, "maxima", lambda query, names: (searched.append(names), maxima(query, names))[1])
    work = Extraction(images, [network], digests)
    work.start()
    work.join()
    assert work.finished and [len(set(names)) for names in searched] == [15]


def test_a_full_disk_ends_the_extraction_and_not_the_page(folder, tmp_path, monkeypatch, capsys):
    digests = FileDigests(tmp_path / "files.json")
    images = Images(open_source(str(folder)), digests, "")
    network = network_of(images, tmp_path / "cache")

    def full(features):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(network.cache, "add", full)
    work = Extraction(images, [network], digests)
    work.start()
    work.join()
    assert not work.finished and "No space left on device" in work.error
    assert "No space left" in capsys.readouterr().out
    assert network.patches(3).shape[-1] == 64  # a click still computes


# Pure functions


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.data())
def test_a_patch_goes_where_the_image_goes(rows, columns, rotation, data):
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    grid = torch.zeros(rows, columns)
    grid[row, column] = 1
    expected = tuple(torch.rot90(grid, rotation).nonzero()[0].tolist())
    assert similarity.rotated_patch((row, column), (rows, columns), rotation) == expected


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 40), st.integers(1, 40))
def test_every_point_lies_in_its_patch(y, x, rows, columns):
    row, column = similarity.patch_at(y, x, (rows, columns))
    assert 0 <= row < rows and 0 <= column < columns
    assert row <= y * rows <= row + 1 and column <= x * columns <= column + 1


def test_features_that_follow_the_image_are_equivariant():
    upright = F.normalize(torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    follows = similarity.equivariance(upright, torch.rot90(upright, 1, (0, 1)), 1, (2, 1))
    assert follows.here == pytest.approx(1) and follows.mean == pytest.approx(1)
    assert follows.found_again == 1 and follows.agreement == pytest.approx(1)
    assert follows.same_place.shape == (5, 3) and follows.elsewhere < 0.5


def test_a_flat_map_has_no_correlation():
    flat = F.normalize(torch.ones(2, 2, 4), dim=-1)
    assert similarity.equivariance(flat, flat, 2, (0, 0)).agreement is None
    colours, share = similarity.principal_colours(flat.flatten(0, 1))
    assert torch.isfinite(colours).all() and math.isfinite(share)


@given(st.integers(16, 5000), st.integers(16, 5000), st.integers(32, 1024), st.sampled_from([8, 14, 16]))
def test_the_aspect_is_kept_up_to_half_a_patch(height, width, size, patch):
    rows, columns = grid_of(height, width, size, patch)
    scale = size / max(height, width)
    for count, side in ((rows, height), (columns, width)):
        assert count == 1 or abs(count * patch - side * scale) <= patch / 2 + 1e-6


def test_what_was_used_last_is_kept():
    made, recent = [], Recent(3)

    def get(key):
        return recent.get(key, lambda: made.append(key) or key)

    assert [get(key) for key in (1, 2, 3, 1, 4, 1, 2)] == [1, 2, 3, 1, 4, 1, 2]
    assert made == [1, 2, 3, 4, 2]


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(0, 20), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    first=st.integers(0, 30),
    count=st.integers(1, 12),
    error=st.sampled_from([0.0, 0.4, 1.5, 6.0]),
)
def test_ranks_are_exact_though_values_are_not(values, seed, first, count, error):
    """The oracle sorts the exact values. Ties keep the order of their places."""
    exact = np.array(values, float)
    approximate = exact + 0.99 * error * np.random.default_rng(seed).uniform(-1, 1, len(values))
    computed = []
    ranks = exact_ranks(
        approximate, np.full(len(values), error), lambda n: computed.append(n) or exact[n], first, first + count
    )
    assert ranks == sorted(range(len(values)), key=lambda n: (-values[n], n))[first : first + count]
    assert len(computed) == len(set(computed))


def test_few_exact_values_are_needed():
    values, computed = np.linspace(1, 0, 1000), []
    ranks = exact_ranks(values, np.full(1000, 5e-4), lambda n: computed.append(n) or float(values[n]), 12, 24)
    assert ranks == list(range(12, 24)) and len(computed) < 20


def test_ranks_are_exact_on_a_machine_that_computes_worse_than_expected():
    exact = np.array([3.0, 2.0, 1.0, 0.0])
    assert exact_ranks(np.array([0.0, 2.0, 1.5, 3.0]), np.full(4, 0.1), lambda n: exact[n], 0, 2) == [0, 1]


def _in_background(arguments):
    """The command line as a shell starts it with &: Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return command_line(arguments)


@pytest.mark.parametrize(
    ("work", "number", "code"),
    [(_in_background, signal.SIGINT, 0), (_in_background, signal.SIGTERM, 143), (command_line, signal.SIGTERM, 143)],
)
def test_one_line_says_that_it_has_stopped(folder, tmp_path, work, number, code):
    given = "explore", "random:test_vit", "--data", folder, "--size", SIZE, "--cache", tmp_path, "--no-browser"
    server = Server(Forked(work, [str(value) for value in given]))
    server.finish()
    server.process.send_signal(number)
    out, error = server.process.communicate()
    lines = [line for line in (out + error).splitlines() if "stopped" in line]
    assert (server.process.returncode, len(lines)) == (code, 1), (out, error)
    assert "the same command continues with the features that were computed" in lines[0]


# Wrong input


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--port", 0), 2, "--port 0: give a number from 1 to 65535"),
        (("--size", 5), 2, "--size 5: give a long side from 32 to 4096 px"),
        (("--against", "nowhere"), 4, "nowhere: no weights there"),
        (("--range16", 9, 3), 2, "black must be below white"),
        (("--cache", __file__), 6, "give another folder with --cache"),
    ],
)
def test_wrong_input_is_answered_with_a_sentence(folder, flags, code, words):
    got, _, error = run("explore", "random:test_vit", "--data", folder, "--no-browser", *flags)
    assert (got, words in error) == (code, True), error


def test_a_busy_port(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, error = run("explore", "random:test_vit", "--data", folder, "--port", port)
    assert code == 6 and f"--port {port}: it is in use by another program" in error


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    code, _, error = run("explore", "random:test_vit", "--data", tmp_path)
    assert code == 3 and "no images (it holds 1 .txt)" in error


def test_the_range_of_16_bits_is_that_of_the_weights(tmp_path, monkeypatch, capsys):
    for number, range16 in enumerate([(0, 4095), (0, 65535)]):
        backbone, _ = load_backbone("random:test_vit")
        backbone.range16 = range16
        write(backbone, tmp_path / f"w{number}")
    scene(1).save(tmp_path / "w0" / "scene.png")
    served = []
    monkeypatch.setattr("gtsa.evaluation.explore.explore._serve", lambda _, extraction, *__: served.append(extraction))
    arguments = str(tmp_path / "w0"), str(tmp_path / "w0")
    explore(*arguments, against=str(tmp_path / "w1"), cache=tmp_path / "cache")
    assert "16-bit images are read with --range16 0 4095 for all weights" in capsys.readouterr().out
    explore(*arguments, range16=(0, 1023), cache=tmp_path / "cache")
    assert [extraction.images.source.range16 for extraction in served] == [(0, 4095), (0, 1023)]


def test_a_missing_library(folder, monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    code, _, error = run("explore", "random:test_vit", "--data", folder)
    assert code == 6 and "pip install 'gtsa[explore]'" in error
