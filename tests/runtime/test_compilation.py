from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime import compilation
from tcaq_lightning.runtime.compilation import compiled


class Unit(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size * size).view(size, size))

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Tensor:
        return torch.sin(x @ self.weight) * factor


class Backend:
    """Counts what it is asked to compile, and runs it as it is."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, module: Any, inputs: list[Any]) -> Any:
        self.compiled += 1
        return module.forward


@pytest.fixture
def backend() -> Iterator[Backend]:
    """Takes the compiler's place."""
    made = Backend()
    torch.compiler.reset()
    compilation._compiled.cache_clear()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=made)):
        yield made
    compilation._compiled.cache_clear()
    torch.compiler.reset()


def test_units_of_equal_shape_share_what_is_compiled(backend: Backend) -> None:
    for _ in range(3):
        unit, x = Unit(4), torch.randn(2, 4)
        torch.testing.assert_close(compiled(unit)(x, factor=2.0), unit(x, factor=2.0))
    assert backend.compiled == 1


def test_many_shapes_are_all_compiled(backend: Backend) -> None:
    for size in range(2, 22):  # torch's own limit is 8
        unit, x = Unit(size), torch.randn(3, size)
        torch.testing.assert_close(compiled(unit)(x), unit(x))
    assert backend.compiled == 20


def test_a_compiler_that_fails_is_one_line_that_names_the_key(backend: Backend) -> None:
    with (
        mock.patch.object(Backend, "__call__", side_effect=RuntimeError("no C++ compiler\nat all")),
        pytest.raises(
            UserError, match=r"reconstruction\.compile: expected .* got: .*; set reconstruction.compile to false$"
        ),
    ):
        compiled(Unit(5))(torch.randn(1, 5))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_real_compiler_gives_the_same_values_and_gradients() -> None:
    unit, x = Unit(6), torch.randn(3, 6)
    results = []
    for forward in (unit, compiled(unit)):
        output = forward(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), unit.parameters())))
    torch.testing.assert_close(results[1], results[0])
