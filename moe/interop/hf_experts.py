"""Our routed experts inside any Hugging Face MoE model: `moe.ops.experts` as an experts implementation of transformers.

    from moe.interop import hf_experts

    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation=hf_experts.register())
    model.set_experts_implementation("moe")              # the same for a model that is there already

    hidden_states [N, D], top_k_index [N, K], top_k_weights [N, K] -> [N, D]
    gate_up_proj [E, 2F, D] gate rows, then up rows; down_proj [E, D, F]: our own layout, read in place

An id of E is no expert: transformers gives it to choices whose expert lives on another rank, E being this rank's share.
Weights stored the other way round (Aria: [E, D, 2F], [E, F, D]) go in as transposed views; a path that wants whole rows
copies a layer's weights once in each pass. Under autocast the weights are cast in each pass, as it does for nn.Linear.

Source: transformers 5.23, integrations/moe.py (ExpertsInterface, use_experts_implementation); distributed/
expert_parallel.py for the ids. Deliberately absent: biases, a gate other than silu(gate) * up, interleaved rows, a norm
behind the experts, fp8 weights. Such a model is refused at its first forward pass, the first place that sees one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import ops
from moe.config import UserError

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def register(name: str = "moe") -> str:
    """Make `name` an experts implementation of transformers, for this process; -> the name. Twice does no harm."""
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as fp8  # there to be refused
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as plain
    except ImportError as error:
        raise UserError(
            f"hf_experts.register needs transformers >= 5.20 ({error}); pip install -U transformers"
        ) from None
    for interface in (plain, fp8):
        if name in ("", "eager") or interface.get(name, experts_forward) is not experts_forward:
            raise UserError(f"hf_experts.register: name={name!r} is empty or another implementation's; take 'moe', say")
    for interface in (plain, fp8):
        interface.register(name, experts_forward)
    return name


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[N, D] -> [N, D] in the same dtype: the experts of `module`, weighted and summed for each token."""
    if reason := refusal(module):
        kind = getattr(getattr(module, "config", None), "model_type", "no config")
        raise UserError(
            f"{type(module).__name__} ({kind}): {reason}, which moe.ops.experts does not compute; load the model with "
            'experts_implementation="grouped_mm" or "eager"'
        )
    w13, w2 = module.gate_up_proj, module.down_proj
    if getattr(module, "is_transposed", False):
        w13, w2 = w13.mT, w2.mT
    device, dtype = hidden_states.device.type, w13.dtype
    context: AbstractContextManager = nullcontext()
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype, context = torch.get_autocast_dtype(device), torch.autocast(device, enabled=False)  # inside all is cast
    with context:  # hidden states are cast without autocast too: norms may hand on fp32
        y = ops.experts(hidden_states.to(dtype), w13.to(dtype), w2.to(dtype), top_k_index, top_k_weights)
    return y.to(hidden_states.dtype)


def refusal(module: nn.Module) -> str | None:
    """Why our experts do not mean what these mean; None when they do."""
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    if getattr(module, "has_bias", False):
        return "its experts have biases"
    if not getattr(module, "has_gate", True):
        return "its experts have no gate"
    if module.gate_up_proj.dtype not in DTYPES:
        return f"its weights are {module.gate_up_proj.dtype}"
    if not getattr(module, "is_concatenated", True):
        return "its gate and up rows are interleaved"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows each expert"
    if type(module)._apply_gate is not _default_apply_gate:
        return "its gate is one of its own, not silu(gate) * up"
    act = module.act_fn
    if act is not F.silu and not isinstance(act, (nn.SiLU, SiLUActivation)):
        return f"its activation is {getattr(act, '__name__', type(act).__name__)}, not SiLU"
    return None
