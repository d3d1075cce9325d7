"""How a model is fitted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raysynth.config.base import Section

ZeroStage = Literal[0, 1, 2, 3]


class TrainingConfig(Section):
    """Progress is counted in samples seen, so it means the same on any number of workers."""

    global_batch_size: int = Field(64, ge=1)
    """Samples per optimizer step over all workers; the result does not depend on their number."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward pass of one worker; smaller saves memory. None: as large as possible."""
    max_seen_samples: int = Field(640_000, ge=0)
    """0 leaves pretrained weights as they were published."""
    max_seconds: float | None = Field(None, gt=0)
    """Stop early, with a bundle, after so long (a laptop, a queue's time limit)."""
    num_workers: int = Field(1, ge=1)
    min_workers: int | None = Field(None, ge=1)
    """Go on with fewer workers while nodes are missing, down to so many; None: wait for all."""
    use_gpu: bool = False
    threads_per_worker: int = Field(1, ge=1)
    """OpenMP threads of a CPU worker. Workers times threads should not exceed the cores."""
    engine: Literal["auto", "ddp", "deepspeed"] = "auto"
    """`auto`: a plain process on one worker; on several DDP, or the first DeepSpeed stage at which
    weights, gradients and moments take half of a worker's memory at most."""
    zero_stage: ZeroStage = 2
    """DeepSpeed ZeRO stage, for the engine `deepspeed`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """Compile the network: minutes at the start of every worker, then faster steps. Needs a C++
    compiler there."""
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of gradients and of their squares."""
    weight_decay: float = Field(0.0, ge=0)
    warmup_samples: int = Field(0, ge=0)
    """The learning rate rises linearly from 0 over so many samples."""
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Per optimizer step; warmed up as (1 + step) / (10 + step). 0 keeps the plain weights."""
    open_shards: int = Field(8, ge=1)
    """Shards a batch is mixed from; a multiple of num_workers, and global_batch_size of it."""
    checkpoint_every: int = Field(64_000, ge=1)
    """Samples between checkpoints."""
    keep_checkpoints: int = Field(3, ge=1)
    log_every: int = Field(640, ge=1)
    """Samples between logged losses."""
    max_failures: int = Field(3, ge=0)
    """Worker losses after which the run goes on from its last checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.global_batch_size % self.open_shards:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of open_shards "
                f"{self.open_shards}: change one of them"
            )
        if self.fewest_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} exceeds num_workers {self.num_workers}: change one"
            )
        for count in range(self.fewest_workers, self.num_workers + 1):
            self._check_share(count)
        return self

    def _check_share(self, num_workers: int) -> None:
        """Whether the batch can be shared by so many workers."""
        if self.open_shards % num_workers:
            raise ValueError(
                f"open_shards {self.open_shards} is not a multiple of num_workers {num_workers}: "
                "change one of them"
            )
        share, micro = self.global_batch_size // num_workers, self.micro_batch_size
        if micro is not None and share % micro:
            raise ValueError(
                f"a worker's share of the batch, {share}, is not a multiple of micro_batch_size "
                f"{micro}: change one of them"
            )

    @property
    def fewest_workers(self) -> int:
        """Workers that training goes on with."""
        return self.min_workers or self.num_workers

    @property
    def local_batch_size(self) -> int:
        """Samples per optimizer step of one worker."""
        return self.global_batch_size // self.num_workers

    @property
    def forward_batch_size(self) -> int:
        """Samples per forward pass of one worker."""
        return self.micro_batch_size or self.local_batch_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward passes of one worker per optimizer step."""
        return self.local_batch_size // self.forward_batch_size
