"""Orthogonal matrices that the regular Hadamard is compared with: for experiments, outside the op set.

All return (n, n) normalized matrices R with R R^T = I, meant as x @ R and weight @ R. Only `regular` is an op.
"""

import torch
from torch import Tensor

from convrot_kernels.reference import hadamard


def identity(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> (n, n): no rotation."""
    return torch.eye(n, dtype=dtype)


def regular(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> (n, n), n a power of 4: the matrix of `rotate`; rows sum to 1, so a constant stays as it is."""
    return hadamard(n, dtype)


def sylvester(n: int, *, signs: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> (n, n), n a power of 2: Kronecker power of [[1, 1], [1, -1]]; a constant becomes one spike.

    `signs`: a seed for random signs of the input channels (QuaRot's randomized Hadamard), None for none.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"sylvester: n must be a power of 2, got {n}; use 256, or global_hadamard for n = 2^a * m")
    matrix = _sylvester(n, dtype) * n**-0.5
    if signs is None:
        return matrix
    drawn = torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(signs))
    return matrix * (2 * drawn - 1)


def random_orthogonal(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> (n, n), uniform over the orthogonal group: Q of a Gaussian matrix, signs fixed by the diagonal of R."""
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).to(dtype)


def global_hadamard(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> (n, n), one Hadamard matrix over a whole row of n = m * 2^a channels: Paley of order m (x) Sylvester."""
    m, power = global_order(n)
    return torch.kron(_paley(m, dtype), _sylvester(power, dtype)) * n**-0.5


def global_order(n: int) -> tuple[int, int]:
    """n -> (m, 2^a), m * 2^a = n, m the smallest order that a Paley construction (or 1) gives: 3072 -> (12, 256)."""
    m = n
    while m > 1 and m % 2 == 0:
        m //= 2
    while n > 0 and n % m == 0:
        if m == 1 or _paley_prime(m):
            return m, n // m
        m *= 2
    remedy = "use a power of 2 times 1, 12, 20, 28, 36, 44 or 60"
    raise ValueError(f"global_hadamard: n must be 2^a * m with m - 1 or m / 2 - 1 a fitting prime, got {n}; {remedy}")


def apply_blockwise(x: Tensor, matrix: Tensor) -> Tensor:
    """(..., K), (n, n) -> (..., K) in matrix.dtype: every block of n columns times the matrix."""
    n, k = matrix.shape[0], x.shape[-1]
    if k % n:
        raise ValueError(f"apply_blockwise: K must be a multiple of the matrix size, got K={k}, n={n}; use another n")
    return (x.to(matrix.dtype).unflatten(-1, (k // n, n)) @ matrix).flatten(-2)


def _sylvester(n: int, dtype: torch.dtype) -> Tensor:
    """-> (n, n) of 1 and -1."""
    matrix, h2 = torch.ones(1, 1, dtype=dtype), torch.tensor([[1, 1], [1, -1]], dtype=dtype)
    while matrix.shape[0] < n:
        matrix = torch.kron(matrix, h2)
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _paley_prime(m: int) -> int:
    """The prime q that gives order m: m = q + 1 with q = 3 mod 4, or m = 2 (q + 1) with q = 1 mod 4; else 0."""
    if _is_prime(m - 1) and (m - 1) % 4 == 3:
        return m - 1
    half = m // 2 - 1
    return half if m % 2 == 0 and _is_prime(half) and half % 4 == 1 else 0


def _paley(m: int, dtype: torch.dtype) -> Tensor:
    """-> (m, m) of 1 and -1: from the quadratic residues mod q, framed by ones."""
    if m == 1:
        return torch.ones(1, 1, dtype=dtype)
    q = _paley_prime(m)
    index = torch.arange(q)
    character = torch.full((q,), -1, dtype=dtype)
    character[index**2 % q] = 1
    character[0] = 0
    core = torch.zeros(q + 1, q + 1, dtype=dtype)
    core[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    core[0, 1:] = 1
    core[1:, 0] = -1 if q % 4 == 3 else 1
    if q % 4 == 3:
        return core + torch.eye(m, dtype=dtype)
    doubled = torch.kron(core, torch.tensor([[1, 1], [1, -1]], dtype=dtype))
    diagonal = torch.kron(torch.eye(q + 1, dtype=dtype), torch.tensor([[1, -1], [-1, -1]], dtype=dtype))
    return doubled + diagonal
