"""A tiny random FLUX pipeline on disk: hidden size 512 (two rotation groups of 256), real tokenizers, no downloads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_MININTERVAL", "1")

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PROMPTS = ("a red cube", "a blue sphere behind a cone")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny_flux(double: int = 1, single: int = 2, *, seed: int = 3, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def make_flux() -> Callable[..., nn.Module]:
    return tiny_flux


def run_flux(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """The output of a FLUX transformer of tiny_flux's size on fixed random inputs, 4 image and 6 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    values = {"hidden_states": (2, 4, 64), "encoder_hidden_states": (2, 6, 64), "pooled_projections": (2, 64)}
    inputs = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in values.items()}
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(6, 3)}
    ids["img_ids"][:, 1] = torch.arange(4)
    with torch.no_grad():
        half, guidance = torch.full((2,), 0.5, dtype=dtype), torch.full((2,), 3.5, dtype=dtype)
        out: torch.Tensor = model(**inputs, **ids, timestep=half, guidance=guidance, return_dict=False)[0]
    return out


@pytest.fixture(scope="session")
def run() -> Callable[..., torch.Tensor]:
    return run_flux


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline folder that FluxPipeline.from_pretrained loads; 32x32 images. Read-only: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    _write_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def saved(make_flux: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file and a sharded folder of the same quantized model; copy to change."""
    from convrot_quant import quantize_, save_quantized

    model = make_flux()
    quantize_(model, "paper-mixed", progress=False)
    root = tmp_path_factory.mktemp("saved")
    save_quantized(model, root / "one")
    save_quantized(model, root / "shards", max_shard_size="3MB")
    return root


@pytest.fixture
def one(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "one", tmp_path / "one"))


@pytest.fixture
def shards(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "shards", tmp_path / "shards"))


@pytest.fixture
def prompts() -> tuple[str, ...]:
    return PROMPTS


class RecordedGraph:
    """Replays by running the function again, into the same results."""

    def __init__(self, forward: Callable[[], Any], result: Any) -> None:
        self.forward, self.results, self.alive, self.replays = forward, pytree.tree_leaves(result), True, 0

    def replay(self) -> None:
        assert self.alive, "a graph that was freed"
        self.replays += 1
        for old, new in zip(self.results, pytree.tree_leaves(self.forward()), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    def reset(self) -> None:
        self.alive = False


class Recorder:
    """In the place of CudaCaptures: what was captured, on the CPU, and how often it was replayed."""

    device_type, reason = "cpu", None

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []
        self.pools = self.running = self.settled = self.trimmed = 0

    def why_not(self) -> str | None:
        return self.reason

    def busy(self) -> bool:
        return False

    def open(self, device: torch.device) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def turn(self, pool: int) -> Iterator[None]:
        self.running += 1
        assert self.running == 1, "two replays share memory"
        try:
            yield
        finally:
            self.running -= 1

    def record(self, forward: Callable[[], Any], pool: int) -> tuple[RecordedGraph, Any]:
        result = [forward() for _ in range(2)][-1]
        self.graphs.append(RecordedGraph(forward, result))
        return self.graphs[-1], result

    def settle(self, pool: int) -> None:
        self.settled += 1

    def trim(self) -> None:
        self.trimmed += 1

    @property
    def alive(self) -> int:
        return sum(graph.alive for graph in self.graphs)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CUDA graphs without a GPU."""
    from convrot_quant import graphs

    stand_in = Recorder()
    monkeypatch.setattr(graphs, "CAPTURES", stand_in)
    return stand_in


def _write_pipeline(folder: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = _tokenizers(folder)
    torch.manual_seed(1)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=32,
            projection_dim=64,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.eos_token_id,
        )
    )
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), **sizes, feed_forward_proj="gated-gelu"))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    modules = [module.to(torch.bfloat16).eval() for module in (vae, clip, t5)]
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    pipe = FluxPipeline(scheduler, modules[0], modules[1], clip_tokenizer, modules[2], t5_tokenizer, tiny_flux())
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _tokenizers(folder: Path) -> tuple[object, object]:
    """A byte-level BPE for CLIP and a Unigram of words and letters for T5, built with the tokenizers library."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer, T5TokenizerFast

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(PROMPTS, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=32)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [("\u2581" + word, -3.0) for word in sorted({word for prompt in PROMPTS for word in prompt.split()})]
    pieces += [(chr(code), -12.0) for code in range(33, 127)]
    t5 = T5TokenizerFast(vocab=pieces, model_max_length=16, extra_ids=0)
    return clip, t5
