"""What decoding remembers: for MLA one latent and one rotary key a token and layer, nothing else.

    latents  L x [B, S, C + R]   c_kv, the normalised latent (key and value in one), then k_rope, the rotated key all share

One tensor a layer, allocated once and written in place: attention reads it where it lies. (C + R) numbers a token and
layer: 576 in DeepSeek-V3 against 32,768 for full keys and values (DeepSeek-V2, table 1). Beside them lies what the layers
make once instead of at every step: absorbed weights, which live as long as the cache and so are never older than its
latents, and what all layers of a step share.
"""

from __future__ import annotations

from typing import Any

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
        self.widths = [kv_lora_rank, qk_rope_head_dim]
        self.latents = [
            torch.zeros(batch, capacity, sum(self.widths), dtype=dtype, device=device) for _ in range(layers)
        ]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.longest = self.shortest = 0  # of lengths, kept on the host so that no step waits for the device
        self.absorbed: dict[int, Any] = {}  # by layer: weights as its attention multiplies by them
        self._later: dict[int, Tensor] = {}  # see `later`; made once a step, read by every layer
        self.turn: tuple[Tensor, Tensor] | None = None  # a step's cosines, and the rotation attention made from them

    @classmethod
    def for_model(cls, config, batch: int, capacity: int, dtype=torch.float32, device="cpu") -> LatentCache:
        """Sized for a ModelConfig (its main layers; MTP is not part of decoding)."""
        return cls(
            config.num_hidden_layers, batch, capacity, config.kv_lora_rank, config.qk_rope_head_dim, dtype, device
        )

    @property
    def c_kv(self) -> list[Tensor]:
        """[B, S, C] of each layer, views."""
        return [latents[..., : self.widths[0]] for latents in self.latents]

    @property
    def k_rope(self) -> list[Tensor]:
        """[B, S, R] of each layer, views."""
        return [latents[..., self.widths[0] :] for latents in self.latents]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.latents)

    def positions(self, time: int) -> Tensor:
        """[B, T] positions of the next `time` tokens of each sequence."""
        return self.lengths.unsqueeze(1) + torch.arange(time, device=self.lengths.device)

    def write(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, T, C] and [B, T, R] at each sequence's end; -> everything up to the longest, [B, S, .].

        Lengths move only with `advance`, so rows of padding are overwritten by the next tokens.
        """
        time = c_kv.shape[1]
        self.append(layer, torch.cat((c_kv, k_rope), -1))
        c_kv, k_rope = self.seen(layer, time).split_with_sizes(self.widths, -1)
        return c_kv, k_rope

    def append(self, layer: int, new: Tensor) -> None:
        """Store [B, T, C + R], latent and rotary key side by side, at each sequence's end."""
        time = new.shape[1]
        end = self.longest + time
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}; make it with a larger capacity")
        latents, new = self.latents[layer], new.detach()
        if self.shortest == self.longest:
            latents.narrow(1, self.longest, time).copy_(new)
        else:
            batch = torch.arange(new.shape[0], device=new.device).unsqueeze(1)
            latents[batch, self.positions(time)] = new.to(latents.dtype)

    def seen(self, layer: int, time: int) -> Tensor:
        """[B, S, C + R] of a layer up to the last of the `time` tokens just written; a view."""
        return self.latents[layer][:, : self.longest + time]

    def later(self, time: int) -> Tensor | None:
        """[B, T, S] to add to the scores of the next `time` tokens: -inf where a key comes later; None: none does."""
        if time == 1 and self.shortest == self.longest:
            return None
        if time not in self._later:
            place = torch.arange(self.longest + time, device=self.lengths.device)
            later = place > self.positions(time).unsqueeze(-1)
            zeros = torch.zeros(later.shape, dtype=self.latents[0].dtype, device=later.device)
            self._later[time] = zeros.masked_fill_(later, float("-inf"))
        return self._later[time]

    def advance(self, tokens: int | Tensor) -> None:
        """Count new tokens: one number, or one for each sequence ([B]; ragged prompts)."""
        if isinstance(tokens, int):
            self.lengths = self.lengths + tokens
            self.longest, self.shortest, self._later = self.longest + tokens, self.shortest + tokens, {}
        else:
            self._count(self.lengths + tokens)

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past `lengths` [B] (rejected drafts)."""
        self._count(torch.minimum(self.lengths, lengths))

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences (row numbers), in this order."""
        self.latents = [latents[rows] for latents in self.latents]
        self._count(self.lengths[rows])

    def _count(self, lengths: Tensor) -> None:
        bounds = (int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0)
        self.lengths, (self.shortest, self.longest), self._later = lengths, bounds, {}
