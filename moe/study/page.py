"""A report's blocks -> Markdown, and one HTML page that needs nothing beside it.

Blocks: Heading, Text, Table, Figure, Code, Items. Text may hold **bold** and `code`. The page reads well from phone to
desktop width, light and dark; a wide table scrolls inside its own box; figures are inline SVG.
Not here: what the blocks say (report.py).
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import NamedTuple


class Heading(NamedTuple):
    text: str


class Text(NamedTuple):
    text: str


class Items(NamedTuple):
    items: list[str]


class Code(NamedTuple):
    text: str


class Figure(NamedTuple):
    file: Path
    caption: str
    """For those who cannot see it; the drawing has its own title."""


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


Block = Heading | Text | Items | Code | Figure | Table

STYLE = """
:root { color-scheme: light dark; --line: #d5d5d5; --soft: #f4f4f2; --text: #1c1c1c; --back: #fff; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #222; --text: #e4e4e4; --back: #161616; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.2rem 4rem; background: var(--back); color: var(--text);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; }
code { font-size: .9em; background: var(--soft); padding: .05em .3em; border-radius: 3px; }
pre { background: var(--soft); padding: .8rem; white-space: pre-wrap; border-radius: 4px; } pre code { padding: 0; }
.box { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:last-child { white-space: normal; min-width: 9rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
@media (prefers-color-scheme: dark) { figure svg { filter: invert(.91) hue-rotate(180deg); } }
"""


def markdown(title: str, blocks: list[Block]) -> str:
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Items):
            parts.append("\n".join(f"- {item}" for item in block.items))
        elif isinstance(block, Code):
            parts.append(f"```\n{block.text}\n```")
        elif isinstance(block, Figure):
            parts.append(f"![{block.caption}]({block.file.name})")
        else:
            rows = [[cell.replace("|", "\\|") for cell in row] for row in (block.header, *block.rows)]
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            parts.append("\n".join([lines[0], "|---" * len(block.header) + "|", *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def page(title: str, blocks: list[Block]) -> str:
    parts, figures = [f"<h1>{_inline(title)}</h1>"], 0
    for block, following in zip(blocks, [*blocks[1:], Text("")]):
        if isinstance(block, Heading):
            parts.append(f"<h2>{_inline(block.text)}</h2>")
        elif isinstance(block, Text):
            parts.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Items):
            parts.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>")
        elif isinstance(block, Code):
            parts.append(f"<pre><code>{html.escape(block.text)}</code></pre>")
        elif isinstance(block, Figure):
            opened = '<div class="figures">' if figures == 0 or not parts[-1].endswith("</figure>") else ""
            figures += 1
            drawing = _inline_svg(block.file, f"f{figures}", block.caption)
            close = "" if isinstance(following, Figure) else "</div>"
            parts.append(f"{opened}<figure>{drawing}</figure>{close}")
        else:
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.header)
            rows = "".join("<tr>" + "".join(f"<td>{_inline(c)}</td>" for c in row) + "</tr>" for row in block.rows)
            parts.append(f'<div class="box"><table><tr>{head}</tr>{rows}</table></div>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{html.escape(title)}</title><style>{STYLE}</style></head>'
        f"\n<body>\n{body}\n</body></html>\n"
    )


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _inline_svg(file: Path, prefix: str, caption: str) -> str:
    """The drawing without header and metadata, its ids told apart from those of other drawings on the page."""
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1).strip()
