"""What an exported graph says about itself."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tcaq_lightning.backends.graph.inputs import GraphInput
from tcaq_lightning.backends.graph.onnx_graph import Product
from tcaq_lightning.errors import UserError

EXPORT_VERSION = 3


@dataclass(frozen=True)
class GraphInfo:
    """What a file says about its graph.

    Attributes:
        artifact: SHA-256 of the weights that it was made from.
        inputs: each of them by name, the noisy sample first.
        products: its quantized products.
    """

    artifact: str
    inputs: dict[str, GraphInput]
    products: list[Product]

    @classmethod
    def from_json(cls, text: str, where: str) -> GraphInfo:
        """Read the properties of a file.

        Raises:
            UserError: another version, or not written by this project.
        """
        try:
            values = json.loads(text)
            if (version := values["version"]) == EXPORT_VERSION:
                return cls(
                    values["artifact"],
                    {name: GraphInput.from_dict(row) for name, row in values["inputs"].items()},
                    [Product(**row) for row in values["products"]],
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: expected a graph that tcaq-lightning exported, got none of its properties; export it again"
            ) from error
        raise UserError(f"{where}: expected export version {EXPORT_VERSION}, got {version}; export it again")
