"""Text to token ids and back: byte-level BPE with DeepSeek's split, trained here or read from any tokenizer.json; or one
id a character of a small alphabet, for tasks.

    ids 0..63      control tokens, spelled as DeepSeek's: BOS 0, EOS 1, padding 2, FIM, roles, <think>, then reserved
    ids 64..319    the 256 bytes            ids 320..    merges
    characters: BOS 0, EOS 1, padding 2, then the alphabet; other characters are an error, never dropped

Text is never an instruction: a document that contains the letters `<think>` gets the ids of those letters, unless the
caller asks for control tokens with `allow_special=True` (chat templates). decode(encode(x)) == x for any valid text.

Source: the pre-tokenizer of DeepSeek-V3's tokenizer.json; byte-level BPE, GPT-2 (Radford et al., 2019).
Not here: BOS and EOS around documents (packing.py), chat templates, fill-in-the-middle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from moe.config import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
CONTROL = [BOS, EOS, PAD, "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>"]
CONTROL += ["<think>", "</think>"]
CONTROL += [f"<｜reserved▁{i}｜>" for i in range(len(CONTROL), 64)]
SMALLEST = len(CONTROL) + 256  # every byte has an id of its own, so nothing is ever unknown

SPLITS = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]

# Names under which published tokenizers keep these roles, most specific first.
EOS_NAMES = [EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>", "[EOS]"]
BOS_NAMES = [BOS, "<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|bos|>", "[BOS]"]
PAD_NAMES = [PAD, "<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]"]


class Tokenizer:
    """A tokenizer.json with its roles found. `bos` may be None; `pad` is EOS where the file has no padding token."""

    def __init__(self, text: str, source: str = "this tokenizer"):
        self.text = text
        self._plain = _build(_all_control_special(text), source)
        self._plain.encode_special_tokens = True  # to the library: spell control tokens out, don't recognise them
        self.added = {i: t.content for i, t in self._plain.get_added_tokens_decoder().items() if not t.special}
        self.special = {i: t.content for i, t in self._plain.get_added_tokens_decoder().items() if t.special}
        eos = self._first(EOS_NAMES)
        if eos is None:
            raise UserError(
                f"data.tokenizer={source} has none of the end-of-text tokens {', '.join(EOS_NAMES)}; "
                "add one, or use data.tokenizer=train"
            )
        self.eos: int = eos
        self.bos: int | None = self._first(BOS_NAMES)
        pad = self._first(PAD_NAMES)
        self.pad: int = self.eos if pad is None else pad
        self.vocab_size: int = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1  # ids may have holes
        self.fingerprint: str = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.alphabet: str | None = _alphabet(self._plain, set(self.special.values()))
        self._apart: dict[str, bool] = {}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE of at most `vocab_size` ids (fewer where the text is too small to fill them)."""
        if vocab_size < SMALLEST:
            raise UserError(
                f"model.vocab_size={vocab_size} is too small to train a tokenizer: {len(CONTROL)} control tokens and "
                f"256 bytes need {SMALLEST}; set model.vocab_size={SMALLEST} or more"
            )
        _parallelism()
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Native

        native = Native(models.BPE())
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        native.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
        native.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # a pair seen once is a memory of one document, not a piece of the language
            show_progress=False,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in CONTROL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        native.train_from_iterator(texts, trainer)
        return cls(native.to_str())

    @classmethod
    def characters(cls, alphabet: str) -> Tokenizer:
        """One id a character, after BOS, EOS and padding: no text is spelled in two ways, and none is joined."""
        _parallelism()
        from tokenizers import AddedToken, decoders, models
        from tokenizers import Tokenizer as Native

        roles = [BOS, EOS, PAD]
        native = Native(models.BPE({token: i for i, token in enumerate([*roles, *dict.fromkeys(alphabet)])}, []))
        native.decoder = decoders.Fuse()  # else the library puts spaces between tokens
        native.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in roles])
        return cls(native.to_str())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Read a tokenizer.json, or the one inside a folder."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            text = file.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise UserError(
                f"data.tokenizer={path} does not exist; name a tokenizer.json, or use data.tokenizer=train"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.tokenizer={path} cannot be read: {error}") from None
        return cls(text, str(path))

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json; a folder gets a file of that name."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        file.write_bytes(self.text.encode())

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`, without BOS or EOS. Control tokens are recognised only with `allow_special`."""
        native = self._reader if allow_special else self._plain
        self._check_characters(text, list(self.special.values()) if allow_special else [])
        return native.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many documents, over all cores."""
        for text in texts:
            self._check_characters(text, [])
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that do not form a character yet become U+FFFD."""
        return self._plain.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def id(self, token: str) -> int | None:
        """Id of one token by its exact spelling, such as `<think>`."""
        return self._plain.token_to_id(token)

    def keeps_apart(self, alphabet: str) -> bool:
        """Whether each of these characters is a token of its own, whatever stands next to it."""
        if alphabet not in self._apart:
            space = {"Ġ", "▁"} if " " in alphabet else set()  # how byte-level and SentencePiece files spell it
            letters = {*alphabet, *space}
            vocab = self._plain.get_vocab(with_added_tokens=True)
            self._apart[alphabet] = not any(len(token) > 1 and letters.issuperset(token) for token in vocab)
        return self._apart[alphabet]

    def _check_characters(self, text: str, control: list[str]) -> None:
        if self.alphabet is None:
            return
        for name in control:
            text = text.replace(name, "")
        strange = next((c for c in text if c not in self.alphabet), None)
        if strange is not None:
            raise UserError(
                f"data.tokenizer has no token for {strange!r}, only for the characters {self.alphabet!r}; write the "
                "text in these, or use another tokenizer.json"
            )

    @cached_property
    def _reader(self):
        """The file as it stands, which recognises control tokens; a second of loading for a large vocabulary."""
        return _build(self.text, "this tokenizer")

    def _first(self, names: list[str]) -> int | None:
        found = (self._plain.token_to_id(name) for name in names)
        return next((i for i in found if i is not None), None)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """[V] int32 bytes of text that each id stands for; control tokens and holes count 0.

    Their sum over a document's ids is exactly its length in bytes for a byte-level tokenizer. For a SentencePiece-like
    file (`▁` for a space, `<0x0A>` for a byte) each document may count one byte more, the space put before it.
    """
    spec = json.loads(tokenizer.text)
    byte_level = "ByteLevel" in {part.get("type") for part in _walk([spec.get("pre_tokenizer"), spec.get("decoder")])}
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int32)
    for token, i in tokenizer._plain.get_vocab(with_added_tokens=True).items():
        if i in tokenizer.special:
            continue
        if i in tokenizer.added or tokenizer.alphabet is not None:
            lengths[i] = len(token.encode())
        elif byte_level:
            lengths[i] = len(token)  # one character of the byte alphabet is one byte
        elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            lengths[i] = 1
        else:
            lengths[i] = len(token.replace("▁", " ").encode())
    return lengths


def check_fits(tokenizer: Tokenizer, vocab_size: int, source: str) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding rows."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer={source} has {tokenizer.vocab_size} ids but the model has model.vocab_size={vocab_size} "
            f"rows; set model.vocab_size={tokenizer.vocab_size}"
        )


def _build(text: str, source: str):
    _parallelism()
    from tokenizers import Tokenizer as Native

    try:
        native = Native.from_str(text)
    except Exception as error:  # the library raises bare Exception, nothing narrower
        raise UserError(
            f"data.tokenizer={source} is not a valid tokenizer.json: {str(error).splitlines()[0]}; "
            "replace the file, or use data.tokenizer=train"
        ) from None
    native.no_truncation()  # some files cut at 128 tokens or pad a batch; a corpus wants neither
    native.no_padding()
    return native


def _alphabet(native, special: set[str]) -> str | None:
    """The characters of a tokenizer that gives each an id and has no way to spell others; None for all other files."""
    tokens = native.get_vocab(with_added_tokens=True).keys() - special
    if native.pre_tokenizer or native.normalizer or getattr(native.model, "unk_token", None):
        return None
    return "".join(sorted(tokens)) if all(len(token) == 1 for token in tokens) else None


def _all_control_special(text: str) -> str:
    """The same file with every control-like added token marked special.

    The library can read special tokens as letters, but published files mark only some of theirs: DeepSeek's
    <｜User｜> and <think> are ordinary added tokens. Runs of spaces and the like stay what they are.
    """
    try:
        spec = json.loads(text)
        added = [t for t in spec.get("added_tokens") or [] if not t["special"] and _control_like(t["content"])]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return text  # not a tokenizer.json: `_build` says so in the library's words
    for token in added:
        token["special"] = True
    return json.dumps(spec, ensure_ascii=False) if added else text


def _control_like(token: str) -> bool:
    return any(mark in token for mark in "<>[]|｜")


def _walk(part):
    """Every dict inside a piece of JSON."""
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _walk(inner)


def _parallelism() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # explicit: else the library warns after every fork
