"""Everything that a GPU is needed for, in resumable pieces: `python -m benchmarks.gpu`."""
