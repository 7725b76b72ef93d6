"""How much arithmetic a training step needs, and how much of the device's it uses (MFU).

Counted is the least work that the gradient needs: each image alone, with a caption of the batch's mean length, so
without padding; no recomputation; attention as plain matrix products. One multiply-add is two FLOPs; element-wise work,
normalisation and the optimiser are not counted.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlv.training.hollow import hollow

if TYPE_CHECKING:
    from vlv.training.objective import Batch, Objective

logger = logging.getLogger(__name__)

PEAK_TFLOPS = {
    "H200": 989.5,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.5,
    "H800": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
}
"""Dense bfloat16 TFLOP/s with float32 accumulation, by a part of the name that the driver gives.

From NVIDIA's data sheets (where a sheet gives the figure with sparsity, half of it) and, for the GeForce cards, the
architecture white papers. The first name that fits counts. A card that runs below its rated clock has a lower peak:
`loop.peak_tflops` overrides the table.
"""


def peak_flops(device: torch.device, tflops: float | None = None) -> float | None:
    """FLOP/s that a device can do in bfloat16 at best.

    Args:
        device: A GPU, or the CPU, of which no peak is known.
        tflops: `loop.peak_tflops`, which comes first.

    Returns:
        FLOP/s, or None where nothing is known.
    """
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


class FlopMeter:
    """FLOPs per image of an objective, counted once for each phase of a run (a part frozen, a loss not yet in).

    Args:
        objective: Its module is copied without its numbers; nothing of it changes.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._known: dict[str, float | None] = {}

    def per_image(self, batch: Batch) -> float | None:
        """FLOPs of the forward and backward pass for one image of the present phase.

        Args:
            batch: As the objective reads it, with `step`.

        Returns:
            The count; None where the objective cannot run on tensors without numbers, which is logged once.
        """
        phase_of = getattr(self._objective, "phase", None)
        phase = "" if phase_of is None else str(phase_of(batch["step"]))
        if phase not in self._known:
            self._known[phase] = self._count(batch)
        return self._known[phase]

    def _count(self, batch: Batch) -> float | None:
        try:
            return float(flops_per_image(self._objective, batch))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning(
                "the FLOPs of %s cannot be counted (%s); the log goes without MFU",
                type(self._objective).__name__,
                reason,
            )
            return None


def flops_per_image(objective: Objective, batch: Batch) -> int:
    """Least FLOPs of the forward and backward pass for one image.

    Args:
        objective: Its module holds real, fake or meta tensors; it stays as it is.
        batch: At least one row, with `step`; of its captions the one nearest to the mean length is taken.

    Returns:
        The count.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with FakeCopyMode(mode):
            imagined = copy.deepcopy(objective)
        hollow(imagined.module)
        _without_recomputation(imagined.module)
        row = {name: _hollow_rows(value) for name, value in _typical_row(batch).items()}
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            _NoNumbers(),  # type: ignore[no-untyped-call]
        ):
            torch.autograd.backward(imagined.loss(row, torch.Generator()).total)
    return int(counter.get_total_flops())


def _hollow_rows(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _typical_row(batch: Batch) -> Batch:
    """One row, with the caption whose length is nearest to the mean."""
    captions = batch.get("captions")
    if captions and all(captions):
        lengths = [len(caption) for caption in captions]
        mean = sum(lengths) / len(lengths)
        best = min(range(len(lengths)), key=lambda row: abs(lengths[row] - mean))
    else:
        best = 0
    rows = slice(best, best + 1)
    return {k: v[rows] if isinstance(v, Tensor | list) else v for k, v in batch.items()}


def _without_recomputation(module: nn.Module) -> None:
    """Switch gradient checkpointing off, so that no forward pass counts twice."""
    for part in module.modules():
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False  # type: ignore[assignment]


class _NoNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where code asks for a number of a tensor that has none, it is told 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))
