"""Synthetic activations and weights with the statistics of FLUX's layers, at FLUX's shapes: no model behind them.

A generated layer is a weight (N, K) and tokens (M, K) of one kind. What belongs to the layer (channel spreads, which
channels are outliers, the AdaLN shift) is drawn once, tokens are drawn on top of it, and tokens for calibration are
others of the same layer. Values are fp32 and the same on every device. Levers were built after this file and are tuned
on TUNING_SEEDS alone; whoever changes a parameter after that measures everything again.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

TUNING_SEEDS = range(10)
REPORT_SEEDS = range(100, 105)
TOKENS, CALIBRATION_TOKENS = 512, 128


@dataclass(frozen=True)
class Parameter:
    """A number of a generator and where it comes from."""

    value: float
    source: str


_TOY = "the usual toy of ConvRot's re-implementers: 512 tokens, 32 of them with a mean of 6 and more, 6 channels x40"
_FIGURE_3 = "ConvRot, Figure 3, 37.proj_out of FLUX.1: max |x| 14.48, Sylvester 106.19 = 16 x 6.64, regular 9.26"
_MINI = "mini-flux in this repository, 4 captions, 8 steps: "
_PUBLISHED_W = "HunyuanVideo-1.5 weights, published: round-to-nearest per row has a relative L2 of .170 at K=2048"

PARAMETERS: Mapping[str, Parameter] = MappingProxyType(
    {
        "outlier_channels": Parameter(6, _TOY),
        "outlier_channel_gain": Parameter(40.0, _TOY),
        "dc_token_every": Parameter(16, _TOY),
        "dc_token_mean": Parameter(6.0, _TOY),
        "adaln_scale_spread": Parameter(0.3, "chosen: 1 + scale stays positive for nearly every channel"),
        "adaln_shift_rms": Parameter(0.66, _MINI + "rms of channel means is .38-.60 of the rms of modulated inputs"),
        "adaln_shift_tail": Parameter(0.7, _MINI + "largest over median channel rms is 3-20, half of them above 6"),
        "gelu_mean": Parameter(-0.5, _MINI + "16-29 % of GELU outputs are positive"),
        "gelu_channel_mean_spread": Parameter(0.35, _MINI + "rms of channel means is .27-.35 of the rms"),
        "gelu_channel_spread": Parameter(0.35, _MINI + "log of the channel rms spreads by .37-.51"),
        "gelu_token_spread": Parameter(0.25, _MINI + "log of the token rms spreads by .23-.39"),
        "gelu_spread": Parameter(0.6, _MINI + "rms of GELU outputs is .23-.38"),
        "gelu_dc_mean": Parameter(6.64, _FIGURE_3),
        "gelu_dc_least": Parameter(0.5, "chosen: DC tokens have between half and all of the largest mean"),
        "gelu_dc_spread": Parameter(0.6, _FIGURE_3 + "; 9.26 - 6.64 = 2.6 is left without the mean"),
        "gelu_dc_peak": Parameter(14.48, _FIGURE_3),
        "gelu_dc_peak_channels": Parameter(6, _TOY),
        "attention_rms": Parameter(0.53, _MINI + "attention part of proj_out: rms .42-.66"),
        "attention_channel_spread": Parameter(0.5, _MINI + "attention part: log of the channel rms spreads by .47-.55"),
        "attention_token_spread": Parameter(0.3, _MINI + "attention part: log of the token rms spreads by .21-.38"),
        "attention_channel_mean": Parameter(0.36, _MINI + "attention part: rms of channel means is .29-.43 of the rms"),
        "tail": Parameter(0.6, "chosen: kurtosis 3 exp(4 x .36) = 12.7, twice a Laplace distribution's"),
        "tail_channel_spread": Parameter(0.3, "chosen: below the spread of attention outputs"),
        "weight_input_spread": Parameter(0.1, _MINI + "log of the rms of weight columns spreads by .06-.26"),
        "weight_output_spread": Parameter(0.15, _MINI + "log of the rms of weight rows spreads by .06-.25 in blocks"),
        "weight_tail": Parameter(0.15, _PUBLISHED_W + "; this tail has .168"),
        "weight_rank_per_k": Parameter(32 / 3072, "SVDQuant's rank 32 at K=3072, where it finds this energy"),
        "weight_low_rank_energy": Parameter(0.12, _MINI + "the leading singular values of that rank hold .06-.39"),
    }
)


@dataclass(frozen=True)
class Case:
    """A generated layer: its input's kind, its weight's variant, its shape, and the FLUX layer that has this shape."""

    kind: str
    weights: str
    n: int
    k: int
    stands_for: str

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.weights}"


_LAYERS = (
    ("gaussian", 3072, 3072, "transformer_blocks.*.attn.to_out.0"),
    ("channel_outliers", 9216, 3072, "transformer_blocks.*.attn.to_q, to_k, to_v"),
    ("token_outliers", 3072, 3072, "transformer_blocks.*.attn.to_add_out"),
    ("adaln_shifted", 12288, 3072, "transformer_blocks.*.ff.net.0.proj"),
    ("gelu_inputs", 3072, 12288, "transformer_blocks.*.ff.net.2"),
    ("heavy_tails", 9216, 3072, "single_transformer_blocks.*.attn.to_q, to_k, to_v"),
    ("proj_out", 3072, 15360, "single_transformer_blocks.*.proj_out"),
)
WEIGHTS = ("gaussian", "heavy_tailed")
CASES = tuple(Case(kind, variant, n, k, layer) for kind, n, k, layer in _LAYERS for variant in WEIGHTS)


@dataclass(frozen=True)
class Sample:
    """One drawn layer: x (M, K), calibration (C, K), weight (N, K), fp32 on the CPU.

    `shift` (K,) is what AdaLN added to every token, `split` the column where an input's second part begins.
    """

    x: Tensor
    calibration: Tensor
    weight: Tensor
    shift: Tensor | None = None
    split: int | None = None


def make(case: Case, seed: int, tokens: int = TOKENS, outputs: int | None = None) -> Sample:
    """-> the sample of a seed; `outputs`: fewer than the layer's N rows of weight, which are all alike."""
    layer, token = (_generator(case, seed, part) for part in ("layer", "token"))
    drawn = _KINDS[case.kind](tokens + CALIBRATION_TOKENS, case.k, layer, token)
    weight = _weight(case.weights, outputs or case.n, case.k, _generator(case, seed, "weight"))
    x, calibration = drawn.x.split((tokens, CALIBRATION_TOKENS))
    return Sample(x, calibration, weight, drawn.shift, drawn.split)


def _generator(case: Case, seed: int, part: str) -> Generator:
    return Generator().manual_seed(zlib.crc32(f"{case.name}/{seed}/{part}".encode()))


def _normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _p(name: str) -> float:
    return PARAMETERS[name].value


@dataclass(frozen=True)
class _Drawn:
    x: Tensor
    shift: Tensor | None = None
    split: int | None = None


# kinds of inputs: (tokens, K, what is drawn once a layer, what is drawn a token) -> (tokens, K)


def _gaussian(tokens: int, k: int, layer: Generator, token: Generator) -> _Drawn:
    return _Drawn(_normal(tokens, k, generator=token))


def _channel_outliers(tokens: int, k: int, layer: Generator, token: Generator) -> _Drawn:
    x = _normal(tokens, k, generator=token)
    x[:, _channels("outlier_channels", k, layer)] *= _p("outlier_channel_gain")
    return _Drawn(x)


def _token_outliers(tokens: int, k: int, layer: Generator, token: Generator) -> _Drawn:
    """Row DC: every 16th token has a mean of 6 and more, of either sign."""
    x = _normal(tokens, k, generator=token)
    drawn = _normal(tokens, 1, generator=token)
    x += _is_dc(tokens) * drawn.sign() * (_p("dc_token_mean") + drawn.abs())
    return _Drawn(x)


def _adaln_shifted(tokens: int, k: int, layer: Generator, token: Generator) -> _Drawn:
    """layer_norm(h) (1 + scale) + shift, the same for every token of an image."""
    scale = _p("adaln_scale_spread") * _normal(k, generator=layer)
    shift = _tailed(k, tail=_p("adaln_shift_tail"), generator=layer)
    shift *= _p("adaln_shift_rms") / shift.square().mean().sqrt()
    x = F.layer_norm(_normal(tokens, k, generator=token), (k,)) * (1 + scale) + shift
    return _Drawn(x, shift=shift)


def _gelu_inputs(tokens: int, k: int, layer: Generator, token: Generator) -> _Drawn:
    """GELU outputs: mostly small and one-sided; every 16th token is Figure 3's, large in every channel."""
    centre = _p("gelu_mean") + _p("gelu_channel_mean_spread") * _normal(k, generator=layer)
    gain = (_p("gelu_channel_spread") * _normal(k, generator=layer)).exp() * _p("gelu_spread")
    gain = gain * (_p("gelu_token_spread") * _normal(tokens, 1, generator=token)).exp()
    noise = _normal(tokens, k, generator=token)
    share = _p("gelu_dc_least") + (1 - _p("gelu_dc_least")) * torch.rand(tokens, 1, generator=token)
    dc = share * _p("gelu_dc_mean") + _p("gelu_dc_spread") * noise
    peaks = _channels("gelu_dc_peak_channels", k, layer)
    dc[:, peaks] = share * _p("gelu_dc_peak")
    before = torch.where(_is_dc(tokens), dc, centre + gain * noise)
    return _Drawn(F.gelu(before, approximate="tanh"))


def _heavy_tails(tokens: int, k: int, layer: Generator, token: Generator) -> _Drawn:
    spread = (_p("tail_channel_spread") * _normal(k, generator=layer)).exp()
    return _Drawn(_tailed(tokens, k, tail=_p("tail"), generator=token) * spread)


def _proj_out(tokens: int, k: int, layer: Generator, token: Generator) -> _Drawn:
    """[attention | GELU], a fifth and four fifths of the columns."""
    width = k // 5
    spread = (_p("attention_channel_spread") * _normal(width, generator=layer)).exp()
    centre = _p("attention_channel_mean") * _normal(width, generator=layer)
    gain = (_p("attention_token_spread") * _normal(tokens, 1, generator=token)).exp()
    attention = (centre + _normal(tokens, width, generator=token)) * spread * gain
    attention *= _p("attention_rms") / attention.square().mean().sqrt()
    gelu = _gelu_inputs(tokens, k - width, layer, token).x
    return _Drawn(torch.cat((attention, gelu), dim=1), split=width)


_KINDS: Mapping[str, Callable[[int, int, Generator, Generator], _Drawn]] = {
    "gaussian": _gaussian, "channel_outliers": _channel_outliers, "token_outliers": _token_outliers,
    "adaln_shifted": _adaln_shifted, "gelu_inputs": _gelu_inputs, "heavy_tails": _heavy_tails, "proj_out": _proj_out,
}  # fmt: skip


def _is_dc(tokens: int) -> Tensor:
    """-> bool (tokens, 1): every 16th, so that any run of 16 has one."""
    every = int(_p("dc_token_every"))
    return (torch.arange(tokens) % every == every // 2).unsqueeze(1)


def _channels(count: str, k: int, generator: Generator) -> Tensor:
    return torch.randperm(k, generator=generator)[: int(_p(count))]


def _tailed(*shape: int, tail: float, generator: Generator) -> Tensor:
    """Gaussian times a log-normal: kurtosis 3 exp(4 tail^2)."""
    return _normal(*shape, generator=generator) * (tail * _normal(*shape, generator=generator)).exp_()


def _weight(variant: str, n: int, k: int, generator: Generator) -> Tensor:
    """-> (N, K) of variance near 1/K, rows and columns of different sizes; heavy_tailed: tails and a low-rank part."""
    if variant == "gaussian":
        weight = _normal(n, k, generator=generator)
    else:
        rank = max(4, round(_p("weight_rank_per_k") * k))
        low = _normal(n, rank, generator=generator) @ _normal(rank, k, generator=generator) / rank**0.5
        weight = _tailed(n, k, tail=_p("weight_tail"), generator=generator)
        share = _p("weight_low_rank_energy")
        weight = weight.mul_((1 - share) ** 0.5).add_(low, alpha=share**0.5)
    columns = (_p("weight_input_spread") * _normal(k, generator=generator)).exp()
    rows = (_p("weight_output_spread") * _normal(n, 1, generator=generator)).exp()
    return weight.mul_(columns).mul_(rows * k**-0.5)
