from __future__ import annotations

from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tcaq_lightning.calibration.losses import block_error
from tcaq_lightning.calibration.reconstruction import BlockReconstruction, Phase, draw_indices
from tcaq_lightning.calibration.unit_errors import unit_errors
from tcaq_lightning.config import (
    ActivationConfig,
    LayerRule,
    QuantizationConfig,
    ReconstructionConfig,
    TrainerConfig,
    WeightConfig,
)
from tcaq_lightning.nn.parts import quant_layers, quantizers
from tcaq_lightning.nn.state import quantization_state
from tcaq_lightning.quantizers import Rounding
from tcaq_lightning.runtime import compilation
from tcaq_lightning.runtime.lightning import make_trainer

CPU = torch.device("cpu")
ATTENTION, RESNET = "mid_block.attentions.0", "mid_block.resnets.0"


def module_of(prepared: tuple[Any, Any, Any], phase: Phase, steps: int, **settings: Any) -> BlockReconstruction:
    twins, unit, data = prepared
    config = ReconstructionConfig(batch_size=8, **settings)
    return BlockReconstruction(unit, data, torch.arange(16), twins.timestep_groups, config, phase, steps, (0, 0, 3))


def fit(module: BlockReconstruction) -> None:
    make_trainer(TrainerConfig(accelerator="cpu"), [], None, module.iterations).fit(module)


@given(st.integers(1, 1000), st.integers(1, 64), st.lists(st.integers(0, 2**31), min_size=1, max_size=6))
def test_drawn_indices_are_in_range_and_a_function_of_the_seeds(count: int, size: int, seeds: list[int]) -> None:
    drawn = draw_indices(count, size, seeds)
    assert drawn.shape == (size,)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < count
    torch.rand(3)
    assert torch.equal(drawn, draw_indices(count, size, seeds))


def test_drawn_indices_differ_from_step_to_step_and_cover_everything() -> None:
    steps = [draw_indices(50, 32, (0, 1, 2, 118, step, 0)) for step in range(40)]
    assert len({tuple(s.tolist()) for s in steps}) == 40
    counts = torch.bincount(torch.cat(steps), minlength=50)
    assert counts.min() > 5
    assert counts.max() < 60
    assert not torch.equal(draw_indices(50, 32, (0, 1, 2)), draw_indices(50, 32, (0, 2, 1)))


@pytest.mark.parametrize(
    ("phase", "kinds"), [("v", {"v", "steps", "weight_scales"}), ("r", {"r", "steps", "weight_scales"})]
)
@pytest.mark.parametrize("name", [RESNET, ATTENTION])
def test_only_what_is_to_be_learned_learns(prepare: Any, name: str, phase: Phase, kinds: set[str]) -> None:
    prepared = prepare(name)
    module = module_of(prepared, phase, 10)
    assert {kind for kind, values in module.learned.items() if values} == kinds
    learned = {id(p) for values in module.learned.values() for p in values}
    (optimizer,) = [module.configure_optimizers()]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == learned
    twins, unit, data = prepared
    block_error(data.run(unit, twins.timestep_groups, torch.arange(16), CPU), data.targets).backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.requires_grad == (id(parameter) in learned), parameter_name
        assert (parameter.grad is not None) <= (id(parameter) in learned), parameter_name
    softmax_steps = {id(q.log_delta) for n, q in quantizers(unit).items() if n.endswith("probabilities")}
    assert all(p.grad is not None for v in module.learned.values() for p in v if id(p) not in softmax_steps)


def test_a_rate_of_zero_leaves_no_gradient_behind(prepare: Any) -> None:
    module = module_of(prepare(RESNET), "v", 3, scale_lr=0.0)
    fit(module)
    for parameter in module.learned["weight_scales"]:
        assert parameter.grad is None
        assert not parameter.any()
    assert all(p.grad is not None for p in module.learned["v"])


@pytest.mark.parametrize("name", [RESNET, ATTENTION])
def test_the_error_falls_and_the_unit_ends_hard(prepare: Any, name: str) -> None:
    prepared = prepare(name)
    twins, unit, data = prepared
    samples = torch.arange(16)
    keys = {k: v.shape for k, v in quantization_state(unit).items()}
    nearest = unit_errors(unit, data, samples, twins.timestep_groups, 5, CPU).squares.sum()
    r_phase = module_of(prepared, "r", 15)
    fit(r_phase)
    r_phase.finish()
    v_phase = module_of(prepared, "v", 60)
    fit(v_phase)
    assert set(v_phase.losses) == {"reconstruction", "rounding"}
    undecided = v_phase.undecided()
    v_phase.finish()
    assert unit_errors(unit, data, samples, twins.timestep_groups, 5, CPU).squares.sum() < 0.9 * nearest
    assert undecided < 0.3
    assert {k: v.shape for k, v in quantization_state(unit).items()} == keys
    assert all(layer.learned_weight.rounding is Rounding.HARD for layer in quant_layers(unit).values())
    assert not any(p.requires_grad for p in unit.parameters())
    assert not any(m.training for m in unit.modules())
    assert all(getattr(q, "drop_probability", 0.0) == 0 for q in quantizers(unit).values())


def test_the_r_phase_holds_the_geometric_mean_and_searches_anew(prepare: Any) -> None:
    prepared = prepare(RESNET)
    unit = prepared[1]
    before = {n: q.r.clone() for n, q in quantizers(unit).items()}
    module = module_of(prepared, "r", 10)
    fit(module)
    module.finish()
    for name, quantizer in quantizers(unit).items():
        assert not torch.equal(quantizer.r, before[name])
        torch.testing.assert_close(quantizer.r.log().mean(), before[name].log().mean(), rtol=0, atol=1e-5)
    for layer in quant_layers(unit).values():
        weight = layer.learned_weight
        delta, v = weight.delta.clone(), weight.v.clone()
        weight.search(layer.input_quantizer.r)
        assert torch.equal(delta, weight.delta)
        assert torch.equal(delta, weight.scale)
        assert torch.equal(v, weight.v)


def test_r_is_frozen_in_the_v_phase(prepare: Any) -> None:
    prepared = prepare(RESNET)
    before = {n: (q.r.clone(), q.zero_point.clone()) for n, q in quantizers(prepared[1]).items()}
    module = module_of(prepared, "v", 5)
    fit(module)
    module.finish()
    for name, quantizer in quantizers(prepared[1]).items():
        assert torch.equal(quantizer.r, before[name][0])
        assert torch.equal(quantizer.zero_point, before[name][1])


def test_a_state_under_way_is_restored(prepare: Any) -> None:
    first, second = prepare(RESNET), prepare(RESNET)
    module = module_of(first, "v", 6)
    fit(module)
    other = module_of(second, "v", 6)
    twins, unit, data = second
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        a = first[2].run(first[1], first[0].timestep_groups, torch.arange(16), CPU)
        b = data.run(unit, twins.timestep_groups, torch.arange(16), CPU)
    assert torch.equal(a, b)
    module.finish()
    other.finish()
    state = quantization_state(unit)
    assert all(torch.equal(v, state[k]) for k, v in quantization_state(first[1]).items())


def test_the_same_fit_twice_is_bit_identical(prepare: Any) -> None:
    states = []
    for _ in range(2):
        prepared = prepare(RESNET)
        module = module_of(prepared, "v", 8, qdrop=0.5)
        fit(module)
        module.finish()
        states.append(quantization_state(prepared[1]))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_qdrop_takes_part_in_the_fit(prepare: Any) -> None:
    losses = []
    for share in (0.0, 0.9):
        module = module_of(prepare(RESNET), "v", 1, qdrop=share)
        fit(module)
        losses.append(float(module.losses["reconstruction"]))
    assert losses[0] != losses[1]


def test_autocast_computes_in_bfloat16_and_rounds_in_float32(prepare: Any) -> None:
    prepared = prepare(RESNET)
    _, unit, data = prepared
    module = module_of(prepared, "v", 3, autocast=True)
    convolved, rounded = set(), []

    def compare(quantizer: Any, args: Any, y: Tensor) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            rounded.append(torch.equal(type(quantizer).forward(quantizer, *args).to(y.dtype), y))

    unit.conv2.input_quantizer.register_forward_hook(compare)
    unit.conv1.register_forward_hook(lambda _, __, y: convolved.add(y.dtype))
    fit(module)
    assert convolved == {torch.bfloat16}
    assert rounded
    assert all(rounded)
    assert module.losses["reconstruction"].dtype == torch.float32
    assert all(p.dtype == torch.float32 for kind in module.learned.values() for p in kind)
    assert data.targets.dtype == torch.float32


def test_a_unit_that_only_reads_its_inputs_learns_at_every_step(prepare: Any) -> None:
    prepared = prepare("conv_in")
    module = module_of(prepared, "r", 6, scale_lr=0.0)
    before = module.unit.input_quantizer.log_delta.detach().clone()
    fit(module)
    assert module._entry.every == 1
    assert not torch.equal(module.unit.input_quantizer.log_delta, before)


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        (ATTENTION, "v"),
        pytest.param(RESNET, "r", marks=pytest.mark.slow),
        pytest.param(RESNET, "v", marks=pytest.mark.slow),
        pytest.param(ATTENTION, "r", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_unit_learns_the_same(prepare: Any, name: str, phase: Phase) -> None:
    states = []
    for compiles in (False, True):
        prepared = prepare(name)
        module = module_of(prepared, phase, 3, compile=compiles, autocast=False, input_steps_every=1)
        with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True)):
            compilation._compiled.cache_clear()
            fit(module)
        states.append({k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad})
    compilation._compiled.cache_clear()
    torch.compiler.reset()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, msg=lambda m, k=key: f"{k}: {m}", rtol=1e-3, atol=1e-4)


def test_rates_are_annealed_but_for_the_roundings(prepare: Any) -> None:
    module = module_of(prepare(RESNET), "v", 4)
    seen: dict[str, list[float]] = {}
    inner = module.on_train_batch_start

    def record(batch: int, batch_idx: int) -> None:
        inner(batch, batch_idx)
        for group in module.trainer.optimizers[0].param_groups:
            seen.setdefault(group["kind"], []).append(group["lr"])

    module.on_train_batch_start = record  # type: ignore[method-assign]
    fit(module)
    assert seen["v"] == [min(0.2, 20 / 4)] * 4
    assert seen["steps"] == pytest.approx([module.config.step_lr * f for f in (1, 0.8535534, 0.5, 0.1464466)])


def test_an_attention_without_quantized_projections_can_be_fitted(make_twins: Any, initialized: Any) -> None:
    twins = make_twins(QuantizationConfig(rules=[LayerRule("mid_block.attentions.0.to_*", keep=True)]), samples=16)
    unit, data, _ = initialized(twins, ATTENTION)
    module = module_of((twins, unit, data), "v", 2)
    fit(module)
    assert module.undecided() == 0
    module.finish()


def test_quantized_outputs_are_learned_around(make_twins: Any, initialized: Any) -> None:
    twins = make_twins(QuantizationConfig(WeightConfig(4), ActivationConfig(6), integer_ready=True), samples=16)
    unit, data, _ = initialized(twins, RESNET)
    conv1, conv2 = (unit.get_submodule(n) for n in ("conv1", "conv2"))
    conv2.input_quantizer.headroom = 1.2  # whose ranges are not to be learned
    keys = quantization_state(unit).keys()
    before = {n: layer.output_quantizer.delta.clone() for n, layer in (("conv1", conv1), ("conv2", conv2))}
    samples = torch.arange(16)
    nearest = unit_errors(unit, data, samples, twins.timestep_groups, 5, CPU).squares.sum()
    calls: list[int] = []
    handle = conv1.output_quantizer.register_forward_hook(lambda *_: calls.append(1))
    for phase, steps in (("r", 10), ("v", 60)):
        module = module_of((twins, unit, data), cast("Phase", phase), steps)
        fit(module)
        assert conv1.output_quantizer.log_delta.grad.abs().sum() > 0
        assert conv2.output_quantizer.log_delta is None
        assert len(calls) == steps
        calls.clear()
        module.finish()
    handle.remove()
    assert quantization_state(unit).keys() == keys
    assert unit_errors(unit, data, samples, twins.timestep_groups, 5, CPU).squares.sum() < 0.9 * nearest
    assert not torch.equal(conv1.output_quantizer.delta, before["conv1"])
    assert torch.equal(conv2.output_quantizer.delta, before["conv2"])
    assert torch.equal(conv1.output_quantizer.offset, conv1.output_quantizer.offset.round())
