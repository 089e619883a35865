"""Rotary positions: the table of rotations, its stretching by YaRN, and applying it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatch.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Rotary positions stretched beyond the length of pre-training: YaRN, arXiv 2309.00071."""

    factor: float = 1.0
    """Longest sequence over that of pre-training; 1 turns it off."""
    original_max_seq_len: int = 4096
    """Longest sequence of pre-training in tokens."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this in the original length keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this in the original length are slowed by the whole factor."""
    truncate: bool = True
    """Round the bounds between fast and slow dimensions to whole dimensions."""
    magnitude: float = 1.0
    """Factor on rotated queries and keys (attention_factor of Hugging Face)."""
    score_factor: float = 1.0
    """One more factor on the attention scores (mscale squared in DeepSeek-V3)."""

    def __post_init__(self) -> None:
        if not self.factor >= 1 or self.original_max_seq_len < 1:
            raise InvalidValue(
                f"yarn.factor ({self.factor}) and yarn.original_max_seq_len ({self.original_max_seq_len}) must be at "
                "least 1; a factor of 1 turns it off"
            )
        for name in ("beta_fast", "beta_slow", "magnitude", "score_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidValue(f"yarn.{name} ({getattr(self, name)}) must be above 0 and finite")


def rotary_table(
    positions: int | Tensor,
    head_dim: int,
    theta: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    yarn: YarnConfig | None = None,
) -> Tensor:
    """Complex numbers exp(i * position * theta^(-2j / head_dim)): (B, S, head_dim / 2), or without B.

    complex128 for float64, otherwise complex64. The table is made in every forward, since `to_empty` would erase a
    buffer, and a cast of the model would cast it. The angles are float64, since fp32 is off by 0.004 rad at position
    100,000. Source: arXiv 2104.09864.

    Args:
        positions: int64 (B, S), or the number of positions S, which then count from 0: the table is (S, head_dim / 2).
        dtype: of the tensor that is to be rotated.
        yarn: lowers some of the frequencies, and multiplies all numbers by its magnitude.
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents
    if yarn is not None and yarn.factor > 1:
        frequencies = _yarn_frequencies(frequencies, head_dim, theta, yarn)
    if isinstance(positions, int):
        positions = torch.arange(positions, device=device)
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
    magnitudes = torch.full_like(angles, 1.0 if yarn is None else yarn.magnitude)
    table = torch.polar(magnitudes, angles)
    return table if dtype == torch.float64 else table.to(torch.complex64)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair (x[2j], x[2j + 1]) of every head by its position; x is (B, S, heads, head_dim).

    The result has the dtype of x. Dimensions of a head beyond those that the table has angles for stay as they are.
    Neighbours form a pair, as in DeepSeek-V3. Complex multiplication is one pass: 0.4 ms forward and backward, where
    two halves with cos and sin, as in Llama, take 2.1 ms (8 x 256 x 8 heads x 32, one CPU thread).
    """
    num_rotated = 2 * table.shape[-1]
    if num_rotated < x.shape[-1]:
        return torch.cat([rotate(x[..., :num_rotated], table), x[..., num_rotated:]], dim=-1)
    pairs = torch.view_as_complex(x.to(table.real.dtype).view(*x.shape[:-1], x.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * table.unsqueeze(-2)).flatten(-2).to(x.dtype)


def _yarn_frequencies(frequencies: Tensor, head_dim: int, theta: float, yarn: YarnConfig) -> Tensor:
    """YaRN: keep the frequencies of dimensions that rotate often, divide those that rotate seldom by the factor."""

    def dimension(turns: float) -> float:
        """The (fractional) dimension that turns so often over the original length."""
        wavelength = yarn.original_max_seq_len / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = torch.arange(head_dim // 2, device=frequencies.device, dtype=torch.float64)
    # 0.001 against 0/0 where both bounds meet, as in the paper's code: a trained model expects the same.
    divided_share = ((ramp - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequencies * (1 - divided_share) + frequencies / yarn.factor * divided_share
