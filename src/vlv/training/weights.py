"""Which weights train, and weights out of checkpoints into modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlv.errors import CheckpointError
from vlv.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
)
from vlv.training.sharding import share, share_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor, nn


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
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on a device; tensors that are there already are left alone."""
    there = all(t.device == device for t in (*module.parameters(), *module.buffers()))
    return module if there else module.to(device)


def store_frozen(module: nn.Module, dtype: torch.dtype, *, keep: Iterable[Any] = ()) -> None:
    """Hold frozen submodules in another dtype, stored buffers included; what trains and `keep` stay as they are."""
    kept = {id(t) for part in keep if part for t in _stored(part)}
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            for tensor in _stored(part):
                if tensor.is_floating_point() and id(tensor) not in kept:
                    tensor.data = tensor.data.to(dtype)


def _stored(module: nn.Module) -> Iterable[Tensor]:
    return module.state_dict(keep_vars=True).values()


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers of submodules that train, such as running means of batch norms."""
    trained = {
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        if any(p.requires_grad for p in part.parameters())
        for buffer, _ in part.named_buffers(recurse=False)
    }
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
        share(own[name]).copy_(share_of(value, own[name]))
