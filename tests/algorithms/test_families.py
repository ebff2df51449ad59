# SPDX-License-Identifier: Apache-2.0
"""Every kind of model from inspection to a reload: roles, realised sparsity, exactness; inputs that are no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from families import FAMILIES, Family
from torch import nn

import scap_nncf
from scap_nncf.algorithms.data import Samples

# experts have tests of their own
OTHERS = [name for name in FAMILIES if "experts" not in FAMILIES[name].kind]


@pytest.fixture(params=OTHERS)
def family(request: pytest.FixtureRequest) -> Family:
    if "timm" in request.param:
        pytest.importorskip("timm", reason="needs timm")
    return FAMILIES[request.param]


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_from_inspection_to_a_reload(family: Family, tmp_path: Path) -> None:
    model, data = family.make(1), family.samples(3, 4, 2)
    report = scap_nncf.inspect_model(model, data[0])
    assert [tuple(layer.role for layer in site.layers) for site in report.sites] == family.roles

    dense = first(model(**data[0]))
    # where zeros pile up, a mode beside them drops all of them or none
    mode = "auto" if "ReLU" in family.kind else "mean"
    nncf.compress(model, dataset=data, sparsity=0.4, mode=mode, sequential=True, allocation="uniform")
    controller = scap_nncf.get_controller(model)
    sparse = first(model(**data[0]))
    assert not torch.equal(sparse, dense)
    controller.reset_counters()
    for sample in data:
        model(**sample)
    for layer in controller.statistics().layers:
        if layer.mode_method == "natural":
            assert layer.threshold == 0.0
            assert layer.realised_sparsity >= 0.4
        else:
            assert layer.realised_sparsity == pytest.approx(0.4, abs=0.01), layer.name

    if hasattr(model, "config"):
        scap_nncf.save_pretrained(model, tmp_path / "model")
        assert torch.equal(first(scap_nncf.load_pretrained(tmp_path / "model")(**data[0])), sparse)
    else:  # timm: the user makes the model, the folder has the rest
        scap_nncf.save_pretrained(model, tmp_path / "model")
        again = scap_nncf.load_pretrained(tmp_path / "model", model=family.make(5))
        assert torch.equal(first(again(**data[0])), sparse)

    controller.set_sparsity(0.0)
    assert torch.equal(first(model(**data[0])), dense)
    controller.strip()
    assert torch.equal(first(model(**data[0])), dense)


def test_without_a_sample(family: Family) -> None:
    """Inspection makes up an input of the right kind."""
    roles = [tuple(layer.role for layer in site.layers) for site in scap_nncf.inspect_model(family.make(0)).sites]
    if family.name == "llava":  # text alone: the language part
        assert roles == family.roles[-8:]
    else:
        assert roles == family.roles


# -- inputs that are no text ------------------------------------------------------------------------------------------


def test_sound_alone_makes_the_decoder_write(tmp_path: Path) -> None:
    model = FAMILIES["whisper"].make(3)
    model.generation_config.eos_token_id = None
    sound = [{"input_features": sample["input_features"]} for sample in FAMILIES["whisper"].samples(2, 2, 0)]
    statistics = scap_nncf.calibrate(model, dataset=sound)
    tokens = {site.name: statistics.tokens_at(site) for site in statistics.sites}
    assert tokens["model.encoder.layers.0.fc1"] == 2 * 2 * 30
    assert tokens["model.decoder.layers.0.fc1"] > 2 * 2 * 10  # and not only the first token
    # the generation itself is not counted
    assert tokens["model.decoder.layers.0.fc1"] == tokens["model.decoder.layers.0.self_attn.q_proj"]
    ids = model.generate(sound[0]["input_features"], max_new_tokens=32, do_sample=False, num_beams=1)
    assert tokens["model.decoder.layers.0.fc1"] <= 2 * 2 * (ids.shape[1] + 1)
    again = scap_nncf.calibrate(model, dataset=sound[::-1])
    assert again.to_bytes() == statistics.to_bytes()


def test_rows_of_datasets_and_pictures() -> None:
    """Columns of numbers without a batch axis; images and sound with a processor."""
    image = np.random.default_rng(0).normal(size=(3, 32, 32))
    for row in ({"pixel_values": image.tolist(), "label": 3}, {"pixel_values": torch.tensor(image).float()}):
        sample = next(iter(Samples([row])))
        assert sample["pixel_values"].shape == (1, 3, 32, 32)
    assert next(iter(Samples([{"input_features": torch.zeros(2, 8, 60)}])))["input_features"].shape == (2, 8, 60)

    class ImageProcessor:
        def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.tensor(np.asarray(images)).permute(2, 0, 1)[None].float()}

    class FeatureExtractor:
        def __call__(self, raw_speech: Any, sampling_rate: int, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"input_values": torch.tensor(raw_speech)[None] * sampling_rate}

    pil = pytest.importorskip("PIL.Image", reason="needs Pillow")
    picture = pil.fromarray((image.transpose(1, 2, 0) > 0).astype(np.uint8))
    for item in (picture, {"image": picture, "label": 3}):
        assert next(iter(Samples([item], ImageProcessor())))["pixel_values"].shape == (1, 3, 32, 32)
    sound = {"audio": {"array": [0.5, 1.0], "sampling_rate": 4}}
    assert next(iter(Samples([sound], FeatureExtractor())))["input_values"].tolist() == [[2.0, 4.0]]
    with pytest.raises(nncf.ValidationError, match="image processor"):
        next(iter(Samples([picture])))


# -- natural zeros ----------------------------------------------------------------------------------------------------


def test_natural_zeros_cost_nothing() -> None:
    """Behind a ReLU half of the inputs are zero: a target below that is τ = 0, bit-exact, and reported as such."""
    model, data = FAMILIES["opt"].make(2), FAMILIES["opt"].samples(3, 2, 0)
    dense = model(**data[0]).logits
    nncf.compress(model, dataset=data, sparsity={"fc2": 0.1})
    controller = scap_nncf.get_controller(model)
    assert torch.equal(model(**data[0]).logits, dense)
    for sample in data[1:]:
        model(**sample)
    statistics = controller.statistics()
    for layer in statistics.layers:
        assert (layer.mode_method, layer.threshold) == ("natural", 0.0)
        assert 0.3 < layer.sparsity < 0.7
        assert layer.realised_sparsity == pytest.approx(layer.sparsity, abs=1e-3)
    assert "no loss" in str(statistics)
    controller.set_sparsity({"fc2": 0.9})
    assert all(layer.threshold > 0 and layer.sparsity == 0.9 for layer in controller.statistics().layers)
    assert "no loss" not in str(controller.statistics())


class Relufied(nn.Module):
    """Gated feed-forward with the activation of reluficated models: ReLU, squared ReLU, or ReLU on both sides."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shapes = {"gate_proj": (24, 64), "up_proj": (24, 64), "down_proj": (64, 24)}
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.layers[0]
        gate, up = block["gate_proj"](x).relu(), block["up_proj"](x)
        inner = {"relu": gate * up, "relu2": gate.square() * up, "drelu": gate * up.relu()}[self.kind]
        return block["down_proj"](inner)


@pytest.mark.parametrize("mode", ["zero", "median", "kde", "auto"])
def test_the_mode_of_zeros_is_zero(mode: str) -> None:
    """Not a neighbour of zero, from which every zero would differ."""
    data = [torch.randn(64, 24).relu() * (torch.rand(64, 24) > 0.2)]
    model = nn.Sequential(nn.Linear(24, 8))
    nncf.compress(model, dataset=data, sparsity=0.5, mode=mode)
    model(data[0])
    (layer,) = scap_nncf.get_controller(model).statistics().layers
    assert (layer.mode, layer.mode_method) == (0.0, "natural")
    assert layer.realised_sparsity == pytest.approx(float((data[0] == 0).float().mean()))


@pytest.mark.parametrize(("kind", "share"), [("relu", 0.5), ("relu2", 0.5), ("drelu", 0.75)])
def test_reluficated_models(kind: str, share: float) -> None:
    model, data = Relufied(kind), [torch.randn(64, 24) for _ in range(3)]
    dense = model(data[0])
    nncf.compress(model, dataset=data, sparsity={"down": share - 0.2})
    (layer,) = scap_nncf.get_controller(model).statistics().layers
    assert layer.mode_method == "natural"
    assert layer.sparsity == pytest.approx(share, abs=0.1)
    assert torch.equal(model(data[0]), dense)


# -- modules that are shared, or called more than once -----------------------------------------------------------------


class Twice(nn.Module):
    """A block that runs twice, and a layer that reads the first tensor only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.layers[0]
        y = block["a"](x) + block["b"](x)
        return block["a"](10 * y)


def test_a_module_that_is_called_twice_is_calibrated_on_all_of_its_inputs() -> None:
    model, x = Twice(), torch.randn(64, 12)
    report = scap_nncf.inspect_model(model, sample=x)
    assert len(report.sites) == 2  # not one site: b never sees the second tensor
    assert "several times" in str(report)
    assert "layers.0.a" in report.notes[0]
    statistics = scap_nncf.calibrate(model, dataset=[x])
    assert {site.name: statistics.tokens_at(site) for site in statistics.sites} == {"layers.0.a": 128, "layers.0.b": 64}
    nncf.compress(model, dataset=[x], sparsity=0.5)
    model(x)
    for layer in scap_nncf.get_controller(model).statistics().layers:
        assert layer.realised_sparsity == pytest.approx(0.5, abs=0.06)


def test_a_shared_module_is_one_layer() -> None:
    """One module under two names, and one weight in two modules."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}) for _ in "ab"])
    model.layers[1]["up"] = model.layers[0]["up"]
    model.layers[1]["down"].weight = model.layers[0]["down"].weight

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return x

    model.forward = forward  # type: ignore[method-assign]
    x = torch.randn(32, 12)
    names = [layer.name for site in scap_nncf.inspect_model(model, sample=x).sites for layer in site.layers]
    assert names == ["layers.0.up", "layers.0.down", "layers.1.down"]
    dense = model(x)
    nncf.compress(model, dataset=[x], sparsity=0.4, mode="mean")
    assert not torch.equal(model(x), dense)
    scap_nncf.get_controller(model).strip()
    assert torch.equal(model(x), dense)


# -- full size ---------------------------------------------------------------------------------------------------------


FULL_SIZE = {
    "llama-2-7b": ("LlamaConfig", {"num_hidden_layers": 32}, 4 * 32, 6_476_005_376),
    "falcon-7b": (
        "FalconConfig",
        {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "vocab_size": 65024},
        3 * 32,
        6_625_951_744,
    ),
    "mpt-7b": (
        "MptConfig",
        {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432},
        4 * 32,
        6_442_450_944,
    ),
    "mixtral-8x7b": ("MixtralConfig", {}, (2 + 16) * 32, 46_439_333_888),
    "mamba2-2.7b": (
        "Mamba2Config",
        {
            "hidden_size": 2560,
            "num_hidden_layers": 64,
            "num_heads": 80,
            "head_dim": 64,
            "n_groups": 1,
            "state_size": 128,
        },
        2 * 64,
        2_571_632_640,
    ),
}


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_full_size_on_the_meta_device(name: str) -> None:
    """The paper's models: every block's weights are found, nothing is allocated."""
    import transformers

    config, options, sites, weights = FULL_SIZE[name]
    with torch.device("meta"):
        settings = getattr(transformers, config)(**options)
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    report = scap_nncf.inspect_model(model, sample={"input_ids": torch.ones(1, 4, dtype=torch.int64, device="meta")})
    layers = [layer for site in report.sites for layer in site.layers]
    assert len(report.sites) == sites
    assert sum(layer.weights for layer in layers) == weights
