"""A command begins without what it does not need: seen in sys.modules, not on a clock (benchmarks/start.py has that)."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gtsa
from conftest import run
from gtsa import methods
from gtsa.cli import main
from gtsa.cli.examples import EXAMPLES
from gtsa.core import plugins
from gtsa.core.plugins import REQUIRED, declared
from gtsa.data.views.multicrop import MultiCrop
from gtsa.evaluation import evaluators
from gtsa.pretraining.settings import MULTICROP

HEAVY = ("torch", "timm", "torchvision", "numpy", "scipy", "sklearn", "PIL", "lightning_fabric", "tensorboard")
QUICK = {  # command line: exit code, and words that it answers with
    (): (0, "Usage: gtsa COMMAND"),
    ("--help",): (0, "pretrain"),
    ("--version",): (0, gtsa.__version__),
    ("pretrian",): (2, 'Did you mean "pretrain"?'),
    ("pretrain", "--epoch", "3"): (2, "Did you mean --epochs?"),
    ("pretrain", "--help"): (0, "--dino.teacher-temp"),
    ("evaluate", "--help"): (0, "--segmentation.steps"),
    ("compare", "--help"): (0, "gtsa-no-rotation"),
    ("export", "--help"): (0, "--network"),
    ("methods",): (0, "iBOT"),
    ("completion", "bash"): (0, "complete -F"),
    ("completion", "zsh"): (0, "#compdef gtsa"),
    ("completion", "fish"): (0, "complete -c gtsa"),
    ("completion", "tcsh"): (2, "bash"),
    ("pretrain", "--batch-size", "0", "--out", "run"): (2, "batch_size: 0"),
    ("pretrain", "--method", "simclr", "--out", "run"): (2, "choose from dino, "),
    ("pretrain", "--data", "nowhere", "--out", "run"): (3, "--data nowhere: there is no such folder"),
    ("pretrain", "--init", "nowhere", "--data", ".", "--out", "run"): (4, "nowhere: no weights there"),
    ("pretrain", "--print-config", "--method", "mae"): (0, "final_weight_decay: 0.05"),
    ("evaluate", "nowhere", "--task", "health", "--val", "."): (4, "nowhere: no weights there"),
    ("evaluate", "random:test_vit", "--task", "knn", "--train", ".", "--val", "void"): (3, "void: there is no such"),
    ("compare", "--data", "nowhere", "--out", "o", "--train", ".", ".", "--folds", "3"): (3, "--data nowhere"),
    ("check", "nowhere"): (3, "--data nowhere"),
    ("preview", "nowhere"): (3, "--data nowhere"),
    ("report", "--help"): (0, "--no-images"),
    ("report", "nowhere"): (2, "nowhere: there is no such folder"),
    ("explore", "--help"): (0, "To free the space, remove it"),
    ("explore", "nowhere", "--data", "."): (4, "nowhere: no weights there"),
    ("explore", "random:test_vit", "--data", "nowhere"): (3, "--data nowhere"),
    ("explore", "random:test_vit", "--data", ".", "--port", "70000"): (2, "--port 70000"),
    ("explore", "random:test_vit"): (2, "--data"),
    ("export", "nowhere", "--out", "o"): (4, "nowhere: no weights there"),
    ("embed", "--help"): (0, "--shard-size"),
    ("embed", "nowhere", "--data", ".", "--out", "o.npy"): (4, "nowhere: no weights there"),
    ("embed", "random:test_vit", "--data", "nowhere", "--out", "o.npy"): (3, "--data nowhere"),
    ("embed", "nowhere", "--data", ".", "--out", "o.csv"): (2, "--out o.csv: the name has to end with"),
    ("embed", "nowhere", "--data", ".", "--out", "o.npy", "--batch-size", "0"): (2, "--batch-size 0"),
    ("embed", "nowhere", "--data", ".", "--out", "o.npy", "--range16", "5", "5"): (2, "--range16 5 5"),
    ("shard", "--help"): (0, "--images-per-shard"),
    ("shard", "nowhere", "--out", "o"): (3, "--data nowhere"),
    ("shard", ".", "--out", "o", "--shard-size", "5"): (2, "500MB or 1GiB"),
    ("check", "ipx.tar.gz"): (3, "--data ipx.tar.gz"),
    ("pretrain", "--loggers", "wandb", "wandb", "--out", "run"): (2, "loggers: wandb wandb: give each once"),
    ("pretrain", "--loggers", "tensorboard", "--out", "run"): (2, "tensorboard"),
}  # fmt: skip
SCRIPT = f"""
import sys
import gtsa
from gtsa.cli import main as cli
first = [name for name in {HEAVY} if name in sys.modules]
print("import", first, flush=True)
for command in {list(QUICK)}:
    print("<", flush=True)
    code = 0
    try:
        code = cli.run(list(command))
    except SystemExit as end:
        code = end.code or 0
    sys.stderr.flush()
    print(">", code, [name for name in {HEAVY} if name in sys.modules], flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each of the quick commands says, its code, and what was imported by then; one process for all."""
    folder = tmp_path_factory.mktemp("quick")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    first, *parts = done.stdout.split("<\n")
    assert first == "import []\n"
    assert list(folder.iterdir()) == []
    return dict(zip(QUICK, parts, strict=True))


@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_is_answered_without_anything_heavy(answers, command):
    code, words = QUICK[command]
    output, _, end = answers[command].rpartition(">")
    assert end.split(maxsplit=1) == [str(code), "[]\n"]
    assert words in output


def test_the_package_is_lazy_and_its_verbs_are_functions():
    script = (
        "import sys, gtsa; assert 'torch' not in sys.modules; assert 'pretrain' in dir(gtsa)\n"
        "from gtsa import preview\n"
        "from gtsa.pretraining.check import scan\n"  # a module of a verb's name is imported first
        "assert gtsa.check.__module__ == 'gtsa.pretraining.check' and callable(gtsa.check), gtsa.check\n"
        "from gtsa import export; assert callable(export)\n"
        "try: gtsa.fly\n"
        "except AttributeError as error: assert 'fly' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("name", "one", "maker"),
    [
        (f"{kind.__name__}.{name}", one, kind.load_all()[name])
        for kind in (methods, evaluators)
        for name, one in kind.declared().items()
    ]
    + [("views", MULTICROP, MultiCrop)],
)
def test_declarations_are_those_of_the_classes(name, one, maker):
    """The classes themselves, imported, are the oracle of what was read from their source."""
    arguments = dict(one.arguments)
    for argument, parameter in inspect.signature(maker, eval_str=True).parameters.items():
        kind, default = arguments.pop(argument)
        if parameter.default is inspect.Parameter.empty:
            assert default is REQUIRED
        else:
            assert (kind, default) == (parameter.annotation, parameter.default)
    assert arguments == {}
    assert one.doc == inspect.getdoc(maker)
    shared = (
        "published_settings",
        "base_lr",
        "given_weights",
        "min_views",
        "min_images",
        "needs_overlap",
        "search_space",
    )
    shared += ("min_images_with", "idle_settings")
    for constant in (*shared, "label_kinds", "uses_train_set", "trains_long"):
        assert one.constants.get(constant) == getattr(maker, constant, None)
    assert sorted(one.constants.get("auto_settings", {})) == sorted(getattr(maker, "auto_settings", {}))


def test_every_method_and_evaluation_is_declared():
    assert list(methods.declared()) == list(methods.load_all())
    assert list(evaluators.declared()) == list(evaluators.load_all())


def test_what_needs_an_import_is_not_worked_out(tmp_path):
    file = tmp_path / "plugin.py"
    file.write_text(
        '"""First line.\n\nMore."""\nimport torch\nSIZES = (1, 2)\nT = torch.arange(3)\n'
        "class Thing(Base):\n    'What it is.'\n    table = {'a': torch.sin, 'b': 2}\n    odd = torch.pi\n    kinds = SIZES\n"
        "    def __init__(self, encoder: torch.nn.Module, *, size: int | None = None, sizes: tuple[int, ...] = SIZES): ...\n"
    )
    one = declared(file, base="Base")
    assert (one.summary, one.doc) == ("First line.", "What it is.")
    assert one.constants == {"table": {"a": None, "b": 2}, "odd": None, "kinds": (1, 2)}
    assert one.arguments["encoder"][1] is REQUIRED
    assert one.arguments["size"] == (int | None, None)
    assert one.arguments["sizes"] == (tuple[int, ...], (1, 2))
    assert declared(file, base="Other") is None


def test_verbs_are_those_of_python():
    assert set(gtsa.__all__) - {"UserError", "load"} <= set(main.VERBS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_and_flags(tmp_path):
    """A real bash reads the script and then completes as with the Tab key."""
    script = subprocess.run(
        [sys.executable, "-m", "gtsa", "completion", "bash"], capture_output=True, text=True, check=True
    )
    folder = tmp_path / "gtsa.bash"
    folder.write_text(script.stdout)

    def offered(*words):
        ask = f"""
            source {folder}
            COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE="{" ".join(words)}"; COMP_POINT=${{#COMP_LINE}}
            _gtsa gtsa "{words[-1]}" "{words[-2]}"; printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()

    assert "pretrain" in offered("gtsa", "pre")
    assert "--batch-size" in offered("gtsa", "pretrain", "--batch")
    assert "--gtsa.region-weight" in offered("gtsa", "pretrain", "--gtsa.re")


def test_completion_is_installed_where_the_shell_reads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert main.run(["completion", "fish", "--install"]) == 0
    assert (tmp_path / ".config/fish/completions/gtsa.fish").read_text().count("complete -c gtsa") > 100
    assert "gtsa.fish" in capsys.readouterr().out


def test_plugins_find_classes_and_nothing_else():
    from gtsa.core.types import Method

    assert plugins.classes(methods, Method) == methods.load_all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--anchor", "1"], "Unknown option: --anchor. It is called --gram-weight now"),
        (["pretrain", "--views.flip", "1"], "Unknown option: --views.flip. It is called --views.hflip now"),
        (["pretrain", "photos"], "unexpected argument photos; give the images with --data"),
        (["export", "run", "--to", "hf"], "--out needs a value"),
    ],
)
def test_mistakes_of_the_command_line_say_what_to_do(arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["evaluate"], True),
        (["evaluate", "random:test_vit", "--val", "images"], True),
        (["evaluate", "random:test_vit", "--task", "knn", "--train", "images"], True),
        (["evaluate", "random:test_vit", "--task", "knn", "--train", ".", "--folds", "1"], False),
        (["compare", "--data", ".", "--out", "o"], True),
        (["compare", "--data", ".", "--train", ".", "--folds", "2"], True),
        (["compare", "--data", ".", "--out", "o", "--train", ".", "--folds", "2", "--methods", "byol"], False),
    ],
)
def test_a_complete_command_is_shown_if_something_is_missing(arguments, shown):
    code, _, err = run(*arguments)
    assert code == 2 and (f"\nexample: {EXAMPLES[arguments[0]]}\n" in err) == shown


@pytest.mark.parametrize("verb", EXAMPLES)
def test_the_example_of_a_verb_is_in_its_help_and_is_valid(verb):
    command = EXAMPLES[verb].split()
    assert EXAMPLES[verb] in " ".join(run(verb, "--help")[1].split())
    code, out, err = run(*command[1:], "--print-config")
    assert (command[0], command[1], code, err) == ("gtsa", verb, 0, "") and "folds: 5" in out
