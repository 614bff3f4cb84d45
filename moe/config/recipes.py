"""The other sections, and one schema a recipe: which sections its configuration has, and what must fit together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from moe.config.knobs import Section, UserError, knob
from moe.config.model import ModelConfig


@dataclass
class DataConfig(Section):
    section = "data"

    corpus: str = knob("torch", "embedded text: Python sources of torch or of the standard library",
                       choices=["torch", "stdlib"])  # fmt: skip
    path: str | None = knob(None, "your text instead: a .txt, .jsonl or other text file, or a folder of them")
    text_column: str = knob("text", "field of a jsonl line that holds the text")
    fraction: float = knob(1.0, "share of the embedded training files that is used", gt=0, le=1)
    val_fraction: float = knob(0.04, "share of your own documents held out for validation, by hash", gt=0, lt=1)
    tokenizer: str = knob("train", "train: byte-level BPE on this corpus; or the path of a tokenizer.json")
    seq_len: int = knob(256, "tokens of one training row", ge=2)
    mask_documents: bool = knob(True, "attention, positions and targets stop at document borders (V3 did not mask)")
    cache: str = knob("runs/cache", "folder of tokenised corpora")


@dataclass
class OptimConfig(Section):
    section = "optim"

    lr: float = knob(3e-3, "peak learning rate", gt=0)
    schedule: str = knob("v3", "entry of the SCHEDULES table: v3, cosine or constant")
    warmup: float = knob(0.02, "share of the run spent warming up", ge=0, lt=1)
    final_lr: float = knob(0.1, "last learning rate as a share of the peak", ge=0, le=1)
    beta1: float = knob(0.9, "AdamW's first decay", ge=0, lt=1)
    beta2: float = knob(0.95, "AdamW's second decay", ge=0, lt=1)
    eps: float = knob(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = knob(0.1, "decoupled decay of matrices; norms and biases have none", ge=0)
    grad_clip: float = knob(1.0, "largest global gradient norm; 0 switches clipping off", ge=0)


@dataclass
class TrainConfig(Section):
    section = "train"

    steps: int = knob(300, "optimizer steps", ge=1)
    seed: int = knob(0, "seed of initialisation and data order", ge=0)
    batch_tokens: int = knob(4096, "tokens of one optimizer step, over all ranks and micro-steps", ge=1)
    micro_batch_size: int = knob(16, "rows of one pass on one rank", ge=1)
    precision: str = knob("fp32", "bf16: working copy in bf16, fp32 masters; fp8: and E4M3 operands, simulated",
                          choices=["fp32", "bf16", "fp8"])  # fmt: skip
    fp8_scales: str = knob("v3", "scales of fp8 that are powers of two: DeepSeek-V3's choice, none or all",
                           choices=["v3", "float", "power_of_two"])  # fmt: skip
    ops: str = knob("auto", "path of moe.ops; auto: triton on a GPU, native (kernels/native) on a CPU, where they work",
                    choices=["auto", "reference", "torch", "triton", "native"])  # fmt: skip
    attention: str = knob("auto", "kernels of attention on GPUs, whatever model.attention computes; auto: docs/attention.md",
                          choices=["auto", "sdpa", "flex", "flash"])  # fmt: skip
    zero_stage: int = knob(0, "DeepSpeed ZeRO stage; 0: plain all-reduce", choices=[0, 1, 2, 3])
    activation_checkpointing: bool = knob(False, "recompute each block in the backward pass instead of storing it")
    recompute_z: bool = knob(False, "routed experts repeat their first product in the backward pass, not store it")
    compile: bool = knob(False, "torch.compile the model")
    device: str = knob("auto", "auto: cuda where there is one, else cpu", choices=["auto", "cpu", "cuda"])
    threads: int = knob(0, "CPU threads of each rank; 0: cores divided by local ranks", ge=0)
    keep_memory: bool = knob(True, "CPU with glibc: freed memory stays with the process, which halves a step's time")
    eval_every: int = knob(50, "steps between validations; 0: only at the end", ge=0)
    eval_tokens: int = knob(65536, "tokens of the fixed validation subset used during the run", ge=1)
    save_every: int = knob(100, "steps between checkpoints; 0: only at the end", ge=0)
    keep_checkpoints: int = knob(2, "checkpoints kept, newest first", ge=1)
    max_bad_steps: int = knob(10, "steps in a row with a non-finite loss or gradient before the run stops", ge=1)
    health_check: bool = knob(True, "check gradients of every expert and router at steps 1 and 100")
    export: bool = knob(True, "write a Hugging Face folder at the end")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "fp8" and self.ops in ("triton", "native"):
            raise UserError(
                f"train.ops={self.ops} has no kernels for train.precision=fp8, which is simulated in PyTorch; "
                "set train.ops=auto"
            )
        if self.precision != "fp8" and self.fp8_scales != "v3":
            raise UserError(
                f"train.fp8_scales={self.fp8_scales} means nothing with train.precision={self.precision}; set "
                "train.precision=fp8, or leave it out"
            )


@dataclass
class ParallelConfig(Section):
    section = "parallel"

    expert_parallel_size: int = knob(1, "ranks that share one set of experts; only 1 so far", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_parallel_size > 1:
            raise UserError(
                f"parallel.expert_parallel_size={self.expert_parallel_size}: experts cannot be spread over ranks yet; "
                "set it to 1, and train.zero_stage=3 where one GPU cannot hold them"
            )


@dataclass
class LogConfig(Section):
    section = "log"

    every: int = knob(10, "steps between console lines", ge=1)
    wandb: str = knob("auto", "auto: online only with a key at hand; never asks",
                      choices=["auto", "online", "offline", "disabled"])  # fmt: skip
    project: str = knob("moe", "wandb project")


@dataclass
class RunConfig(Section):
    section = "run"

    dir: str | None = knob(None, "run folder; the same command with the same folder resumes; null: runs/<name>-<hash>")
    init: str | None = knob(None, "weights and tokenizer to start from: a run folder or a Hugging Face folder")
    dry_run: bool = knob(False, "print size, memory and expected time, then stop")


@dataclass
class TaskConfig(Section):
    """An embedded task whose answers can be checked; prompts are a pure function of these values."""

    section = "task"

    name: str = knob("sort", "entry of the TASKS table")
    min_length: int = knob(6, "smallest size of a problem (sort: digits)", ge=1)
    max_length: int = knob(12, "largest size of a problem", ge=1)
    demonstrations: int = knob(300, "solved problems for fine-tuning", ge=1)
    held_out: int = knob(512, "problems kept for evaluation, never trained on", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_length > self.max_length:
            raise UserError(f"task.min_length={self.min_length} exceeds task.max_length={self.max_length}; lower it")


@dataclass
class SftConfig(Section):
    section = "sft"

    gate: float = knob(0.0, "stop once pass@1 on held-out problems reaches this; 0: train for train.steps", ge=0, le=1)
    gate_every: int = knob(10, "steps between looks at the gate", ge=1)
    template: str = knob(
        "auto", "auto: the task's own where there is a task, else chat", choices=["auto", "chat", "plain"]
    )


@dataclass
class GrpoConfig(Section):
    section = "grpo"

    prompts: int = knob(64, "prompts of one rollout batch, over all ranks", ge=1)
    group_size: int = knob(8, "answers sampled for each prompt", ge=2)
    updates: int = knob(2, "optimizer steps (minibatches) for each rollout batch", ge=1)
    max_new_tokens: int | None = knob(None, "longest answer in tokens; null: a quarter more than any needs", ge=1)
    temperature: float = knob(1.0, "of sampling and of the trained distribution alike", gt=0)
    reward: str = knob("exact", "entry of the REWARDS table")
    reward_timeout: float = knob(10.0, "seconds a reward may take for one answer; then it counts as 0", gt=0)
    advantage: str = knob("group", "reward minus group mean, divided by the std of: group, batch, or none",
                          choices=["group", "batch", "none"])  # fmt: skip
    loss: str = knob("dapo", "entry of the LOSSES table of moe.objectives.policy")
    clip_low: float | None = knob(None, "lower clip of the ratio; null: the loss's own default", gt=0)
    clip_high: float | None = knob(None, "upper clip of the ratio; null: the loss's own default", gt=0)
    beta: float = knob(0.0, "weight of the KL to the reference policy; 0: no reference model is kept", ge=0)
    kl: str = knob("k3_ratio", "estimator of that KL", choices=["k1", "k2", "k3", "k1_ratio", "k3_ratio"])
    correction: str = knob(
        "off", "weights for sampler and trainer disagreeing", choices=["off", "token_tis", "token_mis", "seq_mis"]
    )
    replay: bool = knob(True, "the update routes each token to the experts that the rollout chose")
    drop_zero_signal: bool = knob(True, "groups whose rewards are all equal skip the backward pass")
    mask_truncated: bool = knob(False, "answers cut at max_new_tokens count neither in the loss nor in its divisor")
    eval_samples: int = knob(8, "answers for each of half the held-out problems, for pass@1 and pass@k", ge=1)
    show: int = knob(3, "prompts shown with answers and rewards at each evaluation", ge=0)
    cold_start: float = knob(0.25, "pass@1 to start from; a model below it is fine-tuned first; 0: never", ge=0, le=1)


@dataclass
class GenerateConfig(Section):
    section = "generate"

    prompt: str | None = knob(None, "text to continue; null: ask for prompts until an empty line")
    max_new_tokens: int = knob(128, "longest continuation in tokens", ge=1)
    temperature: float = knob(0.7, "0 is greedy", ge=0)
    top_p: float = knob(1.0, "keep the most likely tokens that reach this probability together", gt=0, le=1)
    seed: int = knob(0, "of the draws", ge=0)
    samples: int = knob(1, "continuations of the prompt", ge=1)
    chat: bool = knob(False, "wrap the prompt in the chat template of a fine-tuned model")
    precision: str = knob("fp32", "of weights and cache", choices=["fp32", "bf16"])


# ------------------------------------------------------------------------------------------------------------- schemas


@dataclass
class Recipe(Section):
    """Base of the schemas. `aliases`: short words of the command line; `unused`: knobs of shared sections that mean
    nothing here, so that a value for one is refused and none is shown."""

    aliases: ClassVar[dict[str, str]] = {}
    unused: ClassVar[frozenset[str]] = frozenset()


@dataclass
class PretrainConfig(Recipe):
    aliases = {"init": "run.init"}
    unused = frozenset({"run.init"})  # pretraining starts from nothing

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        rows = self.train.batch_tokens / self.data.seq_len
        if rows != int(rows):
            near = max(1, round(rows)) * self.data.seq_len
            raise UserError(
                f"train.batch_tokens={self.train.batch_tokens} must be a multiple of data.seq_len={self.data.seq_len}; "
                f"try {near}"
            )
        if self.data.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"data.seq_len={self.data.seq_len} exceeds model.max_position_embeddings="
                f"{self.model.max_position_embeddings}; raise the latter"
            )
        if self.data.seq_len < self.model.num_nextn_predict_layers + 2:
            raise UserError(
                f"data.seq_len={self.data.seq_len} leaves no target for model.num_nextn_predict_layers="
                f"{self.model.num_nextn_predict_layers}; raise it"
            )

    @property
    def rows(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.train.batch_tokens // self.data.seq_len


@dataclass
class FinetuneConfig(PretrainConfig):
    """Supervised fine-tuning: a task's demonstrations, or `data.path`, a .jsonl of messages or prompt and response."""

    unused = frozenset({"data.corpus", "data.text_column", "data.fraction", "data.mask_documents", "train.eval_tokens"})

    sft: SftConfig = field(default_factory=SftConfig)
    task: TaskConfig = field(default_factory=TaskConfig)


@dataclass
class GrpoRecipe(Recipe):
    """Reinforcement learning on a task whose answers can be checked."""

    aliases = {"init": "run.init"}
    unused = frozenset({"train.batch_tokens", "train.eval_tokens", "train.compile"})

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.model = replace(self.model, num_nextn_predict_layers=0)  # MTP takes no part: nothing here trains it


@dataclass
class GenerateRecipe(Recipe):
    aliases = {"run": "run.init", "prompt": "generate.prompt"}
    unused = frozenset({"run.dir", "run.dry_run"}) | {
        f"train.{f.name}" for f in fields(TrainConfig) if f.name not in ("device", "threads", "keep_memory", "ops")
    }

    generate: GenerateConfig = field(default_factory=GenerateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
