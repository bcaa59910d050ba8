"""Docstrings on the API page: aligned lines of `name    meaning` become lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(?P<indent> *)(?P<name>\S+(?: \S+)*?) {2,}(?P<text>\S.*)$")


class AlignedLists(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = lists(obj.docstring.value)


def lists(docstring: str) -> str:
    """Markdown lists in place of unindented aligned blocks; all other text stays what it is."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        entry = ENTRY.match(line)
        if entry and not entry["indent"]:
            if not inside and lines and lines[-1]:
                lines.append("")
            lines.append(f"- `{entry['name']}`: {entry['text']}")
            inside = True
        elif inside and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)
