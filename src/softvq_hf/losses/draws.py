"""Random draws are made on the CPU, so that they do not depend on the device. This is how they get there."""

import torch


def to_device(draws: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """`draws` on `device`; as they are if it is `None`. A plain copy to CUDA waits until the device has done all that
    it was asked for before; out of pinned memory the processor goes on at once."""
    if device is not None and torch.device(device).type == "cuda" and draws.device.type == "cpu":
        return draws.pin_memory().to(device, non_blocking=True)
    return draws.to(device)
