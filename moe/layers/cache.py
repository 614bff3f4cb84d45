"""What decoding remembers: for MLA one latent and one rotary key a token and layer, nothing else.

    c_kv    L x [B, S, C]   normalised latent, key and value in one
    k_rope  L x [B, S, R]   rotated key, shared by all heads

(C + R) numbers a token and layer: 576 in DeepSeek-V3 against 32,768 for full keys and values (DeepSeek-V2, table 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


class LatentCache:
    """Latents of `layers` layers for `batch` sequences of up to `capacity` tokens, each sequence with its own length."""

    def __init__(
        self,
        layers: int,
        batch: int,
        capacity: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.c_kv = [torch.zeros(batch, capacity, kv_lora_rank, dtype=dtype, device=device) for _ in range(layers)]
        self.k_rope = [torch.zeros(batch, capacity, qk_rope_head_dim, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.longest = 0  # max(lengths), kept on the host so that no step waits for the device

    @classmethod
    def for_model(cls, config, batch: int, capacity: int, dtype=torch.float32, device="cpu") -> LatentCache:
        """Sized for a ModelConfig (its main layers; MTP is not part of decoding)."""
        return cls(
            config.num_hidden_layers, batch, capacity, config.kv_lora_rank, config.qk_rope_head_dim, dtype, device
        )

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.c_kv, *self.k_rope))

    def positions(self, time: int) -> Tensor:
        """[B, T] positions of the next `time` tokens of each sequence."""
        return self.lengths.unsqueeze(1) + torch.arange(time, device=self.lengths.device)

    def write(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, T, C] and [B, T, R] at each sequence's end; -> everything up to the longest, [B, S, .].

        Lengths move only with `advance`, so rows of padding are overwritten by the next tokens.
        """
        time = c_kv.shape[1]
        end = self.longest + time
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}; make it with a larger capacity")
        batch = torch.arange(c_kv.shape[0], device=c_kv.device).unsqueeze(1)
        at = self.positions(time)
        self.c_kv[layer][batch, at] = c_kv.detach().to(self.c_kv[layer].dtype)
        self.k_rope[layer][batch, at] = k_rope.detach().to(self.k_rope[layer].dtype)
        return self.c_kv[layer][:, :end], self.k_rope[layer][:, :end]

    def advance(self, tokens: int | Tensor) -> None:
        """Count new tokens: one number, or one for each sequence ([B]; ragged prompts)."""
        self.lengths = self.lengths + tokens
        self.longest = self.longest + tokens if isinstance(tokens, int) else int(self.lengths.max())

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past `lengths` [B] (rejected drafts)."""
        self.lengths = torch.minimum(self.lengths, lengths)
        self.longest = int(self.lengths.max())

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences (row numbers), in this order."""
        self.c_kv = [c[rows] for c in self.c_kv]
        self.k_rope = [k[rows] for k in self.k_rope]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0
