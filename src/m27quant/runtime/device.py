"""Which device the computation runs on."""

from __future__ import annotations

import torch

from m27quant.errors import EnvironmentFault


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
