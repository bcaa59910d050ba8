"""Pieces of the page: tables, figures, strips, and the frame around them. One file, nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from nnssl.report.charts import Chart, Dots, chart_svg, dots_svg, swatch
from nnssl.report.panels import Strip, data_uri

GENERATOR = '<meta name="generator" content="nnssl report">'


@dataclass(frozen=True)
class Number:
    """A cell with a number; `text`: as shown, where not plainly rounded. NaN is a dash."""

    value: float
    digits: int = 3
    signed: bool = False
    text: str = ""

    def html(self) -> str:
        if not math.isfinite(self.value):
            return '<td class="number" data-value="nan">–</td>'
        shown = self.text or f"{self.value:{'+' if self.signed else ''}.{self.digits}f}"
        return f'<td class="number" data-value="{self.value!r}">{escape(minus(shown))}</td>'


@dataclass(frozen=True)
class Marked:
    """A cell of text with a class of the style sheet."""

    text: str
    style: str

    def html(self) -> str:
        return f'<td class="{self.style}">{escape(self.text)}</td>'


Cell = str | Number | Marked


def minus(text: str) -> str:
    return text.replace("-", "−")


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, name: str, changed: Sequence[int] = ()
) -> str:
    """A sortable table with the id table-`name`; `changed`: indices of rows in bold."""
    numeric = [any(isinstance(row[i], Number) for row in rows) for i in range(len(heads))]
    head = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" * number}><button>{escape(text)}</button></th>'
        for text, number in zip(heads, numeric, strict=True)
    )
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{escape(c)}</td>" if isinstance(c, str) else c.html() for c in row)
        body += f"<tr{' class=changed' * (index in changed)}>{cells}</tr>\n"
    return (
        f'<p class="soft" id="table-{name}-text">{escape(caption)}</p>\n<div class="scroll" tabindex="0">'
        f'<table class="sortable" id="table-{name}" aria-describedby="table-{name}-text">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def chart(shown: Chart | Dots) -> str:
    """A figure with title, sentence, legend and drawing."""
    note = f'<p class="soft">{escape(shown.note)}</p>' if shown.note else ""
    if isinstance(shown, Dots):
        return f"<figure><h3>{escape(shown.title)}</h3>{note}{dots_svg(shown)}</figure>\n"
    legend = "".join(f"<li>{swatch(s.style)}{escape(s.name)}</li>" for s in shown.series)
    return (
        f'<figure><h3>{escape(shown.title)}</h3>{note}<ul class="legend">{legend}</ul>{chart_svg(shown)}'
        '<output class="readout"></output></figure>\n'
    )


def charts(several: Sequence[Chart | Dots]) -> str:
    return f'<div class="charts">\n{"".join(map(chart, several))}</div>\n' if several else ""


def strip(shown: Strip) -> str:
    """Panels in rows, captions above and names beside them."""
    rows, strip_rows = list(shown.rows.items()), list(shown.rows.values())
    heads = "".join(f"<th>{escape(panel.caption)}</th>" for panel in max(reversed(strip_rows), key=len))
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            f'<td><img alt="{escape(f"{shown.title}, {name}, {panel.caption}")}" '
            f'width="{panel.pixels.shape[1]}" height="{panel.pixels.shape[0]}" '
            f'src="{data_uri(panel.pixels)}"></td>'
            for panel in panels
        )
        + "</tr>"
        for name, panels in rows
    )
    return (
        f'<figure><h3>{escape(shown.title)}</h3><div class="strip" tabindex="0"><table><thead><tr><th></th>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div></figure>\n"
    )


def boxes(colors: Mapping[str, str]) -> str:
    """Legend of filled or outlined areas."""
    items = "".join(
        f'<li><span class="box" style="background:{color}"></span>{escape(name)}</li>'
        for name, color in colors.items()
    )
    return f'<ul class="legend">{items}</ul>'


def paragraph(text: str, style: str = "") -> str:
    return f"<p{f' class={style}' if style else ''}>{escape(text)}</p>\n"


def bullets(items: Sequence[tuple[str, str]]) -> str:
    """(class of the style sheet, sentence) each."""
    lines = "".join(
        f"<li><span{f' class={style}' if style else ''}>{escape(text)}</span></li>" for style, text in items
    )
    return f"<ul>{lines}</ul>\n" if items else ""


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """The whole page; sections without content are left out."""
    style, script = (
        (resources.files("nnssl.report") / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    kept = {name: content for name, content in sections.items() if content}
    links = "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in kept)
    body = "".join(
        f'<section id="{anchor(name)}"><h2>{escape(name)}</h2>\n{content}</section>\n'
        for name, content in kept.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{GENERATOR}\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{lead}<nav>{links}</nav>\n<main>\n{body}</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())
