"""Files that packaging, GitHub and Docker read: they parse, and agree with the project."""

import os
import re
import tomllib

from ruamel.yaml import YAML

from pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions():
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


def test_dockerfile_builds_from_files_that_exist():
    stages = {"build"}
    assert {name for name, _ in instructions()} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}
    for name, arguments in instructions():
        words = arguments.split()
        if name == "COPY":
            from_stage = [word.removeprefix("--from=") for word in words if word.startswith("--from=")]
            assert set(from_stage) <= stages
            for source in [] if from_stage else words[:-1]:
                assert (ROOT / source).exists(), source


def test_the_wheel_can_be_built_from_what_the_dockerfile_copies():
    copied = {word.rstrip("/") for name, text in instructions() if name == "COPY" for word in text.split()[:-1]}
    needed = [PROJECT["readme"], *PROJECT["license-files"]]
    assert all(any(file == source or file.startswith(f"{source}/") for source in copied) for file in needed)


def test_the_container_runs_gtsa_offline_and_without_rights():
    last = dict(instructions())
    assert last["ENTRYPOINT"] == '["gtsa"]'
    assert last["USER"] not in ("root", "0")
    assert {"HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1"} <= set(last["ENV"].split())


def test_citation_names_version_licence_and_paper():
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert "2304.08014" in citation["references"][0]["url"]


def test_the_workflow_runs_what_ci_runs():
    workflow = YAML(typ="safe").load(ROOT / ".github/workflows/ci.yml")
    steps = workflow["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci/run", os.X_OK)
    python = next(step["with"]["python-version"] for step in steps if "python" in str(step.get("uses")))
    assert f">={python}" == PROJECT["requires-python"]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "src/gtsa/py.typed").is_file()
