# SPDX-License-Identifier: Apache-2.0
"""
Decoding speed of a whole model, dense and deployed.

A model of a named shape gets random weights, is calibrated on random tokens and deployed; dense and sparse steps run
with a static cache, as they are, in a CUDA graph, and compiled in a CUDA graph. What is timed is one token: the model's
forward, the argmax, and the choice of the next input. Thresholds calibrated on random tokens realise the sparsity that
was asked for, which is counted while decoding and reported; text quality has no part in this.
"""

from __future__ import annotations

import copy
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nncf
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.layers import shapes_of
from scap_nncf.algorithms.plan import Plan, block_index
from scap_nncf.bench_report import DecodeResult, DecodeRow, MemoryRow, PrefillRow
from scap_nncf.extras import require

_GROUPED = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}

#: name → model type and configuration of transformers
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "model_type": "mistral",
        **_GROUPED,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "sliding_window": None,
        "max_position_embeddings": 32768,
    },
    "llama-2-7b": {
        "model_type": "llama",
        **_GROUPED,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "model_type": "llama",
        **_GROUPED,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 176,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
    },
}

#: name → sparsity, as scap_nncf.compress takes it
SPARSITIES: dict[str, Any] = {
    "ffn-48.5": {"up": 0.40, "gate": 0.40, "down": 0.60},
    "all-50": 0.5,
}

MODES = ("eager", "graph", "compiled")
_WARM_UP = 3  # steps before a way to decode is timed


# -- models ------------------------------------------------------------------------------------------------------------


def random_model(
    shape: str | Mapping[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> nn.Module:
    """
    A causal LM of a named shape (or of a mapping of configuration values) with random weights, in evaluation mode.

    :raises nncf.ValidationError: unknown shape.
    """
    transformers = require("transformers", "transformers", "a model of a named shape")
    if isinstance(shape, str):
        if shape not in SHAPES:
            msg = f"Unknown model shape {shape!r}; there are {', '.join(SHAPES)}."
            raise nncf.ValidationError(msg)
        shape = SHAPES[shape]
    values = dict(shape)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), use_cache=True, **values)
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:  # outputs of unit size everywhere, in any dtype
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.requires_grad_(False).eval()


def sparse_plans(
    model: nn.Module, sparsities: Mapping[str, Any], samples: int = 8, length: int = 256, prune: str = "all"
) -> dict[str, Any]:
    """One plan for each sparsity, from one calibration on random tokens."""
    import scap_nncf

    batches = random_batches(model, samples, length)
    settings: dict[str, Any] = {"mode": "zero", "allocation": "uniform", "prune": prune}
    calibration = scap_nncf.calibrate(model, dataset=nncf.Dataset(batches), **settings)
    return {
        name: scap_nncf.make_plan(calibration, scap_nncf.Scap(sparsity=value, **settings))
        for name, value in sparsities.items()
    }


def random_batches(model: nn.Module, samples: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens to calibrate on, the same ones in every run."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, device = model.config.vocab_size, next(model.parameters()).device  # type: ignore[union-attr]
    return [
        {"input_ids": torch.randint(vocabulary, (1, length), generator=generator).to(device)} for _ in range(samples)
    ]


# -- one way to decode -------------------------------------------------------------------------------------------------


class Decoder:
    """
    Decoding steps of one model with a static cache, fed with random tokens.

    :param model: a causal LM of transformers.
    :param tokens: how many steps follow the prompt at most; the cache holds these and the prompt.
    """

    def __init__(self, model: nn.Module, batch: int, prompt: int, tokens: int, seed: int = 2) -> None:
        from transformers import StaticCache

        tokens = max(tokens, _WARM_UP + 1)
        self.model, self.batch, self.prompt, self.tokens = model, batch, prompt, tokens
        self.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.vocab_size  # type: ignore[union-attr]
        ids = torch.randint(vocabulary, (batch, prompt + tokens + 1), generator=generator).to(self.device)
        self.prompt_ids, self.stream = ids[:, :prompt], ids[:, prompt:].contiguous()
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + tokens)
        self.input_ids = self.stream[:, :1].clone()
        self.position = torch.zeros((), dtype=torch.int64, device=self.device)
        self.chosen = torch.zeros((batch,), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            model(self.prompt_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.run: Callable[[], None] = self._step

    def _step(self) -> None:
        with torch.no_grad():
            logits = self._forward(self.input_ids)
            self.chosen.copy_(logits[:, -1].argmax(-1))
            # random weights repeat one token for ever; a random stream keeps activations like those of the calibration
            self.position.add_(1)
            self.input_ids.copy_(self.stream.index_select(1, self.position.reshape(1)))

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, past_key_values=self.cache, use_cache=True, return_dict=True).logits

    def compile(self) -> None:
        """Compile the model's part of the step."""
        model, cache = self.model, self.cache

        def forward(input_ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids, past_key_values=cache, use_cache=True, return_dict=True).logits

        self._forward = torch.compile(forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]

    def capture(self) -> None:
        """Record one step as a CUDA graph and run that from now on."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.run = graph.replay
        self.reset()

    def reset(self) -> None:
        """Back to the end of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)
        self.position.zero_()
        self.input_ids.copy_(self.stream[:, :1])

    def time(self, tokens: int) -> float:
        """Milliseconds a step, over `tokens` steps from the end of the prompt."""
        self.reset()
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(tokens):
                self.run()
            return (time.perf_counter() - start) * 1e3 / tokens
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(tokens):
            self.run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / tokens


def _prepare(decoder: Decoder, mode: str) -> None:
    on_gpu = decoder.device.type == "cuda"
    if mode == "compiled":
        decoder.compile()
    if mode == "eager" or not on_gpu:
        for _ in range(_WARM_UP):
            decoder.run()
    else:
        decoder.capture()
    decoder.reset()


# -- the benchmark -----------------------------------------------------------------------------------------------------


def run(
    model: str | Mapping[str, Any] | nn.Module = "mistral-7b",
    *,
    sparsities: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    prompts: Sequence[int] = (256, 1024, 2048),
    batches: Sequence[int] = (1, 4),
    cases: Sequence[tuple[int, int]] | None = None,
    tokens: int = 128,
    rounds: int = 5,
    dense_modes: Sequence[str] = MODES,
    sparse_modes: Sequence[str] = ("compiled",),
    prefill: int | None = 2048,
    backend: str = "triton",
    bits: int | None = None,
    log: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> DecodeResult:
    """
    Time decoding, dense and deployed.

    All ways of one case are made ready first and then timed in turns, round by round, so that a drift of the clock hits
    all of them. Every model is in memory at that time (dense, and one for each sparsity).

    :param model: name in :data:`SHAPES`, a mapping of configuration values with ``model_type``, or a causal LM without
        activation sparsity (it is deep-copied for every sparsity).
    :param sparsities: name → sparsity as :func:`scap_nncf.compress` takes it; default :data:`SPARSITIES`.
    :param prompts: prompt lengths, combined with every one of `batches`.
    :param cases: (batch, prompt) pairs instead of `prompts` and `batches`.
    :param tokens: steps a round.
    :param dense_modes: which of :data:`MODES` to time for the dense model.
    :param sparse_modes: which to time for the sparse ones.
    :param prefill: prompt length for the time to first token at batch 1; None leaves it out.
    :param backend: of :func:`scap_nncf.deploy`.
    :param bits: 4 or 8: weights of the blocks compressed, by NNCF for the sparse models, and for the dense one as
        :mod:`scap_nncf.bench_lowbit` says (4 bits: bfloat16 only).
    :raises nncf.ValidationError: unknown shape or mode.
    """
    unknown = [mode for mode in (*dense_modes, *sparse_modes) if mode not in MODES]
    if unknown:
        msg = f"Unknown mode {unknown[0]!r}; there are {', '.join(MODES)}."
        raise nncf.ValidationError(msg)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    sparsities = SPARSITIES if sparsities is None else sparsities
    result = DecodeResult(_about(model, dtype, where, sparsities, tokens, rounds, bits))
    models, plans = _models(result, model, sparsities, dtype, where, backend, bits, log)
    shares = {name: _pruned_share(models["dense"], plan) for name, plan in plans.items()}
    for batch, prompt in cases or [(batch, prompt) for batch in batches for prompt in prompts]:
        torch._dynamo.reset()  # every case compiles the same functions anew, for other shapes and models
        realised = {name: _count_realised(m, batch, prompt) for name, m in models.items() if name != "dense"}
        ready: list[tuple[str, str, Decoder]] = []
        errors: dict[tuple[str, str], str] = {}
        for name, m in models.items():
            for mode in dense_modes if name == "dense" else sparse_modes:
                start = time.perf_counter()
                try:
                    decoder = Decoder(m, batch, prompt, tokens)
                    _prepare(decoder, mode)
                except Exception as error:  # one way that fails must not cost the others
                    errors[name, mode] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    log(f"{name} {mode}: {errors[name, mode]}")
                    continue
                ready.append((name, mode, decoder))
                log(f"batch {batch} prompt {prompt}: {name} {mode} ready in {time.perf_counter() - start:.1f} s")
        times: dict[tuple[str, str], list[float]] = {(name, mode): [] for name, mode, _ in ready}
        for _ in range(rounds):
            for name, mode, decoder in ready:
                times[name, mode].append(decoder.time(min(tokens, 24) if mode == "eager" else tokens))
        for name in models:
            for mode in dense_modes if name == "dense" else sparse_modes:
                values = times.get((name, mode), [])
                ms = statistics.median(values) if values else None
                result.decode.append(
                    DecodeRow(
                        name,
                        mode,
                        batch,
                        prompt,
                        ms,
                        max(values) - min(values) if values else None,
                        batch * 1e3 / ms if ms else None,
                        realised.get(name),
                        None if name == "dense" else shares[name] * realised[name],
                        errors.get((name, mode), ""),
                    )
                )
        del ready
        _free(where)
    if prefill:
        result.prefill = _time_prefill(models, prefill, rounds, where)
    return result


def _models(
    result: DecodeResult,
    model: str | Mapping[str, Any] | nn.Module,
    sparsities: Mapping[str, Any],
    dtype: torch.dtype,
    where: torch.device,
    backend: str,
    bits: int | None,
    log: Callable[[str], None],
) -> tuple[dict[str, nn.Module], dict[str, Plan]]:
    from scap_nncf import bench_lowbit
    from scap_nncf.compress import compress
    from scap_nncf.deployment import deploy

    def build() -> nn.Module:
        if isinstance(model, nn.Module):
            return copy.deepcopy(model).to(where)
        return random_model(model, dtype, where)

    models: dict[str, nn.Module] = {}
    _free(where)
    base = _allocated(where)
    dense = model.to(where) if isinstance(model, nn.Module) and bits is None else build()
    plans = sparse_plans(dense, sparsities)
    if bits is not None:
        dense = bench_lowbit.make_dense(dense, bits)
    _free(where)
    size = _allocated(where) - base
    models["dense"] = dense
    result.memory.append(MemoryRow("dense", size, size, _running_peak(dense, where) - base))
    log(f"dense: {size / 2**20:.0f} MiB")
    for name, plan in plans.items():
        _free(where)
        base = _allocated(where)
        sparse = build() if bits is None else bench_lowbit.compress(build(), bits)
        sparse = compress(sparse, plan=plan)
        _free(where)
        _reset_peak(where)
        deploy(sparse, backend=backend)
        peak = _peak(where)
        _free(where)
        size = _allocated(where) - base
        models[name] = sparse
        result.memory.append(MemoryRow(name, size, peak - base, _running_peak(sparse, where) - base))
        log(f"{name}: {size / 2**20:.0f} MiB")
    return models, plans


def _running_peak(model: nn.Module, where: torch.device) -> int:
    """Peak of a prefill of 512 tokens and a few eager steps."""
    _reset_peak(where)
    decoder = Decoder(model, 1, 512, 8)
    for _ in range(4):
        decoder.run()
    peak = _peak(where)
    del decoder
    _free(where)
    return peak


def _count_realised(model: nn.Module, batch: int, prompt: int, tokens: int = 32) -> float:
    """Realised sparsity of decoding steps of a deployed model."""
    from scap_nncf.deployment import deployment_of, drift

    deployment = deployment_of(model)
    decoder = Decoder(model, batch, prompt, tokens)
    deployment.set_counting(True)
    try:
        for _ in range(tokens):
            decoder.run()
        return drift(model, bound=1.0).realised_sparsity
    finally:
        deployment.set_counting(False)


def _pruned_share(model: nn.Module, plan: Plan) -> float:
    """Share of the weights of all FC layers in blocks that belongs to pruned ones."""
    every = {name: shape[0] * shape[1] for name, shape in shapes_of(model).items() if block_index(name) is not None}
    return sum(every[layer.name] for layer in plan.layers) / sum(every.values())


def _time_prefill(models: Mapping[str, nn.Module], length: int, rounds: int, where: torch.device) -> list[PrefillRow]:
    from transformers import StaticCache

    from scap_nncf.deployment import deployment_of, is_deployed

    vocabulary = next(iter(models.values())).config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(3)).to(where)

    def once(model: nn.Module) -> float:
        cache = StaticCache(config=model.config, max_cache_len=length + 8)
        _synchronise(where)
        start = time.perf_counter()
        with torch.no_grad():
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # type: ignore[operator]
            logits.argmax(-1).tolist()  # waits for the device
        return (time.perf_counter() - start) * 1e3

    ways = []
    for name, model in models.items():
        ways += [(name, prune) for prune in (("all", "decode") if is_deployed(model) else ("none",))]
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for turn in range(3 * rounds + 2):
        for name, prune in ways:
            model = models[name]
            if is_deployed(model):
                deployment_of(model).set_decode_only(prune == "decode")
            spent = once(model)
            if turn >= 2:
                times[name, prune].append(spent)
    for model in models.values():
        if is_deployed(model):
            deployment_of(model).set_decode_only(deployment_of(model).decode_only)
    rows = []
    for (name, prune), values in times.items():
        quarters = statistics.quantiles(values, n=4)
        rows.append(PrefillRow(name, prune, length, statistics.median(values), quarters[2] - quarters[0]))
    return rows


def _about(
    model: Any,
    dtype: torch.dtype,
    where: torch.device,
    sparsities: Mapping[str, Any],
    tokens: int,
    rounds: int,
    bits: int | None,
) -> dict[str, Any]:
    import transformers

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = where.type == "cuda"
    name = model if isinstance(model, str) else type(model).__name__ if isinstance(model, nn.Module) else dict(model)
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(where) if gpu else platform.processor() or platform.machine(),
        "sparsities": dict(sparsities),
        "weight_bits": bits,
        "tokens": tokens,
        "rounds": rounds,
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _synchronise(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()


def _allocated(where: torch.device) -> int:
    return torch.cuda.memory_allocated() if where.type == "cuda" else 0


def _peak(where: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if where.type == "cuda" else 0


def _reset_peak(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _free(where: torch.device) -> None:
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()
