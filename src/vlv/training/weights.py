"""Which weights train, and weights from checkpoints into modules. Sharded ones are DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vlv.errors import CheckpointError, ConfigError
from vlv.training.checkpoint import Checkpoint, checkpoint_path, latest_checkpoint, load_checkpoint

Parameters = dict[str, nn.Parameter]


def trainable_parameters(module: nn.Module) -> Parameters:
    """Parameters that require a gradient, by name; a shared parameter appears once, under its first name.

    Raises:
        ConfigError: Nothing is trainable, or a trainable parameter is not float32 (the master weights).
    """
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise ConfigError(
            f"{type(module).__name__} has no parameter that requires a gradient; unfreeze a part"
        )
    for name, parameter in found.items():
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name} is {parameter.dtype}, but master weights are float32; load the model in float32 "
                "and set loop.precision to bf16 for the arithmetic"
            )
    return found


def set_train_mode(module: nn.Module, *, everything: bool = False) -> None:
    """Train mode, except for submodules whose parameters are all frozen: they keep eval mode (no dropout, no drift).

    Args:
        module: Changed in place.
        everything: Frozen submodules too, as in the authors' code, whose frozen vision tower drops paths at random.
    """
    module.train()
    if everything:
        for part in module.modules():  # an encoder's own train() spares its frozen vision tower
            part.training = True
        return
    for part in module.modules():
        if not part.training:  # with a part around it
            continue
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on a device; tensors that are there already are left alone."""
    there = all(t.device == device for t in (*module.parameters(), *module.buffers()))
    return module if there else module.to(device)


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers of submodules that train, such as running means of batch norms."""
    trained = set()
    for name, part in module.named_modules():
        buffers = [buffer for buffer, _ in part.named_buffers(recurse=False)]
        if buffers and any(p.requires_grad for p in part.parameters()):
            trained |= {f"{name}.{buffer}" if name else buffer for buffer in buffers}
    persistent = module.state_dict(keep_vars=True)
    return {name: persistent[name] for name in sorted(trained & persistent.keys())}


def load_trained(
    module: nn.Module, run_dir: Path, *, ema: bool = True, part: str = "", best: bool = False
) -> int:
    """Load the weights of a run's newest good checkpoint into a module; return their step.

    Args:
        module: Gets the weights; parameters that were not trained keep their values.
        run_dir: Folder of the run.
        ema: Prefer the moving average, where the run kept one.
        best: The checkpoint that `loop.keep_best` kept instead.
        part: Only the weights below this name, such as "encoder", into a module that is that part.

    Raises:
        CheckpointError: There is no checkpoint, or it does not fit the module.
    """
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no checkpoint; train the run first")
    if best:
        kept = checkpoint.state.get("best")
        if not kept:
            raise CheckpointError(f"{run_dir} kept no best checkpoint; set loop.keep_best")
        checkpoint = load_checkpoint(checkpoint_path(run_dir / "checkpoints", kept["step"]))
    weights = checkpoint.tensors("trainable") | (checkpoint.tensors("ema") if ema else {})
    if part:
        prefix = f"{part}."
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not weights:
            raise CheckpointError(
                f"{checkpoint.path} holds no weights of {part!r}; they were not trained"
            )
    load_weights(module, weights, checkpoint, must_hold=set())
    return checkpoint.step


@torch.no_grad()
def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], checkpoint: Checkpoint, *, must_hold: set[str]
) -> None:
    """Copy weights by name; none may be unknown or of another shape, and `must_hold` may not be missing."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    if missing := must_hold - weights.keys():
        raise CheckpointError(
            f"{checkpoint.path} lacks {min(missing)}; it belongs to another model"
        )
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            there = tuple(own[name].shape) if name in own else "absent"
            raise CheckpointError(
                f"{checkpoint.path} holds {name} {tuple(value.shape)}, which is {there} in this model; "
                "it belongs to another model"
            )
    for name, value in weights.items():
        own[name].copy_(sharded_like(value, own[name]))


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as another one is."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
