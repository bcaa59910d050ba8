"""Settings of every test run: one thread, no display, nothing of the user's nnU-Net in sight."""

from __future__ import annotations

import os

for name in [name for name in os.environ if name.startswith("nnUNet_")]:
    del os.environ[name]
os.environ.update(
    nnUNet_compile="f",
    nnUNet_def_n_proc="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    # virtual machines that hide half of AMX end bfloat16 with an illegal instruction
    ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16",
    # threads of commands that the tests start: spinning ones crawl where several processes share the cores
    OMP_WAIT_POLICY="PASSIVE",
)

import torch  # reads the environment when loaded  # noqa: E402

torch.set_num_threads(1)
