from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.speed.timing import peak_bytes, table


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read in /proc")
@pytest.mark.parametrize("megabytes", [32, 128])
def test_peak_memory_is_that_of_the_call(megabytes: int) -> None:
    def call() -> None:
        torch.ones(megabytes * 2**18).add_(1)

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(megabytes * 2**20, rel=0.1)


def test_tables_show_three_significant_digits() -> None:
    text = table(("what", "seconds"), [("a", 0.12345), ("b", 1234.5)])
    assert text.splitlines() == ["| what | seconds |", "| --- | --- |", "| a | 0.123 |", "| b | 1234 |"]
