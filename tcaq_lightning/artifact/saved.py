"""A denoiser's files of an artifact, to be written again as they are."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME

from tcaq_lightning.artifact.diffusers_quantizer import check_config, forget_checksums, write_checksums
from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.files import naming, sha256

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class SavedDenoiser:
    """The folder of an artifact's denoiser.

    Attributes:
        folder: where it was opened.
        digest: SHA-256 of its weights then.
    """

    folder: Path
    digest: str

    def copy_to(self, directory: Path) -> None:
        """Write the denoiser's files with their checksums, as its `save_pretrained` in PyTorch does.

        Raises:
            UserError: they are not there anymore, or are others by now.
        """
        names = (CONFIG_FILE, SAFETENSORS_WEIGHTS_NAME)
        files = [self.folder / name for name in names]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(
                f"save_pretrained: {missing[0]} is gone since the artifact was opened; expected it there, since an "
                'engine keeps a graph alone: put it back, or open a copy with backend="torch"'
            )
        check_config(files[0])
        if (got := sha256(files[1])) != self.digest:
            raise UserError(
                f"save_pretrained: {files[1]} has changed since the artifact was opened: expected SHA-256 "
                f"{self.digest}, got {got}; open it again"
            )
        with naming(directory):
            directory.mkdir(parents=True, exist_ok=True)
            for file in files:
                if not (directory / file.name).exists() or not (directory / file.name).samefile(file):
                    shutil.copyfile(file, directory / file.name)
        write_checksums(directory, names)
        forget_checksums(directory.resolve())
