"""Training step (forward, backward, AdamW) of this project against transformers and against the dense twin.

    python tools/bench/train_step.py                      # shape R, one thread, five rounds
    python tools/bench/train_step.py shape=R2 threads=2 rounds=3 only=ours-bf16,hf-tuned
    python tools/bench/train_step.py only=ours-bf16,ours-bf16@avx512,ours-bf16@avx2,ours-bf16@portable
    python tools/bench/train_step.py parts=true           # where our step's time goes

One process each; they take turns, one step at a time, so that a machine whose speed drifts slows all of them alike:
quote the ratios. With one thread the figure is CPU seconds, which holds even beside other work; with more it is wall
seconds. Batches are Zipf-distributed ids, the same for all. MTP is off: transformers cannot train it.

    ours-bf16, ours-fp32   this project                      twin-bf16   its dense twin of equal training FLOPs
    ours-bf16@torch        by its PyTorch path               ours-bf16@avx2     by one level of the native kernels
    hf-tuned               transformers' DeepseekV3: grouped_mm experts, sdpa, autocast bf16, fused AdamW, allocator tuned
    hf-default             the same as a user gets it, without the allocator setting
    hf-bf16                the same as hf-tuned with everything in bf16, moments too (less memory, other numerics)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

SHAPES = {  # facts: hidden, layers, heads, latents, expert width; vocabulary 4096, first layer dense
    "R0": dict(),
    "R": dict(
        hidden_size=256, num_hidden_layers=5, intermediate_size=640, num_attention_heads=8, q_lora_rank=128,
        kv_lora_rank=64, moe_intermediate_size=64,
    ),
    "R2": dict(
        hidden_size=512, num_hidden_layers=5, intermediate_size=1280, num_attention_heads=8, q_lora_rank=256,
        kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, moe_intermediate_size=128,
    ),
}  # fmt: skip
ROWS = {"R0": (32, 256), "R": (16, 512), "R2": (16, 512)}  # 8192 tokens a step
ALL = [
    "ours-bf16", "ours-bf16@torch", "ours-fp32", "ours-fp32@torch", "twin-bf16", "twin-bf16@torch", "hf-tuned", "hf-bf16",
    "hf-default",
]  # fmt: skip


def shape_config(shape: str):
    from moe import ModelConfig

    base = dict(
        hidden_size=192, num_hidden_layers=4, intermediate_size=512, num_attention_heads=6, q_lora_rank=96,
        kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, moe_intermediate_size=32,
        vocab_size=4096, num_nextn_predict_layers=0, bias_update_speed=0.001,
    )  # fmt: skip
    return ModelConfig.preset("tiny", **{**base, **SHAPES[shape]})


def batch(shape: str, number: int):
    import torch

    rows, time_ = ROWS[shape]
    generator = torch.Generator().manual_seed(number)
    return (4096 ** torch.rand(rows, time_ + 1, generator=generator) - 1).long().clamp(0, 4095)


def ours(kind: str, shape: str):
    import torch

    from moe import Transformer
    from moe.config import OptimConfig, TrainConfig
    from moe.objectives import Pretraining, count_targets
    from moe.parallel import Ranks
    from moe.train.engine import Engine

    config = shape_config(shape)
    if kind.startswith("twin"):
        config = config.dense_twin()
    objective = Pretraining(Transformer(config))
    train = TrainConfig(precision=kind.split("-")[1])
    engine = Engine(objective, OptimConfig(lr=3e-4, grad_clip=0.0), train, Ranks(0, 1, torch.device("cpu")))

    def step(tokens) -> float:
        losses = engine.forward_backward(tokens, None, None, float(count_targets(tokens)))
        engine.step(3e-4, float(engine.reduce()))
        for name, state in losses.balance.items():
            router = objective.model.layers[int(name.split(".")[1])].ffn.router
            router.bias.copy_(objective.balancer.update(state, router.bias, 0.001))
        return float(losses.loss.detach())

    return step


def transformers(kind: str, shape: str):
    import torch
    import torch.nn.functional as F
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    c = shape_config(shape)
    same = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "n_shared_experts n_routed_experts routed_scaling_factor kv_lora_rank q_lora_rank qk_rope_head_dim v_head_dim "
        "qk_nope_head_dim n_group topk_group num_experts_per_tok first_k_dense_replace"
    )
    config = DeepseekV3Config(
        **{name: getattr(c, name) for name in same.split()}, num_key_value_heads=c.num_attention_heads, use_cache=False
    )
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    model = DeepseekV3ForCausalLM(config).train()
    if kind == "hf-bf16":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step(tokens) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "hf-bf16"):
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def by_path(name: str) -> dict[str, str]:
    """Environment of `kind@path`: a path of MOE_OPS, or a level of the native kernels."""
    from moe.ops import PATHS

    path = name.partition("@")[2]
    return {} if not path else {"MOE_OPS": path} if path in PATHS else {"MOE_OPS": "native", "MOE_NATIVE_LEVEL": path}


def worker(kind: str, shape: str, threads: int) -> None:
    import torch

    from moe.parallel import keep_memory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if kind != "hf-default":
        keep_memory()
    step = transformers(kind, shape) if kind.startswith("hf") else ours(kind, shape)
    number = 0
    for _ in sys.stdin:
        tokens = batch(shape, number)
        number += 1
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(tokens)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        print(json.dumps({"wall": wall, "cpu": cpu, "loss": loss, "peak_mb": peak / 1024}), flush=True)


def main(shape: str = "R", threads: int = 1, rounds: int = 5, only: str = "", parts: bool = False) -> None:
    if parts:
        return print_parts(shape, threads)
    from moe.analysis import ceiling, planner

    names = only.split(",") if only else ALL
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), GOMP_SPINCOUNT="5000")
    command = [sys.executable, __file__, "--worker"]
    processes = {
        name: subprocess.Popen(
            [*command, name.partition("@")[0], shape, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | by_path(name),
        )
        for name in names
    }
    results: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(rounds + 2):  # two rounds warm up
        for name, process in processes.items():
            print("step", file=process.stdin, flush=True)
            results[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    import torch

    clock = "cpu" if threads == 1 else "wall"
    rows, time_ = ROWS[shape]
    tokens = rows * time_
    flops = planner.mfu_flops(shape_config(shape), time_, mtp=False)
    top = {d: ceiling.measure_ceiling(d, threads) for d in (torch.bfloat16, torch.float32)}
    seconds = {name: statistics.median(r[clock] for r in found[2:]) for name, found in results.items()}
    base = seconds.get("hf-tuned", next(iter(seconds.values())))
    print(
        f"shape {shape}, {tokens} tokens a step, {threads} thread(s), {clock} seconds, median of {rounds} interleaved rounds"
    )
    print(
        f"{flops / 1e6:.1f} MFLOP a token; ceilings bf16 {top[torch.bfloat16] / 1e9:.0f}, fp32 {top[torch.float32] / 1e9:.0f} GFLOP/s"
    )
    print("| path | s a step | tokens/s | hf-tuned / this | peak MB | share of the bf16 ceiling | last loss |")
    print("|---|---|---|---|---|---|---|")
    for name, value in seconds.items():
        peak = max(r["peak_mb"] for r in results[name])
        share = flops * tokens / value / top[torch.bfloat16]
        print(
            f"| {name} | {value:.2f} | {tokens / value:,.0f} | {base / value:.2f} | {peak:,.0f} | {share:.0%} | "
            f"{results[name][-1]['loss']:.3f} |"
        )


def print_parts(shape: str, threads: int) -> None:
    """Forward and backward of each part alone at the step's shapes, and what remains of a whole step."""
    import torch

    from moe import Transformer, ops
    from moe.layers.moe import MoE
    from moe.parallel import keep_memory

    torch.set_num_threads(threads)
    keep_memory()
    c, (rows, time_) = shape_config(shape), ROWS[shape]
    n, dtype = rows * time_, torch.bfloat16

    def timed(make, repeat: int = 3) -> float:
        run = make()
        run()
        found = []
        for _ in range(repeat):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def leaf(*size):
        return torch.randn(*size, dtype=dtype).requires_grad_()

    def attention():
        q, k = (leaf(rows, time_, c.num_attention_heads, c.qk_head_dim) for _ in range(2))
        v = leaf(rows, time_, c.num_attention_heads, c.v_head_dim)
        g = torch.randn(v.shape, dtype=dtype)
        return lambda: ops.attention(q, k, v, 0.1).backward(g)

    layer = MoE.from_config(c).to(dtype).train()
    x = leaf(rows, time_, c.hidden_size)
    routing = layer.router(x.detach())
    ids, gates = routing.experts.view(n, -1), routing.gates.detach().view(n, -1).requires_grad_()

    def experts():
        flat = x.detach().view(n, -1).requires_grad_()
        g = torch.randn(flat.shape, dtype=dtype)
        return lambda: ops.experts(flat, layer.experts.w13, layer.experts.w2, ids, gates).backward(g)

    def router():
        def run():
            r = layer.router(x)
            (r.gates.sum() + r.losses["seq_aux"]).backward()

        return run

    def head():
        h, w = leaf(n, c.hidden_size), leaf(c.vocab_size, c.hidden_size)
        t = torch.randint(0, c.vocab_size, (n,))
        return lambda: ops.linear_cross_entropy(h, w, t).backward()

    def optimizer():
        p = [torch.randn(sum(q.numel() for q in Transformer(c).parameters()))]
        p[0].grad = torch.randn_like(p[0])
        adam = torch.optim.AdamW(p, fused=True)
        return adam.step

    step = ours("ours-bf16", shape)
    number = iter(range(100))
    whole = timed(lambda: lambda: step(batch(shape, next(number))))
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace
    table = {
        f"routed experts x {moe_layers}": timed(experts) * moe_layers,
        f"attention core x {c.num_hidden_layers}": timed(attention) * c.num_hidden_layers,
        f"router x {moe_layers}": timed(router) * moe_layers,
        "head and loss": timed(head),
        "AdamW": timed(optimizer),
    }
    print(f"shape {shape}, bf16, {threads} thread(s): a whole step takes {whole:.2f} s wall")
    for name, value in [*table.items(), ("projections, norms, copies: the rest", whole - sum(table.values()))]:
        print(f"| {name} | {value:.2f} s | {value / whole:.0%} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        given = dict(argument.split("=", 1) for argument in sys.argv[1:])
        casts = {"threads": int, "rounds": int, "parts": lambda v: v == "true"}
        main(**{k: casts.get(k, str)(v) for k, v in given.items()})
