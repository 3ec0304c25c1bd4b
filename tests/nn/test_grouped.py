from __future__ import annotations

import copy
import pickle  # noqa: TID251 - as a user may
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.grouped import group, grouped, ungroup
from tcaq_lightning.nn.parts import quantizers
from tcaq_lightning.quantizers import ActivationQuantizer, SoftmaxQuantizer
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups


class Probe(nn.Module):
    """Returns the groups that its parts would read."""

    def __init__(self, groups: TimestepGroups) -> None:
        super().__init__()
        self.groups = groups
        group(self, groups)

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> tuple[list[int], int | None]:
        return self.groups.current.tolist(), self.groups.single


class Transformer(Probe):
    """Takes its timestep third, as transformers with a context do."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[list[int], int | None]:
        return self.groups.current.tolist(), self.groups.single


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize(
    ("timestep", "expected", "single"),
    [
        (700, [1, 1, 1], 1),
        (12.5, [0, 0, 0], 0),
        (torch.tensor(700), [1, 1, 1], 1),
        (torch.tensor([700]), [1, 1, 1], 1),
        (torch.tensor([700, 0, 500]), [1, 0, 1], None),
        (torch.tensor([499.9, 0.0, 500.0]), [0, 0, 1], None),
    ],
)
def test_every_form_of_a_call(
    direct: bool, keyword: bool, timestep: Any, expected: list[int], single: int | None
) -> None:
    probe = Probe(TimestepGroups([500.0]))
    call: Any = probe.forward if direct else probe
    x = torch.zeros(3, 1, 2, 2)
    got = call(sample=x, timestep=timestep) if keyword else call(x, timestep, return_dict=False)
    assert got == (expected, single)
    assert (call(x, timestep=timestep) if keyword else call(x, timestep)) == (expected, single)


def test_the_timestep_is_found_wherever_a_denoiser_takes_it() -> None:
    x, t = torch.zeros(3, 4, 2), torch.tensor([700.0, 0.0, 500.0])
    model = Transformer(TimestepGroups([450.0]))
    expected = ([1, 0, 1], None)
    assert model(x, x, t) == model(x, encoder_hidden_states=x, timestep=t) == expected  # type: ignore[arg-type]
    assert model(hidden_states=x, encoder_hidden_states=x, timestep=t) == expected
    with pytest.raises(TypeError, match="timestep"):  # its own
        model(x, x)  # type: ignore[call-arg]


def test_groups_hold_for_one_call() -> None:
    groups = TimestepGroups([500.0])
    probe = Probe(groups)
    probe(torch.zeros(1, 1), 700)
    with pytest.raises(UserError, match=r"timestep: expected a call of the whole denoiser.* 2 timestep groups"):
        _ = groups.current
    ungroup(probe)
    with pytest.raises(UserError, match="timestep"):
        probe(torch.zeros(1, 1), 700)
    with grouped(probe, groups):
        assert probe(torch.zeros(1, 1), 700) == ([1], 1)
    assert type(probe) is Probe


@pytest.fixture
def twins(make_twins: Callable[..., Any]) -> Iterator[Any]:
    """A quantized UNet whose groups differ."""
    made = make_twins()
    for number, q in enumerate(quantizers(made.quantized).values()):
        q.delta.mul_(torch.tensor([1.0, 0.4 + 0.01 * number]) / 8)
    with torch.no_grad():
        yield made


def together(calls: list[Callable[[], Tensor]], meeting: nn.Module) -> list[Tensor]:
    """Results of calls in a thread each, all of which wait for each other within a module."""
    barrier = threading.Barrier(len(calls))

    def wait(*_: Any) -> None:
        barrier.wait(30)

    def call(function: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return function()

    handle = meeting.register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(call, calls))
    finally:
        handle.remove()


def test_threads_that_meet_within_a_denoiser_keep_their_groups(twins: Any) -> None:
    unet, x = twins.quantized, twins.x
    calls = [
        lambda: unet(x, 100).sample,
        lambda: unet(x[:3], 900).sample,
        lambda: unet(x[:4], torch.tensor([900, 100, 900, 100])).sample,
        lambda: unet.forward(x[:1], torch.tensor([100])).sample,
    ]
    alone = [call() for call in calls]
    assert not torch.equal(unet(x[:1], 900).sample, alone[-1])  # groups differ indeed
    for got, expected in zip(together(calls, unet.mid_block), alone, strict=True):
        assert torch.equal(got, expected)


def test_a_denoiser_called_within_another_ones_call(twins: Any) -> None:
    outer, inner, x = twins.quantized, copy.deepcopy(twins.quantized), twins.x
    found: list[Tensor] = []
    expected = outer(x, 100).sample, inner(x[:2], torch.tensor([900, 100])).sample, outer(x[:1], 900).sample

    def nested(*_: Any) -> None:
        if not found:  # within the outer one's call: the other denoiser, then itself
            found.append(inner(x[:2], torch.tensor([900, 100])).sample)
            found.append(outer(x[:1], 900).sample)

    handle = outer.mid_block.register_forward_pre_hook(nested)
    got = outer(x, 100).sample
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip((got, *found), expected, strict=True))


def test_copies_have_groups_of_their_own_also_while_another_thread_runs(twins: Any) -> None:
    unet, x = twins.quantized, twins.x[:2]
    expected = unet(x, 900).sample
    entered, resume = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        entered.set()
        resume.wait(30)

    handle = unet.mid_block.register_forward_pre_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(torch.no_grad()(lambda: unet(x, 900).sample))
        entered.wait(30)
        made = [copy.deepcopy(unet)]
        resume.set()
        assert torch.equal(running.result(), expected)
    handle.remove()
    made.append(pickle.loads(pickle.dumps(unet)))
    for copied in made:
        assert copied.conv_in.input_quantizer.groups is not unet.conv_in.input_quantizer.groups
        with unet.conv_in.input_quantizer.groups.using(torch.tensor([0])):
            assert torch.equal(copied(x, 900).sample, expected)


def test_a_part_alone_is_refused_where_groups_differ(twins: Any) -> None:
    with pytest.raises(UserError, match=r"^timestep: .*; call the denoiser$"):
        twins.quantized.conv_in(twins.x)
    alone = copy.deepcopy(twins.quantized.conv_out)
    alone.input_quantizer.groups = TimestepGroups([])
    assert alone(torch.zeros(3, 8, 8, 8)).shape == (3, 1, 8, 8)


def test_another_instance_of_its_class_is_an_ordinary_one(twins: Any) -> None:
    other = type(twins.quantized).from_config(twins.quantized.config).eval()
    assert other(twins.x[:1], 3).sample.shape == (1, 1, 8, 8)


def test_gradient_checkpointing_computes_anew_for_the_same_groups(twins: Any) -> None:
    def gradient(unet: Any) -> Tensor:
        x = twins.x[:4].clone().requires_grad_()
        with torch.enable_grad():
            loss = unet(x, torch.tensor([900, 100, 100, 900])).sample.square().sum()
        with ThreadPoolExecutor(1) as pool:  # an accelerator's backward pass has threads of its own
            pool.submit(loss.backward).result()
        assert x.grad is not None
        return x.grad

    unet = copy.deepcopy(twins.quantized).train()
    expected = gradient(unet)
    calls: list[int] = []
    unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    unet.enable_gradient_checkpointing()
    copied = copy.deepcopy(unet)
    assert torch.equal(gradient(unet), expected)
    assert len(calls) == 2
    assert torch.equal(gradient(copied), expected)
    unet.disable_gradient_checkpointing()
    assert torch.equal(gradient(unet), expected)
    assert len(calls) == 3 + 2  # the copy's hook counts too


class Small(nn.Module):
    """Has a quantizer of each kind that reads groups."""

    def __init__(self) -> None:
        super().__init__()
        groups = TimestepGroups([300.0, 600.0])
        self.values, self.probabilities = ActivationQuantizer(4, groups), SoftmaxQuantizer(4, groups)
        self.values.delta.copy_(torch.tensor([0.1, 0.2, 0.3]))
        self.probabilities.tau.copy_(torch.tensor([0.0, 1.0, 0.0]))
        group(self, groups)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        values: Tensor = self.probabilities(self.values(sample).softmax(-1))
        return values


@pytest.mark.parametrize("kind", ["toy", pytest.param("unet", marks=pytest.mark.slow)])
def test_torch_compile_compiles_once_for_all_groups_and_threads(kind: str, twins: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    denoiser, x = Small() if kind == "toy" else twins.quantized, twins.x[:2]
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    steps = [torch.tensor(t) for t in (100, 900, 400, 600)]

    def call(t: Tensor, model: Any = compiled) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(x, t)[0])

    expected = [call(t, denoiser) for t in steps]
    assert not torch.equal(expected[0], expected[2])
    got = [call(t) for t in steps]
    with ThreadPoolExecutor(2) as pool:
        got += pool.map(call, steps)
    assert all(torch.equal(a, b) for a, b in zip(got, 2 * expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_inference_mode_leaves_nothing_behind(twins: Any) -> None:
    unet, x = twins.quantized, twins.x[:2]
    expected = unet(x, 900).sample
    with torch.inference_mode():
        assert torch.equal(unet(x, 900).sample, expected)
    assert torch.equal(unet(x, 900).sample, expected)
    with torch.enable_grad():
        unet(x.clone().requires_grad_(), 900).sample.sum().backward()


def test_a_pipeline_saves_and_shows_it_by_its_name(twins: Any, tmp_path: Path) -> None:
    pipeline: Any = DDIMPipeline(twins.quantized, DDIMScheduler())  # type: ignore[no-untyped-call]
    assert pipeline.config["unet"] == ("diffusers", "UNet2DModel")
    assert type(twins.quantized).__name__ == "UNet2DModel"
    assert '"unet": [\n    "diffusers",\n    "UNet2DModel"' in pipeline.to_json_string()
