"""Block reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tcaq_lightning.config.checks import Section, require, require_count, require_positive, require_rate, require_share


@dataclass
class ReconstructionConfig(Section):
    """Optimisation of each unit against its full-precision output (docs/method.md, "Learned rounding")."""

    enabled: bool = True
    """Off: rounding to nearest with searched ranges."""
    iterations: int = 200
    """Optimisation steps for each unit, over all phases and rounds together."""
    batch_size: int = 32
    """Samples per step, over all processes together."""
    rounding_lr: float | None = None
    """Adam's rate for the rounding logits V; null: rounding_travel / iterations of the phase, at most
    fastest_rounding."""
    fastest_rounding: float = 0.2
    """Largest rate with rounding_lr: null."""
    rounding_travel: float = 20.0
    """How far V may travel in a phase, in logits, with rounding_lr: null. Adam moves V by about its rate a step, and
    the regulariser moves it only late in the phase, when beta is small: with less, a short phase leaves many weights
    undecided."""
    refine_logit: float = 2.0
    """In later rounds, logits start within [-refine_logit, refine_logit]: close to the rounded weights, but a rounding
    can still flip."""
    step_lr: float = 1e-2
    """Adam's rate for the logarithms of activation steps."""
    r_lr: float = 3e-2
    """Adam's rate for log r, in the r phase."""
    scale_lr: float = 1e-3
    """Adam's rate for the logarithms of the weights' scales; 0 keeps them where the search put them."""
    rounding_weight: float = 0.01
    """lambda, the weight of the rounding regulariser."""
    warmup: float = 0.2
    """Share of the V phase without regulariser."""
    patience: int | None = None
    """Stop a phase when its held-out error has not fallen in this many checks; null: never."""
    held_out_checks: int = 10
    """Number of evenly spaced checks of the held-out error in one phase, with `patience`."""
    autocast: bool | Literal["auto"] = "auto"
    """Multiply matrices in bfloat16 during the optimisation; rounding and loss stay in float32. auto: where the device
    does it natively (AMX, tensor cores) and the model is in float32."""
    input_steps_every: int = 4
    """Learn the steps and r of a unit's own inputs only at every n-th optimisation step, since nothing else needs the
    backward pass through its first layers. 1 with `compile`."""
    compile_kernels: bool = True
    """Compile the element-wise work of quantization with torch.compile, for all sizes at once: up to a minute once on a
    machine, seconds in later runs. Without a compiler, a warning is shown and the run continues uncompiled."""
    compile: bool = False
    """Compile the units with torch.compile, once for units of equal shape. That takes seconds to minutes for each
    shape, so it pays with thousands of iterations."""
    qdrop: float = 0.0
    """Probability with which an element of an activation stays in full precision during optimisation (QDrop)."""
    weighting: Literal["sensitivity", "uniform"] = "sensitivity"
    """sensitivity: a unit's errors are weighted, by timestep group and channel, by their effect on the final sample;
    uniform: all have the same weight."""
    bias_correction: bool = True
    """Correct the mean error of each unit's output channels, for each timestep group."""
    bias_rate: float = 0.1
    """Share of a sample's mean error that the bias correction of its group takes over in one step; 0: the correction
    stays constant while rounding is learned."""
    gate: bool = True
    """Keep a unit's result only if its held-out error is no worse than before."""

    def check(self) -> None:
        """Check that all values can be worked with."""
        require_count(self.iterations, "reconstruction.iterations")
        require_count(self.batch_size, "reconstruction.batch_size", most=2**20)
        for name in ("step_lr", "r_lr", "scale_lr", "rounding_weight"):
            require_rate(getattr(self, name), f"reconstruction.{name}")
        if self.rounding_lr is not None:
            require_positive(self.rounding_lr, "reconstruction.rounding_lr")
        for name in ("fastest_rounding", "rounding_travel", "refine_logit"):
            require_positive(getattr(self, name), f"reconstruction.{name}")
        require_share(self.bias_rate, "reconstruction.bias_rate")
        require_count(self.input_steps_every, "reconstruction.input_steps_every")
        require_count(self.patience, "reconstruction.patience")
        require_count(self.held_out_checks, "reconstruction.held_out_checks")
        require(0 <= self.warmup < 1, "reconstruction.warmup", "in [0, 1)", self.warmup)
        require(0 <= self.qdrop < 1, "reconstruction.qdrop", "in [0, 1)", self.qdrop)

    def rounding_rate(self, iterations: int) -> float:
        """Adam's rate for V in a phase of so many steps."""
        return self.rounding_lr or min(self.fastest_rounding, self.rounding_travel / iterations)
