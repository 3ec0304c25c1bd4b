"""Quantized calls of attention: whatever a processor does around them, their operands are quantized.

Most of diffusers' processors differ in how they make q, k and v, and agree in what they hand these to:
`torch.nn.functional.scaled_dot_product_attention`, or a product, a softmax and a product. So the attention's own
forward runs, with its own processor, and these functions alone are exchanged: for this call, in this thread.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.attention.processor import QuantAttnProcessor
from tcaq_lightning.nn.attention.rewritten import REWRITTEN
from tcaq_lightning.nn.spec import AttentionSpec
from tcaq_lightning.quantizers import ACTIVATION_QUANTIZERS
from tcaq_lightning.quantizers.activation import widened
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.provided import provide

OPERANDS = "operands"
"""Name of the quantizers within an attention."""
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum)
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)


class QuantCalls(QuantAttnProcessor):
    """Quantizers of the operands of an attention's calls, in order: the first one's are its own.

    Args:
        spec: bits, kind of quantizers, number of calls.
        groups: timestep groups of the denoiser.

    Attributes:
        further: quantizers of the second call and those after it. While an attention is calibrated, a call that was
            not foreseen gets its own.
        fixed: whether no further ones may come, as in an artifact.
    """

    variants: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: AttentionSpec, groups: TimestepGroups) -> None:
        super().__init__(replace(spec, calls=1), groups)
        self.fixed = False
        self._groups = groups
        self.further = nn.ModuleList(type(self)(replace(spec, calls=1), groups) for _ in range(spec.calls - 1))

    def describe(self) -> AttentionSpec:
        """Its spec with the bits and the number of calls that it has now."""
        return replace(super().describe(), calls=1 + len(self.further))

    def stands_for(self, attn: Any, processor: Any) -> bool:
        """Whether a processor is of the class that was there: its calls are found in the same way."""
        return type(processor).__name__ == self.spec.processor

    def of_call(self, number: int) -> QuantCalls:
        """The quantizers of one call.

        Raises:
            UserError: there are none, and the attention is not calibrated anymore.
        """
        if number == 0:
            return self
        while len(self.further) < number:
            if self.fixed:
                raise UserError(
                    f"an attention is computed {number + 1} times in one forward pass, expected at most "
                    f"{1 + len(self.further)} as in its calibration; call the denoiser with the same arguments"
                )
            made = type(self)(replace(self.describe(), calls=1), self._groups).to(self.query.delta.device)
            for own, other in zip(self.quantizers(), made.quantizers(), strict=True):
                other.enabled = own.enabled
            self.further.append(made.train(self.training))
        found: Any = self.further[number - 1]
        return found  # type: ignore[no-any-return]

    def quantizers(self) -> tuple[Any, ...]:
        """Those of q, k, v and the probabilities."""
        return self.query, self.key, self.value, self.probabilities

    def is_off(self) -> bool:
        """Whether nothing is quantized, and nobody looks at what would be."""
        return not any(q.enabled or q._forward_hooks or q._forward_pre_hooks for q in self.quantizers())

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What `scaled_dot_product_attention` computes, with its operands quantized.

        Args:
            query: (B, ..., T, d).
            key: (B, ..., S, d).
            value: (B, ..., S, e).
            attn_mask: boolean (False is masked) or added, broadcastable to (B, ..., T, S).
            dropout_p: of a denoiser in training mode; nothing is dropped here.
            is_causal: whether a query sees the keys up to its own number only.
            scale: 1 / sqrt(d) unless given.
            enable_gqa: whether several heads of q share one of k and v.

        Returns:
            (B, ..., T, e) in the type of `query`.
        """
        q, k, v = (widened(x) for x in (self.query(query), self.key(key), self.value(value)))
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = torch.matmul(q, k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        hidden: Tensor | None = None
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril().logical_not()
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            hidden = attn_mask.logical_not() if hidden is None else hidden | attn_mask.logical_not()
        elif attn_mask is not None:
            scores = scores + attn_mask.to(scores.dtype)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        if hidden is not None or attn_mask is not None:  # what sees nothing has no probabilities, and gets nothing
            blind = scores.isneginf().all(-1, keepdim=True)
            p = self.quantize_probabilities(p.masked_fill(blind, 0.0)).masked_fill(blind, 0.0)
        else:
            p = self.quantize_probabilities(p)
        return torch.matmul(p, v).to(query.dtype)


class QuantLinearCalls(QuantCalls):
    """Quantizers of an attention without a softmax, whose products are taken two by two.

    Operands of the first are `query` and `key`, those of the second `probabilities`, of any sign here, and `value`.
    """

    def __init__(self, spec: AttentionSpec, groups: TimestepGroups) -> None:
        super().__init__(spec, groups)
        self.probabilities = ACTIVATION_QUANTIZERS[spec.quantizer](spec.softmax_bits, groups)  # type: ignore[assignment]

    def quantize_probabilities(self, p: Tensor) -> Tensor:
        """Quantize (k B, ...) values of any sign."""
        return self.probabilities(p)  # type: ignore[no-any-return]


class Calls(TorchFunctionMode):
    """Within, the products of an attention have quantized operands.

    Args:
        operands: quantizers of its calls.

    Attributes:
        quantizers: class of the quantizers.
        calls: number of calls that have been computed.
    """

    quantizers: ClassVar[type[QuantCalls]] = QuantCalls

    def __init__(self, operands: QuantCalls) -> None:
        super().__init__()
        self.operands, self.calls = operands, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of a function of torch's."""
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the function returns, or with quantized operands what it would."""
        raise NotImplementedError


class FusedCalls(Calls):
    """Of an attention that calls `scaled_dot_product_attention`.

    Where it does so for each sample by itself, as Mochi does for prompts of unequal length, these are one call.
    """

    def __init__(self, operands: QuantCalls) -> None:
        super().__init__(operands)
        self._sample = 0

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `Calls.compute`."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        operands, groups = self.operands.of_call(self.calls), self.operands.query.groups
        batch = groups.current.shape[0]
        query: Tensor = args[0] if args else kwargs["query"]
        alone = query.shape[0] == 1 < batch
        number, self._sample = self._sample, (self._sample + 1) % batch if alone else 0
        self.calls += not self._sample
        if operands.is_off():
            return func(*args, **kwargs)
        if not alone:
            return operands.attention(*args, **kwargs)
        with groups.using(groups.current[number : number + 1], groups.single):
            return operands.attention(*args, **kwargs)


class OpenCalls(Calls):
    """Of an attention that is a product, a softmax and a product."""

    def __init__(self, operands: QuantCalls) -> None:
        super().__init__(operands)
        self._softmax = False

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `Calls.compute`."""
        self._softmax = self._softmax or func in SOFTMAXES
        return self.product(func, args) if is_product(func, args) else func(*args, **kwargs)

    def product(self, func: Any, args: tuple[Any, ...]) -> Any:
        """A product: of q and k before the softmax, of the probabilities and v behind it."""
        operands, second = self.operands.of_call(self.calls), self._softmax
        self.calls, self._softmax = self.calls + second, False
        return _quantized_product(func, args, operands, second)


class LinearCalls(Calls):
    """Of an attention without a softmax: products alone, in pairs."""

    quantizers = QuantLinearCalls

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `Calls.compute`."""
        if not is_product(func, args):
            return func(*args, **kwargs)
        operands, second = self.operands.of_call(self.calls // 2), bool(self.calls % 2)
        self.calls += 1
        return _quantized_product(func, args, operands, second)


def is_product(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a function of torch's multiplies matrices that both depend on the samples."""
    operands = args[1:] if func is torch.einsum else args
    known = func in PRODUCTS and len(operands) == 2 and all(isinstance(x, Tensor) for x in operands)
    return known and all(x.ndim > 2 and x.is_floating_point() and not isinstance(x, nn.Parameter) for x in operands)


def _quantized_product(func: Any, args: tuple[Any, ...], operands: QuantCalls, second: bool) -> Tensor:
    *equation, a, b = args
    if second:
        quantized = operands.quantize_probabilities(a), operands.value(b)
    else:
        quantized = operands.query(a), operands.key(b)
    if operands.is_off():
        return func(*args)  # type: ignore[no-any-return]
    return func(*equation, *map(widened, quantized)).to(b.dtype)  # type: ignore[no-any-return]


class QuantizedForward:
    """What `intercept` gives to an attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's own forward, the operands of its calls quantized."""
        operands: QuantCalls | None = getattr(self, OPERANDS, None)
        if operands is None:  # another instance that somebody made of this one's class
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        calls = interception(self)
        assert calls is not None  # or it would not have been given this forward
        with calls(operands) as computed:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if operands.fixed and not computed.calls:
            raise UserError(
                "attention: expected a backend that torch's scaled_dot_product_attention computes, whose operands are "
                "quantized, got another one; call reset_attention_backend() of the denoiser"
            )
        return output


def interception(attention: Any) -> type[Calls] | None:
    """How the calls of an attention are found: by what its processor, or its own forward, is written with."""
    kinds: tuple[Any, Any] = type(attention), type(getattr(attention, "processor", None))
    return _interception(*kinds)


@functools.cache
def _interception(kind: Any, processor: Any) -> type[Calls] | None:
    own = vars(processor).get("__call__") or vars(processor).get("forward")
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    forward = next((vars(base)["forward"] for base in bases if "forward" in vars(base)), None)
    names = _names(own, processor) | _names(forward, kind)
    if names & {"scaled_dot_product_attention", "dispatch_attention_fn"} or kind.__name__ in REWRITTEN:
        return FusedCalls
    if "softmax" in names:
        return OpenCalls
    return LinearCalls if "matmul" in names else None


def _names(function: Any, kind: type, depth: int = 3) -> set[str]:
    """Names that a function refers to, and those that functions of its module and methods of its class refer to."""
    function = inspect.unwrap(function) if callable(function) else None
    if not isinstance(function, FunctionType):
        return set()
    found = set(function.__code__.co_names)
    if depth:
        called = [function.__globals__.get(name) or getattr(kind, name, None) for name in found]
        own = [f for f in called if isinstance(f, FunctionType) and f.__module__ == function.__module__]
        found = found.union(*(_names(f, kind, depth - 1) for f in own))
    return found


def intercept(attention: nn.Module, spec: AttentionSpec, groups: TimestepGroups, fixed: bool) -> None:
    """Quantize the operands of an attention's calls, in place; its processor stays.

    Args:
        attention: one that `interception` knows.
        spec: of the attention.
        groups: timestep groups of the denoiser.
        fixed: whether it is finished: calls that its spec does not count are refused.
    """
    calls = interception(attention)
    if calls is None:
        raise UserError(f"unknown attention {type(attention).__name__} ({spec.processor}), which cannot be quantized")
    operands = calls.quantizers(spec, groups)
    operands.fixed = fixed
    if (parameter := next(attention.parameters(), None)) is not None:
        operands.to(parameter.device)
    attention.add_module(OPERANDS, operands.train(attention.training))
    if (rewritten := REWRITTEN.get(type(attention).__name__)) is not None:
        provide(attention, rewritten)
    provide(attention, QuantizedForward)
