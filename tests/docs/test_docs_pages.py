"""Fast checks of the documentation: every page parses, its flags exist, its links lead somewhere."""

import ast
import functools
import json
import re

from ruamel.yaml import YAML

from gtsa.cli.main import VERBS, app
from pages import DOCS, ROOT, SHELL, anchors, blocks, gtsa_words, inline, lines, name_of, pages

EVERY = [*pages(), ROOT / "README.md"]
LANGUAGES = {*SHELL, "python", "yaml", "text", "dockerfile", "json"}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*[\w*]")
# Flags in these pages that are no gtsa's: of pip, torchrun, docker, sha256sum, pytest, make and of names before a rename
FOREIGN = {
    "--no-deps", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--rdzv-endpoint", "--network", "--gpus",
    "--user", "--time", "--shm-size", "--check", "--rm", "--profile", "--upgrade", "--head-start", "--encoder-rate", "--anchor", "--keep",
    "--clip", "--tune", "--tune-steps", "--rates", "--looks",
}  # fmt: skip


@functools.cache
def flags(verb):
    found = {name for argument in app[verb].assemble_argument_collection() for name in argument.names}
    return found | {"--help", "--version"}


def commands(page):
    """(line of the block, words after gtsa) of every command in a page."""
    for block in blocks(page):
        for line in lines(block.text) if block.language in SHELL else ():
            words = gtsa_words(line, (*VERBS, "completion"))
            if words is not None:
                yield block.line, words


def test_every_block_says_what_it_is():
    for page in EVERY:
        for block in blocks(page):
            where = f"{name_of(page)}:{block.line}"
            if not block.language:
                assert "gtsa " not in block.text, f"{where}: commands are in a fence, ```sh"
            elif not block.language.startswith("{"):
                assert block.language in LANGUAGES, f"{where}: ```{block.language}"
            if block.language == "python":
                ast.parse(block.text)
            if block.language == "yaml":
                YAML(typ="safe").load(block.text)


def test_flags_of_commands_exist():
    unknown = [
        f"{name_of(page)}:{line}: gtsa {words[0]} {word}"
        for page in EVERY
        for line, words in commands(page)
        for word in words
        if word.startswith("--") and word.split("=")[0] not in flags(words[0])
    ]
    assert not unknown


def test_flags_in_the_text_exist():
    known = set().union(*(flags(verb) for verb in (*VERBS, "completion"))) | FOREIGN
    unknown = [
        f"{name_of(page)}:{line}: {flag}"
        for page in EVERY
        for child, line in inline(page)
        for flag in (FLAG.findall(child.content) if child.type == "code_inline" else ())
        if "*" not in flag and "TASK" not in flag and flag not in known
    ]
    assert not unknown


def test_links_lead_to_files_and_headings():
    broken = []
    for page in EVERY:
        for child, line in inline(page):
            target = child.attrs.get({"link_open": "href", "image": "src"}.get(child.type, ""), "")
            if not target or re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
                broken.append(f"{name_of(page)}:{line}: {target}")
    assert not broken


def test_every_page_is_in_a_table_of_contents():
    listed = {DOCS / "index.md"}
    for page in pages():
        for block in blocks(page):
            if block.language == "{toctree}":
                entries = [line for line in block.text.splitlines() if line and not line.startswith(":")]
                for entry in entries:
                    found = list(page.parent.glob(f"{entry}.md"))
                    assert found, f"{name_of(page)}: {entry}"
                    listed |= {path.resolve() for path in found}
    assert {name_of(page) for page in pages()} == {name_of(page) for page in listed}


def test_pages_begin_with_their_title():
    for page in pages():
        text = re.sub(r"\A---\n.*?\n---\n+", "", page.read_text(), flags=re.DOTALL)
        assert text.startswith(("# ", "```{include} ../")), name_of(page)


def test_what_is_not_run_says_why():
    for page in EVERY:
        for block in blocks(page):
            assert block.not_run is None or len(block.not_run) > 8, f"{name_of(page)}:{block.line}"


def test_notebooks_hold_no_outputs():
    books = sorted((DOCS / "notebooks").glob("*.ipynb"))
    assert books
    for path in books:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), path
            assert cell.get("execution_count") is None, path


def test_pictures_are_small():
    sizes = {path: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    assert max(sizes.values()) < 400_000
    assert sum(sizes.values()) < 3_000_000
