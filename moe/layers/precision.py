"""Which products of a model DeepSeek-V3 trains in FP8: every Linear inside the blocks, and the routed experts.

    names = use_fp8(model)        the same modules, parameters and state dict; their products now run over E4M3 operands

Left alone, as in V3: embedding, output head, router, norms, attention's scores and values. MTP's projection is left
alone too: the paper does not name it, and the released FP8 weights hold it in bf16. Evaluation quantises like training.
Decoding over a cache multiplies attention's weights out first (MLA.absorb), and those products are not quantised.

Source: DeepSeek-V3 (arXiv 2412.19437) section 3.3.1; how: kernels/fp8.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe.config import UserError, nearest
from moe.layers.attention import MLA
from moe.layers.block import Block
from moe.layers.experts import Experts
from moe.ops.fp8 import Scales, fp8_experts, fp8_linear

FP8_SCALES = {  # train.fp8_scales -> (attention's output projection, experts, every other Linear)
    "v3": (Scales(inputs=True), Scales(inputs=True), Scales()),
    "float": (Scales(),) * 3,
    "power_of_two": (Scales(inputs=True, others=True),) * 3,
}


class FP8Linear(nn.Linear):
    scales = Scales()

    def forward(self, x: Tensor) -> Tensor:
        y = fp8_linear(x, self.weight, self.scales)
        return y if self.bias is None else y + self.bias


class FP8Experts(Experts):
    scales = Scales()

    def forward(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        k, tokens = experts.shape[-1], x.reshape(-1, x.shape[-1])
        ids, gates = experts.reshape(-1, k), gates.reshape(-1, k)
        y = fp8_experts(tokens, self.w13, self.w2, ids, gates, self.scales, self.recompute_z)
        return y.view(x.shape)


def use_fp8(model: nn.Module, scales: str = "v3") -> list[str]:
    """Change the class of what V3 quantises, in place, in every Block of `model` -> names of the changed modules.

    scales: which tiles' scales are powers of two. v3: those of the attention output and of what travels to experts;
    float: none; power_of_two: all, as V3.1's. A Linear of a class of its own, or inside a router, stays as it is.
    """
    if scales not in FP8_SCALES:
        raise UserError(f"fp8_scales={scales!r} is not one of {list(FP8_SCALES)}{nearest(scales, FP8_SCALES)}")
    of_output, of_experts, of_others = FP8_SCALES[scales]
    outputs = {m.o for m in model.modules() if isinstance(m, MLA)}
    changed = []
    for block_name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        for name, module in block.named_modules(prefix=block_name):
            if type(module) in (nn.Linear, FP8Linear) and ".router." not in name:
                module.__class__ = FP8Linear
                module.scales = of_output if module in outputs else of_others
            elif type(module) in (Experts, FP8Experts):
                module.__class__ = FP8Experts
                module.scales = of_experts
            else:
                continue
            changed.append(name)
    return changed
