"""Parts of units that a denoiser calls again behind them, such as the embedding of a DiT's first block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class CalledAgain:
    """Modules within units that the denoiser's own forward calls too, outside of these.

    Args:
        denoiser: full precision.
        units: names of its units.
    """

    def __init__(self, denoiser: nn.Module, units: list[str]) -> None:
        self.denoiser = denoiser
        inner = {unit: denoiser.get_submodule(unit).named_modules(prefix=unit) for unit in units}
        self._unit = {name: unit for unit, modules in inner.items() for name, _ in modules if name != unit}
        self._found: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a run in which the units are replaced: a part of a unit that runs now is called from outside."""

        def see(name: str) -> Callable[..., None]:
            return lambda *_: self._found.append(name)

        handles = [self.denoiser.get_submodule(n).register_forward_pre_hook(see(n)) for n in self._unit]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def echoes(self, run: Callable[[], Any], batch: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Modules called twice in all, on the same arguments, that return one row a sample.

        Args:
            run: calls the denoiser, with its units.
            batch: number of samples of that call.

        Returns:
            By unit and module, the shape of what the module returns without the batch axis.
        """
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        outer = [n for n in dict.fromkeys(self._found) if not any(n.startswith(f"{other}.") for other in self._found)]
        if not outer:
            return found
        calls: dict[str, list[tuple[list[Any], Any]]] = {name: [] for name in outer}

        def see(name: str) -> Callable[..., None]:
            return lambda _module, args, kwargs, output: calls[name].append((tree_leaves((args, kwargs)), output))

        modules = ((name, self.denoiser.get_submodule(name)) for name in outer)
        handles = [m.register_forward_hook(see(n), with_kwargs=True) for n, m in modules]
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        for name, seen in calls.items():
            if len(seen) != 2 or not _equal(seen[0][0], seen[1][0]):
                continue
            output = seen[0][1]
            one_row_each = isinstance(output, Tensor) and output.ndim > 0 and output.shape[0] == batch
            if one_row_each and output.dtype == next(self.denoiser.parameters()).dtype:
                found.setdefault(self._unit[name], {})[name] = tuple(output.shape[1:])
        return found


def _equal(first: list[Any], second: list[Any]) -> bool:
    """Whether arguments are the same, those that are tensors by value where they have one."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a is b or (not a.is_meta and torch.equal(a, b))
        return bool(a == b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False

    return len(first) == len(second) and all(map(same, first, second))
