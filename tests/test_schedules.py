from __future__ import annotations

import math

import pytest

from nnssl.schedules import gaussian_ramp


def test_gaussian_ramp_has_its_closed_form_and_stays_at_one() -> None:
    assert gaussian_ramp(0.0, 0.4) == pytest.approx(math.exp(-5))
    assert gaussian_ramp(0.2, 0.4) == pytest.approx(math.exp(-1.25))
    assert gaussian_ramp(0.4, 0.4) == gaussian_ramp(1.0, 0.4) == gaussian_ramp(0.0, 0.0) == 1.0
