"""How a step is taken: one plain process, DistributedDataParallel, or DeepSpeed, by accelerate."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from raysynth.config import TrainingConfig
from raysynth.errors import UnfitCheckpoint
from raysynth.models.gan import Adversaries
from raysynth.training.checkpoints import State
from raysynth.training.context import WorkerContext

logger = logging.getLogger(__name__)

EngineName = Literal["plain", "ddp", "deepspeed"]

STATE_FILE = "state.pt"
ZERO_TAG = "zero"


def choose_engine(config: TrainingConfig) -> tuple[EngineName, str]:
    """The engine that a recipe gets, and why."""
    if config.engine == "deepspeed":
        return "deepspeed", f"the recipe asks for DeepSpeed ZeRO-{config.zero_stage}"
    if config.num_workers == 1:
        return "plain", "one worker has nobody to exchange gradients with"
    if config.engine == "ddp":
        return "ddp", "the recipe asks for it"
    # ZeRO 1-3 costs a small model 1.7-2.1 times the step: it pays where memory is short.
    return "ddp", f"{config.num_workers} workers; ask for deepspeed where memory is short"


@contextmanager
def open_engine(
    module: nn.Module, config: TrainingConfig, context: WorkerContext
) -> Iterator[Engine]:
    """The engine for the block. accelerate keeps its state per process; it is cleared after."""
    name, reason = choose_engine(config)
    if context.rank == 0:
        logger.info("engine %s: %s", name, reason)
    try:
        if name == "deepspeed":
            yield DeepSpeedEngine(module, config, context)
        else:
            yield Engine(module, config, context)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


class Engine:
    """A module and its AdamW on this worker's device: plain, or DDP if there are several workers.

    Attributes:
        module: what to call in the forward pass; it may be wrapped.
        bare_module: the same without wrappers.
        parameters: those of its parameters that are trained, in its order.
        device: where batches must be.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, context: WorkerContext) -> None:
        self.rank, self.world_size = context.rank, context.world_size
        self.max_grad_norm = config.max_grad_norm
        self.num_micro_batches = config.gradient_accumulation_steps
        self.accelerator = self._accelerator(config)
        self.device: torch.device = self.accelerator.device
        self.bare_module = module
        self.parameters: list[Any] = [p for p in module.parameters() if p.requires_grad]
        self.module: Any
        self.optimizer: Any
        optimizer = torch.optim.AdamW(
            _parameter_groups(module),
            config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)

    def _accelerator(self, config: TrainingConfig) -> Accelerator:
        return Accelerator(
            cpu=not config.use_gpu,
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            gradient_accumulation_steps=self.num_micro_batches,
        )

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around each forward and backward pass: workers exchange gradients in the last alone."""
        with self.accelerator.accumulate(self.module):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a micro batch's gradients of its mean loss to the step's."""
        self.accelerator.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Clips and updates; a gradient that is not finite changes nothing.

        Returns:
            The gradient's norm before clipping, equal on all ranks; inf or nan: no update.
        """
        self._set_learning_rate(learning_rate)
        # On CPUs torch would take parameter by parameter.
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, foreach=True)
        )
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the workers."""
        if self.world_size == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total / self.world_size

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Waits for all workers."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def averaged_tensors(self) -> list[torch.Tensor]:
        """What the EMA follows: this worker's part of every trained parameter, in order."""
        return self.parameters

    def whole(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole parameters from what `averaged_tensors` or an EMA of it holds. All ranks call."""
        return tensors

    def part(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """This worker's part of whole parameters, the inverse of `whole`."""
        return tensors

    def save(self, folder: Path, ema: list[torch.Tensor]) -> None:
        """Writes the weights, the optimizer and the EMA. All ranks call it.

        What is frozen is left out: it is large, and where it came from.
        """
        whole_ema = self.whole(ema)
        if self.rank == 0:
            frozen = {n for n, p in self.bare_module.named_parameters() if not p.requires_grad}
            weights = self.bare_module.state_dict()
            state = {
                "module": {name: weights[name] for name in weights if name not in frozen},
                "optimizer": self.optimizer.state_dict(),
                "ema": whole_ema,
            }
            torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path, layout: State) -> list[torch.Tensor]:
        """Restores what `save` wrote.

        Args:
            folder: a verified checkpoint.
            layout: of the engine that wrote it.

        Returns:
            The EMA.

        Raises:
            UnfitCheckpoint: the checkpoint is another engine's, or of another number of workers.
        """
        self._check(layout)
        # weights_only: nothing but tensors and plain values can come out of the file.
        saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        weights = self.bare_module.state_dict() | saved["module"]
        self.bare_module.load_state_dict(weights)
        self.optimizer.load_state_dict(saved["optimizer"])
        return self.part(saved["ema"])

    def layout(self) -> State:
        """What a checkpoint's files depend on: `load` refuses another."""
        return {"engine": "torch"}

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]

    def _check(self, layout: State) -> None:
        if layout != self.layout():
            raise UnfitCheckpoint(
                f"the checkpoint was written by {layout} and this run is "
                f"{self.layout()}: go on with that engine and number of workers, or train under "
                "another name"
            )


class DeepSpeedEngine(Engine):
    """ZeRO 0-3. DeepSpeed averages, clips and steps by itself; stages 1-3 skip bad gradients."""

    def __init__(self, module: nn.Module, config: TrainingConfig, context: WorkerContext) -> None:
        self.zero_stage = config.zero_stage
        if not config.use_gpu:
            _skip_compilation()
        super().__init__(module, config, context)

    def _accelerator(self, config: TrainingConfig) -> Accelerator:
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config), zero3_init_flag=False)
        # cpu=True would drop the plugin without a word; the backend tells accelerate of the group.
        backend = "nccl" if config.use_gpu else "gloo"
        return Accelerator(
            cpu=False,
            gradient_accumulation_steps=self.num_micro_batches,
            deepspeed_plugin=plugin,
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        )

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around each forward and backward pass."""
        with super().micro_batch():
            self.module.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a micro batch's gradients of its mean loss to the step's."""
        self.module.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Clips and updates; a gradient that is not finite changes nothing."""
        self._set_learning_rate(learning_rate)
        if self.zero_stage == 0:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                self.module.module.zero_grad(set_to_none=True)  # AdamW skips what has none
            self.module.step()
            return norm
        self.module.step()
        return float(self.module.get_global_grad_norm())

    def averaged_tensors(self) -> list[torch.Tensor]:
        """What the EMA follows: under ZeRO-3 this worker's slice of every parameter."""
        if self.zero_stage != 3:
            return self.parameters
        return [p.ds_tensor for p in self.parameters]

    def whole(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole parameters: under ZeRO-3 the ranks' slices, in order, without the padding."""
        if self.zero_stage != 3:
            return tensors
        return [
            self._gather(piece)[: p.ds_numel].view(p.ds_shape)
            for piece, p in zip(tensors, self.parameters, strict=True)
        ]

    def part(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """This worker's part of whole parameters."""
        if self.zero_stage != 3:
            return tensors
        pieces = []
        for tensor, p in zip(tensors, self.parameters, strict=True):
            size = p.ds_tensor.numel()
            piece = torch.zeros_like(p.ds_tensor, dtype=torch.float32)
            mine = tensor.flatten()[self.rank * size : (self.rank + 1) * size]
            piece[: mine.numel()] = mine
            pieces.append(piece)
        return pieces

    def _gather(self, piece: torch.Tensor) -> torch.Tensor:
        pieces = [torch.empty_like(piece) for _ in range(self.world_size)]
        torch.distributed.all_gather(pieces, piece)
        return torch.cat(pieces)

    def save(self, folder: Path, ema: list[torch.Tensor]) -> None:
        """Writes DeepSpeed's own sharded checkpoint and the EMA. All ranks call it."""
        self.module.save_checkpoint(
            folder, tag=ZERO_TAG, save_latest=False, exclude_frozen_parameters=True
        )
        whole_ema = self.whole(ema)
        if self.rank == 0:
            torch.save({"ema": whole_ema}, folder / STATE_FILE)

    def load(self, folder: Path, layout: State) -> list[torch.Tensor]:
        """Restores what `save` wrote; see `Engine.load`.

        DeepSpeed's files are pickles: their SHA-256 has been compared with this run's own manifest.
        """
        self._check(layout)
        self.module.load_checkpoint(folder, tag=ZERO_TAG, load_module_strict=False)
        saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        return self.part(saved["ema"])

    def layout(self) -> State:
        """What a checkpoint's files depend on."""
        return {
            "engine": "deepspeed",
            "zero_stage": self.zero_stage,
            "num_workers": self.world_size,
        }


def _parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """All parameters that are trained, with what the learning rate is multiplied by."""
    if isinstance(module, Adversaries):
        return [
            {"params": list(module.generator.parameters()), "rate": 1.0},
            {"params": list(module.discriminator.parameters()), "rate": module.discriminator_rate},
        ]
    return [{"params": [p for p in module.parameters() if p.requires_grad], "rate": 1.0}]


def deepspeed_config(config: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe."""
    micro_batch_size = config.local_batch_size // config.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own needs a compiler
        # Weights stay float32 as under the other engines; bf16.enabled would convert them.
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31 - 1,
    }


def _skip_compilation() -> None:
    """CPU workers exchange by gloo: without this, DeepSpeed compiles its own way for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
