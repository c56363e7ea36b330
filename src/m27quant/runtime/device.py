"""Which device the computation runs on, and what it is called when that fails."""

from __future__ import annotations

import torch

from m27quant.errors import EnvironmentFault, escape


def pick_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU where there is one.

    Raises:
        EnvironmentFault: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentFault(
                f"no device {name}: this machine has {count} CUDA GPUs", hint="use --device cpu"
            )
        device = torch.device("cuda", device.index or 0)
    return device


def device_fault(fault: BaseException) -> EnvironmentFault | None:
    """What torch says of memory or of an accelerator that failed, as an error that can be resumed from."""
    first = escape(str(fault).partition("\n")[0])
    if isinstance(fault, MemoryError | torch.OutOfMemoryError):
        return EnvironmentFault(
            f"out of memory: {first}", hint="lower --max-memory, then run again with --resume"
        )
    if isinstance(fault, torch.AcceleratorError):
        return EnvironmentFault(
            f"the device failed: {first}", hint="when it is back (see `nvidia-smi`), run again with --resume"
        )
    return None
