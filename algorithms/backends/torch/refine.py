# SPDX-License-Identifier: Apache-2.0
"""Training of output vectors in a sparse PyTorch language model (:mod:`scap_nncf.algorithms.refine`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import nncf
import numpy as np
import torch
from nncf.common.logging.track_progress import track
from torch import nn

from scap_nncf.algorithms.backends.torch.prune import named_pruners
from scap_nncf.algorithms.backends.torch.run import (
    attention_mask,
    evaluation,
    forward_sample,
    model_device,
    to_device,
    without_cache,
)
from scap_nncf.algorithms.refine import Refine, RefineReport

_WARM_UP = 5
_LAST_SHARE = 0.1  # of the learning rate, at the last step
_ROWS = 256  # rows of logits at a time: 256 x a vocabulary of 262k x 4 bytes = 270 MB


def train_biases(
    model: nn.Module, samples: Sequence[Any], settings: Refine
) -> tuple[dict[str, np.ndarray[Any, Any]], RefineReport]:
    """
    Train the vectors of all pruned layers of a sparse model. The model is as it was afterwards.

    :param samples: what the model can be called with; its output must have `.logits` [B, T, V].
    :return: layer name → float32 [OC], what is to be added to the layer's output; and how it went.
    :raises nncf.ValidationError: fewer than two samples.
    :raises nncf.UnsupportedModelError: the output has no logits with gradients.
    """
    if len(samples) < 2:
        msg = f"Refining needs at least two samples, one to train on and one to hold out; got {len(samples)}."
        raise nncf.ValidationError(msg)
    start = time.perf_counter()
    held_out_count = min(max(1, round(settings.held_out * len(samples))), len(samples) - 1)
    order = np.random.default_rng(settings.seed).permutation(len(samples))
    held_out = [samples[i] for i in order[:held_out_count]]
    training = [samples[i] for i in order[held_out_count:]]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in frozen])
        for parameter in frozen:
            parameter.requires_grad_(False)
        stack.enter_context(_pruning_everything(model))
        trainer = _Trainer(model, settings)
        trainer.watch_dense(held_out + training)
        stack.enter_context(trainer.attached())
        losses = {0: trainer.held_out_loss(held_out)}
        best_step, best, step = 0, [beta.detach().clone() for beta in trainer.betas.values()], 0
        misses = 0
        batches = _batches(training, settings)
        for step in track(range(1, settings.steps + 1), total=settings.steps, description="Refining"):
            trainer.step(next(batches), step)
            if step % settings.check_every and step != settings.steps:
                continue
            losses[step] = trainer.held_out_loss(held_out)
            if losses[step] < losses[best_step]:
                best_step, misses = step, 0
                best = [beta.detach().clone() for beta in trainer.betas.values()]
            else:
                misses += 1
                if misses >= settings.patience:
                    break
    biases = {
        name: (trainer.scales[name] * beta).float().cpu().numpy()
        for name, beta in zip(trainer.betas, best, strict=True)
    }
    report = RefineReport(step, best_step, losses, time.perf_counter() - start)
    return (biases if best_step else {}), report


@contextmanager
def _pruning_everything(model: nn.Module) -> Iterator[None]:
    """All tokens pruned, whatever the policy, and nothing counted."""
    pruners = [pruner for _, pruner in named_pruners(model)]
    before = [(pruner.decode_only, pruner.counting, pruner.enabled) for pruner in pruners]
    try:
        for pruner in pruners:
            pruner.decode_only, pruner.counting, pruner.enabled = False, False, True
        yield
    finally:
        for pruner, state in zip(pruners, before):
            pruner.decode_only, pruner.counting, pruner.enabled = state


def _batches(samples: Sequence[Any], settings: Refine) -> Iterator[list[Any]]:
    """Samples in random order without end, as many at a time as make the tokens of a step."""
    random = np.random.default_rng(settings.seed + 1)
    batch: list[Any] = []
    tokens = 0
    while True:
        for index in random.permutation(len(samples)):
            batch.append(samples[index])
            tokens += _token_count(samples[index])
            if tokens >= settings.tokens:
                yield batch
                batch, tokens = [], 0


def _token_count(sample: Any) -> int:
    value = sample.get("input_ids", next(iter(sample.values()), None)) if isinstance(sample, Mapping) else sample
    value = value[0] if isinstance(value, (tuple, list)) else value
    return max(int(value.shape[0] * value.shape[1]), 1) if getattr(value, "ndim", 0) >= 2 else 1


class _Trainer:
    """The vectors, the optimiser, and the loss of one sample."""

    def __init__(self, model: nn.Module, settings: Refine) -> None:
        self.model = model
        self.settings = settings
        self.device = model_device(model)
        self._pruned = [(module, pruner) for module, pruner in named_pruners(model) if pruner.layer.prunes]
        self._head = _Head(model)
        self._autocast = _autocast(model, settings.mixed_precision)
        self.scales: dict[str, torch.Tensor] = {}  # rms of each layer's dense output
        self.betas: dict[str, nn.Parameter] = {}
        self._teacher: dict[int, torch.Tensor] = {}  # id(sample) → hidden states before the head, at counted positions

    # -- the dense model ---------------------------------------------------------------------------------------------

    def watch_dense(self, samples: Sequence[Any]) -> None:
        """One dense pass: the size of each layer's output, and the teacher's last hidden states."""
        squares = {pruner.layer.name: torch.zeros((), dtype=torch.float64) for _, pruner in self._pruned}
        counts = dict.fromkeys(squares, 0)
        widths: dict[str, int] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
                squares[name] += output.detach().float().square().sum(dtype=torch.float64).cpu()
                counts[name] += output.numel()
                widths[name] = output.shape[-1]

            return hook

        handles = [module.register_forward_hook(watch(pruner.layer.name)) for module, pruner in self._pruned]
        try:
            with self._dense(), torch.no_grad():
                for index, sample in enumerate(track(samples, total=len(samples), description="Watching the teacher")):
                    with self._autocast():
                        hidden, logits = self._head.run(sample, f"sample {index}")
                        if index == 0:
                            self._head.check(hidden, logits)
                    if self._head.usable:
                        self._teacher[id(sample)] = self._rows(hidden, sample).clone()
                    if index == 0:
                        self._loss_is_possible(logits)
        finally:
            for handle in handles:
                handle.remove()
        for name in squares:
            if counts[name] == 0:  # an expert that no token reached
                continue
            self.scales[name] = (squares[name] / counts[name]).sqrt().float().to(self.device)
            self.betas[name] = nn.Parameter(torch.zeros(widths[name], device=self.device))
        self._optimiser = torch.optim.Adam(self.betas.values(), lr=self.settings.learning_rate, betas=(0.9, 0.98))

    def _loss_is_possible(self, logits: Any) -> None:
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            msg = (
                f"Refining needs a language model whose output has logits [B, T, V]; {type(self.model).__name__} "
                "gives none."
            )
            raise nncf.UnsupportedModelError(msg)

    @contextmanager
    def _dense(self) -> Iterator[None]:
        for _, pruner in self._pruned:
            pruner.enabled = False
        try:
            yield
        finally:
            for _, pruner in self._pruned:
                pruner.enabled = True

    # -- training ----------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Add the vectors to the layers' outputs."""
        handles = []

        def make(name: str, pruner: Any) -> Callable[..., Any]:
            def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> Any:
                if not pruner.enabled:
                    return None
                return output + (self.scales[name] * self.betas[name]).to(output.dtype)

            return hook

        try:
            for module, pruner in self._pruned:
                if pruner.layer.name in self.betas:
                    handles.append(module.register_forward_hook(make(pruner.layer.name, pruner)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step(self, samples: Sequence[Any], step: int) -> None:
        """One optimiser step over the samples."""
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * _schedule(step, self.settings.steps)
        self._optimiser.zero_grad(set_to_none=True)
        positions = sum(self._positions(sample) for sample in samples)
        for sample in samples:
            with torch.enable_grad():
                self._loss(sample, 1.0 / max(positions, 1), backward=True)
        self._optimiser.step()

    def held_out_loss(self, samples: Sequence[Any]) -> float:
        """Mean divergence from the dense model, nats a token."""
        with torch.no_grad():
            total = sum(self._loss(sample, 1.0, backward=False) for sample in samples)
        return total / max(sum(self._positions(sample) for sample in samples), 1)

    def _loss(self, sample: Any, weight: float, backward: bool) -> float:
        if not self._head.usable:
            with self._dense(), torch.no_grad(), self._autocast():
                teacher = self._rows(self._head.run(sample, "a sample")[1], sample)
            with self._autocast():
                student = self._rows(self._head.run(sample, "a sample")[1], sample)
            loss = _divergence(teacher, student)
            if backward:
                (loss * weight).backward()
            return float(loss.detach())
        with self._autocast():
            hidden = self._rows(self._head.run(sample, "a sample", skip_head=True)[0], sample)
        # logits of few rows at a time: a vocabulary is wide
        leaf = hidden.detach().requires_grad_(backward)
        total = 0.0
        for rows in range(0, leaf.shape[0], _ROWS):
            with self._autocast():
                with torch.no_grad():
                    teacher = self._head(self._teacher[id(sample)][rows : rows + _ROWS])
                student = self._head(leaf[rows : rows + _ROWS])
            loss = _divergence(teacher, student)
            if backward:
                (loss * weight).backward()
            total += float(loss.detach())
        if backward:
            hidden.backward(leaf.grad)
        return total

    def _rows(self, values: torch.Tensor, sample: Any) -> torch.Tensor:
        """The counted positions of [B, T, ...] as rows [n, ...]."""
        rows = values[:, :: self.settings.stride].flatten(0, 1)
        mask = attention_mask(sample)
        if mask is None:
            return rows
        return rows[mask[:, :: self.settings.stride].reshape(-1).to(rows.device) != 0]

    def _positions(self, sample: Any) -> int:
        mask = attention_mask(sample)
        if mask is not None:
            return int((mask[:, :: self.settings.stride] != 0).sum())
        ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
        if isinstance(ids, torch.Tensor) and ids.dim() == 2:
            return ids.shape[0] * -(-ids.shape[1] // self.settings.stride)
        return max(_token_count(sample) // self.settings.stride, 1)


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Σ over rows of KL(teacher ‖ student) of two [n, V]."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate at a step from 1: a linear rise, then a cosine down to a tenth."""
    if step <= _WARM_UP:
        return step / _WARM_UP
    along = (step - _WARM_UP) / max(steps - _WARM_UP, 1)
    return _LAST_SHARE + (1 - _LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * along))


class _Head:
    """
    The model's output layer, callable by itself, so that it runs for counted positions only and the teacher's share of
    a step is one product. Where the model does something else behind it (or NNCF decompresses its weights only inside
    of the model's forward), `usable` is False and whole forwards are compared.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        get = getattr(model, "get_output_embeddings", None)
        head = get() if callable(get) else None
        self._module: nn.Module | None = head if isinstance(head, nn.Module) else None
        self.usable = self._module is not None
        self._cap = getattr(getattr(model, "config", None), "final_logit_softcapping", None)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., H]."""
        assert self._module is not None
        logits = self._module(hidden)
        return logits if not self._cap else self._cap * torch.tanh(logits / self._cap)

    def run(self, sample: Any, what: str, skip_head: bool = False) -> tuple[Any, Any]:
        """
        A forward pass: the hidden states before the head [B, T, H] (None without one), and the logits.

        :param skip_head: let the head see one position only; the logits are of no use then.
        """
        seen: list[torch.Tensor] = []

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            seen.append(args[0])
            return (args[0][:, :1], *args[1:]) if skip_head else None

        handle = self._module.register_forward_pre_hook(hook) if self._module is not None else None
        try:
            sample = to_device(sample, model_device(self._model))
            output = forward_sample(self._model, without_cache(self._model, sample), what)
        finally:
            if handle is not None:
                handle.remove()
        return (seen[-1] if seen else None), getattr(output, "logits", None)

    def check(self, hidden: Any, logits: Any) -> None:
        """Whether the head by itself gives the model's logits."""
        if not self.usable:
            return
        try:
            again = self(hidden)
            ok = again.shape == logits.shape and torch.allclose(again.float(), logits.float(), rtol=1e-2, atol=1e-2)
        except (RuntimeError, TypeError, AttributeError, IndexError):
            ok = False
        self.usable = bool(ok)


def _autocast(model: nn.Module, wanted: bool | None) -> Callable[[], Any]:
    """A context in which matrix products run in bfloat16, or one that does nothing."""
    device = model_device(model).type
    float32 = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    if wanted is None:
        wanted = float32 and (torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_has_bf16())
    if not wanted:
        return lambda: torch.autocast(device, enabled=False)
    return lambda: torch.autocast(device, torch.bfloat16)


def _cpu_has_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
