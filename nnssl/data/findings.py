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
        # a line break in a file name must not make two lines of one finding
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
