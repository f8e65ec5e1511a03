"""Steps of a small quantized FLUX shared by the processes of a run, and what each of their blocks saw.

Run by test_parallel.py and test_parallel_gpu.py:  torchrun --nproc-per-node N parallel_scenarios.py DEVICE FOLDER
"""

import copy
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from diffusers.models import attention_dispatch
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from convrot_kernels.testing import make_inputs
from convrot_quant import quantize_, unfuse_
from convrot_quant.families import flux

IMAGE, TEXT, HEADS, SEEDS = 64, 32, 8, 2
Inputs = dict[str, Tensor]


def small_flux(dtype: torch.dtype) -> nn.Module:
    """Weights of a size that lets every layer count; each norm its own."""
    sizes = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": 64}
    widths = {"in_channels": 64, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    model = FluxTransformer2DModel(**sizes, **widths, guidance_embeds=True, axes_dims_rope=(16, 24, 24))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * values if "norm_" in name and parameter.dim() == 1 else 0.05 * values)
    return model.to(dtype).eval()


def inputs(seed: int, dtype: torch.dtype, device: str) -> Inputs:
    """Batch 2: 64 image and 32 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (2, IMAGE, 64), "encoder_hidden_states": (2, TEXT, 64), "pooled_projections": (2, 64)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ids = {"img_ids": torch.zeros(IMAGE, 3), "txt_ids": torch.zeros(TEXT, 3)}
    ids["img_ids"][:, 1], ids["img_ids"][:, 2] = torch.arange(IMAGE) // 8, torch.arange(IMAGE) % 8
    values |= ids | {"timestep": torch.full((2,), 0.5), "guidance": torch.full((2,), 3.5)}
    return {name: value.to(device, dtype) for name, value in values.items()}


def with_lse(_: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) -> the same and (B, S, H): what diffusers' ring asks of an attention kernel, by torch's for CPUs."""
    operands = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands)
    return out.transpose(1, 2), lse.transpose(1, 2)


class Scenarios:
    """The model in several states on one rank; outputs are of all tokens, on every rank."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.exact = small_flux(dtype).to(device)
        self.fused = copy.deepcopy(self.exact)
        quantize_(self.fused, progress=False)
        self.plain = copy.deepcopy(self.fused)
        unfuse_(self.plain)

    def copy(self, model: nn.Module) -> Any:
        """Before anything is hung on it: hooks would go on calling the original."""
        return copy.deepcopy(model).to(self.device)  # which joins what is multiplied as one

    def run(self, model: nn.Module) -> Tensor:
        """(SEEDS, B, S, C): the outputs of SEEDS inputs."""
        with torch.no_grad():
            outs = [model(**inputs(i, self.dtype, self.device), return_dict=False)[0] for i in range(SEEDS)]
        return torch.stack(outs).cpu()

    def shared(self, model: nn.Module, way: str, backend: str = "native") -> Any:
        """A copy of the model that all ranks run together."""
        model = self.copy(model)
        model.set_attention_backend(backend)  # also what models that name none take from now on
        config = ContextParallelConfig(**{f"{way}_degree": distributed.get_world_size()})
        kind = torch.device(self.device).type  # diffusers would take GPUs wherever torch is built for them
        config.mesh = init_device_mesh(kind, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
        model.enable_parallelism(config=config)
        return model

    def compiled(self, model: nn.Module, **options: Any) -> Tensor:
        """The outputs with compiled blocks, which the model keeps."""
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, **options)
        return self.run(model)


def counted(seen: list[tuple[int, ...]]) -> Callable[..., Tensor]:
    """Note the shape of each query of a fused block before its attention."""
    attention = flux._attention

    def noted(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(tuple(q.shape))
        return attention(attn, q, k, v)

    return noted


def on_cpu() -> dict[str, Any]:
    """fp32, where nothing but flipped codes can tell two orders of summation apart."""
    attention_dispatch._native_flash_attention_forward_op = with_lse
    found: dict[str, Any] = {}
    s = Scenarios("cpu", torch.float32)
    found["exact"], found["one"], found["one unfused"] = s.run(s.exact), s.run(s.fused), s.run(s.plain)
    seen: list[tuple[int, ...]] = []
    flux._attention, stock = counted(seen), flux._attention
    found["ulysses"] = s.run(s.shared(s.fused, "ulysses"))
    found["ring"] = s.run(s.shared(s.fused, "ring", "_native_flash"))
    found["queries"], flux._attention = seen, stock
    found["ulysses unfused"] = s.run(s.shared(s.plain, "ulysses"))
    for way, backend in (("ulysses", "native"), ("ring", "_native_flash")):
        found[f"{way} blocks"] = blocks(s.shared(s.fused, way, backend))
    found["one blocks"] = blocks(s.fused)
    found["ulysses compiled"] = s.compiled(s.shared(s.fused, "ulysses"), backend="eager")
    found["graphs"] = counters["stats"]["unique_graphs"]
    found["adapted"], found["ulysses adapted"] = adapted(s)
    return found


def blocks(model: Any) -> list[Tensor]:
    """Text and image after a double and a single block, from equal inputs: this rank's tokens of them, or all."""
    shared = model._parallel_config is not None
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
    values = inputs(7, torch.float32, "cpu")
    ids = torch.cat([values[name].chunk(size)[rank] for name in ("txt_ids", "img_ids")])
    streams = {"hidden_states": make_inputs(2, IMAGE, 512), "encoder_hidden_states": make_inputs(2, TEXT, 512, seed=1)}
    streams = {name: x.float().clamp(-4, 4).chunk(size, dim=1)[rank].contiguous() for name, x in streams.items()}
    others = {"temb": make_inputs(2, 512, seed=2).float().clamp(-2, 2), "image_rotary_emb": model.pos_embed(ids)}
    with torch.no_grad():
        return [
            x
            for block in (model.transformer_blocks[0], model.single_transformer_blocks[0])
            for x in block(**streams, **others)
        ]


def adapted(s: Scenarios) -> tuple[Tensor, Tensor]:
    """With a LoRA beside the fused products: one process, shared."""
    from peft import LoraConfig

    model = s.copy(s.fused)
    torch.manual_seed(1)
    targets = ["to_q", "to_out.0", "proj_mlp", "proj_out"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return s.run(model), s.run(s.shared(model, "ulysses"))


def on_gpus(device: str) -> dict[str, Any]:
    """bf16, with the yardsticks: the same model compiled, and its layers one by one compiled."""
    found: dict[str, Any] = {}
    s = Scenarios(device, torch.bfloat16)
    found["exact"], found["one"], found["one unfused"] = s.run(s.exact), s.run(s.fused), s.run(s.plain)
    found["compiled"], found["compiled unfused"] = (s.compiled(s.copy(model)) for model in (s.fused, s.plain))
    seen: list[tuple[int, ...]] = []
    flux._attention, stock = counted(seen), flux._attention
    for way, backend in (("ulysses", "native"), ("ring", "_native_cudnn"), ("ring flash", "_native_flash")):
        found[way] = s.run(s.shared(s.fused, way.split()[0], backend))
    found["queries"], flux._attention = seen, stock
    for way, backend in (("ulysses", "native"), ("ring", "_native_cudnn")):
        found[f"{way} unfused"] = s.run(s.shared(s.plain, way, backend))
        found[f"{way} compiled"] = s.compiled(s.shared(s.fused, way, backend))
    return found


def main(kind: str, folder: Path) -> None:
    """What this rank found goes to FOLDER/RANK.pt."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.accelerator.device_count = lambda: size  # diffusers divides by it, and a CPU has none
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=120))
    found = on_gpus(f"cuda:{rank}") if kind == "cuda" else on_cpu()
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
