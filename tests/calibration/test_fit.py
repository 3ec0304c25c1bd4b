from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tcaq_lightning.calibration.fit import checkpointed_state
from tcaq_lightning.config import QuantizationConfig
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.files import CheckedCheckpointIO


def test_a_checkpoint_of_another_full_precision_model_is_not_gone_on_from(make_unet: Any, tmp_path: Path) -> None:
    """A fit that resumes writes the checkpoint's weights into the unit, which shares them with the model."""
    unet = make_unet()
    quantize(unet, QuantizationConfig(), TimestepGroups([500.0]))
    unit = unet.mid_block.resnets[0]
    for layer in quant_layers(unit).values():
        layer.search_weight()
    state = {f"unit.{name}": values.clone() for name, values in unit.state_dict().items()}
    path = tmp_path / "fit.ckpt"
    CheckedCheckpointIO().save_checkpoint({"state_dict": state, "ranks": 1}, path)
    found = checkpointed_state(path, unit)
    assert found is not None
    assert torch.equal(found["conv1.weight_quantizer.v"], unit.conv1.learned_weight.logits)
    other = copy.deepcopy(unit)
    with torch.no_grad():
        other.conv1.learned_weight.weight.mul_(1.5)
    assert checkpointed_state(path, other) is None
    assert not path.exists()
