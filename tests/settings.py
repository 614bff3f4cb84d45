"""Arguments that make a recipe small enough for a test; each test module adds what it is about."""

ATTENTION = [
    "model.hidden_size=32", "model.num_attention_heads=2", "model.q_lora_rank=16", "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=4", "model.v_head_dim=8", "model.moe_intermediate_size=8",
    "model.num_experts_per_tok=3", "train.threads=1", "log.wandb=disabled",
]  # fmt: skip
PRETRAIN = [
    *ATTENTION, "model.num_hidden_layers=2", "model.intermediate_size=48", "model.n_routed_experts=16",
    "model.n_group=4", "model.topk_group=2", "model.vocab_size=512", "data.seq_len=32", "train.batch_tokens=256",
]  # fmt: skip
TASK = [
    *ATTENTION, "model.n_routed_experts=8", "task.min_length=2", "task.max_length=4", "task.held_out=24",
    "task.demonstrations=60", "train.export=false",
]  # fmt: skip
