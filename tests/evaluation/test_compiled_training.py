"""--compile in trainings of evaluations: the losses of the code as written, compiled once, and reasons where it does not."""

import functools

import pytest
import torch
from PIL import Image

from evaluating import coloured, labelled, make_context
from gtsa.cli.main import run
from gtsa.core import compilation
from gtsa.evaluation import evaluators
from gtsa.evaluation.evaluators.finetune import Finetune
from gtsa.evaluation.evaluators.linear import Linear
from gtsa.evaluation.evaluators.segmentation import Segmentation
from gtsa.models.backbone import Backbone
from gtsa.training import loop, supervised

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo
KINDS = [i % 4 for i in range(12)]
STEPS = 4
TRAININGS = {
    "linear": Linear(steps=STEPS, batch_size=6, resize=32, crop=32, blocks=(1, 2), learning_rates=(1e-2, 1e-1)),
    "finetune": Finetune(epochs=2, batch_size=6, resize=32, crop=32, warmup=1, learning_rate=1e-2),
    "segmentation": Segmentation(steps=STEPS, batch_size=4, size=32, learning_rate=1e-2, accumulate=2),
    "segmentation-fpn": Segmentation("fpn", steps=STEPS, batch_size=2, crop=32, learning_rate=1e-3),
}


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.utils.counters.clear()
    yield
    compilation.forget()


def data(name):
    images = coloured(KINDS)
    if name.startswith("segmentation"):
        return labelled(images, [torch.full((32, 32), kind) for kind in KINDS], "masks", "abcd")
    return labelled(images, KINDS, classes="abcd")


def train(monkeypatch, name, compile, backend="aot_eager"):
    """The losses of every step, and the number of graphs after it."""
    losses, graphs = [], []
    fit = loop.fit

    def watched(*arguments, **options):
        for done in fit(*arguments, **options):
            losses.append(float(done.parts["loss"]))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            yield done

    monkeypatch.setattr(loop, "compiling", functools.partial(compilation.compiling, backend=backend))
    monkeypatch.setattr(supervised, "fit", watched)
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", 32, arguments={"depth": 2, "embed_dim": 48, "num_heads": 3}).eval()
    TRAININGS[name](backbone, data(name), data(name), make_context(compile=compile, seed=1))
    monkeypatch.undo()
    return losses, graphs


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name.endswith("fpn") else ()) for name in TRAININGS]
)
def test_a_compiled_training_has_the_losses_of_the_code_as_written(monkeypatch, capsys, name, backend):
    expected, written = train(monkeypatch, name, "off")
    losses, graphs = train(monkeypatch, name, "on", backend)
    assert len(expected) == STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] != losses[0]
    assert set(written) == {0}
    assert graphs[0] > 0
    assert set(graphs[1:]) == {graphs[1]}  # nothing is compiled after the second step
    assert not torch._dynamo.utils.counters["graph_break"]
    assert "is not compiled" not in "".join(capsys.readouterr())


def test_auto_compiles_a_long_training_on_a_gpu():
    assert compilation.resolve("auto", True, 2_000) == (True, "pays from 2,000 steps on")
    assert compilation.resolve("auto", True, 1_999)[0] is False
    assert compilation.resolve("auto", False, 10**6) == (False, "pays on a GPU")
    assert compilation.resolve("on", False, 1)[0] is True
    assert compilation.resolve("off", True, 10**6)[0] is False


def test_every_evaluation_says_whether_its_training_is_compiled():
    compiled = {name for name, each in evaluators.load_all().items() if not each.not_compiled}
    assert compiled == {name.removesuffix("-fpn") for name in TRAININGS}


def test_the_command_line_compiles_what_trains_and_gives_the_reason_for_what_does_not(monkeypatch, tmp_path, capsys):
    for number, pixels in enumerate(coloured(KINDS)):
        folder = tmp_path / "abcd"[KINDS[number]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    compiled = []
    fit = supervised.fit

    def noted(*arguments, **options):
        compiled.append(options["compiled"])
        return fit(*arguments, **options)

    monkeypatch.setattr(loop, "compiling", functools.partial(compilation.compiling, backend="aot_eager"))
    monkeypatch.setattr(supervised, "fit", noted)
    command = ["evaluate", "random:test_vit", "--task", "knn", "linear", "--train", tmp_path, "--val", tmp_path]
    command += ["--linear.steps", "2", "--linear.crop", "32", "--linear.resize", "32", "--knn.crop", "32"]
    assert run([*map(str, command), "--compile", "on"]) == 0
    assert "knn: --compile has no effect, as nothing is trained" in capsys.readouterr().out
    assert run([*map(str, command)]) == 0
    assert compiled == [True, False]
    assert "--compile has no effect" not in capsys.readouterr().out
