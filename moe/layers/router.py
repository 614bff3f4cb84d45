"""Choose K of E experts for each token, without an auxiliary loss steering the gradient.

    logits = u W_g^T                       [N, E] fp32, whatever the dtype of the tokens
    s = sigmoid(logits)                    affinity (softmax over experts for V2)
    chosen = top-k of s + b                [N, K] inside the best topk_group of n_group groups; b steers choice only
    gates = s at chosen, normalised, times routed_scaling_factor: the bias never reaches a gate

A group's strength is the sum of its two best biased scores (V3) or its best score (softmax, V2); experts of other
groups score -inf, not 0, or a negative bias would let them in.

Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2, equations 12-16; sequence-wise loss: equations 17-20; batch-wise
loss: section 4.5.3. The latter knows one forward pass: with micro-batches or ranks it balances each, and averages.
Not here: how the bias moves (balance.py), where tokens travel (ops.experts), the same on a GPU in one pass (ops.route).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import ops
from moe.config import ModelConfig, UserError, check_routing
from moe.layers.basics import without_autocast
from moe.layers.routing import Routing

FEW = 16  # tokens of a decoding step, for which one call of topk is faster than four passes (measured); same bits
SAMPLE = 1024  # tokens of a batch that the health statistics look at: enough for two digits, and cheap


class Router(nn.Module):
    """[..., D] -> Routing. `seq_aux_alpha`, `batch_aux_alpha`: weights of the losses made in training only."""

    def __init__(
        self,
        hidden_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        n_group: int = 1,
        topk_group: int = 1,
        scoring_func: str = "sigmoid",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        seq_aux_alpha: float = 0.0,
        batch_aux_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        check_routing(n_routed_experts, num_experts_per_tok, n_group, topk_group, norm_topk_prob)
        if scoring_func not in ("sigmoid", "softmax"):
            raise UserError(f"scoring_func={scoring_func!r} is not one of ['sigmoid', 'softmax']")
        self.n_experts, self.k = n_routed_experts, num_experts_per_tok
        self.n_group, self.topk_group = n_group, topk_group
        self.scoring_func, self.norm, self.scaling = scoring_func, norm_topk_prob, routed_scaling_factor
        self.seq_aux_alpha, self.batch_aux_alpha = seq_aux_alpha, batch_aux_alpha
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        self.register_buffer("bias", torch.zeros(n_routed_experts, dtype=torch.float32))

    @classmethod
    def from_config(cls, c: ModelConfig) -> Router:
        return cls(
            c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group, c.scoring_func,
            c.norm_topk_prob, c.routed_scaling_factor, c.seq_aux_alpha, c.aux_alpha if c.balance == "aux" else 0.0,
        )  # fmt: skip

    def _apply(self, fn, recurse: bool = True):
        # The bias moves in steps of 0.001: bf16 would round them away, so no cast of the model reaches it.
        bias = self.bias
        super()._apply(fn, recurse)
        self.bias = self.bias.float() if bias.is_meta else bias.to(self.bias.device)
        return self

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        replay: Tensor | None = None,
        keep_scores: bool = False,
    ) -> Routing:
        """[..., D] -> Routing with leading dimensions [...].

        mask [...]: False is padding, not routed and not counted (ids = E, gates = 0). replay [..., K]: choices
        recorded earlier are used instead of top-k; the gates follow today's affinities. token_ids [...] are for
        routers that look at tokens; this one does not.
        """
        tokens = x.reshape(-1, x.shape[-1])
        with without_autocast(x):  # it would undo the widening
            logits = ops.router_logits(tokens, self.weight)
        aux = self.training and (self.seq_aux_alpha > 0 or self.batch_aux_alpha > 0)
        kernel = self._kernel(x, logits, replay)
        chosen, gates, counts, s = self._decide(logits, mask, replay, kernel, keep_scores or aux)
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        if self.training:
            if self.seq_aux_alpha > 0:
                losses["seq_aux"] = self.seq_aux_alpha * self._sequence_loss(s, x.shape, mask)
            if self.batch_aux_alpha > 0:  # section 4.5.3: all tokens of the pass as one sequence
                losses["batch_aux"] = self.batch_aux_alpha * self._sequence_loss(s, s.shape, mask)
            every = max(1, tokens.shape[0] // SAMPLE)
            seen = self._affinities(logits.detach()[::every]) if s is None else s.detach()[::every]
            free = None
            if kernel == "native":
                free = ops.route(logits.detach()[::every], torch.zeros_like(self.bias), *self._rule())[0]
            stats = self._health(seen, chosen[::every], free)
        shape = x.shape[:-1]
        return Routing(
            chosen.view(*shape, self.k), gates.view(*shape, self.k), counts, losses, stats,
            s.view(*shape, self.n_experts) if keep_scores else None,
        )  # fmt: skip

    def _kernel(self, x: Tensor, logits: Tensor, replay: Tensor | None) -> str:
        """triton or native, where one of them decides; else nothing."""
        if replay is not None or not self._own_choice():
            return ""
        path = ops.path_for(logits if x.device.type == "cpu" else x)  # no GPU is checked in fp32 just for this
        return path if path in ("triton", "native") else ""

    def _rule(self) -> tuple[int, int, int, str, bool, float]:
        return self.k, self.n_group, self.topk_group, self.scoring_func, self.norm, self.scaling

    def _decide(
        self, logits: Tensor, mask: Tensor | None, replay: Tensor | None, kernel: str, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[N, E] logits -> [N, K] ids, [N, K] gates, [E] counts, [N, E] affinities or, unless kept, perhaps None."""
        valid = None if mask is None else mask.reshape(-1)
        if kernel == "native" and keep:
            return ops.route_scored(logits, self.bias, *self._rule(), valid)
        s = self._affinities(logits) if keep or not kernel else None
        if kernel:  # affinities exist in registers only
            return *ops.route(logits, self.bias, *self._rule(), valid), s
        return *self._route(s, mask, replay), s

    def _own_choice(self) -> bool:
        """No variant says otherwise: only this class's rule has a kernel."""
        kind = type(self)
        return (kind.choose, kind._affinities, kind._route) == (Router.choose, Router._affinities, Router._route)

    def _affinities(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits) if self.scoring_func == "sigmoid" else torch.softmax(logits, -1)

    def _route(self, s: Tensor, mask: Tensor | None, replay: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[N, E] affinities -> [N, K] ids, [N, K] gates, [E] counts: what `ops.route` does in one pass."""
        valid = None if mask is None else mask.reshape(-1, 1)
        if replay is None:
            chosen = self.choose(s.detach(), self.bias)
            gates = s.gather(1, chosen)
        else:  # a recorded id outside [0, E) is no expert: no gate, and no part in the others' sum
            chosen = replay.reshape(-1, self.k).long()
            gates = s.gather(1, chosen.clamp(0, self.n_experts - 1)) * ((chosen >= 0) & (chosen < self.n_experts))
        if self.norm:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        gates = gates * self.scaling
        if valid is not None:
            chosen = torch.where(valid, chosen, self.n_experts)
            gates = gates * valid
        inside = chosen
        if valid is not None or replay is not None:
            inside = torch.where((chosen >= 0) & (chosen < self.n_experts), chosen, self.n_experts)
        inside = inside.reshape(-1)
        if self.training or inside.device.type != "cpu":
            ones = torch.ones_like(inside)
            counts = ones.new_zeros(self.n_experts + 1).scatter_add_(0, inside, ones)
        else:  # one call; elsewhere it would wait for the device
            counts = torch.bincount(inside, minlength=self.n_experts + 1)
        return chosen, gates, counts[: self.n_experts]

    def choose(self, s: Tensor, bias: Tensor) -> Tensor:
        """[N, E] affinities, [E] bias -> [N, K] ids of the best biased scores inside the best groups."""
        biased = s + bias
        if self.topk_group == self.n_group:
            return biased.topk(self.k, -1).indices
        n, size = s.shape[0], self.n_experts // self.n_group
        groups = biased.view(n, self.n_group, size)
        strength = groups.amax(-1)
        if self.scoring_func == "sigmoid" and n <= FEW:
            strength = groups.topk(2, -1).values.sum(-1)
        elif self.scoring_func == "sigmoid":  # V3: the two best; a tie counts twice, so mask one place, not a value
            best = groups.argmax(-1, keepdim=True)
            strength = strength + groups.scatter(-1, best, float("-inf")).amax(-1)
        kept = strength.topk(self.topk_group, -1, sorted=False).indices.sort(-1).values
        ids = F.embedding(kept, torch.arange(self.n_experts, device=s.device).view(-1, size)).flatten(1)
        return ids.gather(1, biased.gather(1, ids).topk(self.k, -1).indices)  # other groups: -inf, left out

    def _sequence_loss(self, s: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor:
        """Equations 17-20, averaged over sequences; f from unbiased, ungrouped top-k and without gradient."""
        rows, time = (shape[0], shape[1]) if len(shape) == 3 else (1, s.shape[0])
        if ops.path_for(s) == "native":
            return ops.sequence_loss(
                s.view(rows, time, self.n_experts), self.k, None if mask is None else mask.reshape(rows, time)
            )
        top = s.detach().topk(self.k, -1, sorted=False).indices
        one = torch.ones_like(top, dtype=s.dtype)
        valid = s.new_ones(rows, time) if mask is None else mask.reshape(rows, time).to(s.dtype)
        length = valid.sum(1).clamp_min(1)
        one = one * valid.reshape(-1, 1)
        row = torch.arange(rows, device=s.device).repeat_interleave(time).unsqueeze(1)
        f = s.new_zeros(rows * self.n_experts).scatter_add_(
            0, (row * self.n_experts + top).reshape(-1), one.reshape(-1)
        )
        f = f.view(rows, self.n_experts) * (self.n_experts / self.k) / length.unsqueeze(1)
        s = s.view(rows, time, self.n_experts)
        # sum_i f_i P_i = mean_t (f . s_t) / sum(s_t): one product instead of a normalised copy of all scores
        share = torch.bmm(s, f.unsqueeze(-1)).squeeze(-1) / s.sum(-1)
        return ((share * valid).sum(1) / length).mean()

    def _health(self, s: Tensor, chosen: Tensor, free: Tensor | None = None) -> dict[str, Tensor]:
        """Sums over a sample of routed tokens, [n, E] affinities and [n, K] ids: see Routing.stats.

        free [n, K]: what the affinities alone would choose, if somebody knows it already.
        """
        live = (chosen[:, 0] >= 0) & (chosen[:, 0] < self.n_experts)
        top = s.topk(min(2, self.n_experts), -1).values
        free = self.choose(s, torch.zeros_like(self.bias)) if free is None else free
        kept = (free.unsqueeze(2) == chosen.unsqueeze(1)).any(2).sum(1)
        return {
            "tokens": live.sum(),
            "margin": ((top[:, 0] - top[:, -1]) * live).sum().float(),
            "kept": (kept * live).sum(),
        }


ROUTERS = {"topk": Router.from_config}
