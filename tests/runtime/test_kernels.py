from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tcaq_lightning.quantizers.adaround import adaround_regularizer, soft_round
from tcaq_lightning.quantizers.logarithmic import log_fake_quantize
from tcaq_lightning.quantizers.uniform import fake_quantize
from tcaq_lightning.runtime import kernels
from tcaq_lightning.runtime.kernels import Kernel, collapsed, compiled_kernels

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are worth a kernel too."""
    monkeypatch.setattr(kernels, "LARGE", 1)
    monkeypatch.setattr(Kernel, "failed", False)
    yield
    torch.compiler.reset()


def doubled(x: Tensor) -> Tensor:
    return x * 2


def test_the_formula_is_compiled_only_where_kernels_are_wanted() -> None:
    kernel = Kernel(doubled, by_hand=lambda x: x + x)
    with mock.patch.object(torch, "compile", side_effect=lambda f, **_: lambda x: f(x) + 1):
        assert kernel(torch.ones(3)).tolist() == [2, 2, 2]
        with compiled_kernels():
            assert kernel(torch.ones(3)).tolist() == [3, 3, 3]
            with compiled_kernels(False):
                assert kernel(torch.ones(3)).tolist() == [2, 2, 2]
        assert kernel(torch.ones(3)).tolist() == [2, 2, 2]


def test_small_tensors_on_a_cpu_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE", 4)
    with mock.patch.object(torch, "compile", side_effect=lambda _, **__: lambda x: x), compiled_kernels():
        kernel = Kernel(doubled)
        assert [kernel(torch.ones(count)).sum() for count in (3, 4)] == [6, 4]


@pytest.mark.parametrize("error", [RuntimeError("no C++ compiler\nat all"), FileNotFoundError(), ImportError("triton")])
def test_without_a_compiler_a_warning_says_so_once(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with (
        mock.patch.object(torch, "compile", side_effect=error),
        caplog.at_level(logging.WARNING),
        compiled_kernels(),
    ):
        for _ in range(3):
            assert Kernel(doubled)(torch.ones(2)).tolist() == [2, 2]
    assert [r.getMessage().count("cannot compile") for r in caplog.records] == [1]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_collapsed_operands_give_what_the_whole_ones_do(shape: list[int], data: st.DataObject) -> None:
    other = [size if data.draw(st.booleans()) else 1 for size in shape]
    x, y = torch.randn(shape), torch.randn(other)
    flat_x, flat_y = collapsed(x, y)
    assert flat_x.ndim <= x.ndim
    assert torch.equal((flat_x * flat_y).view(shape), x * y)
    assert all(torch.equal(a, b) for a, b in zip(collapsed(x, torch.tensor(2.0))[1:], [torch.tensor(2.0)], strict=True))


def differentiated(function: Callable[..., Tensor], learned: list[Tensor], fixed: list[Any]) -> list[Tensor]:
    """A function's result and the gradients of its learned operands."""
    operands = [x.clone().requires_grad_() for x in learned]
    result = function(*operands, *fixed)
    torch.manual_seed(1)
    result.backward(torch.randn(result.shape).to(result.dtype))
    return [result.detach(), *(x.grad for x in operands if x.grad is not None)]


torch.manual_seed(0)
ZERO = torch.randint(16, (6, 1, 1)).float()
TABLES = {"channels first": (6, 5, 1), "channels last": (6, 1, 7), "whole samples": (6, 1, 1)}
PROBABILITIES = torch.randn(6, 5, 7).mul(3).softmax(-1)
CASES = {
    **{
        name: (fake_quantize, [torch.randn(6, 5, 7) * 3, torch.rand(shape) + 0.1], [-ZERO, 15 - ZERO])
        for name, shape in TABLES.items()
    },
    "images": (
        fake_quantize,
        [torch.randn(6, 5, 3, 2) * 3, torch.rand(6, 5, 1, 1) + 0.1],
        [-ZERO[..., None], 15 - ZERO[..., None]],
    ),
    "transposed": (fake_quantize, [torch.randn(6, 7, 5).mT, torch.rand(6, 5, 1) + 0.1], [-ZERO, 15 - ZERO]),
    "logarithmic": (
        log_fake_quantize,
        [PROBABILITIES],
        [PROBABILITIES.amax((1, 2), keepdim=True), torch.full((6, 1, 1), 0.5), 4],
    ),
    "soft rounding": (
        lambda v, unit, base: soft_round(v, base, unit),
        [torch.randn(6, 5, 3, 3) * 3, torch.rand(6, 5, 1, 1) + 0.1],
        [torch.randint(9, (6, 5, 3, 3)).float()],
    ),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_the_bits_and_the_gradients_of_what_it_stands_for(case: str) -> None:
    by_hand, compiled = [], []
    for wanted, found in ((False, by_hand), (True, compiled)):
        with compiled_kernels(wanted):
            found += differentiated(*CASES[case])
    assert not Kernel.failed
    assert len(by_hand) == len(compiled)
    if case != "soft rounding":  # exponentials may differ in the last bit
        assert torch.equal(by_hand[0], compiled[0])
    for ours, theirs in zip(compiled, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_the_regularizers_kernel_gives_what_it_stands_for() -> None:
    operands = torch.randn(6, 5, 3, 3) * 3, torch.randn(6, 5, 3, 3), torch.tensor(4.0), torch.tensor(0.5)
    by_hand = adaround_regularizer(*operands)
    with compiled_kernels():
        compiled = adaround_regularizer(*operands)
    assert not Kernel.failed
    torch.testing.assert_close(compiled, by_hand, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("wanted", [False, True])
def test_within_autocast_the_result_is_the_narrow_one_that_would_be_read(wanted: bool) -> None:
    x, step = torch.randn(6, 5, 7) * 3, torch.rand(6, 5, 1) + 0.1
    exact = differentiated(fake_quantize, [x, step], [-ZERO, 15 - ZERO])
    with torch.autocast("cpu", torch.bfloat16), compiled_kernels(wanted):
        narrow = differentiated(fake_quantize, [x, step], [-ZERO, 15 - ZERO, True])
        assert fake_quantize(x, step, -ZERO, 15 - ZERO).dtype is torch.float32
    assert narrow[0].dtype is torch.bfloat16
    assert torch.equal(narrow[0], exact[0].bfloat16())
    assert [g.dtype for g in narrow[1:]] == [torch.float32] * 2
    for ours, theirs in zip(narrow[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.1)


def test_out_of_memory_is_no_missing_compiler() -> None:
    with (
        mock.patch.object(torch, "compile", side_effect=torch.OutOfMemoryError),
        compiled_kernels(),
        pytest.raises(torch.OutOfMemoryError),
    ):
        Kernel(doubled)(torch.ones(2))
    assert not Kernel.failed


def test_an_error_of_the_formula_is_no_missing_compiler() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise RuntimeError("wrong")

    with mock.patch.object(torch, "compile", side_effect=lambda f, **_: f), compiled_kernels():
        with pytest.raises(RuntimeError, match="wrong"):
            Kernel(wrong)(torch.ones(2))
        assert not Kernel.failed


@pytest.mark.parametrize("case", CASES)
def test_results_may_be_written_to(case: str) -> None:
    function, learned, fixed = CASES[case]
    result = function(*[x.clone().requires_grad_() for x in learned], *fixed)
    assert torch.equal(result.clone().mul_(2), result.mul_(2))


@needs_compiler
def test_one_kernel_serves_all_sizes() -> None:
    sizes: list[int] = []

    def seen(graph: Any, _: Any) -> Any:
        sizes.append(1)
        return graph

    kernel = Kernel(doubled)
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=seen)), compiled_kernels():
        for size in (4, 5, 9, 1000):
            assert kernel(torch.ones(size)).sum() == 2 * size
    assert len(sizes) == 1
