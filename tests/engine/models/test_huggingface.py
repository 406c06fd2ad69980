"""Image classifiers of Hugging Face transformers: opened, unlearned, written back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import MODELS, NAMES, images, logits, saved, sets, tiny

import engine
from engine.errors import UserError
from engine.models.attention_masking import scores_and_outputs
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.models.huggingface import as_classifier
from engine.models.spec import folder_of, spec_of
from engine.models.vit import ViTInfo, attention_info, describe, outputs

transformers = pytest.importorskip("transformers")
AutoModel = transformers.AutoModelForImageClassification
QUICK = {"max_steps": 2, "batch_size": 8}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_unlearned_and_written_back(name: str, tmp_path: Path) -> None:
    original = saved(tiny(name), tmp_path / "original")
    forget, retain = sets()
    result = engine.unlearn(original, forget, retain, method="random_labels", config=QUICK, output_dir=tmp_path / "out")
    back = AutoModel.from_pretrained(tmp_path / "out")
    assert type(back).__name__ == MODELS[name][0]
    assert back.config.id2label == dict(enumerate(NAMES))
    with torch.no_grad():
        expected = result.model(images())
    torch.testing.assert_close(logits(back, images()), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, logits(tiny(name), images()), atol=1e-3)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == (
        original / "preprocessor_config.json"
    ).read_text()
    assert spec_of(load_checkpoint(tmp_path / "out")).label_names == NAMES


@pytest.mark.parametrize("name", ["vit", "swin", "timm-wrapper"])
def test_a_module_in_memory_comes_back_as_one(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = engine.unlearn(model, *sets(), method="random_labels", config=QUICK)
    assert type(result.model) is type(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    result.model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path), images()), logits(result.model, images()))
    assert not torch.equal(logits(result.model, images()), logits(model, images()))
    result.save(tmp_path / "saved")
    back = load_checkpoint(tmp_path / "saved")
    torch.testing.assert_close(outputs(back, images()), logits(result.model, images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "timm-wrapper"])
def test_inplace_changes_the_module_itself(name: str) -> None:
    model, untouched = tiny(name), tiny(name)
    result = engine.unlearn(model, *sets(), method="random_labels", config=QUICK, inplace=True)
    assert result.model is model
    assert not torch.equal(logits(model, images()), logits(untouched, images()))


@pytest.mark.parametrize("name", MODELS)
def test_logits_features_and_geometry(name: str, tmp_path: Path) -> None:
    module = tiny(name)
    model = load_checkpoint(saved(module, tmp_path / "model"))
    assert folder_of(model) == tmp_path / "model"
    torch.testing.assert_close(outputs(model, images()), logits(module, images()), rtol=0, atol=1e-6)
    features = outputs(model, images(), "features")
    assert features.shape == (24, model.num_features)
    heads: Any = model.get_classifier()  # type: ignore[operator]
    heads = heads if isinstance(heads, tuple) else (heads,)
    if len(heads) == 1:
        torch.testing.assert_close(heads[0](features), logits(module, images()), rtol=0, atol=1e-6)
    info = describe(model)
    prefix = {"deit": 2, "deit-teacher": 2, "dinov2-registers": 5, "swin": 0, "swinv2": 0, "siglip": 0}.get(name, 1)
    pool = "avg" if name in ("beit", "clip", "siglip", "swin", "swinv2") else "token"
    assert (info.input_size, info.in_chans, info.width) == ((32, 32), 3, model.num_features)
    if name.startswith("swin"):
        assert not isinstance(info, ViTInfo)
        return
    assert isinstance(info, ViTInfo)
    assert info.grid == (4, 4)
    assert (info.num_prefix_tokens, info.pool, info.patch_size) == (prefix, pool, (8, 8))


def test_fresh_weights_follow_the_seed_and_the_number_of_classes() -> None:
    spec = spec_of(as_classifier(tiny("vit")))
    state = torch.random.get_rng_state()
    first, second, other = spec.build(seed=3), spec.build(seed=3), spec.build(seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert weights_sha256(first) == weights_sha256(second) != weights_sha256(other)


def test_a_head_for_other_classes_drops_the_names() -> None:
    from engine.models.slice_stages import with_fresh_head

    model = with_fresh_head(as_classifier(tiny("vit")), 7)
    assert model(images(2)).shape == (2, 7)
    assert spec_of(model).label_names == []


def test_placeholder_names_are_no_names() -> None:
    model = tiny("vit", id2label={i: f"LABEL_{i}" for i in range(4)})
    assert spec_of(as_classifier(model)).label_names == []
    assert spec_of(as_classifier(tiny("clip"))).label_names == NAMES


def test_sharded_and_pickled_weights(tmp_path: Path) -> None:
    module = tiny("vit")
    module.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(outputs(load_checkpoint(tmp_path / "shards"), images()), logits(module, images()))
    (tmp_path / "bin").mkdir()
    module.config.save_pretrained(tmp_path / "bin")
    torch.save(module.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert torch.equal(outputs(load_checkpoint(tmp_path / "bin"), images()), logits(module, images()))


def test_half_precision_weights_are_opened_in_float32(tmp_path: Path) -> None:
    saved(tiny("vit").half(), tmp_path / "half")
    model = load_checkpoint(tmp_path / "half")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_unknown_keys_of_config_survive(tmp_path: Path) -> None:
    module = tiny("vit")
    module.config.our_note = "from the lab"
    save_checkpoint(load_checkpoint(saved(module, tmp_path / "a")), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["our_note"] == "from the lab"


@pytest.mark.parametrize("method", list(engine.list_methods()))
def test_methods(method: str) -> None:
    if method in ("lethe", "s3t"):
        pytest.skip("needs attention, or a sliced training")
    forget, retain = sets()
    try:
        result = engine.unlearn(tiny("vit"), forget, retain, method=method, config=QUICK, validation=retain)
    except UserError as error:
        pytest.fail(str(error))
    assert type(result.model).__name__ == "ViTForImageClassification"
    assert torch.isfinite(logits(result.model, images())).all()


@pytest.mark.parametrize("name", ["vit", "clip", "swin", "swinv2"])
@pytest.mark.parametrize("trainable", ["head", "last:1", "last:3", "lora:2"])
def test_parts_of_the_weights(name: str, trainable: str) -> None:
    if trainable == "last:3" and not name.startswith("swin"):
        with pytest.raises(UserError, match="has 2 blocks"):
            engine.unlearn(tiny(name), *sets(), method="finetune", config={**QUICK, "trainable": trainable})
        return
    model = tiny(name)
    result = engine.unlearn(model, *sets(), method="finetune", config={**QUICK, "trainable": trainable})
    before, after = model.state_dict(), result.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    head = {key for key in before if key.startswith("classifier.")}
    assert changed
    if trainable == "head":
        assert changed == head
    elif trainable == "lora:2":
        assert not changed & head
        assert all(key.endswith(".weight") for key in changed)
    else:
        assert changed >= head
        assert not any("embeddings" in key for key in changed)
        if trainable == "last:3":  # every block, and what joins the two stages
            assert any("downsample" in key for key in changed)


def test_gradient_checkpointing_changes_no_result() -> None:
    results = [
        engine.unlearn(tiny("vit"), *sets(), method="finetune", config={**QUICK, "gradient_checkpointing": on}).model
        for on in (False, True)
    ]
    assert not any(getattr(module, "gradient_checkpointing", False) for module in results[1].modules())
    torch.testing.assert_close(logits(results[0], images()), logits(results[1], images()))


def test_resume_and_train(tmp_path: Path) -> None:
    result = engine.train(tiny("vit"), sets()[1], config={**QUICK, "epochs": 1}, output_dir=tmp_path / "t")
    assert type(result.model).__name__ == "ViTForImageClassification"
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "t"), images()), logits(result.model, images()))


COLUMNAR = [name for name in MODELS if not name.startswith("swin")]


@pytest.mark.parametrize("name", [name for name in COLUMNAR if name != "timm-wrapper"])
def test_the_class_row_is_that_of_explicit_softmax(name: str) -> None:
    """Rollout in float64 of the maps that transformers gives out with explicit attention."""
    module = tiny(name)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "relative_position_bias_table" in key:  # zeros at first
                parameter.normal_()
    model = as_classifier(module)
    info = attention_info(model)
    with torch.no_grad():
        scores, _ = scores_and_outputs(model, images(4), info, backend="eager")
        model.set_attention("eager")  # type: ignore[operator]
        maps = module(pixel_values=images(4), output_attentions=True).attentions
    rollout = torch.eye(maps[0].shape[-1], dtype=torch.float64).expand(4, -1, -1)
    for each in maps:
        rollout = (0.5 * each.double().mean(1) + 0.5 * torch.eye(each.shape[-1], dtype=torch.float64)) @ rollout
    prefix = info.num_prefix_tokens
    row = rollout[:, 0, prefix:] if info.pool == "token" else rollout[:, prefix:, prefix:].mean(1)
    expected = row / row.sum(1, keepdim=True)
    torch.testing.assert_close(scores.double() / scores.double().sum(1, keepdim=True), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", COLUMNAR)
def test_lethe(name: str, attention: str) -> None:
    result = engine.unlearn(tiny(name), *sets(), method="lethe", config={**QUICK, "attention": attention})
    assert type(result.model).__name__ == MODELS[name][0]
    assert torch.isfinite(logits(result.model, images())).all()
    if name != "timm-wrapper":
        assert result.model.config._attn_implementation == "sdpa"  # as it came


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_lethe_is_refused_where_attention_is_in_windows(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method lethe needs the attention .* attends within windows"):
        engine.unlearn(tiny(name), *sets(), method="lethe", config=QUICK, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _change_config(folder: Path, **keys: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"problem_type": "multi_label_classification"}, "multi_label"),
        ({"problem_type": "regression"}, "regression"),
        ({"auto_map": {"AutoModelForImageClassification": "mine.Model"}}, "trust_remote_code"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ({"architectures": ["ViTModel"]}, "no image classifier"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "no image classifier"),
        ({"image_size": 64}, r"position_embeddings has shape \(1, 17, 24\), but"),
    ],
)
def test_models_that_are_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = _change_config(saved(tiny("vit"), tmp_path / "model"), **keys)
    with pytest.raises(UserError, match=words) as raised:
        load_checkpoint(folder)
    assert "\n" not in str(raised.value)


def test_weights_without_a_classifier_are_refused(tmp_path: Path) -> None:
    """transformers would draw the head at random."""
    module = tiny("vit")
    module.vit.save_pretrained(tmp_path)
    _change_config(tmp_path, architectures=["ViTForImageClassification"])
    with pytest.raises(UserError, match=r"lack classifier\.bias"):
        load_checkpoint(tmp_path)


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    folder = saved(tiny("vit"), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="cannot open it") as raised:
        load_checkpoint(folder)
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    module = tiny("vit")
    with torch.no_grad():
        module.classifier.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"classifier\.bias holds values that are not finite"):
        load_checkpoint(saved(module, tmp_path / "model"))


def test_without_transformers_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny("vit"), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'lethe-unlearning\[huggingface\]'"):
        load_checkpoint(folder)


def test_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny("vit"), tmp_path / "snapshot")
    asked: list[tuple[str, Any]] = []

    def snapshot(repository: str, *, revision: Any, **_: Any) -> str:
        asked.append((repository, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(folder / "config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = load_checkpoint("hf-hub:me/my-vit@v2")
    assert asked == [("me/my-vit", "v2")]
    assert torch.equal(outputs(model, images()), logits(tiny("vit"), images()))


def test_modules_of_transformers_where_models_are_taken(tmp_path: Path) -> None:
    from engine.data import from_dataset
    from engine.evaluate import Evaluator
    from engine.forget_sets import choose_forget_set

    model, (forget, retain) = tiny("vit"), (from_dataset(part, "part") for part in sets())
    evaluation = Evaluator(forget, retain, retain)(model)
    assert 0 <= evaluation.numbers["accuracy"]["forget"] <= 1
    assert len(choose_forget_set(retain, "highest-loss", count=4, model=model).ids) == 4
    save_checkpoint(model, tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path), images()), logits(model, images()))


@pytest.mark.parametrize(("name", "blocks"), [("vit", 2), ("dinov2", 2), ("clip", 2), ("swin", 3)])
def test_weights_are_compared_by_part(name: str, blocks: int) -> None:
    from engine.evaluate.representation import compare_weights

    distance = compare_weights(as_classifier(tiny(name, seed=1)), as_classifier(tiny(name)))["distance"]
    assert {"patch embedding", "head"} <= set(distance)
    assert sum("block" in part for part in distance) == blocks


@pytest.mark.parametrize("name", ["vit", "timm-wrapper"])
def test_names_that_are_given_are_written(name: str, tmp_path: Path) -> None:
    from engine.models.slice_stages import with_fresh_head
    from engine.models.spec import describing, with_label_names

    save_checkpoint(with_label_names(as_classifier(tiny(name)), list("wxyz"), "names"), tmp_path / "a")
    assert list(AutoModel.from_pretrained(tmp_path / "a").config.id2label.values()) == list("wxyz")
    assert spec_of(load_checkpoint(tmp_path / "a")).label_names == list("wxyz")
    save_checkpoint(describing(with_fresh_head(as_classifier(tiny(name)), 3), list("uvw")), tmp_path / "b")
    assert list(AutoModel.from_pretrained(tmp_path / "b").config.id2label.values()) == list("uvw")


def test_arguments_for_files_are_refused(tmp_path: Path) -> None:
    folder = saved(tiny("vit"), tmp_path / "model")
    for query in ("weights=ema", "arch=vit_tiny_patch16_224"):
        with pytest.raises(UserError, match="leave it out"):
            load_checkpoint(f"{folder}?{query}")
    assert load_checkpoint(folder / "model.safetensors")(images(1)).shape == (1, 4)
