"""How a step is taken: one plain process, DistributedDataParallel, or DeepSpeed, by accelerate."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from raysynth.config import TrainingConfig
from raysynth.config.training import ZeroStage
from raysynth.models.gan import Adversaries
from raysynth.training.context import WorkerContext
from raysynth.training.memory import BUCKET_ELEMENTS, EngineChoice, choose_engine
from raysynth.training.saving import Key, Saved

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, as torch calls them."""


@contextmanager
def open_engine(
    module: nn.Module, config: TrainingConfig, context: WorkerContext
) -> Iterator[Engine]:
    """The engine for the block. accelerate keeps its state per process; it is cleared after."""
    if config.use_gpu:
        torch.cuda.set_device(local_gpu())
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    choice = choose_engine(
        config,
        sum(count for count, _ in counts),
        sum(count for count, is_trained in counts if is_trained),
        memory_of_worker(config),
    )
    if context.world_size > 1:  # on machines that differ all take the same
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if config.use_gpu else "gloo")
        box = [choice]
        torch.distributed.broadcast_object_list(box, src=0)
        (choice,) = box
    if context.rank == 0:
        logger.info("engine %s: %s", choice, choice.reason)
    if config.compile:
        module.compile()
    try:
        if choice.name == "deepspeed":
            yield DeepSpeedEngine(module, config, context, choice)
        else:
            yield Engine(module, config, context, choice)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def memory_of_worker(config: TrainingConfig) -> float:
    """Bytes of this worker's GPU; without one, of this machine, shared with the other workers."""
    if config.use_gpu:
        return float(torch.cuda.mem_get_info(local_gpu())[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / config.num_workers


def local_gpu() -> int:
    """This worker's number among those of its machine, by which it takes a GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Engine:
    """A module and its AdamW on this worker's device: plain, or DDP if there are several workers.

    Attributes:
        choice: which engine this is, and why.
        module: what to call in the forward pass; it may be wrapped.
        bare_module: the same without wrappers.
        parameters: those of its parameters that are trained, in its order.
        names: of these.
        device: where batches must be.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        context: WorkerContext,
        choice: EngineChoice,
    ) -> None:
        self.choice = choice
        self.rank, self.world_size = context.rank, context.world_size
        self.max_grad_norm = config.max_grad_norm
        self.num_micro_batches = config.gradient_accumulation_steps
        self.accelerator = self._accelerator(config)
        self.device: torch.device = self.accelerator.device
        self.bare_module = module
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list[Any](trained.values())
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
            # Else every gradient is held twice.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
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
        # Under DDP gradients lie in the buckets that are exchanged: they must stay there.
        self.optimizer.zero_grad(set_to_none=self.world_size == 1)
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

    def owned(self) -> list[torch.Tensor]:
        """This worker's run of every trained parameter, flattened, in order: views.

        Every worker owns an equal part: it averages and writes that, and no other does.
        """
        return [p.detach().view(-1)[self._part_of(p.numel())] for p in self.parameters]

    def whole(self, owned: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole parameters from runs like those of `owned`. All ranks call it."""
        shapes = [self._shape(p) for p in self.parameters]
        if self.world_size == 1:
            return [run.view(shape) for run, shape in zip(owned, shapes, strict=True)]
        return [self._gather(run, shape) for run, shape in zip(owned, shapes, strict=True)]

    def runs(self, average: list[torch.Tensor]) -> dict[Key, torch.Tensor]:
        """What this worker writes into a checkpoint; `average` are runs like those of `owned`.

        What is frozen is left out: it is large, and where it came from.
        """
        runs: dict[Key, torch.Tensor] = {}
        for name, p, weight, mean in zip(
            self.names, self.parameters, self.owned(), average, strict=True
        ):
            start = self._part_of(self._shape(p).numel()).start
            runs[Key("weight", name, start)] = weight
            runs[Key("average", name, start)] = mean
        for name, p in zip(self.names, self.parameters, strict=True):
            for start, tensor, place in self._optimized(p):
                if self._holds_whole:
                    start, place = self._part_of(p.numel()).start, self._part_of(p.numel())
                for moment in MOMENTS:
                    found = self._adamw.state.get(tensor, {}).get(moment)
                    if found is not None:
                        runs[Key(moment, name, start)] = found.view(-1)[place]
        if self.rank == 0:
            runs |= {Key("buffer", name, 0): b.view(-1) for name, b in self._buffers().items()}
        return runs

    def num_updates(self) -> int:
        """Updates that the optimizer has made: AdamW corrects its moments by it."""
        any_state: dict[str, torch.Tensor] = next(iter(self._adamw.state.values()), {})
        return int(any_state.get("step", 0))

    def restore(self, saved: Saved, average: list[torch.Tensor], num_updates: int) -> None:
        """Takes over what the workers of a checkpoint wrote, under whatever engine.

        Args:
            saved: the checkpoint's tensors.
            average: is overwritten; runs like those of `owned`.
            num_updates: of the optimizer by then.

        Raises:
            UnfitCheckpoint: the checkpoint is of another architecture.
        """
        # On all ranks alike, before any of them waits for another.
        shapes = map(self._shape, self.parameters)
        saved.check("weight", {n: s.numel() for n, s in zip(self.names, shapes, strict=True)})
        for name, p, mean in zip(self.names, self.parameters, average, strict=True):
            part = self._part_of(self._shape(p).numel())
            mean.copy_(saved.read("average", name, part.start, part.stop))
            self._restore_weight(saved, name, p)
            for start, tensor, place in self._optimized(p):
                stop = start + place.stop - place.start
                if tensor is not p:  # DeepSpeed's own copy
                    tensor.data.view(-1)[place].copy_(saved.read("weight", name, start, stop))
                if num_updates:
                    state = self._state_of(tensor, num_updates)
                    for moment in MOMENTS:
                        state[moment].view(-1)[place].copy_(saved.read(moment, name, start, stop))
        for name, buffer in self._buffers().items():
            buffer.copy_(saved.read("buffer", name, 0, buffer.numel()).view(buffer.shape))

    def _part_of(self, count: int) -> slice:
        """This worker's part of so many elements."""
        size = -(-count // self.world_size)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))

    def _shape(self, p: Any) -> torch.Size:
        """Of a whole parameter."""
        shape: torch.Size = p.shape
        return shape

    _holds_whole = True
    """Whether every worker holds the moments of all parameters."""

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """The optimizer without wrappers."""
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def _optimized(self, p: Any) -> Iterator[tuple[int, torch.Tensor, slice]]:
        """Where the optimizer keeps what it has of a parameter on this worker.

        Yields:
            First element of a run of the flattened parameter, the tensor that the optimizer steps,
            and the run's place in that tensor, flattened.
        """
        yield 0, p, slice(0, p.numel())

    def _state_of(self, tensor: torch.Tensor, num_updates: int) -> dict[str, torch.Tensor]:
        """The optimizer's state of a tensor that it steps; made, if it has not stepped yet."""
        state: dict[str, torch.Tensor] = self._adamw.state[tensor]
        state["step"] = torch.tensor(float(num_updates), device=tensor.device)
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(tensor))
        return state

    def _restore_weight(self, saved: Saved, name: str, p: Any) -> None:
        p.data.copy_(saved.read("weight", name, 0, p.numel()).view(p.shape))

    def _buffers(self) -> dict[str, torch.Tensor]:
        """What the module keeps beside its parameters."""
        kept = self.bare_module.state_dict(keep_vars=True).items()
        return {name: one for name, one in kept if not isinstance(one, nn.Parameter)}

    def _gather(self, run: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        size = -(-shape.numel() // self.world_size)
        mine = torch.nn.functional.pad(run, (0, size - run.numel()))
        pieces = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(pieces, mine)
        return torch.cat(pieces)[: shape.numel()].view(shape)

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]


class DeepSpeedEngine(Engine):
    """ZeRO 0-3. DeepSpeed averages, clips and steps by itself; stages 1-3 skip bad gradients."""

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        context: WorkerContext,
        choice: EngineChoice,
    ) -> None:
        self.zero_stage = choice.zero_stage
        if not config.use_gpu:
            _skip_compilation()
        super().__init__(module, config, context, choice)

    def _accelerator(self, config: TrainingConfig) -> Accelerator:
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        plugin = DeepSpeedPlugin(
            hf_ds_config=deepspeed_config(config, self.zero_stage), zero3_init_flag=False
        )
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

    def owned(self) -> list[torch.Tensor]:
        """This worker's run of every trained parameter; under ZeRO-3 all that it holds of it."""
        if self.zero_stage != 3:
            return super().owned()
        parts = [self._part_of(p.ds_numel) for p in self.parameters]
        return [
            p.ds_tensor.detach().view(-1)[: part.stop - part.start]
            for p, part in zip(self.parameters, parts, strict=True)
        ]

    def _shape(self, p: Any) -> torch.Size:
        return torch.Size(p.ds_shape) if self.zero_stage == 3 else super()._shape(p)

    @property
    def _holds_whole(self) -> bool:  # type: ignore[override]
        return self.zero_stage == 0

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.module.optimizer
        return optimizer if self.zero_stage == 0 else optimizer.optimizer  # type: ignore[attr-defined]

    def _optimized(self, p: Any) -> Iterator[tuple[int, torch.Tensor, slice]]:
        """Where DeepSpeed keeps this worker's run of a parameter: in a tensor of many such runs."""
        zero = self.module.optimizer
        if self.zero_stage == 0:
            yield from super()._optimized(p)
        elif self.zero_stage == 3:
            group, first, _ = zero.grad_position[zero.get_param_id(p)]
            part = self._part_of(p.ds_numel)
            place = slice(int(first), int(first) + part.stop - part.start)
            yield part.start, zero.fp32_partitioned_groups_flat[group], place
        elif p._hp_mapping is not None:
            here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            flat = zero.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
            yield here.start, flat, slice(there.start, there.start + there.numel)

    def _restore_weight(self, saved: Saved, name: str, p: Any) -> None:
        if self.zero_stage != 3:
            super()._restore_weight(saved, name, p)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([p], modifier_rank=0):
            if self.rank == 0:
                super()._restore_weight(saved, name, p)


def _parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """All parameters that are trained, with what the learning rate is multiplied by."""
    if isinstance(module, Adversaries):
        return [
            {"params": list(module.generator.parameters()), "rate": 1.0},
            {"params": list(module.discriminator.parameters()), "rate": module.discriminator_rate},
        ]
    return [{"params": [p for p in module.parameters() if p.requires_grad], "rate": 1.0}]


def deepspeed_config(config: TrainingConfig, zero_stage: ZeroStage) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe."""
    return {
        "train_micro_batch_size_per_gpu": config.forward_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": config.use_gpu,
            # By default stage 3 keeps a billion gathered weights: all of most networks.
            "stage3_max_live_parameters": BUCKET_ELEMENTS,
            "stage3_max_reuse_distance": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS // 4,
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own needs a compiler
        # Weights stay float32 as under the other engines; bf16.enabled would convert them.
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31 - 1,
    }


def _skip_compilation() -> None:
    """CPU workers exchange by gloo: without this, DeepSpeed compiles its own way for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
