"""What a network costs, counted on tensors without content: neither memory nor a GPU is needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Built = TypeVar("Built")


@dataclass
class Count:
    """What a block of code did.

    Attributes:
        flops: floating-point operations of its matrix products and convolutions; a multiplication
            and an addition are two.
        peak_bytes: of tensors that it made, at the fullest moment; without parameters' gradients.
    """

    flops: int = 0
    peak_bytes: int = 0


class Hollow:
    """Networks and tensors that have shapes and types, but no content."""

    def __init__(self) -> None:
        """Nothing is built yet."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def build(self, make: Callable[[], Built]) -> Built:
        """What a function makes, hollow."""
        with self.mode:
            return make()

    def emptied(self, value: Any) -> Any:
        """A tensor, or a dataclass of tensors, without its content."""
        if isinstance(value, Tensor):
            return self.mode.from_tensor(value)
        if is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: self.emptied(getattr(value, f.name)) for f in fields(value)}
            return replace(value, **parts)
        return value

    @contextmanager
    def count(self, module: nn.Module) -> Iterator[Count]:
        """Counts what is done with a hollow module in the block; known at its end."""
        count, memory = Count(), Tally()
        hooks = [
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: memory.disregard(p.grad)
            )
            for p in module.parameters()
            if p.requires_grad
        ]
        with memory:
            for tensor in (*module.parameters(), *module.buffers()):
                memory.disregard(tensor)
            yield count
        for hook in hooks:
            hook.remove()
        count.flops, count.peak_bytes = memory.flops, memory.peak


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows how many bytes of tensors are alive, storage by storage; and counts FLOPs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self.peak, self.flops = 0, 0, 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # torch's own counter keeps hold of tensors, and so of their memory; its formulas serve.
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=made)
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self._add(one.untyped_storage(), one.untyped_storage().nbytes())
        self.peak = max(self.peak, self.alive)
        return made

    def disregard(self, tensor: Tensor | None) -> None:
        """Does not count a tensor's memory from now on."""
        if tensor is None:
            return
        storage = tensor.untyped_storage()
        self._add(storage, 0)
        self.alive -= self.sizes[id(storage)]
        self.sizes[id(storage)] = 0

    def _add(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = id(storage)
        if key in self.sizes:
            return
        self.sizes[key] = num_bytes
        self.alive += num_bytes
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)
