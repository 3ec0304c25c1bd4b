"""Adapters beside the quantized layers of an artifact, against a computation of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.nn.layers import QuantConv2d, base_layer
from tcaq_lightning.nn.parts import quantizers
from tests.artifacts import OPENERS, frozen, save_denoiser
from tests.families import Family, make_denoiser, make_family

peft = pytest.importorskip("peft")

FAMILIES = {
    "Stable Diffusion 1": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_in", "ff.net.0.proj", "time_emb_proj"],
    "added_kv": ["to_k", "add_k_proj", "add_v_proj", "conv2"],
    "SD3.5": ["to_q", "to_v", "add_k_proj", "to_add_out", "norm1.linear"],
    "Flux": ["to_k", "add_q_proj", "proj_mlp", "x_embedder", "proj_out"],
}
"""Layers that get adapters, by family."""
ADAPTER: dict[str, Any] = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Family]]:
    """Directory of a family's artifact, and samples for its denoiser."""

    @cache
    def make(name: str) -> tuple[Path, Family]:
        path = tmp_path_factory.mktemp("artifact") / "quantized"
        save_denoiser(make_denoiser(name), path)
        return path, make_family(name)

    return make


def opened(saved: Any, name: str, opener: str = "load_quantized") -> tuple[Any, Family, Path]:
    path, family = saved(name)
    return OPENERS[opener](path, type(family.full)), family, path


def add(denoiser: Any, name: str = "default", **changes: Any) -> None:
    torch.manual_seed(len(name))
    denoiser.add_adapter(peft.LoraConfig(**ADAPTER | changes), name)


def scale(layer: Any, adapter: str) -> float:
    """alpha / r of an adapter of `test_adapters_add_to_the_quantized_output`."""
    name = base_layer(layer).name
    patterns = adapter == "default"
    return (7 if patterns and name.endswith("to_q") else 5) / (2 if patterns and name.endswith("to_k") else 3)


def adapted(layer: Any, x: Tensor, weights: dict[str, float]) -> Tensor:
    """What a layer and its adapters compute, without peft."""
    base: Any = base_layer(layer)
    expected = base(x)
    for name, weight in weights.items():
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            if isinstance(base, QuantConv2d):
                added = F.conv2d(F.conv2d(x, a, None, base.stride, base.padding), b)
            else:
                added = F.linear(F.linear(x, a), b)
            expected = expected + weight * scale(layer, name) * added
    return expected


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_add_to_the_quantized_output(saved: Any, name: str) -> None:
    denoiser, family, _ = opened(saved, name, "from_pretrained" if name == "Flux" else "load_quantized")
    before = family.predict(denoiser)
    add(denoiser, target_modules=FAMILIES[name], rank_pattern={"to_k": 2}, alpha_pattern={"to_q": 7})
    add(denoiser, "second", target_modules=FAMILIES[name][:1])
    weights = {"default": 0.5, "second": 2.0}
    denoiser.set_adapters(list(weights), list(weights.values()))
    checked: set[str] = set()

    def check(layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if len(checked) < len(layers) and base_layer(layer).name not in checked:
            checked.add(base_layer(layer).name)
            assert torch.allclose(adapted(layer, args[0], weights), output, rtol=1e-5, atol=1e-6)

    layers = [module for module in denoiser.modules() if "base_layer" in module._modules]
    hooks = [module.register_forward_hook(check) for module in layers]
    both = family.predict(denoiser)
    for hook in hooks:
        hook.remove()
    assert len(checked) == len(layers) >= len(FAMILIES[name])
    assert not torch.equal(both, before)
    denoiser.set_adapters(list(weights), [0.0, 0.0])
    assert torch.equal(family.predict(denoiser), before)
    denoiser.set_adapters("default")
    one = family.predict(denoiser)
    denoiser.disable_adapters()
    assert torch.equal(family.predict(denoiser), before)
    denoiser.enable_adapters()
    denoiser.delete_adapters("second")
    assert torch.equal(family.predict(denoiser), one)
    denoiser.unload_lora()
    assert torch.equal(family.predict(denoiser), before)
    assert not any("base_layer" in module._modules for module in denoiser.modules())


def test_the_input_of_q_k_and_v_is_quantized_once_with_adapters_too(saved: Any) -> None:
    denoiser, family, _ = opened(saved, "Stable Diffusion 1")
    runs: dict[str, int] = {}
    for name, quantizer in quantizers(denoiser).items():
        quantizer.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs.get(name, 0) + 1))
    family.predict(denoiser)
    expected = dict(runs)
    runs.clear()
    add(denoiser, target_modules=["to_q", "to_v"])
    family.predict(denoiser)
    assert set(expected.values()) == {1}
    assert sorted(runs.values()) == sorted(expected.values())


def test_nothing_is_written_into_the_weights(saved: Any) -> None:
    denoiser, family, _ = opened(saved, "Stable Diffusion 1")
    add(denoiser, target_modules=["to_q", "conv1"])
    before = family.predict(denoiser)
    for attempt in (denoiser.fuse_lora, lambda: denoiser.fuse_lora(0.5, safe_fusing=True, adapter_names=["default"])):
        with pytest.raises(UserError, match=r"^fuse_lora: .*$"):
            attempt()
    adapter = next(module for module in denoiser.modules() if "base_layer" in module._modules)
    for safe in (True, False):
        with pytest.raises(UserError, match="are integers and cannot be changed"):
            adapter.merge(safe_merge=safe)
    weight = base_layer(adapter).weight
    for write in (lambda: weight.add_(1), weight.data.zero_, lambda: setattr(weight, "data", weight + 1)):
        with pytest.raises(UserError, match="are integers and cannot be changed"):
            write()
    assert torch.equal(family.predict(denoiser), before)
    with pytest.raises(UserError, match="are integers and cannot be changed"):
        add(denoiser, "pissa", target_modules=["to_q"], init_lora_weights="pissa")


def test_what_others_see_of_a_weight(saved: Any) -> None:
    denoiser, _, _ = opened(saved, "Stable Diffusion 1")
    layer: Any = denoiser.conv_in
    weight = layer.weight_quantizer(layer.input_quantizer.scales())
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(denoiser.time_embedding.linear_1, nn.Linear)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (weight.shape, weight.dtype, weight.device)
    assert torch.equal(layer.weight + 0, weight)
    assert torch.equal(layer.weight.data.flatten()[3:9], weight.flatten()[3:9])
    assert "conv_in.weight" not in denoiser.state_dict()
    assert denoiser.state_dict()["conv_in.weight"].shape == weight.shape
    with pytest.raises(KeyError):
        denoiser.state_dict()["conv_out.scale"]


def test_saving_leaves_adapters_out(saved: Any, tmp_path: Path) -> None:
    denoiser, family, path = opened(saved, "Stable Diffusion 1")
    plain = family.predict(denoiser)
    add(denoiser, target_modules=["to_q", "to_k", "conv_in"])
    changed = family.predict(denoiser)
    denoiser.save_pretrained(tmp_path / "again")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (path / "unet" / file).read_bytes()
    assert torch.equal(family.predict(denoiser), changed)
    assert torch.equal(family.predict(type(family.full).from_pretrained(tmp_path / "again")), plain)
    denoiser.save_lora_adapter(tmp_path / "adapter")
    other, _, _ = opened(saved, "Stable Diffusion 1")
    other.load_lora_adapter(tmp_path / "adapter", prefix=None, use_safetensors=True)
    assert torch.equal(family.predict(other), changed)
    assert torch.equal(family.predict(copy.deepcopy(other)), changed)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_other_kinds_of_adapters(saved: Any, kind: str) -> None:
    denoiser, family, _ = opened(saved, "Stable Diffusion 1")
    before = family.predict(denoiser)
    layers = ["to_q", "conv1", "to_out.0"]
    configs: dict[str, Callable[[], Any]] = {
        "dora": lambda: peft.LoraConfig(**ADAPTER, use_dora=True, target_modules=layers),
        "loha": lambda: peft.LoHaConfig(r=2, alpha=3, init_weights=False, target_modules=layers),
        "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, init_weights=False, target_modules=layers),
    }
    torch.manual_seed(0)
    denoiser.add_adapter(configs[kind]())
    assert not torch.equal(family.predict(denoiser), before)
    denoiser.disable_adapters()
    assert torch.equal(family.predict(denoiser), before)


@pytest.mark.parametrize("name", ["UNet2DModel", "DiT"])
def test_denoisers_without_diffusers_own_methods(saved: Any, name: str) -> None:
    denoiser, family, _ = opened(saved, name)
    before = family.predict(denoiser)
    peft.inject_adapter_in_model(peft.LoraConfig(**ADAPTER, target_modules=["to_q", "to_k", "to_v"]), denoiser)
    assert not torch.equal(family.predict(denoiser), before)


def test_adapters_have_the_type_of_the_artifact() -> None:
    family = make_family("Stable Diffusion 1", dtype=torch.bfloat16)
    denoiser = frozen(make_denoiser("Stable Diffusion 1", torch.bfloat16))
    add(denoiser, target_modules=["to_q", "conv1"])
    kinds = {p.dtype for n, p in denoiser.named_parameters() if "lora" in n}
    assert kinds == {torch.bfloat16}
    assert family.predict(denoiser).dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Flux"])
def test_adapters_are_trained_through_the_quantized_denoiser(saved: Any, name: str) -> None:
    denoiser, family, _ = opened(saved, name)
    args, kwargs = family.arguments(slice(0, 4))
    target = family.predict(family.full, slice(0, 4))
    add(denoiser, target_modules=FAMILIES[name], init_lora_weights=True)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    tensors = {n: t.clone() for n, t in denoiser.state_dict().items() if "lora" not in n}
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = F.mse_loss(denoiser(*args, **kwargs)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(torch.equal(t, tensors[n]) for n, t in denoiser.state_dict().items() if "lora" not in n)
