"""What an inspection finds: one line each, with what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ERROR, WARNING, OK = "error", "warning", "ok"
SHOWN = 20  # names in one line


@dataclass(frozen=True)
class Finding:
    """One fact about a dataset; an error stops a training, a warning may be intended."""

    level: str  # error | warning | ok
    place: str  # file, folder or key
    found: str
    expected: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.place}: {self.found}" + f"; expected {self.expected}" * bool(self.expected)
        text += f". {self.remedy}" * bool(self.remedy)
        return printable(text)


def printable(text: str) -> str:
    """`text` on one line, whatever a file name in it holds: bytes that are not UTF-8 cannot be printed."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # so Python marks bytes of names that are not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else repr(character)[1:-1]


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == ERROR]


def raise_errors(findings: Iterable[Finding]) -> None:
    """ValueError with every error among the findings, one line each."""
    errors = errors_of(findings)
    if len(errors) == 1:
        raise ValueError(str(errors[0]))
    if errors:
        raise ValueError(f"{len(errors)} errors:\n" + "\n".join(f"  - {error}" for error in errors))


def listed(names: Sequence[str], shown: int = SHOWN) -> str:
    """Names for a message; of many the first ones and the number of the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
