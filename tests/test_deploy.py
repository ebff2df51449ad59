# SPDX-License-Identifier: Apache-2.0
"""deploy and undeploy: the deployed model is the simulated one, in every way to run it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import nncf
import pytest
import torch
from tiny_models import build_tiny_model, make_batches
from torch import nn

import scap_nncf
from scap_nncf.deployment import deploy, deployment_of, drift, is_deployed, undeploy
from scap_nncf.kernels import gated
from scap_nncf.kernels.modules import DeployedGlu, DeployedLinear

DECODER_FAMILIES = ["llama", "mistral", "qwen2", "gemma3", "gpt2", "opt", "falcon", "gpt_neox", "phi", "phi3", "mpt"]


def sparse_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = build_tiny_model(family, dtype=dtype)
    settings.setdefault("sparsity", 0.5)
    return scap_nncf.compress(model, dataset=nncf.Dataset(make_batches(2)), **settings)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def fresh_batch(batch: int = 2, length: int = 17) -> dict[str, torch.Tensor]:
    return make_batches(1, batch, length, seed=int(torch.randint(1 << 30, ())))[0]


def generate(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, **{**settings, **options}).tolist()


def storage_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for part in getattr(module, "parts", ()):  # layers kept outside of the module tree
            tensors += [*part.module.parameters(), *part.module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture
def messages() -> Any:
    """Warnings of NNCF's logger."""
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("nncf").addHandler(handler)
    yield records
    logging.getLogger("nncf").removeHandler(handler)


# -- the same model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_deployed_equals_simulated(family: str, mode: str) -> None:
    model = sparse_model(family, mode=mode)
    batch = fresh_batch()
    expected = logits(model, batch)
    deploy(model)
    assert not deployment_of(model).left
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    undeploy(model)
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize(("family", "prune"), [("llama", "all"), ("llama", "decode"), ("phi", "all")])
def test_greedy_text_is_identical(family: str, prune: str) -> None:
    model = sparse_model(family, prune=prune)
    ids = fresh_batch(3, 9)["input_ids"]
    expected = generate(model, ids)
    deploy(model)
    assert generate(model, ids) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_other_dtypes(family: str, dtype: torch.dtype) -> None:
    # layer by layer: over several, another rounding moves values across thresholds
    model = sparse_model(family, dtype=dtype, mode="mean")
    plan = scap_nncf.get_controller(model).plan
    inputs = {site.name: torch.randn(3, 5, site.layers[0].in_features).to(dtype) for site in plan.sites}
    with torch.no_grad():
        expected = {
            layer.name: model.get_submodule(layer.name)(inputs[site.name])
            for site in plan.sites
            for layer in site.layers
        }
        deploy(model)
        for projection in deployment_of(model).projections:
            names = [part.name for part in projection.parts]
            site = next(site for site in plan.sites if names[0] in {layer.name for layer in site.layers})
            outputs = [expected[name] for name in names]
            wanted = torch.cat(outputs, -1)
            if projection.activation:
                wanted = nn.functional.silu(outputs[0]) * outputs[1]
            result = projection(inputs[site.name])
            assert result.dtype == dtype
            # the simulation keeps η·W in float32
            tolerance = {torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
            torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance)


def test_policy_decode_prunes_lone_tokens_only() -> None:
    model = sparse_model("llama", sparsity=0.7, prune="decode")
    controller = scap_nncf.get_controller(model)
    batch = fresh_batch()
    with controller.disabled():
        dense = logits(model, batch)
        dense_token = logits(model, {"input_ids": batch["input_ids"][:, :1]})
    deploy(model)
    torch.testing.assert_close(logits(model, batch), dense, atol=1e-5, rtol=1e-5)
    token = logits(model, {"input_ids": batch["input_ids"][:, :1]})
    assert (token - dense_token).abs().max() > 1e-2


def test_thresholds_of_their_own_and_layers_that_keep_everything() -> None:
    sparsity = {"q": 0.6, "k": 0.3, "up": 0.4, "gate": 0.6, "down": 0.5}  # v and o are not in the plan
    model = sparse_model("qwen2", sparsity=sparsity, mode="mean")
    batch = fresh_batch()
    expected = logits(model, batch)
    deploy(model)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    attention = model.model.layers[0].self_attn
    # v is not centred as q and k are, and a dense launch of its own would gain nothing
    assert [type(layer) for layer in (attention.v_proj, attention.o_proj)] == [nn.Linear] * 2
    assert len(set(attention.q_proj.projection.thresholds)) == 2


def test_negative_thresholds_in_a_centred_site() -> None:
    model = sparse_model("qwen2", mode="mean")
    plan = scap_nncf.get_controller(model).plan
    text = plan.to_json()
    scap_nncf.get_controller(model).strip()
    import json

    data = json.loads(text)
    for site in data["sites"]:
        site["layers"][0]["threshold"] = -1.0
    scap_nncf.compress(model, plan=scap_nncf.Plan.from_json(json.dumps(data)))
    batch = fresh_batch()
    expected = logits(model, batch)
    deploy(model)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


def test_disabled_is_dense() -> None:
    model = sparse_model("qwen2", mode="mean")
    controller = scap_nncf.get_controller(model)
    batch = fresh_batch()
    with controller.disabled():
        dense = logits(model, batch)
        deploy(model)
        torch.testing.assert_close(logits(model, batch), dense, atol=1e-5, rtol=1e-5)
    assert (logits(model, batch) - dense).abs().max() > 1e-2
    with controller.disabled():
        torch.testing.assert_close(logits(model, batch), dense, atol=1e-5, rtol=1e-5)
    undeploy(model)
    assert (logits(model, batch) - dense).abs().max() > 1e-2


# -- ways to run it ------------------------------------------------------------------------------------------------


def test_generation_with_caches_beams_padding_and_speculation() -> None:
    model = sparse_model("mistral", mode="mean")
    ids = fresh_batch(4, 11)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :3] = 0, 0
    ways: list[dict[str, Any]] = [
        {"attention_mask": mask, "max_new_tokens": 16},
        {"cache_implementation": "static", "max_new_tokens": 16},
        {"num_beams": 3, "max_new_tokens": 16},
        {"use_cache": False, "max_new_tokens": 6},
    ]
    alone = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 24, "eos_token_id": 2}
    expected = [generate(model, ids, **way) for way in ways] + [generate(model, ids[:1], **alone)]
    deploy(model)
    assert [generate(model, ids, **way) for way in ways] + [generate(model, ids[:1], **alone)] == expected


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2"])
def test_compiles_without_graph_breaks(family: str) -> None:
    model = sparse_model(family)
    batch = {"input_ids": fresh_batch()["input_ids"]}
    expected = logits(model, batch)
    deploy(model, counters=True)
    torch._dynamo.reset()
    # aot_eager: traced and functionalised as for any compiler, without minutes of C++
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-5, rtol=1e-5)
    assert is_deployed(compiled)
    assert drift(compiled, bound=1.0).layers[0].tokens == batch["input_ids"].numel()


def test_layers_called_out_of_order_or_with_other_tensors() -> None:
    model = sparse_model("qwen2")
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 1, 5, 48)
    expected = [getattr(attention, f"{name}_proj")(x) for name in "qkv"]
    expected_other = attention.k_proj(other)
    deploy(model)
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    close = torch.testing.assert_close
    close(k(x), expected[1])
    close(q(x), expected[0])
    close(k(other), expected_other)
    close(v(x), expected[2])
    close(q(x), expected[0])
    y = x.clone()
    q(y)
    y.copy_(other)  # the same tensor with new values: the first layer computes again
    q(y)
    close(k(y), expected_other)
    v(y)
    assert q._handover.pending is None  # nothing is kept alive after the last layer


def test_empty_input() -> None:
    model = sparse_model("llama")
    deploy(model)
    block = model.model.layers[0]
    assert block.mlp(torch.zeros(1, 0, 48)).shape == (1, 0, 48)
    assert block.self_attn.k_proj(torch.zeros(0, 48)).shape == (0, 24)


# -- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_one_copy_of_the_weights(family: str) -> None:
    model = sparse_model(family)
    before = storage_bytes(model)
    deploy(model)
    assert storage_bytes(model) <= before * 1.02
    matrices = [sum(p.numel() for p in m.parameters() if p.dim() > 1) for m in (model, build_tiny_model(family))]
    assert matrices[0] == matrices[1]
    undeploy(model)
    assert storage_bytes(model) == before


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_state_dict_keeps_names_and_values(family: str) -> None:
    model = sparse_model(family, mode="mean")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deploy(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    # new values reach the kernels, the fused bias of a centred site included
    donor = build_tiny_model(family, seed=1)
    model.load_state_dict(donor.state_dict())
    batch = fresh_batch()
    result = logits(model, batch)
    plan = scap_nncf.get_controller(model).plan
    torch.testing.assert_close(result, logits(scap_nncf.compress(donor, plan=plan), batch), atol=1e-5, rtol=1e-5)


def test_save_pretrained_saves_the_dense_weights(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = sparse_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deploy(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], before[name]) for name in before)
    undeploy(model)
    assert "save_pretrained" not in model.__dict__


def test_casting_and_copying_a_deployed_model() -> None:
    model = sparse_model("qwen2", mode="mean")
    batch = fresh_batch()
    expected = logits(model, batch)
    deploy(model)
    size = storage_bytes(model)
    twin = copy.deepcopy(model)
    assert storage_bytes(twin) == size
    undeploy(model)
    torch.testing.assert_close(logits(twin, batch), expected, atol=1e-5, rtol=1e-5)
    twin.double()
    torch.testing.assert_close(logits(twin, batch).float(), expected, atol=1e-5, rtol=1e-5)
    assert storage_bytes(twin) < 2.1 * size
    undeploy(twin)
    torch.testing.assert_close(logits(twin.float(), batch), expected, atol=1e-5, rtol=1e-5)


# -- counters ------------------------------------------------------------------------------------------------------


def test_counters_agree_with_the_simulation() -> None:
    model = sparse_model("llama", sparsity={"up": 0.3, "gate": 0.5, "down": 0.6, "attn": 0.4})
    controller = scap_nncf.get_controller(model)
    batch = fresh_batch()
    controller.reset_counters()
    logits(model, batch)
    expected = {layer.name: layer.realised_sparsity for layer in controller.statistics().layers}
    deploy(model)
    logits(model, batch)
    assert controller.statistics().realised_sparsity is None  # off by default
    with pytest.raises(nncf.ValidationError, match="counters=True"):
        drift(model)
    undeploy(model)
    deploy(model, counters=True)
    logits(model, batch)
    assert {layer.name: layer.realised_sparsity for layer in controller.statistics().layers} == expected
    controller.reset_counters()
    assert controller.statistics().realised_sparsity is None


def test_drift_warns_to_recalibrate(messages: list[str]) -> None:
    model = deploy(sparse_model("llama"), counters=True)
    logits(model, fresh_batch(8, 64))
    assert not drift(model, bound=0.2).recalibrate
    assert not any("Recalibrate" in message for message in messages)
    scap_nncf.get_controller(model).reset_counters()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(2.0)
    logits(model, fresh_batch(8, 64))
    report = drift(model)
    assert "model.layers.1.mlp.gate_proj" in {layer.name for layer in report.drifted}
    assert sum("Recalibrate" in message for message in messages) == 1
    assert "model.layers.1" in str(report)


# -- what is replaced ----------------------------------------------------------------------------------------------


def test_launches_are_fused() -> None:
    model = deploy(sparse_model("llama"))
    block = model.model.layers[0]
    assert isinstance(block.mlp, DeployedGlu)
    assert [type(m) for m in (block.self_attn.q_proj, block.mlp.down_proj)] == [DeployedLinear] * 2
    assert len(deployment_of(model).projections) == 2 * 4  # qkv, o, gate|up, down


def test_dense_layers_that_read_one_tensor_are_fused_too() -> None:
    model = sparse_model("qwen2", sparsity={"ffn": 0.5})
    batch = fresh_batch()
    controller = scap_nncf.get_controller(model)
    controller.reset_counters()
    expected = logits(model, batch)
    counted = controller.statistics().layers
    deploy(model, counters=True)
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.projection.thresholds == [-1.0] * 3
    assert type(attention.o_proj) is nn.Linear
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    assert {layer.role for layer in drift(model, bound=1.0).layers} == {"gate", "up", "down"}
    undeploy(model)
    assert controller.statistics().layers == counted  # what deploy ran to find them was not counted
    # a layer that the plan leaves dense beside sparse ones joins their launch
    other = deploy(sparse_model("llama", sparsity={"q": 0.5, "gate": 0.4}, mode="zero"))
    assert other.model.layers[0].self_attn.v_proj._shared[0].thresholds[1:] == [-1.0, -1.0]
    assert other.model.layers[0].mlp.gate_up.thresholds[1] == -1.0


class _Mlp(nn.Module):
    def __init__(self, forward: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(8, 12)
        self.c = nn.Linear(12, 8)
        self.kind = forward

    def forward(self, x: torch.Tensor) -> Any:
        a, b = self.a(x), self.b(x)
        match self.kind:
            case "plain":
                return self.c(nn.functional.silu(b) * a)
            case "clamped":
                return self.c(nn.functional.silu(b).clamp(max=100.0) * a)
            case "quick gelu":
                return self.c(b * torch.sigmoid(1.702 * b) * a)
            case "residual":
                return self.c(nn.functional.silu(b) * a) + x
            case "tuple":
                return (self.c(nn.functional.silu(b) * a),)
            case _:
                return self.c(nn.functional.silu(b) * a * self.a.weight.mean())


def test_gated_feed_forwards_are_recognised_by_what_they_compute() -> None:
    found = gated.recognise(_Mlp("plain"), ["a", "b", "c"])
    assert found == gated.GatedFeedForward(("b", "a"), "c", "silu")
    for kind in ("clamped", "quick gelu", "residual", "tuple", "weights"):
        assert gated.recognise(_Mlp(kind), ["a", "b", "c"]) is None, kind
    module = _Mlp("plain")
    module.scale = nn.Parameter(torch.ones(1))
    assert gated.recognise(module, ["a", "b", "c"]) is None
    module = _Mlp("plain")
    module.register_forward_hook(lambda *_: None)
    assert gated.recognise(module, ["a", "b", "c"]) is None


def test_unsupported_layers_stay_simulated_with_one_warning(messages: list[str]) -> None:
    model = build_tiny_model("llama")

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = inner.in_features, inner.out_features
            self.store = [inner]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.store[0](x)

    layers = model.model.layers
    doubled = Doubled(48, 24, bias=False)
    doubled.weight = layers[0].self_attn.k_proj.weight
    layers[0].self_attn.k_proj = doubled
    layers[1].self_attn.o_proj = Wrapped(layers[1].self_attn.o_proj)
    scap_nncf.compress(model, dataset=nncf.Dataset(make_batches(2)), sparsity=0.5)
    calls = []
    layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    batch = fresh_batch()
    expected = logits(model, batch)
    messages.clear()
    deploy(model)
    left = {item.name: item.reason for item in deployment_of(model).left}
    assert set(left) == {
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.0.mlp.up_proj",
    }
    assert len(messages) == 1
    assert "Doubled" in messages[0]
    assert "Wrapped" in messages[0]
    assert "hooks" in messages[0]
    calls.clear()
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    assert calls
    undeploy(model)
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_torchao_are_read_where_they_are(bits: int, messages: list[str]) -> None:
    pytest.importorskip("torchao", reason="needs torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = build_tiny_model("llama")
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(8))
    quantize_(model, config)
    scap_nncf.compress(model, dataset=nncf.Dataset(make_batches(2)), sparsity={"attn": 0.5, "down": 0.4}, mode="mean")
    batch = fresh_batch()
    expected = logits(model, batch)
    dense_output = model.model.layers[0].mlp.gate_proj(torch.ones(1, 48))
    messages.clear()
    deploy(model)
    assert not deployment_of(model).left
    assert {projection.bits for projection in deployment_of(model).projections} == {bits}
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-4)
    undeploy(model)
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(model.model.layers[0].mlp.gate_proj(torch.ones(1, 48)), dense_output)


def test_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["scap_nncf.deployment"]
    model = sparse_model("llama")
    batch = fresh_batch()
    expected = logits(model, batch)
    made = module._Layers.project
    count = []

    def failing(*args: Any) -> Any:
        count.append(1)
        if len(count) == 5:
            raise torch.OutOfMemoryError("no memory")
        return made(*args)

    monkeypatch.setattr(module._Layers, "project", failing)
    with pytest.raises(torch.OutOfMemoryError):
        deploy(model)
    assert not is_deployed(model)
    assert torch.equal(logits(model, batch), expected)


# -- bad input -----------------------------------------------------------------------------------------------------


def test_public_names_are_those_of_the_module() -> None:
    assert (scap_nncf.deploy, scap_nncf.undeploy, scap_nncf.drift) == (deploy, undeploy, drift)


def test_bad_input() -> None:
    with pytest.raises(nncf.ValidationError, match="no activation sparsity"):
        deploy(build_tiny_model("llama"))
    model = sparse_model("llama")
    with pytest.raises(nncf.ParameterNotSupportedError, match="'cuda'"):
        deploy(model, backend="cuda")
    with pytest.raises(nncf.ValidationError, match="not deployed"):
        undeploy(model)
    with pytest.raises(nncf.UnsupportedBackendError):
        deploy(object())  # type: ignore[arg-type]
    deploy(model)
    with pytest.raises(nncf.ValidationError, match="deployed already"):
        deploy(model)
    controller = scap_nncf.get_controller(model)
    for change in (controller.strip, lambda: controller.set_sparsity(0.3)):
        with pytest.raises(nncf.ValidationError, match="undeploy"):
            change()
    with pytest.raises(ValueError):
        model.model.layers[0].mlp(torch.zeros(1, 47))
    with pytest.raises(TypeError):
        model.model.layers[0].mlp(torch.zeros(1, 48, dtype=torch.float64))
    assert len(controller.statistics().layers) == 14
    undeploy(model)
    controller.strip()


def test_reference_backend_runs_the_definition(messages: list[str]) -> None:
    model = sparse_model("phi3")
    batch = fresh_batch()
    expected = logits(model, batch)
    messages.clear()
    deploy(model, backend="reference")
    assert not messages  # asked for, so nothing to warn about
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.smollm2
def test_smollm2_decodes_as_it_was_simulated(smollm2: tuple[Any, Any]) -> None:
    """
    Each token after the simulation's own text and cache. Sums in another order move values that lie on a threshold to
    its other side, and the blocks behind amplify that; a whole text would diverge there, so steps are compared.
    """
    model, tokenizer = smollm2
    from scap_nncf.text import builtin_text

    scap_nncf.compress(model, dataset=builtin_text("calibration")[:4], tokenizer=tokenizer, sparsity=0.4)
    ids = tokenizer("The history of the printing press begins", return_tensors="pt")["input_ids"]
    simulated = model.generate(
        ids, max_new_tokens=49, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    text, prompt = simulated.sequences, ids.shape[1]
    deploy(model)
    try:
        differences, same = [], []
        for step in range(1, len(simulated.logits)):
            cache = copy.deepcopy(simulated.past_key_values)
            cache.crop(prompt + step - 1)
            token = text[:, prompt + step - 1 : prompt + step]
            with torch.no_grad():
                got = model(token, past_key_values=cache).logits[:, -1]
            differences.append((got - simulated.logits[step]).abs().max().item())
            same.append(got.argmax() == text[0, prompt + step])
    finally:
        undeploy(model)
    assert sorted(differences)[len(differences) // 2] < 1e-3
    assert sum(same) >= 0.8 * len(same)
