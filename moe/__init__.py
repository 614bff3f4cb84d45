"""DeepSeek-V3, whole and honest, at a scale one person can train.

Legend for the whole repository: B batch, T time, N = B*T tokens, D model width, H heads, E experts, K choices a token,
F expert width, C latent width, R rotary width, M = N*K, V vocabulary.
"""

from moe import objectives, ops
from moe.config import ModelConfig
from moe.config import load as load_config
from moe.inference.decoding import generate
from moe.interop.hf import from_hf, to_hf
from moe.layers.attention import MLA
from moe.layers.balance import update_balance
from moe.layers.block import Block
from moe.layers.cache import LatentCache
from moe.layers.experts import Experts
from moe.layers.moe import MoE
from moe.layers.mtp import MTP
from moe.layers.router import Router
from moe.layers.routing import Routing
from moe.model import Transformer

__all__ = [
    "MLA", "MTP", "Block", "Experts", "LatentCache", "MoE", "ModelConfig", "Router", "Routing", "Transformer",
    "from_hf", "generate", "load_config", "objectives", "ops", "to_hf", "update_balance",
]  # fmt: skip
