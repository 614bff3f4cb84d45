"""The plan against the modules it describes, published numbers and hand counts."""

import pytest
import torch

from moe.analysis import planner
from moe.config import PRESETS, ModelConfig
from moe.kernels.native import library
from moe.layers.balance import routers
from moe.layers.experts import Experts
from moe.layers.precision import use_fp8
from moe.model import Transformer
from moe.objectives import Pretraining

SHAPES = [
    {},
    {"q_lora_rank": None},
    {"tie_word_embeddings": True},
    {"n_shared_experts": 0},
    {"n_routed_experts": 0},
    {"n_routed_experts": 0, "num_nextn_predict_layers": 0, "tie_word_embeddings": True},
    {"num_nextn_predict_layers": 2},
    {"first_k_dense_replace": 3},  # dense but for the MTP block
    {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0, "n_shared_experts": 2},
]
REFERENCE = {  # hidden, layers, heads, ranks and head widths; expert width; row -> MFLOP a token without and with MTP
    "R0": (
        dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, q_lora_rank=96, kv_lora_rank=48,
             intermediate_size=512, moe_intermediate_size=32), 256, 14.6, 22.1,
    ),
    "R": (
        dict(hidden_size=256, num_hidden_layers=5, num_attention_heads=8, q_lora_rank=128, kv_lora_rank=64,
             intermediate_size=640, moe_intermediate_size=64), 512, 32.4, 44.7,
    ),
    "R2": (
        dict(hidden_size=512, num_hidden_layers=5, num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128,
             qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=1280,
             moe_intermediate_size=128), 512, 103.9, 137.8,
    ),
}  # fmt: skip


def reference(name):
    changes, seq, without, with_mtp = REFERENCE[name]
    return ModelConfig.preset("tiny", name=name, mtp_rows=1.0, **changes), seq, without, with_mtp


def meta(config):
    with torch.device("meta"):
        return Transformer(config)


def assert_same_counts(config):
    model, p = meta(config), planner.parameters(config)
    assert p.total == model.num_parameters()
    assert p.active == model.num_parameters(active=True)
    assert p.total + p.mtp == model.num_parameters(mtp=True)
    assert p.active + p.mtp_active == model.num_parameters(active=True, mtp=True)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_parameters_of_presets_equal_the_model(preset):
    assert_same_counts(ModelConfig.preset(preset))


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_parameters_of_odd_shapes_equal_the_model(small, changes):
    assert_same_counts(small(**changes))


def test_v3_has_its_published_size_and_cache():
    plan = planner.plan(ModelConfig.preset("v3-671b"), seq_len=4096, batch_tokens=15360 * 4096)
    assert (plan.parameters.total, plan.parameters.active) == (671_026_404_352, 36_625_603_584)
    assert (plan.cache.elements, plan.cache.bytes) == (35_136, 70_272)
    assert plan.cache.full_elements == 128 * (192 + 128) * 61
    assert planner.plan(ModelConfig.preset("v2-lite-16b")).cache.elements == 15_552


@pytest.mark.parametrize("name", list(REFERENCE))
def test_flops_reproduce_the_reference_table(name):
    config, seq, without, with_mtp = reference(name)
    f = planner.flops(config, seq)
    assert round(f.training_without_mtp / 1e6, 1) == without
    assert round(f.training / 1e6, 1) == with_mtp
    assert f.training == 3 * f.forward
    assert planner.flops(config, seq, mtp=False).training == f.training_without_mtp
    assert planner.mfu_flops(config, seq) == f.training


def linear_flops(config, time):
    """Forward FLOPs of one row of `time` tokens, counted at the matrix products of a model that runs."""
    model = Transformer(config).train()
    total = 0.0

    def count(module, inputs, output):
        nonlocal total
        rows = inputs[0].numel() // inputs[0].shape[-1]
        if isinstance(module, torch.nn.Linear):
            total += 2 * rows * module.weight.numel()
        elif type(module).__name__ == "Experts":
            k = inputs[1].shape[-1]
            total += 2 * rows * k * (module.w13[0].numel() + module.w2[0].numel())
        elif type(module).__name__ == "Router":
            total += 2 * rows * module.weight.numel()
        elif type(module).__name__ == "MLA":
            pairs = time * (time + 1) / 2
            total += 2 * pairs * module.heads * (module.nope + module.rope + module.v)

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, time, dtype=torch.int64))
    return total


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_flops_equal_the_products_of_a_running_model(small, changes):
    config, time = small(**{**changes, "num_nextn_predict_layers": 0}), 12
    assert planner.flops(config, time).forward * time == pytest.approx(linear_flops(config, time), rel=1e-12)


def test_mtp_costs_its_projection_block_and_head_each_depth(small):
    config, seq = small(num_nextn_predict_layers=2), 9
    d, v = config.hidden_size, config.vocab_size
    per_depth = (planner.flops(config, seq).training - planner.flops(config, seq, mtp=False).training) / 2
    attention = d * 10 + 10 * 2 * 10 + d * 16 + 12 * 2 * 11 + 2 * 5 * d
    ffn = d * 8 + 3 * d * 7 * (3 + 1)
    core = 2 * 2 * (10 + 5) * (seq + 1) / 2
    assert per_depth == 3 * (2 * (2 * d * d + attention + ffn + v * d) + core)


def test_mfu_counts_mtp_only_where_its_loss_takes_part(small):
    alone = planner.flops(small(), 8, mtp=False).training
    assert planner.mfu_flops(small(mtp_weight=0.0), 8) == alone
    assert planner.mfu_flops(small(mtp_weight=[[0, 0.0], [1, 0.0]]), 8) == alone
    assert planner.mfu_flops(small(mtp_weight=[[0, 0.3], [0.5, 0.0]]), 8) > alone
    assert planner.mfu_flops(small(), 8, mtp=False) == alone


def test_memory_of_weights_and_optimizer_is_exact(small):
    config = small()
    n = meta(config).num_parameters(mtp=True)
    fp32, bf16 = (planner.memory(config, 16, 4, precision) for precision in ("fp32", "bf16"))
    assert (fp32.weights, fp32.master, fp32.gradients, fp32.moments) == (4 * n, 0, 4 * n, 8 * n)
    assert (bf16.weights, bf16.master, bf16.gradients, bf16.moments) == (2 * n, 4 * n, 6 * n, 8 * n)
    parts = [v for k, v in vars(bf16).items() if k != "total"]
    assert sum(parts) == bf16.total


def test_simulated_fp8_is_planned_as_bf16_with_a_larger_workspace(small):
    bf16, fp8 = (vars(planner.memory(small(), 16, 4, precision)) for precision in ("bf16", "fp8"))
    assert [k for k in bf16 if bf16[k] != fp8[k]] == ["workspace", "total"] and fp8["workspace"] > bf16["workspace"]
    assert any("simulated" in note for note in planner.plan(small(), precision="fp8").notes)
    assert not any("simulated" in note for note in planner.plan(small(), precision="bf16").notes)


def saved_bytes(config, rows, time, dtype, checkpointing, recompute_z=False, fp8=False):
    """Bytes that autograd keeps in one forward pass, parameters apart."""
    model = Transformer(config).train().to(dtype)
    if fp8:
        use_fp8(model)
    model.activation_checkpointing = checkpointing
    for module in model.modules():
        if isinstance(module, Experts):
            module.recompute_z = recompute_z
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # x keeps the address from being used again
        return x

    tokens = torch.randint(config.vocab_size, (rows, time + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        Pretraining(model)(tokens, None, None, rows * time, mtp_weight=0.3)
    return sum(size for size, _ in kept.values())


@pytest.fixture(params=["torch", "native"])
def path(request, ops_path):
    if request.param == "native" and library.status():
        pytest.skip(library.status())
    ops_path(request.param)
    return request.param


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None, "n_shared_experts": 0}, {"n_routed_experts": 0}], ids=str
)
def test_activations_are_what_autograd_keeps(changes, precision, path):
    config, rows, time = ModelConfig.preset("tiny", vocab_size=64, num_hidden_layers=2, mtp_rows=1.0, **changes), 2, 160
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    measured = saved_bytes(config, rows, time, dtype, checkpointing=False, fp8=precision == "fp8")
    m = planner.memory(config, time, rows, precision, path=path)
    logits = rows * time * config.vocab_size * (4 if precision == "fp32" else 6)
    assert m.activations + m.head - logits == pytest.approx(measured, rel=0.1)


def test_experts_that_repeat_their_first_product_keep_less(path):
    config, rows, time = ModelConfig.preset("tiny", vocab_size=64, mtp_rows=1.0), 2, 160
    measured = saved_bytes(config, rows, time, torch.float32, checkpointing=False, recompute_z=True)
    whole, m = (planner.memory(config, time, rows, recompute_z=flag, path=path) for flag in (False, True))
    logits = rows * time * config.vocab_size * 4
    assert m.activations + m.head - logits == pytest.approx(measured, rel=0.1)
    assert m.activations < whole.activations


def test_checkpointing_keeps_block_inputs_and_one_block(path):
    config, rows, time = ModelConfig.preset("tiny", vocab_size=64, mtp_rows=1.0), 2, 160
    measured = saved_bytes(config, rows, time, torch.float32, checkpointing=True)
    whole, m = (planner.memory(config, time, rows, activation_checkpointing=flag, path=path) for flag in (False, True))
    again = measured + whole.activations / 4  # one of three blocks and the MTP module is made again
    logits = rows * time * config.vocab_size * 4
    assert m.activations + m.head - logits == pytest.approx(again, rel=0.2)
    assert m.activations < whole.activations / 2


def test_a_fused_path_keeps_less_and_longer_rows_keep_more_for_a_token():
    config = ModelConfig.preset("tiny")
    assert planner.memory(config, 256, 4, path="triton").activations < planner.memory(config, 256, 4).activations
    assert planner.memory(config, 512, 2).activations > planner.memory(config, 256, 4).activations


def test_load_and_its_noise_match_a_draw():
    """A perfectly balanced router, drawn: K of E without replacement for each token."""
    b = planner.plan(ModelConfig.preset("tiny"), batch_tokens=4096).balance
    assert (b.tokens_per_expert, b.tokens_per_expert_pass) == (128, 128)
    draws = torch.rand(20, 4096, 256).topk(8, -1).indices.view(20, -1)
    counts = torch.stack([torch.bincount(row, minlength=256) for row in draws]).double()
    assert counts.std(1).mean().item() == pytest.approx(b.tokens_per_expert_std, rel=0.05)
    maxvio = (counts.amax(1) / 128 - 1).mean().item()
    assert b.maxvio_floor == pytest.approx(maxvio, rel=0.12)  # twenty draws: 3 % of noise
    assert planner.maxvio_floor(10, 1, 1) == 0


def test_passes_and_small_experts(small):
    plan = planner.plan(ModelConfig.preset("tiny"), seq_len=256, batch_tokens=8192, micro_batch_size=1)
    assert plan.passes == 32
    assert plan.balance.tokens_per_expert_pass == 8
    assert any("8.0 tokens an expert" in note for note in plan.notes)
    assert planner.plan(ModelConfig.preset("tiny"), batch_tokens=8192, micro_batch_size=4, world_size=2).passes == 4


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_twin_costs_the_same(preset):
    config = ModelConfig.preset(preset)
    plan = planner.plan(config, 512)
    assert plan.twin.training == pytest.approx(plan.flops.training, rel=0.01)
    assert plan.twin.intermediate_size == config.dense_twin().intermediate_size
    dense = planner.plan(config.dense_twin(), 512)
    assert dense.twin is None and dense.balance is None
    assert dense.parameters.total == plan.twin.total


def test_every_router_weight_is_counted(small):
    config = small()
    found = sum(r.weight.numel() for r in routers(meta(config)).values())
    assert planner.flops(config, 8).matmul_weights["router"] + config.hidden_size * 8 == found  # the latter: MTP


@pytest.mark.parametrize(
    "number, unit, text",
    [
        (671_026_404_352, "", "671.0 B"), (16_683_264, "", "16.7 M"), (999_999, "", "1.0 M"), (7, "", "7"),
        (3.26e12, "", "3.3 T"), (0, "B", "0 B"), (70_272, "B", "70.3 kB"), (22.1e6, "FLOP", "22.1 MFLOP"),
        (1.6e19, "FLOP", "16.0 EFLOP"),
    ],
)  # fmt: skip
def test_numbers_read_well(number, unit, text):
    assert planner.si(number, unit) == text


def test_a_table_is_aligned_and_spells_out_the_formula():
    text = planner.table(planner.plan(ModelConfig.preset("v3-671b")))
    for part in ("671.0 B", "36.6 B", "35,136 elements", "dense twin", planner.FORMULA):
        assert part in text
    assert "twin" not in planner.table(planner.plan(ModelConfig.preset("tiny", n_routed_experts=0)))
    other = planner.table(planner.plan(ModelConfig.preset("tiny", attention="gqa")))
    assert "model.attention=gqa is counted as mla" in other
