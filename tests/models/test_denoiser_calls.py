"""Denoiser calls by meaning, and the conditioning of single samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tcaq_lightning.errors import UserError
from tcaq_lightning.models.denoiser_calls import Call, Conditioning, Samples, split_call, watched

CPU = torch.device("cpu")


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added: dict[str, Tensor] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        assert timestep is not None
        assert not return_dict
        y = hidden_states + timestep.view(-1, 1)
        if encoder_hidden_states is not None:
            y = y + encoder_hidden_states
        return (y if added is None else y + added["pooled"].sum(1, keepdim=True) * added["factor"],)


def conditioning_of(halves: int, samples: int, step: float = 0.0) -> Conditioning:
    """Row h of sample n has the value 10 h + n."""
    values = torch.cat([torch.arange(samples) + 10.0 * h + step for h in range(halves)])
    arguments = {"text": values[:, None], "added": {"pooled": values[:, None] * 2, "scale": 3.0}, "flag": True}
    return Conditioning.of_call(arguments, halves * samples, halves)


@pytest.mark.parametrize("positional", [True, False])
def test_a_call_is_split_by_name_whatever_the_order(positional: bool) -> None:
    x, text, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor(5)
    args, kwargs = (
        ((x, text), {"timestep": t})
        if positional
        else ((), {"timestep": t, "encoder_hidden_states": text, "hidden_states": x})
    )
    call = split_call(Denoiser(), args, kwargs | {"return_dict": False, "added": None})
    assert call.x is x
    assert call.timestep is t
    assert list(call.arguments) == ["encoder_hidden_states"]


def test_a_denoiser_without_timestep_is_refused() -> None:
    with pytest.raises(UserError, match="expected the noisy sample first, and timestep"):
        split_call(Denoiser(), (torch.zeros(1, 1),), {})


def test_watching_ends() -> None:
    denoiser, seen = Denoiser(), list[Call]()
    for _ in range(2):
        with watched(denoiser, seen.append):
            denoiser(torch.zeros(1, 1), timestep=torch.tensor(1), return_dict=False)
        denoiser(torch.zeros(1, 1), timestep=torch.tensor(1), return_dict=False)
    assert len(seen) == 2


@given(halves=st.integers(1, 3), samples=st.integers(1, 4), steps=st.integers(1, 3), data=st.data())
def test_rows_find_their_call_and_trajectory(halves: int, samples: int, steps: int, data: Any) -> None:
    conditioning = Conditioning.along_steps([conditioning_of(halves, samples) for _ in range(steps)])
    assert len(conditioning.tensors[0]) == halves  # not once for each step
    calls = data.draw(st.lists(st.integers(0, halves * steps - 1), min_size=1, max_size=5))
    trajectories = data.draw(st.lists(st.integers(0, samples - 1), min_size=len(calls), max_size=len(calls)))
    got = conditioning.rows(torch.tensor(calls), torch.tensor(trajectories), CPU)
    expected = [10.0 * (s % halves) + n for s, n in zip(calls, trajectories, strict=True)]
    assert got["text"].flatten().tolist() == expected
    assert got["added"]["pooled"].flatten().tolist() == [2 * e for e in expected]
    assert got["added"]["scale"] == 3.0
    assert got["flag"] is True


def test_what_differs_from_step_to_step_is_kept_for_each() -> None:
    conditioning = Conditioning.along_steps([conditioning_of(2, 3, step) for step in (0.0, 0.5)])
    got = conditioning.rows(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 1, 1]), CPU)
    assert got["text"].flatten().tolist() == [1.0, 11.0, 1.5, 11.5]


def test_trajectories_side_by_side_and_chosen() -> None:
    left = Conditioning.along_steps([conditioning_of(2, 3)] * 2)
    right = Conditioning.along_steps([conditioning_of(2, 2, step) for step in (0.25, 0.5)])
    both = Conditioning.side_by_side([left, right]).select(torch.tensor([2, 4]))
    got = both.rows(torch.tensor([0, 3, 0, 3]), torch.tensor([0, 0, 1, 1]), CPU)
    assert got["text"].flatten().tolist() == [2.0, 12.0, 1.25, 11.5]


def test_packing_keeps_everything() -> None:
    arguments = {
        "text": torch.randn(4, 2),
        "img_ids": torch.arange(4),  # as long as the batch, and yet the same for all of it
        "nested": {"pair": (torch.randn(4), None), "number": 7},
        "name": "x",
    }
    conditioning = Conditioning.of_call(arguments, 4, 2)
    tensors, record = conditioning.packed()
    assert Conditioning.unpacked(tensors, record) == conditioning
    got = conditioning.rows(torch.tensor([0, 1]), torch.tensor([1, 1]), CPU)
    assert got["img_ids"].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(got["text"], arguments["text"][[1, 3]])
    assert got["nested"]["pair"][1] is None


def test_constants_must_stay_constant() -> None:
    parts = [Conditioning.of_call({"a": torch.ones(1), "n": n}, 1) for n in (1, 2)]
    with pytest.raises(UserError, match="from step to step"):
        Conditioning.along_steps(parts)


def test_an_argument_that_cannot_be_kept_is_named() -> None:
    with pytest.raises(UserError, match="object among odd"):
        Conditioning.of_call({"odd": object()}, 1)


def test_samples_are_predicted_alike_in_any_batch() -> None:
    denoiser, x = Denoiser(), torch.randn(6, 2)
    arguments = {"encoder_hidden_states": torch.randn(6, 2), "added": {"pooled": torch.randn(6, 3), "factor": 0.5}}
    samples = Samples(x, torch.arange(6), Conditioning.of_call(arguments, 6))
    whole = samples.predict(denoiser)
    parts = [samples[:4][torch.tensor([1, 3])], samples[4:], samples.cycled(13)[6:7]]
    for part, rows in zip(parts, ([1, 3], [4, 5], [0]), strict=True):
        torch.testing.assert_close(part.predict(denoiser), whole[rows])
    expected = x[2] + 2 + arguments["encoder_hidden_states"][2] + arguments["added"]["pooled"][2].sum() * 0.5  # type: ignore[index]
    torch.testing.assert_close(whole[2], expected)
