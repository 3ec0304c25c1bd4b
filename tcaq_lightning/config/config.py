"""One calibration run, with all its sections."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcaq_lightning.config.calibration import CalibrationConfig
from tcaq_lightning.config.checks import Section, require, require_text
from tcaq_lightning.config.conditioning import ConditioningConfig
from tcaq_lightning.config.daq import DAQConfig
from tcaq_lightning.config.evaluation import EvaluationConfig
from tcaq_lightning.config.headroom import HeadroomConfig
from tcaq_lightning.config.logging import LoggingConfig
from tcaq_lightning.config.model import ModelConfig
from tcaq_lightning.config.par import PARConfig
from tcaq_lightning.config.quantization import QuantizationConfig
from tcaq_lightning.config.reconstruction import ReconstructionConfig
from tcaq_lightning.config.sensitivity import SensitivityConfig
from tcaq_lightning.config.tcr import TCRConfig
from tcaq_lightning.config.trainer import TrainerConfig
from tcaq_lightning.config.values import check_types

SMALLEST_JUDGED = 32
"""Samples of a pass through a unit that hardly any device is faster with more of."""
UNRELATED_TO_RESULT = ("run_dir", "cache_dir", "trainer", "logging", "calibration.memory_budget")
"""Keys that may change when a run is resumed, with all that is under them."""


@dataclass
class Config(Section):
    """One calibration run."""

    run_dir: Path = Path("runs/{model}-{bits}")
    """Directory of everything the run writes; the same command resumes there. {model} stands for the last part of
    model.path, {bits} for the width, such as w4a8."""
    cache_dir: Path | None = None
    """Directory for what runs with the same model and samples can share: trajectories, images, statistics; null keeps
    them in run_dir."""
    seed: int = 0
    """Seed of noises, sample draws and searches."""
    extensions: list[str] = field(default_factory=list)
    """Python files, or dotted names of modules, imported before anything is built: metrics, methods, families and
    quantizers register themselves there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The pretrained model."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    """Prompts or classes, and guidance."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Calibration data."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """Bits and granularity."""
    headroom: HeadroomConfig = field(default_factory=HeadroomConfig)
    """Headroom of the ranges of unnormalized inputs."""
    tcr: TCRConfig = field(default_factory=TCRConfig)
    """TCR."""
    daq: DAQConfig = field(default_factory=DAQConfig)
    """DAQ."""
    par: PARConfig = field(default_factory=PARConfig)
    """PAR."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """Block reconstruction."""
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    """Sensitivity weights."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Devices and threads."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """TensorBoard and pictures."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        check_types(self, "")
        require_text(self.run_dir, "run_dir")
        require_text(self.cache_dir, "cache_dir")
        self.run_dir = self._named(self.run_dir)
        for i, name in enumerate(self.extensions):
            require_text(name, f"extensions[{i}]")
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if isinstance(value, Section):
                value.check()
        require(0 <= self.seed < 2**31, "seed", "in 0 .. 2^31 - 1", self.seed)
        require(
            self.quantization.activation.timestep_groups <= self.calibration.sampler.num_steps,
            "quantization.activation.timestep_groups",
            f"at most calibration.sampler.num_steps ({self.calibration.sampler.num_steps})",
            self.quantization.activation.timestep_groups,
        )
        if self.num_rounds > 1:
            require(
                self.par.rounds <= self.reconstruction.iterations,
                "par.rounds",
                f"at most reconstruction.iterations ({self.reconstruction.iterations})",
                self.par.rounds,
            )
        if self.reconstruction.enabled:
            require(
                min(self.phase_iterations().values()) >= 1,
                "reconstruction.iterations",
                "enough for one step in every phase and round of tcr and par",
                self.reconstruction.iterations,
            )

    def _named(self, run_dir: str | Path) -> Path:
        """A directory whose name may say which model and width it is of."""
        bits = f"w{self.quantization.weight.bits}a{self.quantization.activation.bits}"
        model = Path(self.model.path).resolve().name
        return Path(str(run_dir).replace("{model}", model).replace("{bits}", bits))

    def check_ranks(self) -> None:
        """Check that there is work for every rank.

        Raises:
            UserError: fewer trajectories than ranks, or a batch that cannot be dealt evenly.
        """
        ranks = self.trainer.devices * self.trainer.num_nodes
        expected = f"at least the number of processes (trainer.devices x trainer.num_nodes = {ranks})"
        for key, got in (
            ("calibration.num_trajectories", self.calibration.num_trajectories),
            ("calibration.held_out_trajectories", self.calibration.held_out_trajectories),
            ("evaluation.num_trajectories", self.evaluation.num_trajectories),
        ):
            require(got >= ranks, key, expected, got)
        if self.num_rounds > 1:
            learned = self.learned_trajectories(1)
            require(learned >= ranks, "par.trajectories x calibration.num_trajectories", expected, learned)
        require(
            self.reconstruction.batch_size % ranks == 0,
            "reconstruction.batch_size",
            f"a multiple of the number of processes (trainer.devices x trainer.num_nodes = {ranks})",
            self.reconstruction.batch_size,
        )

    def learned_trajectories(self, round_index: int) -> int:
        """Number of trajectories that a round learns from."""
        total = self.calibration.num_trajectories
        return max(1, round(self.par.trajectories * total)) if round_index else total

    @property
    def num_rounds(self) -> int:
        """Rounds of the alignment loop, round 0 included."""
        return 1 + (self.par.rounds if self.par.enabled and self.reconstruction.enabled else 0)

    @property
    def judged_batch_size(self) -> int:
        """Samples of a pass through one unit outside of the optimisation: its memory is then no more than a step's."""
        return min(self.calibration.batch_size, max(SMALLEST_JUDGED, self.reconstruction.batch_size))

    def phase_iterations(self) -> dict[tuple[int, str], int]:
        """Optimisation steps by (round, phase): the total is reconstruction.iterations whatever is switched on."""
        total, later = self.reconstruction.iterations, {}
        if self.num_rounds > 1:
            each = int(total * self.par.share / self.par.rounds)
            later = {(m, "v"): each for m in range(1, self.num_rounds)}
        first = total - sum(later.values())
        learned = int(first * self.tcr.share) if self.tcr.enabled and self.tcr.learn else 0
        phases = {(0, "r"): learned} if self.tcr.enabled and self.tcr.learn else {}
        return {**phases, (0, "v"): first - learned, **later}

    def steps_by_round(self) -> list[int]:
        """Optimisation steps of one unit in each round."""
        if not self.reconstruction.enabled:
            return [0]
        phases = self.phase_iterations()
        return [sum(n for (m, _), n in phases.items() if m == i) for i in range(self.num_rounds)]

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML-ready values, paths as strings."""
        values = dataclasses.asdict(self)
        for section, key in ((values, "run_dir"), (values, "cache_dir"), (values["conditioning"], "prompts")):
            section[key] = None if section[key] is None else str(section[key])
        return values
