# SPDX-License-Identifier: Apache-2.0
"""
Calibration block by block: weights of one block in memory at a time, all samples advance from block to block.

Every sample's forward pass runs in a thread of its own and waits before each block until all samples have reached it
(one thread runs at a time). So the model's own code computes masks and positions, whatever the architecture, and each
weight is read once for all samples. Between blocks a sample holds its hidden state; where these are large, or on a GPU,
their storage is emptied while the sample waits and filled again from disk or main memory.

What is on disk between two blocks, with the statistics so far, is also where a killed process goes on.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nncf
import torch
from nncf.common.logging import nncf_logger
from safetensors.torch import load_file, save_file
from torch import nn

from scap_nncf.algorithms.backends.torch.residency import is_offloaded, resident, weight_bytes
from scap_nncf.algorithms.sites import Site

#: Hidden states of all samples together beyond which they wait on disk.
MAX_HIDDEN_BYTES = 1 << 30
_HISTOGRAM_BYTES = 8 << 16


class Finished(BaseException):
    """Ends a sample's forward pass behind the last block that matters."""


def block_names(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """
    Names of the blocks in the lists that hold sites, all of them, in the order of registration.

    :raises nncf.UnsupportedModelError: no site is in a numbered block.
    """
    lists: dict[str, None] = {}
    for site in sites:
        parts = site.name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if index is not None:
            lists.setdefault(".".join(parts[:index]))
    if not lists:
        msg = f"{type(model).__name__} has no numbered blocks to calibrate one by one; leave block_by_block out."
        raise nncf.UnsupportedModelError(msg)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return [
        f"{name}.{child}"
        for name in sorted(lists, key=order.__getitem__)
        for child, _ in model.get_submodule(name).named_children()
    ]


class BlockWalk:
    """
    Leads all samples through the blocks.

    :param sites: the calibrated sites, in the order of execution.
    :param samples: number of samples of this process.
    :param keeper: keeps the state between blocks for a later process, or None.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], samples: int, keeper: Keeper | None = None) -> None:
        self._model = model
        self.names = block_names(model, sites)
        self._samples = samples
        lists = {name.rpartition(".")[0] for name in self.names}
        if keeper is not None and len(lists) > 1:  # a decoder's blocks need more than their own hidden state
            nncf_logger.info("A model with an encoder and a decoder is calibrated in one go: it could not be resumed.")
            keeper = None
        self._keeper = keeper
        self._hidden: dict[int, _Hidden] = {}  # job → what it waits with
        self._weights = ExitStack()
        self._start = 0  # index of the block that a resumed run starts with
        self._kind: int | None = None  # blocks give a tensor (0) or a tuple of this length
        self._folder: Path | None = None
        prefixes = tuple(f"{name}." for name in self.names)
        # a site outside of the blocks, such as lm_head, needs all of the forward pass
        inside = all(site.name.startswith(prefixes) for site in sites)
        with_sites = [i for i, name in enumerate(self.names) if any(s.name.startswith(f"{name}.") for s in sites)]
        self._last = self.names[max(with_sites)] if inside else None
        nncf_logger.info(self.forecast(sites))

    def forecast(self, sites: Sequence[Site]) -> str:
        """What will be in memory, as text, before the run."""
        blocks = [weight_bytes(self._model.get_submodule(name)) for name in self.names]
        outside = sum(weight_bytes(module) for module in _outside(self._model, self.names))
        offloaded = any(is_offloaded(self._model.get_submodule(name)) for name in self.names)
        weights = f"one of {len(blocks)} blocks at a time, {max(blocks) / 2**20:.0f} MiB" if offloaded else "all blocks"
        return (
            f"Calibrating block by block: {weights} of {sum(blocks) / 2**20:.0f} MiB, {outside / 2**20:.0f} MiB before "
            f"the first of them; histograms {len(sites) * _HISTOGRAM_BYTES / 2**20:.0f} MiB; "
            f"hidden states of {self._samples} samples."
        )

    def with_stops(self, members: Mapping[str, Sequence[Site]]) -> list[str]:
        """The stops of sequential calibration and the blocks, each block before its stops."""
        order: list[str] = []
        waiting = list(self.names)
        for stop, sites in members.items():
            name = next((name for name in self.names if sites[0].name.startswith(f"{name}.")), None)
            while name in waiting:
                order.append(waiting.pop(0))
            order.append(stop)
        return order + waiting

    @contextmanager
    def attached(self, job: Callable[[], int], wait: Callable[[str], None]) -> Iterator[None]:
        """
        Hook the blocks. `job` says which sample runs, `wait` lets the others catch up.
        """
        handles: list[Any] = []
        bypassed: list[tuple[nn.Module, Any]] = []
        with ExitStack() as stack:
            stack.callback(self._weights.close)
            try:
                for index, name in enumerate(self.names):
                    block = self._model.get_submodule(name)
                    if index < self._start:
                        bypassed.append((block, block.__dict__.get("forward")))
                        block.forward = self._bypass  # type: ignore[method-assign]
                        continue
                    handles.append(
                        block.register_forward_pre_hook(self._arrival(name, job, wait), prepend=True, with_kwargs=True)
                    )
                    handles.append(block.register_forward_hook(self._departure(name)))
                outside = _outside(self._model, self.names)
                self._weights.enter_context(resident(*outside))
                yield
            finally:
                for handle in handles:
                    handle.remove()
                for block, forward in bypassed:
                    if forward is None:
                        block.__dict__.pop("forward", None)
                    else:
                        block.forward = forward  # type: ignore[method-assign]
                if self._folder is not None:
                    shutil.rmtree(self._folder, ignore_errors=True)

    def enter(self, name: str) -> None:
        """All samples wait before the block: its weights come, those of the one before go."""
        self._weights.close()
        if self._keeper is not None and self.names.index(name) > self._start:
            self._keeper.keep(self.names.index(name), self._kind or 0, self._hidden)
        self._weights.enter_context(resident(self._model.get_submodule(name)))

    def resume(self) -> int:
        """
        Go on from what the keeper has.

        :return: index of the first block that is run; 0 from the start.
        """
        if self._keeper is not None:
            self._start, self._kind = self._keeper.found()
        return self._start

    # -- hooks of the blocks ---------------------------------------------------------------------------------------

    def _arrival(self, name: str, job: Callable[[], int], wait: Callable[[str], None]) -> Callable[..., Any]:
        first_resumed = self._start > 0 and name == self.names[self._start]

        def pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            number = job()
            place, tensor = _hidden_state(args, kwargs)
            if first_resumed:
                assert self._keeper is not None
                tensor = self._keeper.hidden(number).to(tensor.device)
                args, kwargs = _with_hidden_state(args, kwargs, place, tensor)
            self._hidden[number] = held = _Hidden(tensor)
            self._put_away(number, held)
            wait(name)
            held.restore()
            del self._hidden[number]
            return args, kwargs

        return pre_hook

    def _departure(self, name: str) -> Callable[..., Any]:
        def post_hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._kind = len(output) if isinstance(output, tuple) else 0
            if name == self._last:
                raise Finished

        return post_hook

    def _bypass(self, *args: Any, **kwargs: Any) -> Any:
        """A block that an earlier run has done; what it gives is replaced before the first one that is run."""
        _, tensor = _hidden_state(args, kwargs)
        return (tensor, *[None] * (self._kind - 1)) if self._kind else tensor

    def _put_away(self, number: int, held: _Hidden) -> None:
        if held.bytes * self._samples > MAX_HIDDEN_BYTES:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="scap-hidden-"))
            held.to_file(self._folder / f"{number}.safetensors")
        elif held.tensor.device.type != "cpu":
            held.to_memory()


class _Hidden:
    """A hidden state that waits; its storage may be emptied meanwhile, whoever else refers to it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._size = tensor.untyped_storage().nbytes()
        self._copy: torch.Tensor | Path | None = None

    @property
    def bytes(self) -> int:
        return self._size

    def to_memory(self) -> None:
        self._copy = _flat(self.tensor).cpu()
        self.tensor.untyped_storage().resize_(0)

    def to_file(self, file: Path) -> None:
        save_file({"hidden": _flat(self.tensor).cpu()}, file)
        self._copy = file
        self.tensor.untyped_storage().resize_(0)

    def restore(self) -> None:
        if self._copy is None:
            return
        values = load_file(self._copy)["hidden"] if isinstance(self._copy, Path) else self._copy
        self.tensor.untyped_storage().resize_(self._size)
        _flat(self.tensor).copy_(values)
        if isinstance(self._copy, Path):
            self._copy.unlink(missing_ok=True)
        self._copy = None

    def value(self) -> torch.Tensor:
        """The hidden state on the CPU, wherever it is now."""
        if self._copy is None:
            return self.tensor.detach().cpu()
        values = load_file(self._copy)["hidden"] if isinstance(self._copy, Path) else self._copy
        whole = values.view(torch.uint8).view(self.tensor.dtype)
        return torch.as_strided(whole, self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the tensor's storage, uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _hidden_state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | str, torch.Tensor]:
    """Where a block's hidden state is among its arguments: the first floating-point tensor."""
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return index, value
    for name in ("hidden_states", *kwargs):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return name, value
    msg = "A block is called without a floating-point tensor; block by block calibration cannot follow it."
    raise nncf.UnsupportedModelError(msg)


def _with_hidden_state(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str, tensor: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(place, int):
        return (*args[:place], tensor, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: tensor}


def _outside(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules outside of the blocks that run before them: all leaves but the output embedding."""
    prefixes = tuple(f"{name}." for name in names)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    found = []
    for name, module in model.named_modules():
        leaf = not any(True for _ in module.children())
        if leaf and module is not head and name not in names and not name.startswith(prefixes):
            found.append(module)
    return found


class Keeper:
    """
    What a walk leaves for a later process, and finds of an earlier one.

    :param folder: for the hidden states.
    :param save: called with (block, kind) when these are on disk: writes the statistics and the note about them.
    :param due: whether it is time to write.
    :param state: (block, kind) of an earlier process, or None.
    """

    def __init__(
        self,
        folder: Path,
        save: Callable[[int, int], None],
        due: Callable[[], bool],
        state: tuple[int, int] | None = None,
    ) -> None:
        self._folder = folder
        self._save = save
        self._due = due
        self._state = state

    def found(self) -> tuple[int, int | None]:
        """(block to start with, kind of output), (0, None) where there is nothing."""
        return (0, None) if self._state is None else self._state

    def is_complete(self, samples: int) -> bool:
        """Whether the hidden states of all samples are there."""
        folder = self._boundary(self.found()[0])
        return all((folder / f"{job}.safetensors").is_file() for job in range(samples))

    def hidden(self, job: int) -> torch.Tensor:
        """The hidden state of a sample before the block to start with."""
        return load_file(self._boundary(self.found()[0]) / f"{job}.safetensors")["hidden"]

    def keep(self, block: int, kind: int, hidden: Mapping[int, _Hidden]) -> None:
        """Write everything that is needed to go on from before the block, then forget the one before."""
        if not self._due():
            return
        folder = self._boundary(block)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for job, held in hidden.items():
                save_file({"hidden": held.value().contiguous()}, folder / f"{job}.safetensors")
        except Exception as error:  # a full disk must not end the work that it could not protect
            nncf_logger.warning(f"Calibration goes on, but could not be resumed from here: {error}")
            shutil.rmtree(folder, ignore_errors=True)
            return
        self._save(block, kind)
        for other in self._folder.parent.glob(f"{self._folder.name}-before-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _boundary(self, block: int) -> Path:
        return self._folder.parent / f"{self._folder.name}-before-{block}"
