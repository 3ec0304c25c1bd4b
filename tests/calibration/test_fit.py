from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tcaq_lightning.calibration.fit import checkpointed_state
from tcaq_lightning.calibration.run_files import RunFiles
from tcaq_lightning.calibration.visit import Visit
from tcaq_lightning.config import QuantizationConfig
from tcaq_lightning.nn.parts import quant_layers
from tcaq_lightning.nn.prepare import quantize
from tcaq_lightning.quantizers.timestep_groups import TimestepGroups
from tcaq_lightning.runtime.files import CheckedCheckpointIO

LIGHTNINGS = {
    "global_step": 4,
    "spent": {"seconds": {}, "executions": {"learn_v": 16}},
    "epoch": 0,
    "pytorch-lightning_version": "2.6.0",
    "optimizer_states": [{"state": {}, "param_groups": [{}]}],
    "lr_schedulers": [],
    "loops": {"fit_loop": {}},
    "callbacks": {},
}
"""What Lightning keeps beside."""


def test_a_checkpoint_of_another_full_precision_model_is_not_gone_on_from(make_unet: Any, tmp_path: Path) -> None:
    """A fit that resumes writes the checkpoint's weights into the unit, which shares them with the model."""
    unet = make_unet()
    quantize(unet, QuantizationConfig(), TimestepGroups([500.0]))
    unit = unet.mid_block.resnets[0]
    for layer in quant_layers(unit).values():
        layer.search_weight()
    state = {f"unit.{name}": values.clone() for name, values in unit.state_dict().items()}
    file = RunFiles(tmp_path).checkpoint(Visit(0, 0, "mid_block.resnets.0"), "v")
    CheckedCheckpointIO().save_checkpoint(
        {**LIGHTNINGS, "state_dict": state, "ranks": 1, "place": file.place}, file.path
    )
    found = checkpointed_state(file, unit)
    assert found is not None
    assert torch.equal(found[0]["conv1.weight_quantizer.v"], unit.conv1.learned_weight.logits)
    assert found[1]["executions"] == {"learn_v": 16}
    other = copy.deepcopy(unit)
    with torch.no_grad():
        other.conv1.learned_weight.weight.mul_(1.5)
    assert checkpointed_state(file, other) is None
    assert not file.exists()
