"""Whose names LoRA files have: every family's loader, the original FLUX names at the real size, FILE:SCALE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from convrot_kernels.testing import assert_equal
from convrot_quant.lora_files import LOADERS, LoraFile, Merge

pytest.importorskip("peft")


def original_flux(rank: int = 1) -> dict[str, Tensor]:
    """A LoRA on every linear of FLUX.1's blocks under the names of the original repository."""
    double = {"img_attn.qkv": (3, 1), "img_attn.proj": (1, 1), "img_mlp.0": (4, 1), "img_mlp.2": (1, 4)}
    double |= {name.replace("img", "txt"): sizes for name, sizes in double.items()}
    double |= {"img_mod.lin": (6, 1), "txt_mod.lin": (6, 1)}
    single = {"linear1": (7, 1), "linear2": (1, 5), "modulation.lin": (3, 1)}
    layers = {f"double_blocks.{i}.{name}": sizes for i in range(19) for name, sizes in double.items()}
    layers |= {f"single_blocks.{i}.{name}": sizes for i in range(38) for name, sizes in single.items()}
    layers["final_layer.linear"] = (0, 1)
    state = {}
    for name, (outputs, inputs) in layers.items():
        n = 3072 * outputs or 64
        state[f"base_model.model.{name}.lora_A.weight"] = torch.full((rank, 3072 * inputs), 0.5)
        state[f"base_model.model.{name}.lora_B.weight"] = (
            torch.arange(n * rank, dtype=torch.float32).reshape(n, rank) / n
        )
    return state


def test_the_original_names_at_the_real_size(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    save_file(original_flux(), tmp_path / "original.safetensors")
    merge = Merge(model, [LoraFile(tmp_path / "original.safetensors", 2.0)])
    assert not merge.ignored
    assert merge.layers == 19 * 14 + 38 * 6 + 1
    to_k = merge("transformer_blocks.18.attn.to_k.weight", torch.zeros(3072, 3072))
    rows = torch.arange(3072, 2 * 3072) / (3 * 3072)  # the second third of the fused qkv: 2.0 * B * 0.5
    torch.testing.assert_close(to_k, rows[:, None].expand(3072, 3072), rtol=1e-6, atol=1e-6)
    kept = torch.ones(3072)
    assert merge("transformer_blocks.18.attn.to_k.bias", kept) is kept


def test_sd3_merges_as_its_own_loader_does(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig, get_peft_model_state_dict

    def make() -> Any:
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=8, num_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32,
            caption_projection_dim=64, pooled_projection_dim=32, in_channels=4, patch_size=2, pos_embed_max_size=8,
        ).bfloat16()  # fmt: skip

    trained, model, empty = make(), make(), make().to("meta")
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(trained).items()}
    save_file(state, tmp_path / "sd3.safetensors")
    merge = Merge(empty, [LoraFile(tmp_path / "sd3.safetensors")])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_lora_adapter(state)
    model.fuse_lora()
    model.unload_lora()
    changed = 0
    for name, tensor in model.state_dict().items():
        assert_equal(merge(name, before[name]), tensor)
        changed += not torch.equal(tensor, before[name])
    assert changed == merge.layers == 2


def test_every_loader_is_one_of_diffusers_for_a_transformer() -> None:
    import diffusers
    import diffusers.loaders.lora_pipeline as loaders

    for kind, stem in LOADERS.items():
        assert hasattr(diffusers, kind), kind
        assert "transformer" in getattr(loaders, f"{stem}LoraLoaderMixin")._lora_loadable_modules, stem


def test_a_file_may_name_its_scale() -> None:
    assert LoraFile.parse("a/style.safetensors:0.5") == LoraFile(Path("a/style.safetensors"), 0.5)
    assert LoraFile.parse("a/style.safetensors:-2") == LoraFile(Path("a/style.safetensors"), -2.0)
    assert LoraFile.parse("C:/style.safetensors") == LoraFile(Path("C:/style.safetensors"), 1.0)
