"""Let a trained model continue text, printed as it is drawn.

    python recipes/generate.py run=runs/pretrain-tiny-96e3785f prompt="def forward(self"
    python recipes/generate.py run=exported generate.temperature=0          # a Hugging Face folder; asks for prompts

In the loop an empty line or Ctrl-D ends, Ctrl-C stops the current continuation; a pipe gives one prompt a line.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: two threads that spin starve each other (docs/benchmarks.md)

import sys
import time

import torch

from moe import LatentCache, config, generate, ops, parallel
from moe.data.chat import chat_prompt
from moe.train.log import entry
from moe.train.pretrained import Pretrained, load_model


def main() -> None:
    cfg = config.load(config.GenerateRecipe)
    if not cfg.run.init:
        raise config.UserError("run.init is not set; name a run folder or a Hugging Face folder: run=FOLDER")
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="replace")
    elif cfg.generate.prompt is None:
        raise config.UserError("there is no standard input to read prompts from; give generate.prompt=TEXT")
    with parallel.session(cfg.train) as ranks:
        ops.select(cfg.train.ops)
        found = load_model(cfg.run.init)
        found.model.to(ranks.device, torch.bfloat16 if cfg.generate.precision == "bf16" else torch.float32)
        if cfg.generate.prompt is None:
            return talk(cfg.generate, found)
        answer(cfg.generate, found, cfg.generate.prompt, echo=cfg.generate.prompt)


def talk(wish: config.GenerateConfig, found: Pretrained) -> None:
    print(f"{found.name}: an empty line ends", flush=True)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if not text:
            return
        try:
            answer(wish, found, text)
        except config.UserError as error:
            print(f"error: {error}", flush=True)
        except KeyboardInterrupt:
            print(flush=True)


def answer(wish: config.GenerateConfig, found: Pretrained, text: str, echo: str = "") -> None:
    """Print the continuations of `text` one after the other, each with what it took."""
    model, tokenizer, _ = found
    reach, bos = model.config.max_position_embeddings, [] if tokenizer.bos is None else [tokenizer.bos]
    text = text.encode(errors="replace").decode()  # bytes of an argument that were no UTF-8
    if not text:
        raise config.UserError("generate.prompt is empty; give some text, or leave it out to be asked")
    ids = chat_prompt([("user", text)], tokenizer) if wish.chat else bos + tokenizer.encode(text)
    new = min(wish.max_new_tokens, reach - len(ids))
    if new < 1:
        raise config.UserError(f"generate.prompt has {len(ids)} tokens and the model reads {reach}; shorten it")
    if new < wish.max_new_tokens:
        print(f"generate.max_new_tokens is cut from {wish.max_new_tokens} to {new}: the model reads {reach} tokens")
    cache = LatentCache.for_model(model.config, 1, len(ids) + new, model.embed.weight.dtype, "meta").nbytes
    options = {"top_p": wish.top_p, "eos": tokenizer.eos}
    for seed in range(wish.seed, wish.seed + wish.samples):
        print(echo, end="", flush=True)
        start = time.perf_counter()
        drawn = generate(model, [ids], new, wish.temperature, [seed], stream=Written(tokenizer, ids), **options)
        count = len(drawn.tokens[0])
        print(f"\n[{count} tokens, {count / (time.perf_counter() - start):.1f} tokens/s, cache {cache:,} bytes]", flush=True)


class Written:
    """Prints ids as text. A character's bytes may come as several ids: only what is complete is printed."""

    def __init__(self, tokenizer, ids: list[int]) -> None:
        self.text = lambda: tokenizer.decode(self.ids, skip_special=True).rstrip("\ufffd")
        self.ids = ids[-8:]  # some tokenizers spell an id by what stands before it
        self.shown = self.text()

    def __call__(self, _: int, token: int) -> None:
        self.ids.append(token)
        print(self.text()[len(self.shown) :], end="", flush=True)
        self.ids = self.ids[-32:]
        self.shown = self.text()


if __name__ == "__main__":
    entry(main)
