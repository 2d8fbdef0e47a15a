"""Every recipe is a call that the command takes, and says how to run it."""

import re
from functools import reduce
from pathlib import Path

import pytest

from gtsa.comparison.settings import Compare
from gtsa.core.settings import merged, validated
from gtsa.core.settings_file import read_yaml
from gtsa.evaluation.settings import Evaluate
from gtsa.pretraining.settings import Pretrain

RECIPES_FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(RECIPES_FOLDER.rglob("*.yaml"))
MODELS = {
    "pretrain": (Pretrain, {}),
    "evaluate": (Evaluate, {"weights": "RUN", "train": ("a", "b")}),
    "compare": (Compare, {"data": "a", "out": "b", "train": ("a", "b")}),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_call(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = next(line for line in header if line.startswith("# Command:"))
    assert any(line.startswith("# Hardware:") for line in header)
    assert f"--config recipes/{path.relative_to(RECIPES_FOLDER).as_posix()}" in command
    model, given = MODELS[re.search(r"gtsa (\w+)", command)[1]]
    files = re.findall(r"--config (recipes/\S+)", command)  # a recipe may change another one
    settings = reduce(merged, (read_yaml(RECIPES_FOLDER.parent / file) for file in files), {})
    if model is Evaluate and "folds" not in settings:
        given = {**given, "val": ("c", "d")}
    if "--eval-train" in command:
        given = {**given, "eval_train": ("a", "b"), "eval_folds": 5, "init": "c"}
    validated(model, {**settings, **given})
