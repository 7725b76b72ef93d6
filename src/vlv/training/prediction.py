"""What a step costs, known from shapes alone: FLOPs, and the highest moment of memory.

The run's own step works on fake tensors, which have shapes and dtypes but no numbers and take no memory.

FLOPs are the least that the gradient needs: each image alone, with a caption of the batch's mean length, so without
padding; no recomputation; attention as plain matrix products. One multiply-add is two FLOPs; element-wise work,
normalisation and the optimiser are not counted.

Memory is that of every storage while it is alive. What the prediction cannot see are the workspaces inside a kernel, the
allocator's rounding, and what a GPU's driver takes for itself (half a gigabyte or so).
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vlv.config import LoopConfig, OptimConfig
from vlv.models.draws import RowGenerator
from vlv.models.lora import low_rank_parameters
from vlv.models.placement import linear_layers
from vlv.training.distributed import World
from vlv.training.microbatches import with_targets
from vlv.training.objective import Batch, Objective
from vlv.training.parallel import gathered_bytes, units, uses_fsdp
from vlv.training.step import TrainingStep
from vlv.training.weights import set_train_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ObjectiveT = TypeVar("ObjectiveT", bound="Objective")
ResultT = TypeVar("ResultT")

LONGEST_CAPTION = 300
"""Tokens of a caption where the settings limit them nowhere."""

PEAK_TFLOPS = {
    "H200": (989.5, 66.9),
    "H100 NVL": (835.5, 60.0),
    "H100 PCIe": (756.5, 51.2),
    "H100": (989.5, 66.9),
    "H800": (989.5, 66.9),
    "B200": (2250.0, 75.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "L40S": (362.1, 91.6),
    "L40": (181.1, 90.5),
    "L4": (121.0, 30.3),
    "RTX 6000 Ada": (364.2, 91.1),
    "RTX A6000": (154.8, 38.7),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.2, 35.6),
}
"""Dense TFLOP/s in bfloat16 (float32 accumulation) and in float32, by a part of the name that the driver gives.

From NVIDIA's data sheets (where a sheet gives the figure with sparsity, half of it) and, for the GeForce cards, the
architecture white papers. TF32 runs at half the rate of bfloat16 on all of them. The first name that fits counts. A card
that runs below its rated clock has a lower peak: `loop.peak_tflops` overrides the table.
"""


def peak_flops(
    device: torch.device,
    tflops: float | None = None,
    *,
    precision: str = "bf16",
    tf32: bool = False,
) -> float | None:
    """FLOP/s that a device reaches at best.

    Args:
        device: A GPU, or the CPU, whose peak is not known.
        tflops: `loop.peak_tflops`, which overrides the table.
        precision: `loop.precision`.
        tf32: `loop.tf32`, which matters where the precision is fp32.

    Returns:
        FLOP/s, or None where nothing is known.
    """
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), None)
    if peaks is None:
        return None
    bf16, fp32 = peaks
    if precision == "bf16":
        return bf16 * 1e12
    return (max(bf16 / 2, fp32) if tf32 else fp32) * 1e12


# --- fake tensors ----------------------------------------------------------------------------------


def fake_mode() -> FakeTensorMode:
    """Tensors made within have shapes and no numbers."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(objective: ObjectiveT) -> tuple[ObjectiveT, FakeTensorMode]:
    """A copy of an objective that holds fake tensors, and the mode in which to use it; the original stays as it is."""
    mode = fake_mode()
    # fake ones take their place below: to copy them would take longer than the step
    weights = {id(t): t for t in (*objective.module.parameters(), *objective.module.buffers())}
    with mode:
        with FakeCopyMode(mode):
            copied = copy.deepcopy(objective, weights)
        make_fake(copied.module)
    return copied, mode


def make_fake(module: nn.Module, dtype_of: Callable[[str], torch.dtype] | None = None) -> None:
    """Replace the tensors of a module by fake ones on the CPU, within `fake_mode`; shared tensors stay shared.

    Args:
        module: Changed in place; of any device, the meta device too.
        dtype_of: Dtype of a parameter by its name; None keeps what it has.
    """
    made: dict[int, Tensor] = {}
    for prefix, part in module.named_modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    is_parameter = isinstance(tensor, nn.Parameter)
                    dtype = dtype_of(f"{prefix}.{name}") if dtype_of and is_parameter else None
                    empty = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    )
                tensors[name] = made[id(tensor)]
        if type(part).__name__ == "Linear4bit":
            part.__class__ = PackedLinear


class PackedLinear(nn.Linear):
    """Stands for a layer whose weights have 4 bits, where there are shapes only: it unpacks them in each pass, as bitsandbytes does."""

    compute_dtype: torch.dtype

    def unpacked(self) -> Tensor:
        """The weights in the dtype that they are multiplied in."""
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output in the dtype of its input."""
        out: Tensor = _FromFourBits.apply(input.to(self.compute_dtype), self)  # type: ignore[no-untyped-call]
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(input.dtype)


class _FromFourBits(torch.autograd.Function):
    """A product with weights that are unpacked again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.unpacked())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.unpacked(), None


def pack_outline(llm: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a language model without numbers, nor adapters, weights of 4 bits, which are multiplied in a dtype."""
    if low_rank_parameters(llm):
        return
    for layer in linear_layers(llm).values():
        size, device = (layer.weight.numel() + 1) // 2, layer.weight.device
        layer.weight = nn.Parameter(torch.empty(size, 1, dtype=torch.uint8, device=device), False)
        layer.__class__ = PackedLinear
        layer.compute_dtype = dtype  # type: ignore[assignment]


class _ScalarsAreOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers 1 where code reads a number out of a tensor that has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


# --- FLOPs -----------------------------------------------------------------------------------------


class FlopMeter:
    """FLOPs per image of an objective, counted once for each phase of a run (a part frozen, a loss not yet in).

    Args:
        objective: Copied without its numbers; it stays as it is.
    """

    def __init__(self, objective: Objective) -> None:
        self._name = type(objective).__name__
        self._copied = self._tried(lambda: fake_copy(objective))
        self._known: dict[str, float | None] = {}

    def per_image(self, batch: Batch) -> float | None:
        """FLOPs of the forward and backward pass for one image of the present phase.

        Args:
            batch: As the objective reads it, with `step`.

        Returns:
            The count; None where the objective cannot run on fake tensors, which is logged once.
        """
        if self._copied is None:
            return None
        objective, mode = self._copied
        phase_of = getattr(objective, "phase", None)
        phase = "" if phase_of is None else str(phase_of(batch["step"]))
        if phase not in self._known:
            self._known[phase] = self._tried(lambda: float(_count_flops(objective, mode, batch)))
        return self._known[phase]

    def _tried(self, work: Callable[[], ResultT]) -> ResultT | None:
        try:
            return work()
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning(
                "no MFU in the log: FLOPs of %s cannot be counted: %s", self._name, reason
            )
            return None


def flops_per_image(objective: Objective, batch: Batch) -> int:
    """Least FLOPs of the forward and backward pass for one image.

    Args:
        objective: Its module holds real, fake or meta tensors; it stays as it is.
        batch: At least one row, with `step`; of its captions the one nearest to the mean length is taken.
    """
    copied, mode = fake_copy(objective)
    return _count_flops(copied, mode, batch)


def _count_flops(objective: Objective, mode: FakeTensorMode, batch: Batch) -> int:
    for part in objective.module.modules():  # so that no forward pass counts twice
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False  # type: ignore[assignment]
    with mode:
        row = {name: _fake_rows(value) for name, value in _typical_row(batch).items()}
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter, _ScalarsAreOne():  # type: ignore[no-untyped-call]
            torch.autograd.backward(objective.loss(row, torch.Generator()).total)
            _rehearse(objective, row)
    return int(counter.get_total_flops())


def _rehearse(objective: Objective, batch: Batch) -> None:
    """What an objective does before its loss, where it does more than look things up."""
    rehearse = getattr(objective, "rehearse", None)
    if rehearse is not None:
        rehearse(batch)


def _fake_rows(value: object) -> object:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _typical_row(batch: Batch) -> Batch:
    """One row, with the caption whose length is nearest to the mean."""
    best, captions = 0, batch.get("captions")
    if captions and all(captions):
        lengths = [len(caption) for caption in captions]
        mean = sum(lengths) / len(lengths)
        best = min(range(len(lengths)), key=lambda row: abs(lengths[row] - mean))
    rows = slice(best, best + 1)
    return {k: v[rows] if isinstance(v, Tensor | list) else v for k, v in batch.items()}


# --- memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """Bytes at the highest moment."""

    weights: int
    """Parameters and buffers."""
    gradients: int = 0
    optimizer: int = 0
    """Moments, and the moving average where there is one."""
    activations: int = 0
    """Everything else: activations, copies of weights in another dtype, inputs."""

    @property
    def peak(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


class LiveBytes(_ScalarsAreOne):
    """Counts the bytes of all storages that are alive; each counts once, however many tensors share it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: object, shards: int = 1) -> None:
        """Count a tensor's storage, or one of several shards of it, for as long as it lives."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() // shards
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def shard(self, tensor: Tensor, shards: int) -> None:
        """From now on count one of several shards of a tensor's storage, which counted whole."""
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes() // shards
        self.now += size - self._sizes[key]
        self._sizes[key] = size

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            self.add(leaf)
        return result


def num_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    return sum_of_bytes({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def sum_of_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, one by one."""
    return sum(t.numel() * t.element_size() for t in tensors)


def predict_step(
    objective: Objective, batch: Batch, loop: LoopConfig, optim: OptimConfig, *, num_ranks: int = 1
) -> Footprint:
    """Memory of the training step in one process, at the end of the run, when nothing is frozen for the time being.

    It is a GPU's step: attention has the precision of all else, as it has not on a CPU.

    Args:
        objective: Its module holds real or fake tensors; real ones are changed.
        batch: `loop.batch_size` rows; fake ones for a fake module.
        loop: Precision, accumulation, moving average, and whether what trains is sharded.
        optim: The optimiser.
        num_ranks: Processes that train together.
    """
    stand_in = getattr(objective, "stand_in", None)
    batch = batch if stand_in is None else stand_in(batch)
    device = next(objective.module.parameters()).device
    shards = num_ranks if uses_fsdp(loop, World(0, num_ranks, device)) else 1
    step = TrainingStep(objective, loop, optim, World(0, 1, device))
    set_train_mode(step.module, everything=loop.train_mode == "all")
    trained = list(step.parameters.values())
    _fill_gradients(trained)
    step.optimizer.step(0)  # from now on the optimiser has its moments
    step.optimizer.zero_grad()
    averages = step.average.averages if step.average is not None else {}
    states = (*averages.values(), *step.optimizer.tensors().values())
    # gradients are there before the pass where another one went before, and in the buckets of DDP
    if loop.passes_per_step(num_ranks) > 1 or num_ranks > shards:
        _fill_gradients(trained)
    with LiveBytes() as live, ExitStack() as hooks:
        for tensor in (*trained, *states, *(p.grad for p in trained)):
            live.add(tensor, shards)
        for tensor in (*step.module.parameters(), *step.module.buffers(), *batch.values()):
            live.add(tensor)
        if shards > 1:  # what lies in no block has whole gradients until the end of the pass
            for parameter in chain(*units(step.module)[:-1]):
                hook: Any = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p: live.shard(p.grad, shards)
                )
                hooks.callback(hook.remove)
        with torch.autocast(device.type, torch.bfloat16, enabled=loop.precision == "bf16"):
            _rehearse(objective, batch | {"step": loop.steps - 1})
        draws = RowGenerator(loop.seed, loop.steps - 1, range(loop.batch_size))
        step([with_targets(batch, objective, loop.batch_size, draws)], loop.steps - 1)
    gradients = sum_of_bytes(trained) // shards
    weights = num_bytes(step.module) - sum_of_bytes(trained) + gradients
    optimizer = sum_of_bytes(states) // shards
    peak = live.peak + gathered_bytes(step.module, shards)
    return Footprint(weights, gradients, optimizer, max(0, peak - weights - gradients - optimizer))


def _fill_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def predict_inference(
    module: nn.Module, inputs: Tensor, work: Callable[[Tensor], object]
) -> Footprint:
    """Memory of `work` on the inputs, without gradients; module and inputs hold real or fake tensors."""
    weights = num_bytes(module)
    with torch.no_grad(), LiveBytes() as live:
        for tensor in (*module.parameters(), *module.buffers(), inputs):
            live.add(tensor)
        work(inputs)
    return Footprint(weights, activations=live.peak - weights)


def training_batch(pixels: Tensor) -> Batch:
    """A batch with a caption for every image."""
    names = [str(row) for row in range(len(pixels))]
    return {"ids": names, "pixels": pixels, "captions": names}


class FullLength:
    """Stands for a tokenizer that makes every caption as long as it may be."""

    eos_token_id = 0

    def __init__(self, length: int | None) -> None:
        self._length = length or LONGEST_CAPTION

    def __call__(self, texts: Sequence[str], **_: object) -> SimpleNamespace:
        """Token ids, one short of the length, as the end token comes behind them."""
        return SimpleNamespace(input_ids=[[0] * (self._length - 1) for _ in texts])
