"""The pages of the documentation: their blocks of code, links and anchors."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SHELL = ("sh", "bash")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)
PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """A fence (or an indented block, whose language is empty) and why it is not run, if a comment above it says so."""

    line: int
    language: str
    text: str
    not_run: str | None = None


def pages():
    """All pages, by their path below docs."""
    return sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def name_of(page):
    return str(page.relative_to(ROOT))


def tokens(page):
    """Tokens of a page without its front matter, which only moves the lines."""
    text = page.read_text(encoding="utf-8")
    front, moved = re.match(r"---\n.*?\n---\n", text, re.DOTALL), 0
    if front:
        text, moved = text[front.end() :], front[0].count("\n")
    return [(token, (token.map[0] if token.map else 0) + moved + 1) for token in PARSER.parse(text)]


def as_written(page):
    """Whether the page is run without the smaller settings of docs/small.yaml."""
    return page.read_text(encoding="utf-8").startswith("---\nrun: as written\n---\n")


def blocks(page):
    found, reason = [], None
    for token, line in tokens(page):
        if token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(line, language, token.content, reason))
        given = NOT_RUN.match(token.content) if token.type == "html_block" else None
        reason = " ".join(given[1].split()) if given else None
    return found


def lines(text):
    """The commands of a shell block: continued lines are joined, comments and empty lines left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def gtsa_words(line, verbs):
    """The words after ``gtsa`` of a command that starts with it or holds ``-m gtsa``; None of another command."""
    words = shlex.split(line, comments=True)
    for i, word in enumerate(words[:-1]):
        if (i == 0 or words[i - 1] == "-m") and word == "gtsa" and words[i + 1] in verbs:
            return words[i + 1 :]
    return None


def inline(page):
    """The inline tokens of a page, with the line of their block: links, images and code."""
    for token, line in tokens(page):
        for child in token.children or ():
            yield child, line


def slug(text):
    """The anchor that MyST and GitHub give a heading."""
    kept = re.sub(r"[^\w\- ]", "", text.strip().lower())
    return kept.replace(" ", "-")


def anchors(page):
    found = [token for token, _ in tokens(page)]
    return {
        slug(found[i + 1].content.replace("`", "")) for i, token in enumerate(found) if token.type == "heading_open"
    }
