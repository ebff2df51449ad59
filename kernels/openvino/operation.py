# SPDX-License-Identifier: Apache-2.0
"""
``ScapSparseFC`` nodes from Python: made by the compiled extension, and read without it where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from scap_nncf.kernels.cpu.build import build

TYPE, OPSET = "ScapSparseFC", "extension"
VERSION = 1
_TEXTS = ("names", "formats", "scales", "thresholds")


@dataclass
class Attributes:
    """
    Attributes of the operation; lists have one entry a layer. See ``extension.cpp`` for the inputs.

    :param thresholds: τ as decimal text with 9 digits, which a float32 survives; negative keeps everything.
    :param mode: η, likewise.
    :param groups: input channels that share a scale.
    :param transposed: 1 where the stock weights are [K, N].
    :param policy: the second input is a flag: 0 where the tokens are not pruned.
    :param stock: what is needed to make the stock graph again; not read by the operation.
    """

    in_features: int
    version: int = VERSION
    names: list[str] = field(default_factory=list)
    out_features: list[int] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    zero_bits: list[int] = field(default_factory=list)
    transposed: list[int] = field(default_factory=list)
    biases: list[int] = field(default_factory=list)
    corrections: list[int] = field(default_factory=list)
    thresholds: list[str] = field(default_factory=list)
    mode: str = "0"
    activation: str = "none"
    policy: bool = False
    stock: str = ""


def decimal(value: float) -> str:
    """A float32 as text that reads back as the same float32."""
    return f"{value:.9g}"


def extension() -> Path:
    """
    The compiled extension, for ``openvino.Core().add_extension`` or GenAI's ``extensions=[...]``; built at first use.

    :raises BuildError: it is not there and cannot be built.
    """
    return build("openvino")


@cache
def _factory() -> Any:
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(extension()))
    return factory


def make_node(inputs: Sequence[Any], attributes: Attributes) -> Any:
    """
    A ``ScapSparseFC`` node.

    :raises BuildError: the extension cannot be built.
    :raises RuntimeError: inputs and attributes do not fit together; the message says which.
    """
    return _factory().create(TYPE, list(inputs), asdict(attributes))


def attributes_of(node: Any) -> Attributes:
    """The attributes of a node, made by the extension or read without it."""
    given = node.get_attributes()
    return Attributes(**{name: given[name] for name in Attributes.__dataclass_fields__})


def is_sparse_fc(node: Any) -> bool:
    """Whether a node is one of these operations."""
    return bool(node.get_type_name() == TYPE)


def reader() -> Any:
    """
    A stand-in for the extension that can be read, for ``Core.add_extension``: it knows shapes and attributes and cannot
    run. With it a model that has the operation is read where nothing can be compiled, and turned into the stock graph.
    """
    import openvino as ov

    class ScapSparseFC(ov.Op):  # type: ignore[misc]
        class_type_info = ov.DiscreteTypeInfo(TYPE, OPSET)

        def __init__(self, inputs: Any = None) -> None:
            super().__init__(self)
            # lists must not be empty for the visitor to see what they hold
            empty = asdict(Attributes(0))
            self._attributes = {
                key: ([""] if key in _TEXTS else [0]) if value == [] else value for key, value in empty.items()
            }
            if inputs is not None:
                self.set_arguments(inputs)
                self.constructor_validate_and_infer_types()

        def visit_attributes(self, visitor: Any) -> bool:
            visitor.on_attributes(self._attributes)
            return True

        def get_attributes(self) -> dict[str, Any]:
            return dict(self._attributes)

        def validate_and_infer_types(self) -> None:
            widths = self._attributes["out_features"]
            if self._attributes["activation"] != "none":
                widths = widths[:1]
            shape = self.get_input_partial_shape(0)
            for index, width in enumerate(widths):
                out = ov.PartialShape(shape)
                out[len(out) - 1] = ov.Dimension(width)
                self.set_output_type(index, self.get_input_element_type(0), out)

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            twin = ScapSparseFC()
            twin._attributes = dict(self._attributes)
            twin.set_arguments(inputs)
            twin.constructor_validate_and_infer_types()
            return twin

    return ScapSparseFC
