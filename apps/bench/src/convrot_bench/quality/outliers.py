"""How large outliers are, defined: amplitude, crest factor of a token, DC ratio of a token, DC of a block.

The papers' "outlier amplitude" is the maximum of |x|. It depends on how large a layer's inputs are at all; what costs
bits is the crest factor, and what separates regular from Sylvester matrices is the DC.
"""

import torch
from torch import Tensor


def amplitude(x: Tensor) -> float:
    """(..., K) -> max |x|."""
    return float(x.abs().max())


def crest_factor(x: Tensor) -> Tensor:
    """(..., K) -> (...): max |x| / rms of each token; one step of 4 bits is a seventh of it, in units of the rms."""
    return x.abs().amax(-1) / _rms(x)


def dc_ratio(x: Tensor) -> Tensor:
    """(..., K) -> (...): |mean| / rms of each token, 0 to 1."""
    return x.mean(-1).abs() / _rms(x)


def block_dc(x: Tensor, size: int = 256) -> Tensor:
    """(..., K) -> (..., K/size): |mean| of each block of channels; a Sylvester matrix makes it a spike sqrt(size) x."""
    return x.unflatten(-1, (-1, size)).mean(-1).abs()


def describe(x: Tensor, size: int = 256) -> dict[str, float]:
    """(..., K) -> the amplitude, and median, 99th percentile and maximum over tokens of the other three."""
    found = {"amplitude": amplitude(x)}
    parts = {"crest_factor": crest_factor(x), "dc_ratio": dc_ratio(x), "block_dc": block_dc(x, size).amax(-1)}
    for name, values in parts.items():
        ordered = values.flatten().float().sort().values
        for rank, share in (("median", 0.5), ("p99", 0.99), ("max", 1.0)):
            found[f"{name}_{rank}"] = float(ordered[int(share * (len(ordered) - 1))])
    return found


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-30) * x.shape[-1] ** -0.5
