from __future__ import annotations

import copy
import inspect
import pickle  # noqa: TID251 - as a user may
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from tcaq_lightning.runtime.provided import provide, withdraw
from tests.tiny_models import tiny_unet


class Halved:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)[0] / 2  # type: ignore[misc]


class Negated:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return -super().forward(*args, **kwargs)  # type: ignore[misc]

    def extra(self) -> str:
        return "here"


def call(unet: Any) -> torch.Tensor:
    result: torch.Tensor = unet(torch.ones(1, 1, 8, 8), 3, return_dict=False)
    return result


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_unet().requires_grad_(False)


def test_methods_stand_in_front_of_the_modules_own(plain: Any) -> None:
    expected, unet = call(plain)[0], copy.deepcopy(plain)
    provide(unet, Halved)
    provide(unet, Negated)
    provide(unet, Halved)  # has it
    assert torch.equal(call(unet), -expected / 2)
    assert torch.equal(unet.forward(torch.ones(1, 1, 8, 8), 3, return_dict=False), -expected / 2)
    assert unet.extra() == "here"
    assert torch.equal(call(plain)[0], expected)  # of this one module
    withdraw(unet, Halved)
    with pytest.raises(TypeError):
        call(unet)  # what is negated now is a tuple
    withdraw(unet, Negated)
    withdraw(unet, Negated)
    assert type(unet) is UNet2DModel


def test_a_class_passes_for_the_original(plain: Any) -> None:
    unet = copy.deepcopy(plain)
    provide(unet, Halved)
    kind = type(unet)
    assert isinstance(unet, UNet2DModel)
    names = [(k.__name__, k.__qualname__, k.__module__, k.__doc__) for k in (kind, UNet2DModel)]
    assert names[0] == names[1]
    assert inspect.signature(unet.forward) == inspect.signature(plain.forward)
    assert repr(unet) == repr(plain)
    assert unet.config == plain.config
    assert unet.to_json_string() == plain.to_json_string()


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: pickle.loads(pickle.dumps(m, 1))],
)
def test_copies_have_them_too(copied: Any, plain: Any) -> None:
    unet = copy.deepcopy(plain)
    provide(unet, Halved)
    provide(unet, Negated)
    again = copied(unet)
    assert type(again) is type(unet)
    assert torch.equal(call(again), call(unet))


def test_a_module_of_a_class_derived_from_such_a_one(plain: Any) -> None:
    unet = copy.deepcopy(plain)
    provide(unet, Halved)
    unet.__class__ = type("Sharded", (type(unet),), {})  # as FSDP does
    provide(unet, Negated)
    assert torch.equal(call(unet), -call(plain)[0] / 2)
    withdraw(unet, Negated)
    assert type(unet).__name__ == "Sharded"


def test_a_child_may_be_called_anything() -> None:
    module: Any = nn.Sequential()
    module.forward_before = nn.Identity()
    provide(module, Negated)
    assert isinstance(module.forward_before, nn.Identity)
    assert module(torch.ones(1)) == -1
