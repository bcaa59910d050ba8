"""Selective state-space models that run everywhere PyTorch runs."""

from nnssl.ssm.mamba import Backend, Mamba2Mixer, available_backends
from nnssl.ssm.ssd import ssd_scan

__all__ = ["Backend", "Mamba2Mixer", "available_backends", "ssd_scan"]
