"""The parts of the pipeline: tokenizers, text encoders, autoencoder, transformer; saving a FluxPipeline folder."""

import copy
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from tokenizers import normalizers as token_normalizers
from tokenizers import trainers as token_trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

IMAGE_SIZE = 128
LATENT_TOKENS = 64  # 8 x 8 patches of 2 x 2 latents
T5_LENGTH = 32  # what captions need; FluxPipeline's own default of 512 works as well
CLIP_LENGTH = 40  # training only: CLIP is causal and pooled at its end token, so padding on to 77 changes nothing
CLIP_MAX = 77


def make_clip_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Byte-level BPE with CLIP's own vocabulary layout: bytes, bytes with </w>, merges, the two specials."""
    bpe = Tokenizer(token_models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = token_normalizers.Lowercase()
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = token_trainers.BpeTrainer(
        vocab_size=1200, min_frequency=2, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(bpe.to_str())["model"]["merges"]
    ]
    pieces = dict.fromkeys(alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges])
    vocab = {p: i for i, p in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_MAX)


def make_t5_tokenizer(captions: Iterable[str]) -> T5TokenizerFast:
    """Unigram with a piece for every caption word, and for every ASCII character so that other words get tokens too.

    The trainer of the library splits words of so small a corpus in silly places; log frequencies by hand do not.
    """
    count = Counter(w for c in captions for w in c.split())
    total = sum(count.values())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    vocab += [("▁" + w, math.log(n / total)) for w, n in sorted(count.items())]
    vocab += [(chr(c), -12.0) for c in range(33, 127)]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return T5TokenizerFast(vocab=vocab, model_max_length=T5_LENGTH)


def make_text_encoders(clip_vocab: int, t5_vocab: int, clip_end: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_vocab, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=CLIP_MAX, projection_dim=128, bos_token_id=clip_end - 1, eos_token_id=clip_end,
            pad_token_id=clip_end,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=-(-t5_vocab // 64) * 64, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    return clip, t5


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(32, 64, 96, 96), layers_per_block=1,
        latent_channels=16, norm_num_groups=16, sample_size=IMAGE_SIZE, mid_block_add_attention=False,
        use_quant_conv=False, use_post_quant_conv=False, force_upcast=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def make_transformer() -> FluxTransformer2DModel:
    """FLUX with hidden size 512 (8 heads of 64), 1 double and 4 single blocks; DiT's zero modulation and output."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=4, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=256, pooled_projection_dim=128, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.xavier_uniform_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        if (".norm" in name and ".linear." in name) or name.startswith(("norm_out", "proj_out")):
            nn.init.zeros_(p)
    return model


def image_ids(height: int = 8, width: int = 8) -> Tensor:
    """(height * width, 3) positions of the latent patches, as FluxPipeline makes them."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.reshape(-1, 3)


def pack_latents(z: Tensor) -> Tensor:
    """(B, 16, 16, 16) -> (B, 64, 64): 2 x 2 patches as tokens, FluxPipeline's order."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack_latents(x: Tensor) -> Tensor:
    """(B, 64, 64) -> (B, 16, 16, 16)."""
    return x.view(-1, 8, 8, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, 16, 16)


def flux_forward(
    model: FluxTransformer2DModel, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor, g: Tensor, rope: object
) -> Tensor:
    """FluxTransformer2DModel.forward, written out so that t and g stay fp32 under autocast.

    x (B, T, 64), text (B, L, 256), pooled (B, 128), t and g (B,) fp32 -> velocity (B, T, 64).
    """
    x = model.x_embedder(x)
    temb = model.time_text_embed(t * 1000, g * 1000, pooled)
    text = model.context_embedder(text)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        text, x = block(hidden_states=x, encoder_hidden_states=text, temb=temb, image_rotary_emb=rope)
    return model.proj_out(model.norm_out(x, temb))


def save_pipeline(
    folder: Path, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, clip: nn.Module, t5: nn.Module,
    vae: nn.Module, transformer: nn.Module, *, max_shard_size: str = "14MB",
) -> int:  # fmt: skip
    """Write bf16 shards that `FluxPipeline.from_pretrained(folder)` loads; returns the number of parameters."""
    clip, t5, vae, transformer = (copy.deepcopy(m).to("cpu", torch.bfloat16) for m in (clip, t5, vae, transformer))
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    pipe = FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)
    pipe.save_pretrained(folder, max_shard_size=max_shard_size)
    # transformers 5 writes the class name T5Tokenizer here, which other versions can't load from tokenizer.json alone
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    parts["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    index.write_text(json.dumps(parts, indent=2) + "\n")
    # transformers 4 wants CLIP's vocabulary in its two original files beside tokenizer.json
    state = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return sum(p.numel() for m in (clip, t5, vae, transformer) for p in m.parameters())


def load_pipeline(folder: Path, device: str = "cpu") -> FluxPipeline:
    """A pipeline folder in bf16."""
    from diffusers.utils import deprecation_utils

    keyword = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"  # renamed in diffusers 0.42
    return FluxPipeline.from_pretrained(folder, **{keyword: torch.bfloat16}).to(device)
