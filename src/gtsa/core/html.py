"""Parts of HTML pages: skeleton, sections, tables, figures, images. A page is one file and loads nothing.

Text is escaped wherever it is put in, unless it is ``Markup``, which these functions return.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from gtsa.core.errors import escaped

HERE = Path(__file__).parent
# A page may run its own script and show its own pictures. Nothing else: a browser would refuse it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
EMPTY = Markup("")

Text = str | Markup


def page(title: Text, *parts: Markup) -> str:
    """A whole page. ``title`` is its heading of level 1, too; the parts follow it."""
    style, script = (_own_file("page.css") + _own_file("parts.css")), _own_file("page.js")
    head = Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="{}">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n<title>{}</title>\n'
    ).format(POLICY, plain(title))
    body = Markup("</head>\n<body>\n<main>\n<h1>{}</h1>\n{}\n</main>\n").format(title, join(parts, "\n"))
    # style and script are our own files, and go in as they are
    return f"{head}<style>\n{style}</style>\n{body}<script>\n{script}</script>\n</body>\n</html>\n"


def _own_file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def join(parts: Iterable[Text], between: str = "") -> Markup:
    return Markup(between).join(parts)


def section(title: Text, *parts: Markup, level: int = 2) -> Markup:
    """A heading and what belongs to it; nothing where there is no content."""
    content = join(parts, "\n")
    if not content.strip():
        return EMPTY
    return Markup("<section>\n<h{0}>{1}</h{0}>\n{2}\n</section>").format(level, title, content)


def paragraph(text: Text, kind: str = "") -> Markup:
    return Markup("<p{}>{}</p>").format(_kind(kind), text)


def bullets(items: Iterable[Text]) -> Markup:
    inner = join(Markup("<li>{}</li>").format(item) for item in items)
    return Markup("<ul>{}</ul>").format(inner) if inner else EMPTY


def facts(items: Iterable[tuple[Text, Text]]) -> Markup:
    """Names and values in a row."""
    inner = join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(*item) for item in items)
    return Markup('<dl class="facts">{}</dl>').format(inner)


def marked(text: Text, kind: str) -> Markup:
    """Text in the colour of ``kind``: good, warn, bad or quiet."""
    return Markup('<span class="{}">{}</span>').format(kind, text)


def bold(text: Text) -> Markup:
    return Markup("<b>{}</b>").format(text)


def small(text: Text) -> Markup:
    return Markup("<br><small>{}</small>").format(text)


def code(text: str) -> Markup:
    """A file name, a command, a value. Control characters become visible."""
    return Markup("<code>{}</code>").format(escaped(text))


def plain(text: Text) -> str:
    """The text without tags, for titles and labels."""
    return escape(text).striptags()


def unbroken(text: str) -> str:
    """The text with a no-break space before every %."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def preformatted(text: str) -> Markup:
    return Markup('<pre tabindex="0">{}</pre>').format(text)


def details(summary: Text, *parts: Markup) -> Markup:
    """Content that opens with a click."""
    return Markup("<details><summary>{}</summary>\n{}\n</details>").format(summary, join(parts, "\n"))


def table(caption: Text, head: Sequence[Text], rows: Iterable[Sequence[Text]], words: bool = False) -> Markup:
    """A table; the first cell of a row is its header. A wide one scrolls in itself.

    Args:
        words: cells are text, and are aligned as such.
    """
    columns = join(Markup('<th scope="col">{}</th>').format(name) for name in head)
    lines = [
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(first, join(Markup("<td>{}</td>").format(c) for c in cells))
        for first, *cells in rows
    ]
    return Markup(
        '<div class="wide" role="region" tabindex="0" aria-label="{}">\n<table{}><caption>{}</caption>\n'
        "<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody></table></div>"
    ).format(plain(caption), _kind("words" if words else ""), caption, columns, join(lines, "\n"))


def figure(content: Markup, caption: Text, kind: str = "") -> Markup:
    return Markup("<figure{}>\n{}\n<figcaption>{}</figcaption>\n</figure>").format(_kind(kind), content, caption)


def image(data: bytes, alt: str, size: tuple[int, int] | None = None, kind: str = "jpeg") -> Markup:
    """An image inside the page.

    Args:
        data: the bytes of the file.
        alt: what it shows, for those who do not see it.
        size: width and height in px; with them nothing jumps while the page loads.
        kind: jpeg or png.
    """
    sides = Markup(' width="{}" height="{}"').format(*size) if size else EMPTY
    encoded = base64.b64encode(data).decode()
    return Markup('<img src="data:image/{};base64,{}" alt="{}"{}>').format(kind, encoded, alt, sides)


def strip(items: Sequence[Markup]) -> Markup:
    """Images or figures side by side in one row, however narrow the screen is."""
    return Markup('<div class="strip" style="--columns:{}">\n{}\n</div>').format(len(items), join(items, "\n"))


def grid(items: Iterable[Markup], kind: str = "strips") -> Markup:
    """Figures in one or more columns, as many as fit. ``kind``: strips, charts or tiles (narrow ones)."""
    inner = join(items, "\n")
    if not inner.strip():
        return EMPTY
    return Markup('<div class="{}">\n{}\n</div>').format(kind, inner)


def _kind(kind: str) -> Markup:
    return Markup(' class="{}"').format(kind) if kind else EMPTY


__all__ = [
    "EMPTY", "Markup", "Text", "bold", "bullets", "code", "details", "escape", "facts", "figure", "grid", "image",
    "join", "marked", "page", "paragraph", "plain", "preformatted", "section", "small", "strip", "table", "unbroken",
]  # fmt: skip
