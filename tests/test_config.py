"""Cross-field checks and the division of iterations over phases and rounds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcaq_lightning.config import (
    ActivationConfig,
    CalibrationConfig,
    Config,
    EvaluationConfig,
    HeadroomConfig,
    LayerRule,
    ModelConfig,
    PARConfig,
    QuantizationConfig,
    ReconstructionConfig,
    SamplerConfig,
    SensitivityConfig,
    SoftmaxConfig,
    TCRConfig,
    TrainerConfig,
    WeightConfig,
)
from tcaq_lightning.errors import UserError


@given(
    iterations=st.integers(20, 5000),
    rounds=st.integers(1, 4),
    par=st.booleans(),
    tcr=st.booleans(),
    learn=st.booleans(),
    share=st.floats(0.2, 0.6),
)
def test_all_ablations_take_equal_iterations(
    iterations: int, rounds: int, par: bool, tcr: bool, learn: bool, share: float
) -> None:
    config = Config(
        tcr=TCRConfig(enabled=tcr, learn=learn),
        par=PARConfig(enabled=par, rounds=rounds, share=share),
        reconstruction=ReconstructionConfig(iterations=iterations),
    )
    phases = config.phase_iterations()
    assert sum(phases.values()) == iterations
    assert ((0, "r") in phases) == (tcr and learn)
    assert config.num_rounds == (1 + rounds if par else 1)
    assert sum(config.steps_by_round()) == iterations
    assert len(config.steps_by_round()) == config.num_rounds


def test_without_reconstruction_there_is_one_round_of_no_steps() -> None:
    config = Config(reconstruction=ReconstructionConfig(enabled=False))
    assert config.steps_by_round() == [0]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: WeightConfig(bits=1), "quantization.weight.bits"),
        (lambda: ActivationConfig(bits=9), "quantization.activation.bits"),
        (lambda: WeightConfig(granularity="row"), "WeightConfig.granularity"),
        (lambda: WeightConfig(granularity=1), "quantization.weight.granularity"),
        (lambda: LayerRule("*", weight_granularity=-4), r"quantization.rules\[\*\].weight_granularity"),
        (
            lambda: QuantizationConfig(activation=ActivationConfig(bits=16), softmax=SoftmaxConfig(8)),
            "quantization.softmax.bits",
        ),
        (lambda: SamplerConfig(eta=1.5), "^sampler.eta must be"),
        (lambda: SamplerConfig(num_steps=0), "^sampler.num_steps must be"),
        (lambda: CalibrationConfig(bias_samples=0), "calibration.bias_samples"),
        (lambda: HeadroomConfig(stream=0.9), "headroom.stream"),
        (lambda: HeadroomConfig(coarse_below=1), "headroom.coarse_below"),
        (lambda: SensitivityConfig(data_variance=0.0), "sensitivity.data_variance"),
        (lambda: SensitivityConfig(probes=0), "sensitivity.probes"),
        (lambda: ReconstructionConfig(bias_rate=1.5), "reconstruction.bias_rate"),
        (lambda: ReconstructionConfig(refine_logit=0.0), "reconstruction.refine_logit"),
        (lambda: ReconstructionConfig(fastest_rounding=float("nan")), "reconstruction.fastest_rounding"),
        (lambda: PARConfig(final_share=0.0), "par.final_share"),
        (lambda: ReconstructionConfig(step_lr=float("inf")), "reconstruction.step_lr"),
        (lambda: ReconstructionConfig(rounding_lr=float("nan")), "reconstruction.rounding_lr"),
        (lambda: TCRConfig(truncation=float("inf")), "tcr.truncation"),
        (lambda: Config(seed=-1), "seed"),
        (lambda: EvaluationConfig(metrics=[]), "evaluation.metrics"),
        (lambda: EvaluationConfig(metrics=["fid", "fid"]), "evaluation.metrics"),
        (lambda: Config(reconstruction=ReconstructionConfig(iterations=2)), "reconstruction.iterations"),
        (
            lambda: Config(
                calibration=CalibrationConfig(sampler=SamplerConfig(num_steps=5)),
                quantization=QuantizationConfig(activation=ActivationConfig(timestep_groups=6)),
            ),
            "quantization.activation.timestep_groups",
        ),
    ],
)
def test_a_value_out_of_range_is_named(make: Any, key: str) -> None:
    with pytest.raises(UserError, match=key):
        make()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calibration.num_trajectories", 3),
        ("calibration.held_out_trajectories", 3),
        ("evaluation.num_trajectories", 3),
        ("reconstruction.batch_size", 30),
        ("par.trajectories", 0.05),
    ],
)
def test_every_rank_needs_its_share(key: str, value: float) -> None:
    config = Config(trainer=TrainerConfig(devices=2, num_nodes=2))
    config.check_ranks()
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(
        UserError, match=rf"^{key}.*trainer\.devices x trainer\.num_nodes = 4.*got {value:g}|^par.* got 3"
    ):
        config.check_ranks()
    Config().check_ranks()


@pytest.mark.parametrize("settings", [{}, {"pattern": "conv_in", "role": "input"}])
def test_a_rule_is_about_either_names_or_a_role(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"quantization\.rules must be rules with either a role or a pattern"):
        LayerRule(**settings, keep=True)


def test_headroom_can_be_left_out() -> None:
    headroom = HeadroomConfig()
    assert (headroom.of_sample(5), headroom.of_sample(6), headroom.of_stream) == (2.0, 1.5, 1.35)
    off = HeadroomConfig(enabled=False)
    assert (off.of_sample(5), off.of_sample(6), off.of_stream) == (1.0, 1.0, 1.0)


@given(st.integers(1, 100_000))
def test_the_rounding_rate_is_bounded(iterations: int) -> None:
    config = ReconstructionConfig()
    assert config.rounding_rate(iterations) == min(0.2, 20 / iterations)
    assert ReconstructionConfig(rounding_lr=0.03).rounding_rate(iterations) == 0.03


def test_values_that_were_set_later_are_checked_by_check() -> None:
    config = Config()
    config.check()
    config.calibration.sampler.num_steps = 0
    with pytest.raises(UserError, match=r"^calibration\.sampler\.num_steps must be at least 1, got 0$"):
        config.check()


def test_a_run_directory_is_named_after_model_and_width() -> None:
    assert Config().run_dir == Path("runs/fashion-mnist-ddpm-w4a8")
    config = Config(model=ModelConfig("someone/a-model"), run_dir=Path("out/{bits}/{model}"))
    assert config.run_dir == Path("out/w4a8/a-model")
    assert dataclasses.replace(config, seed=1).run_dir == config.run_dir
