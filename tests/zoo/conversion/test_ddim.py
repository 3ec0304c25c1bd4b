"""The DDIM repository's network converted: equal outputs, every way its checkpoints are stored, every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq_lightning.errors import UserError
from tcaq_lightning.zoo.conversion import ddim
from tcaq_lightning.zoo.conversion.architecture import load_exactly
from tests.zoo.conversion.originals import DDIMModel, randomized, relative_error
from tests.zoo.conversion.published import DDIM_CIFAR10, DDIM_LSUN, DDIM_SMALL, changed

TIMESTEPS = torch.tensor([0, 1, 500, 999])


def converted(config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    architecture = ddim.architecture(config)
    return load_exactly(architecture["unet"].build(), ddim.convert_unet(state, architecture["unet"]), "unet")


def error_of(config: dict[str, Any]) -> float:
    original = randomized(DDIMModel(config))
    unet = converted(config, original.state_dict())
    size = min(config["data"]["image_size"], 64)  # the networks take any size; the largest would take minutes
    x = torch.randn(len(TIMESTEPS), 3, size, size, generator=torch.Generator().manual_seed(1))
    return relative_error(unet(x, TIMESTEPS).sample, original(x, TIMESTEPS))


@settings(max_examples=6, deadline=None)
@given(
    multipliers=st.lists(st.integers(1, 2), max_size=3).map(lambda rest: [1, *rest]),
    blocks=st.integers(1, 2),
    attended=st.sets(st.sampled_from([16, 8, 4, 2])),
)
def test_outputs_are_equal_for_any_layout(multipliers: list[int], blocks: int, attended: set[int]) -> None:
    layout = {"model__ch_mult": multipliers, "model__num_res_blocks": blocks, "model__attn_resolutions": list(attended)}
    assert error_of(changed(DDIM_SMALL, **layout)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("config", [DDIM_CIFAR10, DDIM_LSUN], ids=["cifar10", "lsun"])
def test_outputs_of_the_published_networks_are_equal(config: dict[str, Any]) -> None:
    assert error_of(config) < 1e-10


def test_equality_is_not_of_the_weights_alone() -> None:
    """The proof would notice: other paddings, epsilons or embeddings change the output by far more."""
    original = randomized(DDIMModel(DDIM_SMALL))
    architecture = ddim.architecture(DDIM_SMALL)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for key, value in {"downsample_padding": 1, "norm_eps": 1e-3, "freq_shift": 0, "flip_sin_to_cos": True}.items():
        component = architecture["unet"]
        other = type(component)(component.library, component.name, component.config | {key: value})
        unet = load_exactly(other.build(), ddim.convert_unet(original.state_dict(), component), "unet")
        assert relative_error(unet(x, TIMESTEPS).sample, original(x, TIMESTEPS)) > 1e-7, key


def test_the_noise_schedule_is_the_repositorys() -> None:
    scheduler = ddim.architecture(DDIM_CIFAR10)["scheduler"].build_scheduler()
    scheduler.set_timesteps(100)
    assert scheduler.timesteps.tolist() == list(range(0, 1000, 10))[::-1]
    assert float(scheduler.final_alpha_cumprod) == 1
    torch.testing.assert_close(scheduler.betas.double(), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    x, eps = torch.randn(2, 1, 3, 4, 4).unbind()
    a, b = scheduler.alphas_cumprod[500], scheduler.alphas_cumprod[490]
    expected = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps  # unclipped
    torch.testing.assert_close(scheduler.step(eps, 500, x * 1).prev_sample, expected)


def test_every_way_that_checkpoints_are_stored() -> None:
    raw = randomized(DDIMModel(DDIM_SMALL), 0).state_dict()
    average = randomized(DDIMModel(DDIM_SMALL), 1).state_dict()
    parallel = {f"module.{k}": v for k, v in raw.items()}
    training = [parallel, {"state": {}, "param_groups": [{"lr": 1e-4}]}, 3, 1000]
    for content, ema, expected, averaged in (
        (raw, None, raw, False),
        (parallel, None, raw, False),
        (training, None, raw, False),
        ([*training, average], None, average, True),
        ([*training, average], True, average, True),
        ([*training, average], False, raw, False),
    ):
        found = ddim.find_weights(content, ema)
        assert found is not None
        assert found[1] == averaged
        assert found[0].keys() == expected.keys()
        assert all(torch.equal(found[0][k], expected[k]) for k in expected)
    for foreign in ({}, [], [1], {"a": 1}, {"a": torch.zeros(1)}, "text", {"state_dict": raw}):
        assert ddim.find_weights(foreign, None) is None
    with pytest.raises(UserError, match="--ema true: expected a checkpoint with a moving average"):
        ddim.find_weights(raw, True)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"add": "logvar"}, r"do not map, 1: logvar"),
        ({"add": "down.0.block.7.conv1.weight"}, r"without a place 1: down_blocks.0.resnets.7.conv1.weight"),
        ({"remove": "mid.attn_1.q.bias"}, r"missing 1: mid_block.attentions.0.to_q.bias"),
        ({"reshape": "conv_in.weight"}, r"of another shape 1: conv_in.weight \(3, 3\) not \(32, 3, 3, 3\)"),
        ({"nan": "conv_in.bias"}, r"NaN or infinity in 1: conv_in.bias"),
    ],
)
def test_weights_that_do_not_fit_are_listed(change: dict[str, str], pattern: str) -> None:
    state = dict(randomized(DDIMModel(DDIM_SMALL)).state_dict())
    ((kind, key),) = change.items()
    if kind == "remove":
        del state[key]
    else:
        state[key] = torch.full_like(state["conv_in.bias"], torch.nan) if kind == "nan" else torch.zeros(3, 3)
    with pytest.raises(UserError, match=pattern) as caught:
        converted(DDIM_SMALL, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"model__type": "bayesian"}, "model.type must be 'simple', got 'bayesian'"),
        ({"model__resamp_with_conv": False}, "model.resamp_with_conv must be True, got False"),
        ({"model__odd": 1}, "model.odd is not known"),
        ({"model__ch": None}, "model.ch is missing"),
        ({"model__ch": "wide"}, "model.ch must be a int, got 'wide'"),
        ({"model__ch_mult": [1, "two"]}, "model.ch_mult must be a list of integers"),
        ({"model__ch_mult": [2, 2]}, "model.ch_mult must begin with 1"),
        ({"data__rescaled": False}, "data.rescaled must be True, got False"),
        ({"model": None}, "--architecture: model is missing"),
        ({"diffusion__beta_schedule": "quad"}, "diffusion.beta_schedule must be 'linear', got 'quad'"),
    ],
)
def test_settings_without_a_counterpart_are_named(change: dict[str, Any], pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        ddim.architecture(changed(DDIM_SMALL, **change))


def test_numbers_that_yaml_reads_as_text_will_do() -> None:
    config = changed(DDIM_SMALL, diffusion__beta_start="1e-4", diffusion__beta_end=0.02)
    assert ddim.architecture(config) == ddim.architecture(DDIM_SMALL)
