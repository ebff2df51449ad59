# SPDX-License-Identifier: Apache-2.0
"""
Undoing what NNCF did in place to a PyTorch model.

``nncf.compress_weights`` replaces the data of parameters and wraps the model's forward. It never writes into the old
tensors, so keeping references to them is enough to go back; they cost no memory beyond what the caller holds until the
compression has ended.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from scap_nncf.algorithms.backends import is_optimum_model

_WRAPPED_ATTRIBUTES = ("forward", "_replicate_for_data_parallel")


class Snapshot:
    """
    The state of a model before compression. OpenVINO models are cloned instead, so there is nothing to keep, except for
    the graph that a model object of Optimum-Intel holds.

    :param model: a PyTorch module, an OpenVINO model, or a model object of Optimum-Intel.
    """

    def __init__(self, model: Any) -> None:
        self._model = model if isinstance(model, nn.Module) else None
        self._holder = model if is_optimum_model(model) else None
        if self._holder is not None:
            self._graph = graph_of(model)
        if self._model is None:
            return
        self._parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
        self._attributes = {key: model.__dict__[key] for key in _WRAPPED_ATTRIBUTES if key in model.__dict__}
        self._hooks = _hooks(model)

    def restore(self) -> None:
        """Make the model what it was."""
        if self._holder is not None and graph_of(self._holder) is not self._graph:
            replace_graph(self._holder, self._graph)
        if self._model is None:
            return
        model, before = self._model, self._hooks
        for parameter, data, requires_grad in self._parameters:
            parameter.requires_grad = False  # a gradient cannot be required of the packed integers in between
            parameter.data = data
            parameter.requires_grad = requires_grad
        now = _hooks(model)
        if now is not None and before is None:
            from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE

            del model._modules[ATR_HOOK_STORAGE]
            for key in _WRAPPED_ATTRIBUTES:
                model.__dict__.pop(key, None)
            model.__dict__.update(self._attributes)
        elif now is not None and before is not None:
            storage = _storage(model)
            for name in now:
                if name not in before:
                    storage.delete_hook(name)


def graph_of(model: Any) -> Any:
    """The OpenVINO model of a model object of Optimum-Intel."""
    from scap_nncf.algorithms.backends.openvino.layers import ir_of

    return ir_of(model)


def replace_graph(model: Any, graph: Any) -> None:
    """Give a model object of Optimum-Intel another OpenVINO model; it compiles again at the next call."""
    model.replace_ov_model(graph_of(model), graph)
    model.clear_requests()


def _storage(model: nn.Module) -> Any:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    return get_hook_storage(model)


def _hooks(model: nn.Module) -> list[str] | None:
    """Names of NNCF's hooks in a model, None where the model is not wrapped."""
    from nncf.torch.function_hook.wrapper import is_wrapped

    if not is_wrapped(model):
        return None
    return [name for name, _ in _storage(model).named_hooks(remove_duplicate=False)]
