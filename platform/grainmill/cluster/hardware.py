"""Hardware of a worker: what it has, and whether it can use the GPU that Ray has given it."""

import os
import platform
import socket
import sys
from pathlib import Path

import ray

from grainmill.errors import ResourceError


def machine() -> dict[str, str]:
    """Processor, memory and graphics cards that this process can use; cards only where it has imported PyTorch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    torch = sys.modules.get("torch")
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch else []
    return {
        "cpu": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "memory": f"{memory:.0f} GiB",
        "gpu": ", ".join(cards) or "none",
    }


def lacks_gpu() -> bool:
    """Return True in a worker to which Ray has given a GPU, while PyTorch sees none."""
    if not ray.is_initialized() or not ray.get_gpu_ids():
        return False
    import torch

    return not torch.cuda.is_available()


def check_gpu() -> None:
    """Refuse to work on the CPU while a GPU is reserved, and paid for.

    Raises:
        ResourceError: `lacks_gpu`.
    """
    if lacks_gpu():
        import torch

        raise ResourceError(
            f"a worker that is given a GPU must train on it, but PyTorch {torch.__version__} sees none on "
            f"{socket.gethostname()}; install a driver and a build of PyTorch for CUDA there, or start its Ray with "
            "--num-gpus=0"
        )
