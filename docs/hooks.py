"""What mkdocs does beyond rendering: equations as MathML, the command line from argparse, pictures from
benchmarks/."""

from __future__ import annotations

import argparse
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from nnssl.commands.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated page, and every picture outside docs/ that a page shows."""
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    for page in list(files.documentation_pages()):
        if page.generated_by is None:
            for image, _, target, _ in LINK.findall(page.content_string):
                outside = _outside(page.src_uri, target)
                if image and outside and files.get_file_from_path(f"pictures/{outside}") is None:
                    source = str(ROOT / outside)
                    files.append(File.generated(config, f"pictures/{outside}", abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point pictures outside docs/ at their copies; name other files of the repository without a link."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        image, text, target, _ = match.groups()
        outside = _outside(page.file.src_uri, target)
        if outside is None:
            return match[0]
        if not (ROOT / outside).exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        if image:
            return f"![{text}]({posixpath.relpath('pictures/' + outside, folder or '.')})"
        return text if outside in text else f"{text} (`{outside}`)"

    return LINK.sub(replace, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Equations as MathML, which browsers show without a script."""

    def replace(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]).strip(), display=display)

    return MATH.sub(replace, content)


def _outside(page: str, target: str) -> str | None:
    """Path from the repository's root of a link that leaves docs/; None where it stays inside."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def command_line() -> str:
    """The page of all commands and options, from the parser itself."""
    parser = build_parser()
    lines = ["# Command line", "", f"{parser.description} Options before the command:", "", *_table(parser)]
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    for name, command in commands.choices.items():
        usage = re.sub(r"\s+", " ", command.format_usage().removeprefix("usage: "))
        lines += ["", f"## nnssl {name}", "", _escape(command.description or _sentence(helps[name])), ""]
        lines += ["```text", *_wrap(usage), "```", "", *_table(command)]
    return "\n".join(lines) + "\n"


def _table(parser: argparse.ArgumentParser) -> list[str]:
    rows = []
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            value = f" {action.metavar}" if isinstance(action.metavar, str) else ""
            value += " ..." if action.nargs == "+" else ""
            needed = " Required." if action.required else ""
            text = parser._get_formatter()._expand_help(action) if action.help else ""
            option = f"`{', '.join(action.option_strings)}{value}`"
            rows.append(f"| {option} | {_escape(_sentence(text))}{needed} |")
    return ["| option | |", "|---|---|", *rows]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") or not text else ".")


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _wrap(usage: str, width: int = 100) -> list[str]:
    """Break a usage line between options."""
    lines, line = [], ""
    for part in re.findall(r"\[[^\]]*\]|\S+", usage):
        if line and len(line) + len(part) >= width:
            lines.append(line)
            line = "   "
        line = f"{line} {part}" if line else part
    return [*lines, line]
