"""Blocks become Markdown and one page: escaped, self-contained, ids told apart."""

import re

from moe.study.page import Code, Figure, Heading, Items, Table, Text, markdown, page

SVG = """<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg"><metadata>made by</metadata>
<defs><clipPath id="c"/></defs><g clip-path="url(#c)" id="g"><use xlink:href="#g"/><!-- label --></g></svg>"""


def blocks(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.svg").write_text(SVG)
    return [
        Heading("One & two"), Text("a < b, **bold** and `x<y`"), Items(["first", "second"]), Code("if a < b: pass"),
        Figure(tmp_path / "a.svg", "left \"one\""), Figure(tmp_path / "b.svg", "right"), Text("end"),
        Table(["name", "a|b"], [["`k`", "1 | 2"]]), Figure(tmp_path / "a.svg", "alone"),
    ]  # fmt: skip


def test_markdown(tmp_path):
    text = markdown("Title", blocks(tmp_path))
    for part in (
        "# Title\n", "## One & two\n", "a < b, **bold** and `x<y`", "- first\n- second\n", "```\nif a < b: pass\n```",
        "![right](b.svg)", "| name | a\\|b |\n|---|---|\n| `k` | 1 \\| 2 |",
    ):  # fmt: skip
        assert part in text, part


def test_page(tmp_path):
    text = page("Title <x>", blocks(tmp_path))
    for part in (
        "<h1>Title &lt;x&gt;</h1>", "<h2>One &amp; two</h2>", "a &lt; b, <strong>bold</strong> and <code>x&lt;y</code>",
        "<li>second</li>", "<code>if a &lt; b: pass</code>", "<td>1 | 2</td>", 'name="viewport"', "prefers-color-scheme: dark",
    ):  # fmt: skip
        assert part in text, part
    assert text.count('<div class="figures">') == 2 and text.count("</figure></div>") == 2  # a row of two, one alone
    assert text.count("<div") == text.count("</div>")


def test_drawings_keep_their_own_ids_and_lose_what_nobody_sees(tmp_path):
    text = page("t", blocks(tmp_path))
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) == 6
    used = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert set(used) == set(ids)
    assert "made by" not in text and "label -->" not in text and "<?xml" not in text
    assert 'aria-label="left &quot;one&quot;"' in text
