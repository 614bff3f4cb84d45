"""The folder around the weights: whole or not there, with the tokenizer's files in the form transformers reads.

    work aside in .NAME.tmp-*, sync, rename; an export that was there before goes only when the new one stands

Not here: the weights and config.json (hf.py, hf_config.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.config import UserError
from moe.files import sync

EXPORTED = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder next to `path`, which takes that place when the block ends well and disappears when it does not."""
    final = Path(os.path.realpath(path))
    _check_replaceable(final)
    aside = final.with_name(f".{final.name}.tmp-{os.getpid()}-{time.time_ns()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in sorted(aside.iterdir()):
            sync(file)
        sync(aside)
        _publish(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # before any message: it also frees the space
        raise


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Any, vocab_size: int, max_length: int) -> dict[str, int | None]:
    """tokenizer.json, tokenizer_config.json, generation_config.json -> ids of bos, eos and pad.

    `tokenizer`: an object with save(folder), bos, eos and pad, or the path of a tokenizer.json.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        from moe.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(tokenizer)
    file = folder / "tokenizer.json"
    tokenizer.save(file)
    spellings = _spellings(json.loads(file.read_bytes()))
    if max(spellings, default=0) >= vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {max(spellings)} but the model has model.vocab_size={vocab_size} rows; "
            "export it with the tokenizer it was trained with"
        )
    ids = {role: getattr(tokenizer, role, None) for role in ("bos", "eos", "pad")}
    tokens = {f"{role}_token": None if i is None else spellings[i] for role, i in ids.items()}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokens,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(folder / "generation_config.json", {f"{role}_token_id": i for role, i in ids.items() if i is not None})
    return ids


def _spellings(spec: dict[str, Any]) -> dict[int, str]:
    """id -> token, of everything a tokenizer.json holds."""
    vocab = spec["model"].get("vocab", {})
    if isinstance(vocab, list):  # unigram: [token, score], the place is the id
        found = {i: token for i, (token, _) in enumerate(vocab)}
    else:
        found = {i: token for token, i in vocab.items()}
    return found | {token["id"]: token["content"] for token in spec.get("added_tokens") or []}


def _check_replaceable(final: Path) -> None:
    """Nothing but an earlier export is ever deleted."""
    if not final.exists():
        return
    if not final.is_dir():
        raise UserError(f"{final} is a file, an export is a folder; name another path")
    strange = sorted(p.name for p in final.iterdir() if p.is_dir() or not EXPORTED.fullmatch(p.name))
    if strange:
        raise UserError(
            f"{final} holds files that are no export ({', '.join(strange[:3])}{', ...' if strange[3:] else ''}) and "
            "would be lost; name another folder, or move them away"
        )


def _publish(aside: Path, final: Path) -> None:
    old = aside.with_name(aside.name.replace(".tmp-", ".old-"))
    existed = final.exists()
    if existed:
        os.rename(final, old)
    try:
        os.rename(aside, final)
    except BaseException:
        if existed:
            os.rename(old, final)
        raise
    sync(final.parent)
    # also what a killed process left; an old export among it is only now no longer needed
    for left in final.parent.iterdir():
        if left.name.startswith((f".{final.name}.tmp-", f".{final.name}.old-")):
            shutil.rmtree(left, ignore_errors=True)
