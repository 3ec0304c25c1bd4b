from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.forwards import patched_forwards
from tcaq_lightning.models.graph import trace_units
from tcaq_lightning.models.units import find_units


def test_execution_order_is_recorded_and_not_that_of_definition(make_unet: Any) -> None:
    unet = make_unet()
    called: list[str] = []
    units = find_units(unet)
    for name in units:
        unet.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: called.append(n))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    unet(x, t)
    expected = list(called)
    graph = trace_units(unet, lambda: unet(x, t))
    assert graph.names == expected
    assert sorted(units) == sorted(expected)
    assert units != expected
    middle, up = graph.names.index("mid_block.resnets.0"), graph.names.index("up_blocks.0.resnets.0")
    assert units.index("up_blocks.0.resnets.0") < units.index("mid_block.resnets.0")  # the trap
    assert middle < up


def test_dependencies_are_those_that_a_perturbation_shows(make_unet: Any) -> None:
    unet = make_unet()
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([300])
    graph = trace_units(unet, lambda: unet(x, t))

    outputs: dict[str, Tensor] = {}
    handles = [
        unet.get_submodule(n).register_forward_hook(lambda _m, _a, out, n=n: outputs.__setitem__(n, out))
        for n in graph.names
    ]
    unet(x, t)
    for handle in handles:
        handle.remove()

    def inputs_with(replaced: str | None) -> dict[str, list[Tensor]]:
        seen: dict[str, list[Tensor]] = {}

        def stub(name: str) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                seen[name] = [a.clone() for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
                return outputs[name] + (1.0 if name == replaced else 0.0)

            return forward

        with patched_forwards(unet, {n: stub(n) for n in graph.names}):
            unet(x, t)
        return seen

    plain = inputs_with(None)
    for source in graph.names:
        moved = inputs_with(source)
        for name in graph.names:
            differs = any(not torch.equal(a, b) for a, b in zip(plain[name], moved[name], strict=True))
            assert differs == (source in graph.needs[name]), (source, name)


def test_alive_after_keeps_what_a_later_unit_needs(make_unet: Any) -> None:
    unet = make_unet()
    graph = trace_units(unet, lambda: unet(torch.randn(2, 1, 8, 8), 5))
    for position in range(len(graph.names)):
        expected = {
            n for n in graph.names[: position + 1] if any(n in graph.needs[k] for k in graph.names[position + 1 :])
        }
        assert graph.alive_after(position) == expected
    assert graph.alive_after(len(graph.names) - 1) == set()


def test_tracing_works_without_gradients_and_leaves_the_model_as_it_was(make_unet: Any) -> None:
    unet = make_unet()
    x = torch.randn(2, 1, 8, 8)
    before = unet(x, 5).sample
    graph = trace_units(unet, lambda: unet(x, 5))
    with torch.no_grad():
        assert trace_units(unet, lambda: unet(x, 5)) == graph
    assert torch.equal(unet(x, 5).sample, before)
    assert not any("forward" in vars(m) for m in unet.modules())
    assert graph.output_shapes["conv_out"] == (1, 8, 8)


class Odd(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return self.layer(y) if self.twice else y


def test_a_unit_that_runs_twice_is_glue_the_second_time() -> None:
    model = Odd(twice=True)
    graph = trace_units(model, lambda: model(torch.zeros(2, 2)))
    assert graph.names == ["layer"]
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_unit_that_returns_no_tensor_is_refused() -> None:
    model = Odd(twice=False)
    model.layer.forward = lambda _: (None, 3)  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(UserError, match="unit layer returns tuple"):
        trace_units(model, lambda: model(torch.zeros(1, 2)))
