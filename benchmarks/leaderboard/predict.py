"""Entry point of a prediction in the precision of the training."""

from __future__ import annotations


def predict_in_bfloat16() -> None:
    """`nnUNetv2_predict` on a CPU in the precision of the training: in float32 PyTorch takes a slow routine
    for batches of one tile."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        predict_entry_point()
