"""``nnssl env``: what a bug report needs, in one paste."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from nnssl import __version__

PACKAGES = (
    "nnunetv2",
    "torch",
    "triton",
    "mamba-ssm",
    "causal-conv1d",
    "batchgeneratorsv2",
    "dynamic-network-architectures",
    "numpy",
    "blosc2",
)
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer")
VARIABLES = (
    *("nnUNet_n_proc_DA", "nnUNet_def_n_proc", "nnUNet_compile", "nnUNet_wandb_enabled"),
    "nnssl_tensorboard_enabled",
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDNN_LOGLEVEL_DBG"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK"),
    *("TORCH_LOGS", "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_COMPILE_THREADS", "TORCH_NCCL_BLOCKING_WAIT"),
    *("NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NNODES", "SLURM_NTASKS"),
)


def versions() -> dict[str, str]:
    """Of nnssl, Python, the system and the packages, without importing any; `not installed` where absent."""
    found = {"nnssl": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"system": platform.platform()}


def version_line() -> str:
    """What ``nnssl --version`` prints."""
    given = versions()
    shown = ("python", "nnunetv2", "torch", "mamba-ssm", "system")
    return f"nnssl {given['nnssl']} ({', '.join(f'{name} {given[name]}' for name in shown)})"


def environment() -> dict[str, Any]:
    """Versions, devices and variables. Of paths nnU-Net's folders alone: others are private."""
    variables = {name: os.environ[name] for name in FOLDERS if name in os.environ}
    for name in VARIABLES:
        if name in os.environ:
            value = os.environ[name]
            variables[name] = "set (a path)" if "/" in value or "\\" in value else value
    return {"versions": versions(), "devices": devices(), "variables": variables}


def devices() -> dict[str, str]:
    """Every GPU, and the processor with the threads that a training on it would use."""
    import torch

    found = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = (
                f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute capability "
                f"{properties.major}.{properties.minor}"
            )
        found["cuda"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    elif torch.backends.mps.is_available():
        found["mps"] = "available"
    else:
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        found["cuda"] = f"no device; torch is built {build}"
    found["cpu"] = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    return found


def processor() -> str:
    """The processor's name, or its kind where the system tells no name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def as_text(found: dict[str, Any]) -> str:
    """One line per entry, grouped."""
    lines = []
    for group, entries in found.items():
        lines.append(f"{group}:")
        lines += [f"  {name}: {value}" for name, value in entries.items()] or ["  none is set"]
    return "\n".join(lines)
