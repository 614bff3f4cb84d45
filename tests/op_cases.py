"""Inputs of the expert ops in every awkward shape, and gradients by any function of them."""

import torch


def with_gradients(function, inputs, upstream, argnums):
    """function(*inputs) and its gradients in the tensors at `argnums`, against `upstream`."""
    inputs = [x.detach().clone().requires_grad_() if i in argnums else x for i, x in enumerate(inputs)]
    y = function(*inputs)
    gradients = torch.autograd.grad(y, [inputs[i] for i in argnums], upstream.to(y.dtype), allow_unused=True)
    return y, gradients


def expert_inputs(ids, n_experts, d, f, dtype):
    """x, w13, w2, ids, gates for [N, K] ids. The reference gets the same rounded numbers in float64."""
    n, k = ids.shape
    x, w13, w2 = torch.randn(n, d), torch.randn(n_experts, 2 * f, d) * d**-0.5, torch.randn(n_experts, d, f) * f**-0.5
    return x.to(dtype), w13.to(dtype), w2.to(dtype), ids, torch.rand(n, k, dtype=dtype) + 0.1


def ids_of(name, n, k, n_experts):
    distinct = torch.rand(n, n_experts).topk(k, -1).indices
    match name:
        case "spread":
            return distinct
        case "few":  # experts 0 and the last get nothing
            return (1 + torch.rand(n, n_experts - 2).topk(min(k, n_experts - 2), -1).indices).contiguous()
        case "one hot expert":
            return torch.full((n, k), 2)
        case "one choice":
            return distinct[:, :1].contiguous()
        case "outside":
            ids = distinct.clone()
            ids[torch.rand(n, k) < 0.5] = n_experts
            ids[0], ids[-1, 0] = n_experts, -1
            ids[n // 2, 0] = n_experts + 12345
            return ids
        case "all outside":
            return torch.full((n, k), n_experts)
        case "duplicates":
            ids = distinct.clone()
            ids[:, 1] = ids[:, 0]
            return ids
    raise AssertionError(name)


CASES = ["spread", "few", "one hot expert", "one choice", "outside", "all outside", "duplicates"]


def attention_inputs(batch, time, heads, dqk, dv, dtype):
    return [torch.randn(batch, time, heads, d).to(dtype) for d in (dqk, dqk, dv)]


def segments_of(batch, time):
    return torch.sort(torch.randint(0, 3, (batch, time)), -1).values


def head_inputs(n, d, vocab, dtype, masked=0.3):
    targets = torch.randint(0, vocab, (n,))
    targets[torch.rand(n) < masked] = -1
    return torch.randn(n, d).to(dtype), torch.randn(vocab, d).to(dtype) * 0.5, targets
