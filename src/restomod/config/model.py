"""`ModelConfig`: the architecture of a model; checks of ranges and divisors for all configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from restomod.utils.errors import UserError, shortened

LARGEST = 2**40  # larger values are typing errors, and the search for divisors would not end
LARGEST_OF_MODEL = {  # far above every published model
    "n_layer": 4096,
    "n_head": 65_536,
    "n_embd": 2**20,
    "n_positions": 2**28,
    "vocab_size": 2**26,
    "n_inner": 2**24,
    "head_dim": 2**20,
}
VOCAB_SIZE = 50257  # GPT-2: 50,000 merges + 256 bytes + <|endoftext|>

Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope"]
Activation = Literal["gelu", "relu2", "swiglu"]


def require(condition: bool, message: str) -> None:
    """Raise UserError with ``message`` if ``condition`` is false."""
    if not condition:
        raise UserError(message)


def require_size(name: str, value: int | None, least: int = 1, most: int = LARGEST) -> None:
    """Raise UserError unless ``value`` is None or in [``least``, ``most``]; the message begins with ``name``."""
    if value is not None and not least <= value <= most:
        at = f"at least {least}" if value < least else f"at most {most:,}"
        raise UserError(f"{name} is {shortened(str(value))}; it must be {at}")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model. The defaults are those of GPT-2 124M."""

    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Attention heads per block. They must divide model.n_embd unless model.head_dim is set."""
    n_embd: int = 768
    """Embedding width D: channels of the residual stream."""
    n_positions: int = 1024
    """Maximum context length, in tokens."""
    vocab_size: int = VOCAB_SIZE
    """Vocabulary size; 50257 for GPT-2's tokenizer."""
    norm: Norm = "layernorm"
    """Normalisation before attention, before the MLP and before lm_head."""
    positions: Positions = "learned"
    """Position encoding. learned: learned position embedding; rope: rotary embedding of queries and keys (RoPE)."""
    rope_theta: float = 10000.0
    """Base of the RoPE frequencies; used with model.positions rope."""
    mlp: Activation = "gelu"
    """Activation of the MLP. gelu: GELU in the tanh approximation of GPT-2; relu2: relu(x)²; swiglu: SiLU gate with a
    third weight matrix."""
    n_inner: int | None = None
    """Hidden size of the MLP. None: 4 n_embd, or for swiglu 8/3 n_embd rounded up to a multiple of 64, which has about
    as many parameters."""
    head_dim: int | None = None
    """Channels per attention head. None: n_embd / n_head."""
    qk_norm: bool = False
    """Apply RMS norm to the queries and keys of every head (QK-norm)."""
    bias: bool = True
    """Use biases in linear layers and layer norms."""
    tied: bool = True
    """Tie lm_head to the token embedding (weight tying); otherwise lm_head is a separate matrix."""
    zero_init_projections: bool = False
    """Initialise the output projections of attention and MLP to zero, so that every block is initially the identity."""
    softcap: float | None = None
    """Soft cap of the logits z: softcap * tanh(z / softcap). None: no cap."""
    embedding_norm: bool = False
    """Apply RMS norm to the token embedding before the first block."""
    embedding_skip: bool = False
    """Add a learned per-channel residual from the embedding to the input of every block."""
    value_embedding: bool = False
    """Add a second token embedding to the attention values of every block, with a learned scale."""

    def __post_init__(self) -> None:
        for name, most in LARGEST_OF_MODEL.items():
            require_size(f"model.{name}", getattr(self, name), most=most)
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(
                f"model.n_embd {self.n_embd} is not a multiple of model.n_head {self.n_head}; "
                f"try model.n_head {nearest_divisor(self.n_embd, self.n_head)}"
            )
        require(
            self.positions != "rope" or self.head_size % 2 == 0,
            f"model.positions rope needs an even number of channels per head, not {self.head_size}",
        )
        require(
            self.softcap is None or 0 < self.softcap < math.inf, f"model.softcap is {self.softcap}; it must be above 0"
        )
        require(0 < self.rope_theta < math.inf, f"model.rope_theta is {self.rope_theta}; it must be above 0")

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate and a value per hidden unit, that is 2 I inputs of the activation."""
        return self.mlp.endswith("glu")

    @property
    def inner_size(self) -> int:
        """Hidden size I of the MLP."""
        if self.n_inner is not None:
            return self.n_inner
        return 64 * math.ceil(8 * self.n_embd / 3 / 64) if self.gated else 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix in memory: vocab_size rounded up to a multiple of 64, such as 50304."""
        return 64 * math.ceil(self.vocab_size / 64)


def _divisors(n: int) -> set[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return {*small, *(n // d for d in small)}


def nearest_divisor(n: int, to: int) -> int:
    """Return the divisor of ``n`` nearest to ``to``; the smaller one if two are equally near."""
    return min(_divisors(n), key=lambda d: (abs(d - to), d))


def divisors_near(n: int, to: int) -> str:
    """Return the nearest divisors of ``n`` below and above ``to``, as text for an error message."""
    below, above = [d for d in _divisors(n) if d < to], [d for d in _divisors(n) if d > to]
    return " or ".join(str(d) for d in (*sorted(below)[-1:], *sorted(above)[:1]))


def nearest_multiples(n: int, multiple: int) -> str:
    """Return the nearest multiples of ``multiple`` below and above ``n``, as text for an error message."""
    below = n // multiple * multiple
    return f"{below} and {below + multiple}" if below else f"{multiple}"


def nearest_divisor_below(n: int, limit: int) -> int:
    """Return the largest divisor of ``n`` that is at most max(1, ``limit``)."""
    return max(d for d in _divisors(n) if d <= max(1, limit))
