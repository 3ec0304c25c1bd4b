"""The artifact as diffusers' own `from_pretrained` and `save_pretrained` see it: a quantization method, `tcaq`."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import Tensor

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.files import sha256, write_bytes
from tcaq_lightning.runtime.json_files import read_json
from tcaq_lightning.runtime.one_line import one_line
from tcaq_lightning.runtime.provided import provide

if TYPE_CHECKING:
    from tcaq_lightning.artifact.blobs import Stored

QUANT_METHOD = "tcaq"
PLAIN, QUANTIZED_OUTPUTS = FORMAT_VERSIONS = (1, 2)
"""Of files: the second one where outputs are quantized too, which releases that know the first alone must refuse."""
CHECKSUMS_FILE = "checksums.json"
DIGEST = "config_sha256"
"""Key of the checksum that a config.json holds of itself."""
_SAVING = threading.Lock()
"""Held while a denoiser is saved: the tensors are handed to diffusers in its quantizer."""


class Method(str, Enum):
    """Our entry beside diffusers' `QuantizationMethod`."""

    TCAQ = QUANT_METHOD


class TCAQConfig(QuantizationConfigMixin):
    """The `quantization_config` of a denoiser's config.json, kept as it is.

    Attributes:
        quant_method: as diffusers asks for it.
        values: all of its content.
    """

    def __init__(self, **values: Any) -> None:
        self.quant_method: Any = Method.TCAQ
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return copy.deepcopy(self.values)

    def to_json_string(self, use_diff: bool = True) -> str:
        """The same as text; diffusers logs it."""
        return json.dumps(self.values)


class TCAQQuantizer(DiffusersQuantizer):
    """Opens and saves a finished artifact; quantizing is the work of a calibration.

    diffusers fills a model by the names in its file. Ours holds a few fused tensors, so empty buffers of their names
    stand in the model while it is loaded, and the first of them that arrives brings all.

    Raises:
        UserError: an artifact of another format version.
    """

    requires_calibration = True

    def __init__(self, quantization_config: TCAQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        check_format(self._values, "quantization_config")
        self._stored: list[Stored] | None = None
        self._fused: dict[str, Tensor] = {}
        self._dtype: torch.dtype | None = None

    @property
    def _values(self) -> dict[str, Any]:
        config: Any = self.quantization_config
        values: dict[str, Any] = config.values
        return values

    @property
    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Never: integers have no gradient."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beside accelerate, which diffusers itself asks for, is needed.

        Raises:
            ImportError: it is not installed.
        """
        from diffusers.utils import import_utils

        if not import_utils.is_accelerate_available():  # type: ignore[no-untyped-call]
            raise ImportError("diffusers opens quantized models with accelerate alone: pip install accelerate")

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """None: the artifact says which types its tensors have, and what is asked for is done afterwards."""
        self._dtype = torch_dtype
        return None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Check that the file is the one that the config was written for.

        Raises:
            UserError: it is not.
        """
        expected = self._values.get("sha256")
        for config in {Path(file).with_name("config.json") for file in checkpoint_files}:
            check_config(config)
        for file in checkpoint_files:
            if (got := sha256(Path(file))) != expected:
                raise UserError(
                    f"{file} is damaged: expected SHA-256 {expected} (config.json), got {got}; copy the artifact again"
                )
        return loaded_keys

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """None is missing: `check_if_quantized_param` finds out."""
        return []

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether it is a fused tensor."""
        return "." not in param_name and param_name in model._buffers

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> Any:
        """Set all of the denoiser's tensors from the file's, unless it is done.

        Called with (model, value, name, device, state_dict, unexpected_keys).
        """
        from tcaq_lightning.artifact.blobs import restore

        state_dict = args[4]
        if self._stored is not None:
            restore(self._stored, state_dict)
            self._stored = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from tcaq_lightning.artifact.blobs import stored_tensors
        from tcaq_lightning.artifact.structure import Structure, rebuild

        model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
        try:
            structure = Structure.from_dict(self._values)
            rebuild(model, structure, packed=True)
        except Exception as error:  # diffusers' modules and the tables raise each in its own way
            raise UserError(
                f"quantization_config: its tables do not fit {type(model).__name__}: {one_line(error)}; copy the "
                "artifact again"
            ) from error
        self._stored = stored_tensors(model)
        # Not by `register_buffer`: a module has a method `bfloat16`, and there may be tensors of that name.
        model._buffers.update({item.how.blob: torch.empty(0, dtype=item.how.dtype) for item in self._stored})

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._stored is not None:
            raise UserError("the artifact's weights hold none of the tensors that its config.json describes")
        for name in [name for name, buffer in model._buffers.items() if buffer is not None and not buffer.numel()]:
            del model._buffers[name]
        model.is_quantized = False  # diffusers would refuse a change of type, which our layers know how to do
        finish(model.requires_grad_(False).eval(), self)
        if self._dtype is not None:
            model.to(self._dtype)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fused tensors, which `save_pretrained` writes.

        Raises:
            UserError: they would be written by pickle, or are not at hand.
        """
        if not safe_serialization:
            raise UserError("safe_serialization: expected True, got False; an artifact is written as safetensors alone")
        if not self._fused:
            raise UserError(
                "save_pretrained: expected the method of a denoiser that was opened in this process, got that of its "
                "class or of a pickled one"
            )
        return self._fused, {}

    def save(self, model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a denoiser as its class does, with the fused tensors of now, and list the files' checksums.

        Adapters beside its layers are left out.

        Raises:
            UserError: its type or what is quantized in it is not as in the artifact, it is offloaded, or a variant is
                asked for.
        """
        from tcaq_lightning.artifact.adapters import without_adapters
        from tcaq_lightning.artifact.blobs import fuse, stored_tensors
        from tcaq_lightning.artifact.offloading import check_at_hand
        from tcaq_lightning.artifact.structure import Structure, describe

        check_at_hand(model)
        model = without_adapters(model, self)
        call = inspect.signature(type(model).save_pretrained).bind(model, save_directory, *args, **kwargs)
        if (variant := call.arguments.get("variant")) is not None:
            raise UserError(f"variant: expected None, got {variant!r}; an artifact has one file of weights")
        call.arguments["max_shard_size"] = sys.maxsize  # one file, whose checksum config.json holds
        structure = describe(model)
        if structure.dtypes != self._values.get("dtypes", {}):
            raise UserError("save_pretrained: expected the artifact's own type, got another; save it before .to(dtype)")
        if (name := structure.difference(Structure.from_dict(self._values))) is not None:
            raise UserError(f"save_pretrained: {name} is quantized otherwise than in the artifact; open it again")
        self._fused = fuse(stored_tensors(model))
        try:
            values = {**self._values, **structure.to_dict()}
            values["sha256"] = hashlib.sha256(save(self._fused, metadata={"format": "pt"})).hexdigest()
            self.quantization_config = TCAQConfig(**values)
            model.register_to_config(quantization_config=self.quantization_config)
            type(model).save_pretrained(*call.args, **call.kwargs)
        finally:
            self._fused = {}
        directory = Path(save_directory).resolve()
        text = config_text(model, self._values)
        write_bytes(directory / "config.json", text.encode())  # as the artifact has it: no path of this machine
        write_checksums(directory, ["config.json", SAFETENSORS_WEIGHTS_NAME])
        forget_checksums(directory)


def finish(denoiser: Any, quantizer: TCAQQuantizer) -> None:
    """Hand a frozen denoiser over to diffusers.

    Its attentions stay quantized whatever is set, its weights stay as they are beside adapters, and its
    `save_pretrained` writes the artifact's files again, alone or in its pipeline.
    """
    from tcaq_lightning.artifact.adapters import BesideAdapters
    from tcaq_lightning.artifact.offloading import OffloadedLayers
    from tcaq_lightning.nn.attention import keep_quantized

    keep_quantized(denoiser)
    provide(denoiser, BesideAdapters)
    provide(denoiser, OffloadedLayers)
    denoiser.hf_quantizer = quantizer
    denoiser.register_to_config(quantization_config=quantizer.quantization_config)

    @functools.wraps(type(denoiser).save_pretrained)  # pipelines look at its signature
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
        with _SAVING:
            model.hf_quantizer.save(model, *args, **kwargs)

    denoiser.save_pretrained = MethodType(save_pretrained, denoiser)  # bound, so that a copy of the model saves itself


def write_checksums(directory: Path, names: Sequence[str] | None = None) -> None:
    """Write checksums.json: the SHA-256 of the named files, or of every other one, and of this list itself."""
    if names is None:
        found = (f.relative_to(directory).as_posix() for f in sorted(directory.rglob("*")) if f.is_file())
        names = [name for name in found if name != CHECKSUMS_FILE]
    files = {name: sha256(directory / name) for name in names}
    write_bytes(directory / CHECKSUMS_FILE, checksums_text(files).encode())


def checksums_text(files: dict[str, str]) -> str:
    """Content of a checksums.json."""
    listed = json.dumps(files, sort_keys=True)
    return json.dumps({"files": files, "sha256": hashlib.sha256(listed.encode()).hexdigest()}, indent=1) + "\n"


def forget_checksums(folder: Path) -> None:
    """Remove the checksums of an artifact whose denoiser has been saved over: they are those of the old one."""
    file = folder.parent / CHECKSUMS_FILE
    with suppress(OSError, ValueError):
        if f"{folder.name}/config.json" in json.loads(file.read_bytes())["files"]:
            file.unlink()


def check_format(quantization: dict[str, Any], where: str) -> None:
    """Check that a `quantization_config` is of this format.

    Raises:
        UserError: it is not.
    """
    got = (quantization.get("quant_method"), quantization.get("version"))
    if got not in [(QUANT_METHOD, version) for version in FORMAT_VERSIONS]:
        raise UserError(
            f"{where}: expected quant_method {QUANT_METHOD!r} and version 1 or 2, got {got}; use the release of "
            f"tcaq-lightning ({quantization.get('tcaq_lightning')}) that wrote it, or calibrate again"
        )


def config_text(denoiser: Any, quantization: dict[str, Any]) -> str:
    """Content of a frozen denoiser's config.json."""
    config = json.loads(denoiser.to_json_string())
    for key in ("_name_or_path", "quantization_config"):  # where the model lay on this machine; at the end
        config.pop(key, None)
    content = {**config, "quantization_config": quantization}
    return _readable_json({**content, "quantization_config": {**quantization, DIGEST: _config_digest(content)}}) + "\n"


def check_config(file: Path) -> None:
    """Check that a denoiser's config.json is as it was written; the first release put no checksum in it.

    Raises:
        UserError: it is not.
    """
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {one_line(error)}; copy the artifact again") from error
    if not isinstance(content, dict) or not isinstance(content.get("quantization_config"), dict):
        return
    expected = content["quantization_config"].get(DIGEST)
    if expected is not None and (got := _config_digest(content)) != expected:
        raise UserError(f"{file} is damaged: expected content with SHA-256 {expected}, got {got}; copy it again")


def _config_digest(content: dict[str, Any]) -> str:
    """SHA-256 of a config.json's values, this one left out."""
    quantization = {key: value for key, value in content["quantization_config"].items() if key != DIGEST}
    canonical = json.dumps({**content, "quantization_config": quantization}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _readable_json(values: dict[str, Any], depth: int = 3, indent: str = "") -> str:
    """JSON with one line for each key of the upper levels, and nothing spread beyond them."""
    if depth == 0 or not values or not isinstance(values, dict):
        return json.dumps(values)
    inner = indent + " "
    lines = [
        f"{inner}{json.dumps(str(key))}: {_readable_json(value, depth - 1, inner)}" for key, value in values.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
