"""AdamW with a learning rate per name prefix, the schedule as a function of the step, and the weight average."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vlv.config import LoopConfig, OptimConfig
from vlv.errors import CheckpointError, ConfigError
from vlv.training.weights import Parameters, sharded_like

logger = logging.getLogger(__name__)


def learning_rate_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Share of the full learning rate that step `step` (counted from 0) of `total_steps` uses."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    end = config.decay_steps or total_steps
    progress = (step - config.warmup_steps) / max(1, end - config.warmup_steps)
    match config.schedule:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "cosine_wave":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            share = max(0.0, 1 - progress)
        case "constant":
            share = 1.0
    return config.end_share + (1 - config.end_share) * share


def name_scale(name: str, scales: Mapping[str, float]) -> float:
    """Factor of the longest prefix in `scales` that `name` starts with, at a dot.

    >>> name_scale("queries", {"queries": 10.0}), name_scale("queries_norm.weight", {"queries": 10.0})
    (10.0, 1.0)
    """
    fitting = [prefix for prefix in scales if f"{name}.".startswith(f"{prefix}.")]
    return scales[max(fitting, key=len)] if fitting else 1.0


class Optimizer:
    """AdamW over named parameters, which may be sharded.

    Args:
        parameters: What trains, by name.
        config: Rates and decay.
        total_steps: Length of the run, on which the schedule depends.

    Raises:
        ConfigError: A prefix of `lr_scale` fits no parameter, or the warm-up is as long as the run.
    """

    def __init__(self, parameters: Parameters, config: OptimConfig, total_steps: int) -> None:
        if config.warmup_steps and config.warmup_steps >= total_steps:
            raise ConfigError(
                f"optim.warmup_steps is {config.warmup_steps}, but the run has only {total_steps} steps; lower it"
            )
        self.parameters, self.config, self.total_steps = parameters, config, total_steps
        self._adamw = torch.optim.AdamW(
            self._groups(), lr=config.lr, betas=config.betas, fused=True
        )

    def _groups(self) -> list[dict[str, object]]:
        """One group per learning-rate factor."""
        scales = self.config.lr_scale
        for prefix in scales:
            if not any(f"{name}.".startswith(f"{prefix}.") for name in self.parameters):
                known = sorted({name.split(".")[0] for name in self.parameters})
                raise ConfigError(
                    f"optim.lr_scale names {prefix!r}, but no trained parameter starts with it; "
                    f"trained are {', '.join(known)}"
                )
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(name_scale(name, scales), []).append(parameter)
        decay = self.config.weight_decay
        return [{"params": ps, "lr_scale": s, "weight_decay": decay} for s, ps in groups.items()]

    def learning_rate(self, step: int) -> float:
        """Where the schedule is at step `step`, counted from 0."""
        return self.config.lr * learning_rate_factor(step, self.total_steps, self.config)

    def clip(self) -> Tensor:
        """Scale the gradients down to the largest norm allowed; returns their norm before, a scalar on the device."""
        trained = self.parameters.values()
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.config.clip is not None:
            clip_grads_with_norm_(trained, self.config.clip, norm)
        return norm

    def step(self, step: int, finite: Tensor | None = None) -> None:
        """Update the parameters as step `step`, counted from 0; unless `finite`, a scalar on the device, is False."""
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate(step) * group["lr_scale"]
        if finite is not None:  # as torch.amp.GradScaler does: the device decides, and nobody waits
            self._adamw.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        self._adamw.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as flat tensors: `<parameter name>:<exp_avg | exp_avg_sq | step>`."""
        state = self._adamw.state
        return {
            f"{name}:{key}": value
            for name, parameter in self.parameters.items()
            for key, value in state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the state that `tensors` returned, whole tensors.

        Raises:
            CheckpointError: The state names a parameter that is not trained here, or has another shape.
        """
        self._adamw.state.clear()
        for key, value in tensors.items():
            name, _, part = key.rpartition(":")
            parameter = self.parameters.get(name)
            if parameter is None or (value.ndim and value.shape != parameter.shape):
                raise CheckpointError(
                    f"the optimiser state {key} {tuple(value.shape)} fits no trained parameter; start a new run folder"
                )
            value = sharded_like(value, parameter) if value.ndim else value
            self._adamw.state[parameter][part] = value.to(parameter.device)


class BadSteps:
    """Counts steps that were skipped because the loss or its gradient was not finite, and ends a run of them.

    On a GPU a step is judged when the next one has been queued, so that nobody waits for the device.

    Args:
        config: With `max_bad_steps`.
        optim: With the learning rate, for the advice.

    Attributes:
        skipped: Skipped steps that were counted so far.
    """

    def __init__(self, config: LoopConfig, optim: OptimConfig) -> None:
        self.config, self.optim = config, optim
        self.skipped = self.in_a_row = 0
        self._waiting: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, finite: Tensor) -> None:
        """Take note of a step, counted from 0, and of a boolean scalar on the device."""
        self.settle()
        if finite.device.type == "cuda":
            copy = torch.empty((), dtype=torch.bool, pin_memory=True)
            copy.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._waiting = step, copy, event
        else:
            self._waiting = step, finite, None
            self.settle()

    def settle(self) -> None:
        """Judge the last step.

        Raises:
            ConfigError: Too many in a row were bad.
        """
        if self._waiting is None:
            return
        step, finite, event = self._waiting
        self._waiting = None
        if event is not None:
            event.synchronize()
        if bool(finite):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        logger.warning(
            "step %d: the loss or its gradient is not finite; the step is skipped", step + 1
        )
        if self.in_a_row >= self.config.max_bad_steps:
            raise ConfigError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row up to step "
                f"{step + 1}; lower optim.lr (now {self.optim.lr}) or set loop.precision to fp32"
            )

    def state_dict(self) -> dict[str, int]:
        """JSON values, after `settle`."""
        return {"skipped_steps": self.skipped, "bad_steps": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Set what `state_dict` returned."""
        self.skipped, self.in_a_row = state["skipped_steps"], state["bad_steps"]


class MovingAverage:
    """Exponential moving average of the trained parameters (not in the paper; off by default).

    The decay grows from 0.1 towards `decay`: min(decay, (1 + step) / (10 + step)), so that a short run is not
    dominated by its first weights.
    """

    def __init__(self, parameters: Parameters, decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        targets = [p.detach() for p in self.parameters.values()]
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update(list(self.averages.values()), targets, 0)

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the averages, whole tensors.

        Raises:
            CheckpointError: The names differ from the trained parameters.
        """
        if tensors.keys() != self.averages.keys():
            raise CheckpointError(
                "the moving average holds other parameters than the run; start a new run folder"
            )
        for name, value in tensors.items():
            self.averages[name].copy_(sharded_like(value, self.parameters[name]))
