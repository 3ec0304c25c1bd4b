"""The whole configuration as typed dataclasses: every YAML key is a field, and every section has a file."""

from tcaq_lightning.config.calibration import CalibrationConfig, MemoryBudget
from tcaq_lightning.config.conditioning import ConditioningConfig
from tcaq_lightning.config.config import UNRELATED_TO_RESULT, Config
from tcaq_lightning.config.daq import DAQConfig
from tcaq_lightning.config.evaluation import INCEPTION, EvaluationConfig
from tcaq_lightning.config.headroom import HeadroomConfig
from tcaq_lightning.config.logging import LoggingConfig
from tcaq_lightning.config.model import ModelConfig
from tcaq_lightning.config.par import PARConfig
from tcaq_lightning.config.quantization import (
    ActivationConfig,
    LayerRule,
    QuantizationConfig,
    Role,
    SoftmaxConfig,
    WeightConfig,
)
from tcaq_lightning.config.reconstruction import ReconstructionConfig
from tcaq_lightning.config.sampler import SamplerConfig
from tcaq_lightning.config.sensitivity import SensitivityConfig
from tcaq_lightning.config.tcr import TCRConfig
from tcaq_lightning.config.trainer import TrainerConfig

__all__ = [
    "INCEPTION",
    "UNRELATED_TO_RESULT",
    "ActivationConfig",
    "CalibrationConfig",
    "ConditioningConfig",
    "Config",
    "DAQConfig",
    "EvaluationConfig",
    "HeadroomConfig",
    "LayerRule",
    "LoggingConfig",
    "MemoryBudget",
    "ModelConfig",
    "PARConfig",
    "QuantizationConfig",
    "ReconstructionConfig",
    "Role",
    "SamplerConfig",
    "SensitivityConfig",
    "SoftmaxConfig",
    "TCRConfig",
    "TrainerConfig",
    "WeightConfig",
]
