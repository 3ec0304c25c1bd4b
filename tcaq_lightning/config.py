"""The whole configuration as typed dataclasses: every YAML key is a field here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from tcaq_lightning.errors import UserError

Metric = Literal["fid", "sfid", "is", "kid", "precision_recall", "clip"]
"""What can be measured on images."""
Role = Literal["input", "output", "time", "modulation", "shortcut", "block"]
"""What a layer is for in its denoiser: it reads the noisy sample or the context, gives the prediction, embeds the
timestep, turns the condition into scales, shifts and gates, carries a stream past a block, or none of these."""
INCEPTION = "inception"
"""Name of the feature extractor of published figures."""


def _require(ok: bool, key: str, expected: str, got: object) -> None:
    if not ok:
        raise UserError(f"{key} must be {expected}, got {got!r}")


def _require_bits(bits: int | None, key: str) -> None:
    _require(bits is None or 2 <= bits <= 8, key, "in 2..8", bits)


def _require_share(value: float, key: str) -> None:
    _require(0 <= value <= 1, key, "in [0, 1]", value)


@dataclass
class ModelConfig:
    """Which pretrained model to quantize."""

    path: str = "fashion-mnist-ddpm"
    """A directory in diffusers layout (model_index.json), a hub id, or the name of a shipped model."""
    architecture: str | None = None
    """What --dry_run plans with where there is nothing at model.path: name of a shipped configuration without weights,
    such as stable-diffusion-v1-4, or a directory with one."""
    variant: str | None = None
    """Variant of the weights' files, such as fp16; null takes the ones without."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model computes in; quantizers and rounding are always computed in float32."""


@dataclass
class ConditioningConfig:
    """What the samples are of; nothing of it concerns an unconditional model."""

    prompts: Path | None = None
    """Text file with one prompt a line; sample i takes line i, from the start again after the last one."""
    negative_prompt: str | None = None
    """What guidance leads away from, for all samples."""
    class_labels: list[int] | None = None
    """Classes that the samples take in turn; null: all of a class-conditional model's."""
    guidance_scale: float | None = None
    """Classifier-free guidance, in calibration, sampling and evaluation; null: the pipeline's own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's call, such as height and width."""

    def __post_init__(self) -> None:
        self.prompts = None if self.prompts is None else Path(self.prompts)
        _require(
            self.class_labels is None or len(self.class_labels) > 0,
            "conditioning.class_labels",
            "null or not empty",
            [],
        )
        scale = self.guidance_scale
        _require(scale is None or 0 <= scale < math.inf, "conditioning.guidance_scale", "finite and at least 0", scale)


@dataclass
class SamplerConfig:
    """How images are sampled; any diffusers scheduler will do."""

    scheduler: str | None = None
    """Class name in diffusers, such as DDIMScheduler or UniPCMultistepScheduler; null keeps the model's own."""
    num_steps: int = 20
    """Sampler steps S."""
    eta: float = 0.0
    """DDIM's noise share: 0 is deterministic, 1 is DDPM-like."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further settings of the scheduler, such as clip_sample or timestep_spacing."""

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, "sampler.num_steps", "at least 1", self.num_steps)
        _require_share(self.eta, "sampler.eta")


@dataclass
class MemoryBudget:
    """Gigabytes (10^9 bytes) for each process' stored activations; the device is filled first, then host, then disk."""

    device: float | None = None
    """In the memory of a GPU; null: half of what is free there. A CPU's memory counts as the host's."""
    host: float | None = None
    """In host memory; null: half of what is available, shared by a node's processes."""
    disk: float | None = None
    """In memory-mapped files in RUN_DIR; null: what is free there, shared by a node's processes."""

    def __post_init__(self) -> None:
        for name in ("device", "host", "disk"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value < math.inf,
                f"calibration.memory_budget.{name}",
                "finite and at least 0, or null",
                value,
            )


@dataclass
class CalibrationConfig:
    """The model's own samples that it is calibrated on."""

    num_trajectories: int = 64
    """Trajectories to calibrate on; each gives one sample per sampler step."""
    held_out_trajectories: int = 8
    """Further trajectories, for the held-out losses and the gate."""
    mismatch_trajectories: int = 32
    """Trajectories after the first num_trajectories that the two samplers' mismatch is measured on."""
    batch_size: int = 64
    """Samples per forward pass outside of the optimisation."""
    storage: Literal["float32", "bfloat16"] = "float32"
    """What stored activations are kept as; bfloat16 takes half the memory and rounds them to 8 bits."""
    memory_budget: MemoryBudget = field(default_factory=MemoryBudget)
    """Memory for stored activations."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Sampler of the trajectories; images are evaluated with it too, unless evaluation.sampler says otherwise."""

    def __post_init__(self) -> None:
        _require(self.num_trajectories >= 1, "calibration.num_trajectories", "at least 1", self.num_trajectories)
        _require(
            self.held_out_trajectories >= 1,
            "calibration.held_out_trajectories",
            "at least 1",
            self.held_out_trajectories,
        )
        _require(
            self.mismatch_trajectories >= self.held_out_trajectories,
            "calibration.mismatch_trajectories",
            f"at least calibration.held_out_trajectories ({self.held_out_trajectories})",
            self.mismatch_trajectories,
        )
        _require(self.batch_size >= 1, "calibration.batch_size", "at least 1", self.batch_size)

    @property
    def indices(self) -> range:
        """Numbers of all noises that calibration samples from."""
        return range(self.num_trajectories + self.mismatch_trajectories)


@dataclass
class WeightConfig:
    """Weight quantizers: one step per output channel."""

    bits: int = 4
    """Code width, 2..8."""
    symmetric: bool = True
    """Constant zero point, as integer kernels want it; false searches a zero point per channel, for comparison."""

    def __post_init__(self) -> None:
        _require_bits(self.bits, "quantization.weight.bits")


@dataclass
class ActivationConfig:
    """Activation quantizers: one step and zero point per tensor and timestep group."""

    bits: int = 8
    """Code width, 2..8."""
    timestep_groups: int = 20
    """Number of timestep intervals G with their own parameters; 1 is static."""
    dynamic_per_token: bool = False
    """Give the inputs of linear layers a step and zero point for every token, from its values at run time, in place of
    those of its timestep group: for transformers. Convolutions, and q, k, v, keep theirs."""

    def __post_init__(self) -> None:
        _require_bits(self.bits, "quantization.activation.bits")
        _require(self.timestep_groups >= 1, "quantization.activation.timestep_groups", ">= 1", self.timestep_groups)


@dataclass
class SoftmaxConfig:
    """Quantizers of post-softmax values; daq decides their kind."""

    bits: int | None = None
    """Code width, 2..8; null takes quantization.activation.bits."""

    def __post_init__(self) -> None:
        _require_bits(self.bits, "quantization.softmax.bits")


@dataclass
class LayerRule:
    """What holds for the layers of a role, or for those whose name matches; a later rule overrides an earlier one."""

    pattern: str | None = None
    """Shell-style pattern on the module's name within the denoiser, such as *.time_emb_proj. It must match something;
    give either a pattern or a role."""
    weight_bits: int | None = None
    """Code width of the weights, null leaves it."""
    activation_bits: int | None = None
    """Code width of the inputs (for an attention: of q, k and v), null leaves it."""
    softmax_bits: int | None = None
    """Code width of an attention's probabilities, null leaves it."""
    keep: bool = False
    """Leave the layer in full precision."""
    float_output: bool | None = None
    """With quantization.integer_ready: true leaves a convolution's output in floating point, false quantizes it; null:
    only that of the layer with role output, the prediction itself, is left."""
    role: Role | None = None
    """Role of the layers, in any model: input, output, time, modulation, shortcut, or block for all others and for
    attentions. A model may have no layer of a role."""

    def __post_init__(self) -> None:
        _require(
            (self.pattern is None) != (self.role is None),
            "quantization.rules",
            "rules with either a role or a pattern",
            {"role": self.role, "pattern": self.pattern},
        )
        for name in ("weight_bits", "activation_bits", "softmax_bits"):
            _require_bits(getattr(self, name), f"quantization.rules[{self.role or self.pattern}].{name}")

    def matches(self, name: str, role: Role) -> bool:
        """Whether the rule is about the layer or attention called `name` in that role."""
        return role == self.role if self.pattern is None else fnmatchcase(name, self.pattern)


@dataclass
class QuantizationConfig:
    """Bits and granularity."""

    weight: WeightConfig = field(default_factory=WeightConfig)
    """Weights."""
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    """Inputs of layers, and q, k, v."""
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    """Attention probabilities."""
    rules: list[LayerRule] = field(default_factory=list)
    """Layers that differ or are kept: a role (input, output, time, modulation, shortcut, block) or a shell-style
    pattern on the module's name, and weight_bits, activation_bits, softmax_bits (each null or left out: unchanged),
    keep: true, or float_output: true or false (with integer_ready). A later rule overrides an earlier one."""
    integer_ready: bool = False
    """Quantize the outputs of convolutions too, to 8 bits by channel, for engines without integer convolutions that
    give floats (ONNX Runtime). They are calibrated, learned and simulated."""


@dataclass
class TCRConfig:
    """Timestep-channel joint reparameterization (METHOD section 3)."""

    enabled: bool = True
    """Off: r = 1 everywhere."""
    formula: Literal["searched", "profile"] = "searched"
    """searched: the candidate of least output error; profile: the published timestep-weighted formula alone."""
    truncation: float = 10.0
    """r lies in [1 / truncation, truncation]."""
    learn: bool = True
    """Learn log r in round 0's r phase, after the search."""
    share: float = 0.25
    """Share of round 0's iterations that the r phase takes."""

    def __post_init__(self) -> None:
        _require(1 <= self.truncation < math.inf, "tcr.truncation", "finite and at least 1", self.truncation)
        _require(0 < self.share < 1, "tcr.share", "between 0 and 1", self.share)


@dataclass
class DAQConfig:
    """Dynamically adaptive quantization of post-softmax layers (METHOD section 4)."""

    enabled: bool = True
    """Off: every group is uniform."""
    rule: Literal["likelihood", "error"] = "error"
    """likelihood: the better fitting tail; error: the smaller error of the attention's output. Both are recorded."""
    family: Literal["log2", "log_sqrt2", "adalog"] = "log2"
    """Which logarithmic quantizer stands against the uniform one."""


@dataclass
class PARConfig:
    """Progressively aligned reconstruction (METHOD section 5)."""

    enabled: bool = True
    """Off: round 0 only, with all iterations."""
    rounds: int = 1
    """Rounds M after round 0."""
    final_share: float = 1.0
    """Share rho_M of the last round's trajectories that the quantized sampler draws; round m takes m / M of it."""
    share: float = 0.3
    """Share of all iterations that the later rounds take together."""
    trajectories: float = 0.5
    """Share of the calibration trajectories that a later round learns from, drawn anew for each round."""

    def __post_init__(self) -> None:
        _require(self.rounds >= 1, "par.rounds", "at least 1 (par.enabled switches them off)", self.rounds)
        _require(0 < self.share < 1, "par.share", "between 0 and 1", self.share)
        _require(0 < self.final_share <= 1, "par.final_share", "in (0, 1]", self.final_share)
        _require(0 < self.trajectories <= 1, "par.trajectories", "in (0, 1]", self.trajectories)


@dataclass
class ReconstructionConfig:
    """Optimisation of each unit against its full-precision output (METHOD section 2)."""

    enabled: bool = True
    """Off: rounding to nearest with searched ranges."""
    iterations: int = 400
    """Optimisation steps for each unit, over all phases and rounds together."""
    batch_size: int = 32
    """Samples per step, over all processes together."""
    rounding_lr: float | None = None
    """Adam's rate for the rounding logits V; null: 20 / iterations of the phase, at most 0.2."""
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
    """Stop a phase when its held-out error, looked at ten times in it, has not fallen for so many looks; null:
    never."""
    autocast: bool | Literal["auto"] = "auto"
    """Multiply matrices in bfloat16 during the optimisation; rounding and loss stay in float32. auto: where the device
    does it natively (AMX, tensor cores) and the model is in float32."""
    input_steps_every: int = 4
    """Learn the activation steps and r of what a unit reads at every so many-th optimisation step only: nothing else
    needs the backward pass through its first layers. 1 with `compile`."""
    compile_kernels: bool = True
    """Compile the element-wise work of quantization with torch.compile, for all sizes at once: up to a minute once on
    a machine, seconds in later runs. Without a compiler a warning says that it goes on without."""
    compile: bool = False
    """Compile the units with torch.compile, once for units of equal shape. That takes seconds to minutes for each
    shape, so it pays with thousands of iterations."""
    qdrop: float = 0.0
    """Probability with which an element of an activation stays in full precision during optimisation (QDrop)."""
    weighting: Literal["sensitivity", "uniform"] = "sensitivity"
    """sensitivity: a unit's errors weigh, by timestep group and channel, what they do to the final sample; uniform: all
    weigh the same."""
    bias_correction: bool = True
    """Correct the mean error of each unit's output channels, for each timestep group."""
    gate: bool = True
    """Keep a unit's result only if its held-out error is no worse than before."""

    def __post_init__(self) -> None:
        _require(self.iterations >= 1, "reconstruction.iterations", "at least 1", self.iterations)
        _require(self.batch_size >= 1, "reconstruction.batch_size", "at least 1", self.batch_size)
        for name in ("step_lr", "r_lr", "scale_lr", "rounding_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"reconstruction.{name}", "finite and at least 0", value)
        if self.rounding_lr is not None:
            _require(
                0 < self.rounding_lr < math.inf, "reconstruction.rounding_lr", "positive or null", self.rounding_lr
            )
        _require(self.input_steps_every >= 1, "reconstruction.input_steps_every", "at least 1", self.input_steps_every)
        _require(self.patience is None or self.patience >= 1, "reconstruction.patience", "at least 1", self.patience)
        _require(0 <= self.warmup < 1, "reconstruction.warmup", "in [0, 1)", self.warmup)
        _require(0 <= self.qdrop < 1, "reconstruction.qdrop", "in [0, 1)", self.qdrop)


SMALLEST_JUDGED = 32
"""Samples of a pass through a unit that hardly any device is faster with more of."""


@dataclass
class EvaluationConfig:
    """What is measured at the end."""

    num_trajectories: int = 32
    """Held-out full-precision trajectories for the noise error."""
    num_images: int = 64
    """Images sampled from the same noise by both models, for MSE and PSNR."""
    fid_samples: int = 0
    """Images for FID and the other metrics; 0 leaves them out. Needs a model that evaluation.features fits."""
    features: str = "fashion-mnist-features"
    """Feature extractor: inception, the one of published figures; a directory, or the name of a shipped one."""
    batch_size: int = 64
    """Samples per forward pass."""
    sampler: SamplerConfig | None = None
    """Sampler of the images; null takes calibration.sampler."""
    metrics: list[Metric] = field(default_factory=lambda: ["fid"])
    """What is measured on the fid_samples images: fid, kid, precision_recall; with features: inception also sfid and
    is; with clip_model and clip_prompts also clip."""
    reference: str | None = None
    """Real images to compare with: a folder of images, an .npz with images (arr_0) or statistics (mu, sigma, mu_s,
    sigma_s), or a .safetensors of `python -m tcaq_lightning statistics`; null takes the extractor's own."""
    inception_weights: str | None = None
    """File with torch-fidelity's weights of Inception v3; null looks for it in torch hub's cache."""
    is_splits: int = 10
    """Parts of the images whose inception scores are averaged."""
    kid_subsets: int = 100
    """Random subsets that KID is averaged over."""
    kid_subset_size: int = 1000
    """Images in each of them."""
    neighbours: int = 3
    """Nearest neighbours k of precision and recall."""
    clip_model: str | None = None
    """Directory of a CLIP model in transformers' layout."""
    clip_prompts: str | None = None
    """Text file with the prompt of each image, one a line."""
    save_images: str | None = None
    """Directory for all images as PNG files (clipped to [0, 1], times 255, rounded); null writes none."""

    def __post_init__(self) -> None:
        _require(self.num_trajectories >= 1, "evaluation.num_trajectories", "at least 1", self.num_trajectories)
        _require(self.num_images >= 1, "evaluation.num_images", "at least 1", self.num_images)
        _require(self.fid_samples >= 0, "evaluation.fid_samples", "at least 0", self.fid_samples)
        _require(self.batch_size >= 1, "evaluation.batch_size", "at least 1", self.batch_size)
        _require(
            0 < len(self.metrics) == len(set(self.metrics)) and set(self.metrics) <= set(get_args(Metric)),
            "evaluation.metrics",
            f"different ones of {', '.join(get_args(Metric))}",
            self.metrics,
        )
        _require(self.is_splits >= 1, "evaluation.is_splits", "at least 1", self.is_splits)
        _require(self.kid_subsets >= 1, "evaluation.kid_subsets", "at least 1", self.kid_subsets)
        _require(self.kid_subset_size >= 2, "evaluation.kid_subset_size", "at least 2", self.kid_subset_size)
        _require(self.neighbours >= 1, "evaluation.neighbours", "at least 1", self.neighbours)
        for metric in {"sfid", "is"} & set(self.metrics):
            _require(self.features == INCEPTION, "evaluation.features", f"{INCEPTION} for {metric}", self.features)
        if "clip" in self.metrics:
            for name in ("clip_model", "clip_prompts"):
                _require(bool(getattr(self, name)), f"evaluation.{name}", "given for clip", getattr(self, name))
        if self.fid_samples:
            self.check_number(self.fid_samples, "evaluation.fid_samples", self.metrics)

    def check_number(self, number: int, what: str, metrics: Collection[str]) -> None:
        """See that there are enough images for some metrics, real or generated ones.

        Args:
            number: of images.
            what: they are, for the message.
            metrics: that look at these images.

        Raises:
            UserError: there are too few.
        """
        least = {
            "is": (self.is_splits, "evaluation.is_splits"),
            "kid": (self.kid_subset_size, "evaluation.kid_subset_size"),
            "precision_recall": (self.neighbours + 1, "evaluation.neighbours + 1"),
        }
        for metric, (needed, key) in least.items():
            if metric in metrics:
                _require(number >= needed, what, f"at least {needed} for {metric} ({key})", number)


@dataclass
class TrainerConfig:
    """Where and how it runs; changes nothing in the result but the order of float sums."""

    accelerator: str = "auto"
    """Lightning accelerator: auto, cpu, gpu, mps."""
    devices: int = 1
    """Processes on each node, one device each; torchrun and SLURM set it themselves. A run may go on with another
    number: finished units are kept, the one that was being learned is begun again."""
    num_nodes: int = 1
    """Nodes; torchrun and SLURM set it themselves. Only the first process reads and writes run_dir."""
    timeout: float = 30.0
    """Minutes that a process waits for another one, for example while rank 0 writes, before the run ends."""
    threads: int | None = None
    """CPU threads of each process; null leaves torch's choice, or with several processes shares the cores among them.
    Bit-identical repeats need the same number."""
    checkpoint_every: int = 100
    """Optimisation steps between two checkpoints inside a unit."""
    stop_after: str | None = None
    """Name of a unit with which the command ends, in its first round: a trial of what a large model takes. The same
    command with null goes on from there."""

    def __post_init__(self) -> None:
        _require(self.devices >= 1, "trainer.devices", "at least 1", self.devices)
        _require(self.num_nodes >= 1, "trainer.num_nodes", "at least 1", self.num_nodes)
        _require(0 < self.timeout < math.inf, "trainer.timeout", "finite and positive", self.timeout)
        _require(self.threads is None or self.threads >= 1, "trainer.threads", "at least 1 or null", self.threads)
        _require(self.checkpoint_every >= 1, "trainer.checkpoint_every", "at least 1", self.checkpoint_every)


@dataclass
class LoggingConfig:
    """What is written for people to look at."""

    tensorboard: bool = True
    """Write event files to RUN_DIR/tensorboard."""
    every_n_steps: int = 20
    """Optimisation steps between two logged losses."""
    grid_images: int = 16
    """Images in each full-precision-versus-quantized grid."""

    def __post_init__(self) -> None:
        _require(self.every_n_steps >= 1, "logging.every_n_steps", "at least 1", self.every_n_steps)
        _require(self.grid_images >= 1, "logging.grid_images", "at least 1", self.grid_images)


@dataclass
class Config:
    """One calibration run."""

    run_dir: Path = Path("runs/default")
    """Directory of everything the run writes; the same command resumes there."""
    seed: int = 0
    """Seed of noises, sample draws and searches."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The pretrained model."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    """Prompts or classes, and guidance."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Calibration data."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """Bits and granularity."""
    tcr: TCRConfig = field(default_factory=TCRConfig)
    """TCR."""
    daq: DAQConfig = field(default_factory=DAQConfig)
    """DAQ."""
    par: PARConfig = field(default_factory=PARConfig)
    """PAR."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """Block reconstruction."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Devices and threads."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """TensorBoard and pictures."""

    def __post_init__(self) -> None:
        self.run_dir = Path(self.run_dir)
        _require(0 <= self.seed < 2**31, "seed", "in 0 .. 2^31 - 1", self.seed)
        _require(
            self.quantization.activation.timestep_groups <= self.calibration.sampler.num_steps,
            "quantization.activation.timestep_groups",
            f"at most calibration.sampler.num_steps ({self.calibration.sampler.num_steps})",
            self.quantization.activation.timestep_groups,
        )
        if self.reconstruction.enabled:
            _require(
                min(self.phase_iterations().values()) >= 1,
                "reconstruction.iterations",
                "enough for one step in every phase and round of tcr and par",
                self.reconstruction.iterations,
            )

    def check_ranks(self) -> None:
        """See that there is work for every rank.

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
            _require(got >= ranks, key, expected, got)
        if self.num_rounds > 1:
            learned = self.learned_trajectories(1)
            _require(learned >= ranks, "par.trajectories x calibration.num_trajectories", expected, learned)
        _require(
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
        """Plain YAML-ready values, run_dir as a string."""
        values = dataclasses.asdict(self)
        values["run_dir"] = str(self.run_dir)
        prompts = self.conditioning.prompts
        values["conditioning"]["prompts"] = None if prompts is None else str(prompts)
        return values


UNRELATED_TO_RESULT = ("run_dir", "trainer", "logging", "calibration.memory_budget")
"""Keys that may change when a run is resumed, with all that is under them."""
