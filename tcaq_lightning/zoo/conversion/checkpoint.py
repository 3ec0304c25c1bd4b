"""Original checkpoint files: read without unpickling code, and the weights to convert picked from them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tcaq_lightning.errors import UserError

State = dict[str, Tensor]

IGNORED_CLASSES = (
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
)
"""What published checkpoints refer to beside their tensors (Lightning's callbacks and counters). None of it is needed,
so an inert stand-in is made in its place."""
LISTED = 50
"""Keys that an error spells out."""


class _Ignored:
    """Stands for an object of a checkpoint that is not needed; it does nothing with what it is made of."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, _: Any) -> None:
        """Take any state."""


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let torch.load make `_Ignored` objects for `IGNORED_CLASSES`, and nothing else beyond tensors."""
    made: list[Any] = [
        type(name, (_Ignored,), {"__module__": module, "__qualname__": name}) for module, name in IGNORED_CLASSES
    ]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(made)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def read_checkpoint(path: Path) -> Any:
    """Content of a checkpoint file on the CPU: `.safetensors`, or what torch.load reads with `weights_only=True`.

    Raises:
        UserError: no such file, a truncated one, or one that holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a checkpoint file, got {'a directory' if path.is_dir() else 'no file'}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with _stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about foreign pickles, which are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers raise is about this file
        text = str(error)
        if matched := re.search(r"GLOBAL (\S+)", text):
            raise UserError(
                f"{path}: expected a checkpoint of tensors and plain containers, got one that calls {matched[1]}, "
                f"which is not run; get the published file"
            ) from error
        _, _, cause = text.rpartition("WeightsUnpickler error:")  # before it: the advice to trust the file
        reason = " ".join(cause.split())
        raise UserError(
            f"{path}: expected a checkpoint file, got a damaged or foreign one ({type(error).__name__}: "
            f"{reason[:150]}); get it again"
        ) from error


def tensors(content: Any) -> State | None:
    """`content` if it is a plain state dict, without DataParallel's prefix; else None."""
    if not isinstance(content, Mapping) or not content:
        return None
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return None
    prefix = "module."
    if all(k.startswith(prefix) for k in content):
        return {k[len(prefix) :]: v for k, v in content.items()}
    return dict(content)


def ema_of_latent_diffusion(state: State) -> State:
    """The averaged weights of `model.diffusion_model.*`, which CompVis' `LitEma` stores under names without dots.

    Returns:
        Averages under the names of the weights they average; empty if the checkpoint has none.

    Raises:
        UserError: some weights have no average, or two share the name of one.
    """
    if not any(k.startswith("model_ema.") for k in state):
        return {}
    names = [k for k in state if k.startswith("model.diffusion_model.")]
    averaged = {k: "model_ema." + k.removeprefix("model.").replace(".", "") for k in names}
    if len(set(averaged.values())) < len(names):
        raise UserError("expected weights whose averages have names of their own, got two of one name; --ema false")
    if missing := [k for k, v in averaged.items() if v not in state]:
        raise UserError(
            f"expected an EMA of each of the {len(names)} weights, got none of {listing(missing)}; "
            f"convert with --ema false"
        )
    return {k: state[v] for k, v in averaged.items()}


def listing(keys: list[str]) -> str:
    """Keys for an error message.

    >>> listing(["b", "a"])
    '2: a, b'
    """
    shown = ", ".join(sorted(keys)[:LISTED])
    return f"{len(keys)}: {shown}" + (f", and {len(keys) - LISTED} more" if len(keys) > LISTED else "")
