"""Rotary positions (Su et al. 2021, arXiv:2104.09864), and the forms in which they are stretched to longer texts.

The frequencies are made in NumPy, with each value rounded to float32 where torch rounds it: an error of one unit in the
last place of a frequency is 4e-3 in the cosine at position 130,000.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Linear:
    """Positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: low frequencies are divided by the factor, high ones stay, and those between are interpolated."""

    factor: float
    low: float
    high: float
    original: float  # positions of the model before it was stretched


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2, and its factor on cosine and sine, section 3.4."""

    factor: float
    original: float
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer."""

    theta: float
    size: int  # entries of a head that are rotated, the first ones; the others pass
    scaling: Linear | Llama3 | Yarn | None = None


class Rotation(NamedTuple):
    """Cosine and sine of the angles of every token, one for each pair of entries."""

    cosine: Float[Array, "batch length pairs"]
    sine: Float[Array, "batch length pairs"]


def frequencies(rope: Rope) -> Float[np.ndarray, "pairs"]:
    """Radians per position of every pair of entries."""
    exponents = np.arange(0, rope.size, 2).astype(np.float32) / np.float32(rope.size)
    powers = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    match rope.scaling:
        case Linear(factor):
            return 1 / powers / np.float32(factor)
        case Llama3():
            return _llama3(1 / powers, rope.scaling)
        case Yarn():
            return _yarn(powers, rope.scaling, rope)
    return 1 / powers


def _llama3(plain: np.ndarray, scaling: Llama3) -> np.ndarray:
    wavelengths = np.float32(2 * math.pi) / plain
    longest, shortest = scaling.original / scaling.low, scaling.original / scaling.high
    divided = np.where(wavelengths > longest, plain / np.float32(scaling.factor), plain)
    share = (scaling.original / wavelengths - scaling.low) / (scaling.high - scaling.low)
    between = (1 - share) * divided / np.float32(scaling.factor) + share * divided
    is_between = (wavelengths >= shortest) & (wavelengths <= longest)
    return np.where(is_between, between, divided).astype(np.float32)


def _yarn(powers: np.ndarray, scaling: Yarn, rope: Rope) -> np.ndarray:
    def pair_of(rotations: float) -> float:
        """The pair of entries that turns so often within the original positions."""
        return rope.size * math.log(scaling.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(rope.size // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    kept = 1 - ramp  # the share of the frequency that is not divided
    return (1 / (np.float32(scaling.factor) * powers) * (1 - kept) + 1 / powers * kept).astype(np.float32)


def rotation(rope: Rope, places: Int[Array, "batch length"]) -> Rotation:
    """The angles of tokens at these places of their documents."""
    per_place = jnp.asarray(frequencies(rope))[None, None, :]
    angles = places[:, :, None].astype(jnp.float32) * per_place
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1.0
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: Float[Array, "batch length heads size"], by: Rotation) -> Float[Array, "batch length heads size"]:
    """Turns entry i of a head together with entry i + pairs, as in GPT-NeoX and all classes of transformers."""
    pairs = by.cosine.shape[-1]
    cosine, sine = by.cosine[:, :, None, :], by.sine[:, :, None, :]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :pairs], wide[..., pairs : 2 * pairs], wide[..., 2 * pairs :]
    turned = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
