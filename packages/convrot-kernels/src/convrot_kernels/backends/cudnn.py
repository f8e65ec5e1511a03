"""The product of attention_fp8: cuDNN's, through NVIDIA's own frontend. No backend of its own; others call it.

Graphs of cuDNN are built once a shape (0.1 s) and executed on the current stream. On Hopper the result is e4m3 too
(16-bit results need Blackwell), so it is made in units of v, whose scale the caller multiplies.
H200, 24 heads of 128, 4608 tokens: 300 us, cuDNN in bf16 400 to 440; the call takes 25 us of the host. Probabilities
below 2^-19 of their row's largest are lost, which counts where thousands of keys share what one leaves.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from convrot_kernels.reference import FP8_MAX

LEAST_CAPABILITY = (9, 0)
LEAST_CUDNN, _BROKEN_CUDNN = 90100, 91000  # what the frontend says of e4m3 attention; run with 9.19
# the frontend's names for tensors are numbers
_Q, _K, _V, _OUT, _ONE, _P_SCALE, _P_DESCALE, _MOST_P, _MOST_OUT, _Q_DESCALE, _K_DESCALE, _V_DESCALE = range(12)

_lock = threading.Lock()  # a handle has one stream at a time


def why_not(device: torch.device) -> str | None:
    """None where e4m3 attention runs on `device`, else the reason it cannot."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, got {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU: no driver, or a build of torch without CUDA"
    return _reason(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _reason(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None or capability < LEAST_CAPABILITY:
        name, found = torch.cuda.get_device_name(index), ".".join(map(str, capability))
        return f"cuDNN's e4m3 attention needs an NVIDIA GPU of compute capability 9.0 or newer, {name} has {found}"
    if find_spec("cudnn") is None:
        return "cuDNN's frontend is not installed, run `pip install 'nvidia-cudnn-frontend~=1.18.0'`"
    try:
        import cudnn

        version = cudnn.backend_version()
    except Exception as error:  # it asserts, and opens libraries, while it is imported
        return f"cuDNN's frontend cannot be loaded: {error}; run `pip install 'nvidia-cudnn-frontend~=1.18.0'`"
    if version < LEAST_CUDNN or version == _BROKEN_CUDNN:
        return f"needs cuDNN 9.1 or newer and not 9.10.0, found {version}; install a newer torch"
    return None


@lru_cache(maxsize=16)
def _handle(index: int) -> Any:
    import cudnn

    return cudnn.create_handle()


@lru_cache(maxsize=16)
def _numbers(index: int) -> dict[int, Tensor]:
    """What the scales point to, and what is written and never read.

    By a thread of its own: what is kept must lie in no memory pool that the caller's thread has in force (compiled code
    with CUDA graphs does), and be written before another stream reads it.
    """
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(_made, index).result()


def _made(index: int) -> dict[int, Tensor]:
    values = {_ONE: 1.0, _P_SCALE: FP8_MAX, _P_DESCALE: 1 / FP8_MAX, _MOST_P: 0.0, _MOST_OUT: 0.0}
    with torch.cuda.device(index):
        numbers = {
            name: torch.full((1, 1, 1, 1), value, dtype=torch.float32, device="cuda") for name, value in values.items()
        }
        torch.cuda.current_stream().synchronize()
    return numbers


class _Attention:
    """cuDNN's graph of one shape on one GPU, and all addresses that are the same at every call."""

    def __init__(self, index: int, batch: int, tokens: int, keys: int, heads: int, d: int) -> None:
        import cudnn

        if torch.cuda.is_current_stream_capturing():  # what is kept here would belong to that graph
            raise RuntimeError(
                f"attention_fp8: the first call with {tokens} tokens came while a CUDA graph is captured; "
                "run what is captured once before"
            )
        self._cudnn, self._handle = cudnn, _handle(index)
        try:
            self._graph = _built(cudnn, self._handle, batch, tokens, keys, heads, d)
        except Exception as error:
            raise RuntimeError(
                f"attention_fp8: cuDNN {cudnn.backend_version()} has no kernel for {heads} heads of {d} columns, "
                f"{tokens} x {keys} tokens, on {torch.cuda.get_device_name(index)}: {error}; keep attention in 16 bits"
            ) from error
        self._workspace = max(self._graph.get_workspace_size(), 1)
        self._addresses = {name: number.data_ptr() for name, number in _numbers(index).items()}
        self._addresses |= dict.fromkeys((_Q_DESCALE, _K_DESCALE, _V_DESCALE), self._addresses[_ONE])

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=q.device)
        addresses = self._addresses | {_Q: q.data_ptr(), _K: k.data_ptr(), _V: v.data_ptr(), _OUT: out.data_ptr()}
        with _lock:
            self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
            self._graph.execute(addresses, workspace.data_ptr(), handle=self._handle)
        return out


_graph = lru_cache(maxsize=64)(_Attention)


def _built(cudnn: Any, handle: Any, batch: int, tokens: int, keys: int, heads: int, d: int) -> Any:
    e4m3, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=e4m3, intermediate_data_type=fp32, compute_data_type=fp32, handle=handle)

    def operand(name: int, rows: int) -> Any:
        dim, stride = (batch, heads, rows, d), (rows * heads * d, d, heads * d, 1)
        return graph.tensor(uid=name, dim=dim, stride=stride, data_type=e4m3)

    def number(name: int) -> Any:
        return graph.tensor(uid=name, dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=fp32)

    out, _, *most = graph.sdpa_fp8(
        q=operand(_Q, tokens),
        k=operand(_K, keys),
        v=operand(_V, keys),
        descale_q=number(_Q_DESCALE),
        descale_k=number(_K_DESCALE),
        descale_v=number(_V_DESCALE),
        descale_s=number(_P_DESCALE),
        scale_s=number(_P_SCALE),
        scale_o=number(_ONE),
        generate_stats=False,
        attn_scale=d**-0.5,
        use_causal_mask=False,
    )
    shape, stride = (batch, heads, tokens, d), (tokens * heads * d, d, heads * d, 1)
    out.set_uid(_OUT).set_output(True).set_dim(shape).set_stride(stride).set_data_type(e4m3)
    for name, found in zip((_MOST_P, _MOST_OUT), most, strict=True):
        found.set_uid(name).set_output(True).set_dim((1,) * 4).set_stride((1,) * 4).set_data_type(fp32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """e4m3 (B, S, H, D), (B, T, H, D), contiguous, on the current device -> e4m3 (B, S, H, D), before v's scale."""
    if q.shape[1] == 1:  # which cuDNN leaves to kernels of other GPUs
        return attend(q.expand(-1, 2, -1, -1).contiguous(), k, v)[:, :1].contiguous()
    graph = _graph(q.device.index, q.shape[0], q.shape[1], k.shape[1], *q.shape[2:])
    return graph.run(q, k, v)
