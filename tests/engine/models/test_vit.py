from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from toys import TINY, tiny_vit

from engine.errors import RunStopped, UserError
from engine.models.attention import attention_backend, capture_queries_keys, zero_key_bias_grads
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.models.info import model_info
from engine.models.spec import ModelSpec, remember_model_args, spec_of
from engine.models.vit import attention_info, describe, outputs

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def timm_model(name: str, **args: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **args).eval()


def test_checkpoint_opens_in_timm_with_the_same_logits(tmp_path: Path, model: torch.nn.Module) -> None:
    save_checkpoint(model, tmp_path / "c")
    opened = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(opened(images), model(images))
    assert torch.equal(load_checkpoint(tmp_path / "c")(images), model(images))


def test_checkpoint_of_timm_opens_here(tmp_path: Path) -> None:
    original = timm_model("vit_tiny_patch16_224", **SMALL)
    timm.models.save_for_hf(original, tmp_path / "c", model_args=SMALL, safe_serialization=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_checkpoint(tmp_path / "c")(images), original(images))


def test_a_pth_state_dict_opens(tmp_path: Path, checkpoint: Path, model: torch.nn.Module) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"state_dict": model.state_dict()}, checkpoint / "model.pth")
    assert weights_sha256(load_checkpoint(checkpoint)) == weights_sha256(model)


def test_saving_a_model_that_timm_made(tmp_path: Path) -> None:
    original = timm_model("vit_tiny_patch16_224", **SMALL)
    remember_model_args(original, **SMALL)
    save_checkpoint(original, tmp_path / "c")
    assert weights_sha256(load_checkpoint(tmp_path / "c")) == weights_sha256(original)


def test_a_bare_module_says_what_is_missing_when_it_is_saved(tmp_path: Path) -> None:
    bare = timm.models.vision_transformer.VisionTransformer(**SMALL)
    with pytest.raises(UserError, match="has no record of its timm architecture"):
        save_checkpoint(bare, tmp_path / "c")


def test_wrong_model_args_are_noticed() -> None:
    original = timm_model("vit_tiny_patch16_224", **SMALL)
    original.blocks = original.blocks[:1]
    with pytest.raises(UserError, match="does not give this model"):
        spec_of(original)


@pytest.mark.parametrize(
    ("name", "args", "prefix", "pool"),
    [
        ("vit_tiny_patch16_224", SMALL, 1, "token"),
        ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "class_token": False}, 0, "avg"),
        ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 4}, 5, "token"),
        ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}, 1, "token"),
        ("vit_tiny_patch16_224", {**SMALL, "embed_dim": 48, "num_heads": 3, "img_size": (32, 64)}, 1, "token"),
        ("deit_tiny_distilled_patch16_224", SMALL, 2, "token"),
    ],
)
def test_geometry_and_captured_attention(name: str, args: dict[str, object], prefix: int, pool: str) -> None:
    """softmax(q k^T scale) of what the hooks hand over is the attention that timm's explicit path computes."""
    vit = timm_model(name, **args)
    info = describe(vit)
    assert (info.num_prefix_tokens, info.pool, info.patch_size) == (prefix, pool, (8, 8))
    images = torch.randn(2, 3, *info.input_size)
    with torch.no_grad(), capture_queries_keys(vit) as (queries, keys):
        fused = vit(images)
    assert len(queries) == len(keys) == 2
    assert queries[0].shape[2] == prefix + info.num_patches
    probabilities: list[torch.Tensor] = []
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda m, i, out: probabilities.append(out)) for block in vit.blocks
    ]
    with torch.no_grad(), attention_backend(vit, "eager"):
        explicit = vit(images)
    assert all(block.attn.fused_attn for block in vit.blocks)  # as it was
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(fused, explicit)
    for q, k, expected, block in zip(queries, keys, probabilities, vit.blocks, strict=True):
        torch.testing.assert_close((q @ k.transpose(-2, -1) * block.attn.scale).softmax(-1), expected)


def test_capture_copies_nothing_and_leaves_no_hooks(model: torch.nn.Module) -> None:
    with torch.no_grad(), capture_queries_keys(model) as (queries, keys):
        model(torch.randn(2, 1, 8, 8))
    assert queries[0].untyped_storage().data_ptr() == keys[0].untyped_storage().data_ptr()  # views of one qkv
    assert not any(block.attn.q_norm._forward_hooks or block.attn.k_norm._forward_hooks for block in model.blocks)


def test_models_without_usable_attention_say_what_was_looked_for() -> None:
    with pytest.raises(UserError, match=r"expected `patch_embed\.patch_size`"):
        attention_info(timm_model("resnet18"))
    broken = tiny_vit()
    del broken.blocks[1].attn.q_norm
    with pytest.raises(UserError, match="a pass on one image of its input size fails"):
        attention_info(broken)


def test_the_same_seed_builds_the_same_model_and_spares_the_global_generator() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, third = tiny_vit(1), tiny_vit(1), tiny_vit(2)
    assert torch.equal(torch.rand(3), expected)
    assert weights_sha256(first) == weights_sha256(second) != weights_sha256(third)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    torch.save({"w": _Payload()}, checkpoint / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth is not a plain state dict.*safetensors"):
        load_checkpoint(checkpoint)
    assert not (checkpoint / "pwned").exists()


def test_damaged_checkpoints_say_what_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    weights, config = load_file(checkpoint / "model.safetensors"), json.loads((checkpoint / "config.json").read_text())

    def broken(name: str) -> Path:
        return Path(shutil.copytree(checkpoint, tmp_path / name))

    cut = broken("cut")
    (cut / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    shape = broken("shape")
    (shape / "config.json").write_text(json.dumps({**config, "model_args": {**TINY, "embed_dim": 64}}))
    depth = broken("depth")
    (depth / "config.json").write_text(json.dumps({**config, "model_args": {**TINY, "depth": 1}}))
    poisoned = broken("nan")
    save_file({**weights, "head.bias": torch.full((10,), float("nan"))}, poisoned / "model.safetensors")
    arch = broken("arch")
    (arch / "config.json").write_text(json.dumps({**config, "architecture": "vit_tinny_patch16_224"}))
    argument = broken("argument")
    (argument / "config.json").write_text(json.dumps({**config, "model_args": {"colour": 1}}))
    unconfigured = broken("unconfigured")
    (unconfigured / "config.json").unlink()
    text = broken("text")
    (text / "config.json").write_text("not json")
    empty = broken("empty")
    (empty / "model.safetensors").unlink()
    for folder, message in (
        (cut, "damaged or cut short"),
        (shape, "has shape"),
        (depth, "is not in the model"),
        (poisoned, "head.bias holds values that are not finite"),
        (arch, "unknown architecture 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'"),
        (argument, "refuses its model_args"),
        (unconfigured, "no config.json"),
        (text, "is not a timm configuration"),
        (empty, "no model.safetensors"),
        (tmp_path / "nowhere", "is not a folder"),
    ):
        with pytest.raises(UserError) as error:
            load_checkpoint(folder)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs to mount a tmpfs")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, model: torch.nn.Module) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        save_checkpoint(model, disk / "c")
        before = weights_sha256(model)
        with pytest.raises(RunStopped, match="no space left"):
            save_checkpoint(tiny_vit(seed=1), disk / "c")
        assert weights_sha256(load_checkpoint(disk / "c")) == before
        assert sorted(p.name for p in (disk / "c").iterdir()) == ["config.json", "model.safetensors"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_still_key_biases_zero_what_softmax_does_not_see_and_nothing_else() -> None:
    model, images = tiny_vit(), torch.randn(4, 1, 8, 8)
    model(images).square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    handles = zero_key_bias_grads(model)
    assert len(handles) == len(model.blocks)
    model.zero_grad()
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            queries, keys, values = parameter.grad.chunk(3)
            assert not keys.any()
            assert before[name].chunk(3)[1].abs().max() < 1e-5 * before[name].abs().max(), "it was rounding"
            assert torch.equal(torch.cat([queries, values]), torch.cat([*before[name].chunk(3)[::2]]))
        else:
            assert torch.equal(parameter.grad, before[name])
    for handle in handles:
        handle.remove()
    assert not zero_key_bias_grads(tiny_vit(qk_norm=True)), "a normalised key feels its bias"


@pytest.mark.parametrize(
    ("name", "arguments", "still"),
    [
        ("test_vit", {}, 6),
        ("test_vit_relpos", {"qkv_bias": True}, 9),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 1, 1), "embed_dim": 24}, 4),
        ("davit_tiny", {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48)}, 0),
        pytest.param("tiny_vit_5m_224", {}, 0, marks=pytest.mark.slow),
        ("test_maxvit", {}, 0),
        ("vit_small_patch16_rope_224", {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32}, 0),
    ],
)
def test_only_biases_without_influence_are_still(name: str, arguments: dict[str, Any], still: int) -> None:
    model = timm.create_model(name, num_classes=4, **arguments).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    size = model_info(model).input_size
    images = torch.randn((2, 3, *size), generator=generator, dtype=torch.float64)
    other = copy.deepcopy(model)
    other(images).square().sum().backward()
    before = {key: p.grad for key, p in other.named_parameters()}
    handles = zero_key_bias_grads(model)
    assert len(handles) == still
    model(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad - before[key]).norm() <= 1e-10 * max(1e-3, before[key].norm()), key


@pytest.mark.parametrize("name", ["tiny", "deit"])
def test_features_are_what_the_classifier_reads(name: str) -> None:
    if name == "tiny":
        model, images = tiny_vit(), torch.randn(3, 1, 8, 8)
    else:
        spec = ModelSpec(
            architecture="deit_tiny_distilled_patch16_224",
            num_classes=7,
            model_args={"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2},
            pretrained_cfg={},
        )
        model, images = spec.build(seed=0).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.equal(outputs(model, images, "features"), expected)
        assert torch.equal(outputs(model, images), model(images)), "and the model is as it was"
