"""Rotary position tables from a config, in its old layout and in its new one.

Source: rotary embedding, Su et al. 2021 (arXiv 2104.09864); linear scaling, Chen et al. 2023
(arXiv 2306.15595); YaRN, Peng et al. 2023 (arXiv 2309.00071), sections 3.2-3.4; llama3 scaling:
Llama 3.1's published frequencies.
"""

import math

import msgspec
import torch

from llmservices.models.folder import Config


class Rope(msgspec.Struct, frozen=True):
    """Angles per position and pair of dimensions, and what cosine and sine are multiplied by."""

    inverse_frequencies: list[float]
    scale: float = 1.0

    @classmethod
    def plain(cls, base: float, dims: int) -> "Rope":
        """Without any scaling."""
        return cls(_plain(base, dims))

    def tables(
        self, positions: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, signed sines) of shape (positions, dims): x * cos + roll(x, dims / 2) * sin
        rotates."""
        frequencies = torch.tensor(self.inverse_frequencies, dtype=torch.float32)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
        cos = angles.cos() * self.scale
        sin = angles.sin() * self.scale
        both = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return both[0].to(device, dtype), both[1].to(device, dtype)


def read_rope(
    config: Config, dims: int, *, layers: str | None = None, base_default: float = 10_000.0
) -> Rope:
    """The rope of a config; `layers` picks one of those that the new layout keeps by layer type."""
    if "rope_parameters" in config:
        settings = config.nested("rope_parameters")
        if layers is not None and layers in settings:
            settings = settings.nested(layers)
        base = settings.number("rope_theta", config.number("rope_theta", base_default))
    else:
        base = config.number("rope_theta", base_default)
        if "rope_scaling" not in config:
            return Rope.plain(base, dims)
        settings = config.nested("rope_scaling")
    return scaled(config, settings, base, dims)


def scaled(config: Config, settings: Config, base: float, dims: int) -> Rope:
    """Apply the named scaling; INVALID, with the name, for one that is not implemented."""
    kind = settings.text("rope_type", settings.text("type", "default"))
    match kind:
        case "default":
            return Rope.plain(base, dims)
        case "linear":
            factor = settings.number("factor")
            return Rope([f / factor for f in _plain(base, dims)])
        case "llama3":
            return Rope(_llama3(settings, _plain(base, dims)))
        case "yarn":
            return _yarn(config, settings, base, dims)
        case _:
            raise settings.error(f"rope scaling {kind!r} is not implemented")


def _plain(base: float, dims: int) -> list[float]:
    # In float32 and through the same operations as every other implementation, so that the
    # angles agree.
    powers = torch.arange(0, dims, 2, dtype=torch.int64).to(torch.float32) / dims
    return [float(f) for f in 1.0 / (base**powers)]


def _llama3(settings: Config, frequencies: list[float]) -> list[float]:
    factor = settings.number("factor")
    low = settings.number("low_freq_factor")
    high = settings.number("high_freq_factor")
    trained = settings.integer("original_max_position_embeddings")
    plain = torch.tensor(frequencies, dtype=torch.float32)
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > trained / low, plain / factor, plain)
    smooth = (trained / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    medium = ~(wavelength < trained / high) & ~(wavelength > trained / low)
    return [float(f) for f in torch.where(medium, between, slowed)]


def _yarn(config: Config, settings: Config, base: float, dims: int) -> Rope:
    factor = settings.number("factor")
    trained = settings.integer(
        "original_max_position_embeddings", config.integer("max_position_embeddings")
    )
    fast = settings.number("beta_fast", 32.0)
    slow = settings.number("beta_slow", 1.0)
    settings.refuse("mscale", 1.0)
    settings.refuse("mscale_all_dim", 1.0)

    def dim_of(rotations: float) -> float:
        return dims * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(fast), dim_of(slow)
    if settings.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = (torch.arange(dims // 2, dtype=torch.float32) - low) / (max(high - low, 0.001))
    keep = 1 - ramp.clamp(0, 1)
    plain = torch.tensor(_plain(base, dims), dtype=torch.float32)
    mixed = plain / factor * (1 - keep) + plain * keep
    default_scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return Rope([float(f) for f in mixed], settings.number("attention_factor", default_scale))
