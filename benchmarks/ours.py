"""Our contestants: the step of the training loop, in this process or in several that were launched together.

The gradient, the exchange with other processes, clipping and AdamW are those of `vlv train`.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from models import SIZES, Models, make_batch, make_models
from vlv.config import LoopConfig, OptimConfig, Stage1Config, Stage2Config
from vlv.models.draws import RowGenerator
from vlv.training.distributed import World, join_world
from vlv.training.microbatches import num_rows, rows_of, with_targets
from vlv.training.precision import store_frozen
from vlv.training.stages import Stage1, Stage2
from vlv.training.step import TrainingStep
from vlv.training.weights import set_train_mode

if TYPE_CHECKING:
    from vlv.training.objective import Batch

STEP = 10**6
"""The number of every step, so that all draw the same noise."""
COMPILED = ("vision_tower", "language", "text_encoder", "unet")
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Variant:
    """How a step is made."""

    models: str
    """Size, see `models.SIZES`."""
    stage: int
    precision: str
    batching: str = "auto"
    vae_precision: str = "fp32"
    compiled: bool = False
    """All parts of stage 1 but the VAE, which takes minutes in the first step."""
    seed: int = 0
    """Of images, captions and noise."""


class Ours:
    """A step as the training loop does it.

    Args:
        objective: Stage 1 or stage 2.
        precision: fp32 or bf16; in bf16 the VAE keeps the precision in which it comes.
        batches: Global batches by name; every process takes its rows.
        world: The processes.
        seed: Of the noise.
        compiled: See `loop.compile`.
    """

    def __init__(
        self,
        objective: Stage1 | Stage2,
        precision: str,
        batches: dict[str, Batch],
        world: World = ALONE,
        seed: int = 0,
        compiled: str | tuple[str, ...] = "none",
    ) -> None:
        if precision == "bf16":
            store_frozen(objective.module, torch.bfloat16, keep=[objective.decoder.vae])
        set_train_mode(objective.module)
        size = num_rows(next(iter(batches.values()))) // world.num_ranks
        loop = LoopConfig(
            steps=2 * STEP, batch_size=size, precision=precision, seed=seed, compile=compiled
        )
        optim = OptimConfig(lr=1e-5, schedule="constant", warmup_steps=0)
        self.objective, self.size = objective, size
        self.training_step = TrainingStep(objective, loop, optim, world)
        own = slice(world.rank * size, (world.rank + 1) * size)
        self.batches = {name: rows_of(batch, own) for name, batch in batches.items()}

    def step(self, name: str) -> torch.Tensor:
        """Train on a batch; the loss of the global batch, which nobody has to wait for."""
        draws = RowGenerator(0, STEP, range(self.size))
        batch = with_targets(self.batches[name], self.objective, self.size, draws)
        return self.training_step([batch], STEP).values["loss"]


def make_batches(models: Models, variant: Variant) -> dict[str, Batch]:
    """A batch as it is, and in stage 1 with latents, and with latents and features, in place of pixels."""
    sizes = SIZES[variant.models]
    batch = make_batch(sizes, models.caption_decoder.tokenizer, seed=variant.seed)
    if variant.stage == 2:
        return {"live": rows_of(batch, slice(sizes.captions))}
    with torch.no_grad():
        posterior = models.decoder.posterior(batch["pixels"])
        features = models.encoder.eval().image_features(batch["pixels"])
    latents = batch | {"latents_mean": posterior.mean, "latents_std": posterior.std}
    both = latents | {"features": features}
    del both["pixels"]
    return {"live": batch, "latents": latents, "features": both}


def make_ours(models: Models, variant: Variant, world: World = ALONE) -> Ours:
    """A contestant with weights of its own."""
    own = copy.deepcopy(models)
    batches = make_batches(own, variant)
    if variant.vae_precision == "bf16":
        own.decoder.vae.to(torch.bfloat16)
    objective: Stage1 | Stage2
    if variant.stage == 1:
        objective = Stage1(own.encoder, own.decoder, Stage1Config())
    else:
        own.decoder.unet = own.decoder.vae = None
        settings = Stage2Config(batching=variant.batching)  # type: ignore[arg-type]
        objective = Stage2(own.encoder, own.decoder, own.caption_decoder, settings)
    compiled = COMPILED if variant.compiled else "none"
    return Ours(objective, variant.precision, batches, world, variant.seed, compiled)


class Processes:
    """A contestant of one or more processes, started as `torchrun` starts them; they sleep between the steps.

    Args:
        variant: What they do.
        count: Processes, each with its share of the global batch.
        threads: Of each.
    """

    def __init__(self, variant: Variant, count: int = 2, threads: int = 1) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, __file__, json.dumps(asdict(variant))]
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": str(threads),
            **({"OMP_WAIT_POLICY": "PASSIVE"} if count > 1 else {}),
        }
        self._processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def step(self, name: str) -> float:
        """Let all of them train on a batch; the loss of the global batch."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
        losses = [_reply(process) for process in self._processes]
        return losses[0]

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.communicate()


def _reply(process: Any) -> float:
    """The loss that a process tells; other lines are the libraries'."""
    for line in process.stdout:
        if line.startswith("loss "):
            return float(line.split()[1])
    raise SystemExit("a process of the benchmark ended; its message is above")


def work(variant: Variant) -> None:
    """One of the processes: a step for every line that comes in, until there are no more."""
    world = join_world()
    ours = make_ours(make_models(variant.models), variant, world)
    for line in sys.stdin:
        print(f"loss {float(ours.step(line.strip()))!r}", flush=True)


if __name__ == "__main__":
    work(Variant(**json.loads(sys.argv[1])))
