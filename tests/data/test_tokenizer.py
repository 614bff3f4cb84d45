"""Text survives the tokenizer whatever it holds, text never becomes a control token, foreign files find their roles."""

import json
import re
import unicodedata

import pytest

from moe.config import UserError
from moe.data.tokenizer import BOS, CONTROL, EOS, PAD, SMALLEST, Tokenizer, check_fits, token_bytes

WORLD = [range(0x20, 0x7F), range(0x80, 0x250), range(0x370, 0x600), range(0x900, 0x980), range(0x3040, 0x3100),
         range(0x4E00, 0x9FA5), range(0xAC00, 0xD7A4), range(0x1F300, 0x1F700), range(0, 0x20), range(0x2000, 0x2070),
         range(0xE000, 0xE010), range(0x10FFF0, 0x110000)]  # fmt: skip


def random_text(rng, length=80):
    """Letters of many scripts, controls, emoji, runs of spaces and line ends, digits, pieces of control tokens."""
    pieces = [
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u2028",
        "\ufeff",
        "e\u0301",
        "\u200d",
        "0123456789",
        *CONTROL[:12],
        "｜",
        "▁",
    ]
    return "".join(
        rng.choice(pieces) if rng.random() < 0.4 else chr(rng.choice(rng.choice(WORLD))) for _ in range(length)
    )


def foreign(*names, special=True, **changes):
    """A small byte-level tokenizer.json as someone else might publish it, with these control tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Native

    native = Native(models.BPE())
    native.pre_tokenizer, native.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    native.train_from_iterator(["some text some text"], trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=260))
    native.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return json.dumps({**json.loads(native.to_str()), **changes})


def test_any_text_survives_a_round_trip(tokenizer, rng):
    for _ in range(300):
        text = random_text(rng)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_gives_what_single_texts_give(tokenizer, rng):
    texts = [random_text(rng, rng.randint(0, 50)) for _ in range(40)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_bytes_of_tokens_add_up_to_the_text(tokenizer, rng):
    lengths = token_bytes(tokenizer)
    assert lengths.shape == (tokenizer.vocab_size,) and not lengths[: len(CONTROL)].any()
    for _ in range(200):
        text = random_text(rng)
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_control_tokens_have_deepseeks_spelling_and_fixed_ids(tokenizer):
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
    assert [tokenizer.id(name) for name in CONTROL] == list(range(64))
    assert CONTROL[:10] == [
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>",
        "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CONTROL[:12])
def test_control_tokens_in_text_stay_letters(tokenizer, name):
    text = f"before {name}after{name}{name} {name}"
    for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0]):
        assert min(ids) >= 64 and tokenizer.decode(ids) == text
    seen = tokenizer.encode(text, allow_special=True)
    assert seen.count(tokenizer.id(name)) == 4 and tokenizer.decode(seen) == text
    assert name not in tokenizer.decode(seen, skip_special=True)


def test_text_that_mentions_control_tokens_does_not_teach_them(tokenizer):
    taught = Tokenizer.train([f"{EOS}<think>{BOS}</think>" * 500], 600)
    assert min(taught.encode(f"{EOS}<think>{BOS}")) >= 64


def test_digits_are_split_in_groups_of_three(tokenizer):
    taught = Tokenizer.train(["123456789 1234567 " * 200], 500)
    pieces = [taught.decode([i]) for i in taught.encode("1234567")]
    assert pieces == ["123", "456", "7"]


def test_training_twice_gives_the_same_tokenizer(words):
    text = [words(200), words(100)]
    one, two = Tokenizer.train(text, 500), Tokenizer.train(iter(text), 500)
    assert one.text == two.text and one.fingerprint == two.fingerprint and len(one.fingerprint) == 12
    assert Tokenizer.train([words(200)], 500).fingerprint != one.fingerprint


def test_saved_and_loaded_is_the_same_tokenizer(tokenizer, tmp_path, rng):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path / "other.json")
    text = random_text(rng)
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path / "other.json")):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(text) == tokenizer.encode(text)
        assert (loaded.bos, loaded.eos, loaded.pad, loaded.vocab_size) == (0, 1, 2, tokenizer.vocab_size)


def test_no_text_is_enough_for_a_tokenizer_of_bytes():
    assert Tokenizer.train(["x"], SMALLEST).vocab_size == SMALLEST
    assert Tokenizer.train([], 4096).decode([*range(64, SMALLEST)]) != ""


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"model.vocab_size=319 .* set model.vocab_size=320"):
        Tokenizer.train(["text"], 319)


@pytest.mark.parametrize("eos, bos", [("</s>", "<s>"), ("<|endoftext|>", None), ("<eos>", "<bos>"),
                                      ("<|end_of_text|>", "<|begin_of_text|>"), (EOS, BOS)])  # fmt: skip
def test_roles_of_foreign_files_are_found(tmp_path, eos, bos):
    (tmp_path / "t.json").write_text(foreign(*filter(None, (bos, eos))))
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.decode([loaded.eos]) == eos and loaded.pad == loaded.eos
    assert loaded.bos is None if bos is None else loaded.decode([loaded.bos]) == bos
    assert loaded.vocab_size == max(loaded.eos, loaded.bos or 0) + 1


def test_a_foreign_file_without_an_end_token_is_refused_by_name(tmp_path):
    (tmp_path / "odd.json").write_text(foreign("<fin>"))
    with pytest.raises(UserError, match=r"odd.json has none of the end-of-text tokens .*</s>"):
        Tokenizer.load(tmp_path / "odd.json")


def test_control_tokens_not_marked_special_are_letters_too(tmp_path):
    (tmp_path / "t.json").write_text(foreign("</s>", "<think>", "      ", special=False))
    loaded = Tokenizer.load(tmp_path / "t.json")
    text = "a      b<think></s>c"
    ids = loaded.encode(text)
    assert loaded.id("<think>") not in ids and loaded.eos not in ids and loaded.decode(ids) == text
    assert loaded.id("      ") in ids, "a run of spaces is text, not control"
    assert token_bytes(loaded)[ids].sum() == len(text.encode())
    assert loaded.id("<think>") in loaded.encode(text, allow_special=True)


def test_truncation_and_padding_of_a_foreign_file_are_off(tmp_path, rng):
    limits = {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "</s>"}  # fmt: skip
    (tmp_path / "t.json").write_text(foreign("</s>", padding=padding, **limits))
    loaded = Tokenizer.load(tmp_path / "t.json")
    for text in ("a", "0123456789" * 10):
        assert loaded.decode(loaded.encode(text)) == text == loaded.decode(loaded.encode_batch([text])[0])


def test_a_sentencepiece_like_file_counts_its_bytes_up_to_the_leading_space(tmp_path):
    from tokenizers import Tokenizer as Native
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {f"<0x{i:02X}>": i + 2 for i in range(256)} | {
        "</s>": 0,
        "<unk>": 1,
        "▁": 258,
        "a": 259,
        "▁a": 260,
        "é": 261,
    }
    native = Native(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    native.pre_tokenizer = pre_tokenizers.Metaspace()
    native.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    native.add_special_tokens(["</s>", "<unk>"])
    native.save(str(tmp_path / "t.json"))
    loaded = Tokenizer.load(tmp_path / "t.json")
    text = "aé a 你"
    assert loaded.decode(loaded.encode(text)) == text
    assert token_bytes(loaded)[loaded.encode(text)].sum() == len(text.encode()) + 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'{"added_tokens": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_corrupt_file_is_named_in_one_line(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data.tokenizer=.*bad.json") as error:
        Tokenizer.load(tmp_path / "bad.json")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=r"does not exist.*data.tokenizer=train"):
            Tokenizer.load(path)


def test_a_vocabulary_beyond_the_model_names_both_numbers_and_the_remedy(tokenizer):
    check_fits(tokenizer, tokenizer.vocab_size, "t.json")
    short = tokenizer.vocab_size - 1
    with pytest.raises(UserError, match=rf"t.json has {tokenizer.vocab_size} ids .*model.vocab_size={short} .*"
                                        rf"set model.vocab_size={tokenizer.vocab_size}"):  # fmt: skip
        check_fits(tokenizer, short, "t.json")


def test_text_is_not_normalised(tokenizer):
    for form in ("NFC", "NFD", "NFKC"):
        text = unicodedata.normalize(form, "Ångström ﬁ ①")
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ----------------------------------------------------------------------------------------------------------- characters

TASK_LETTERS = "0123456789+-*=;>: ()|"


def test_a_character_tokenizer_has_one_id_a_character_after_the_roles(rng):
    made = Tokenizer.characters(TASK_LETTERS)
    assert made.vocab_size == 24 and (made.bos, made.eos, made.pad) == (0, 1, 2)
    assert [made.id(name) for name in (BOS, EOS, PAD)] == [0, 1, 2] and made.id("<｜User｜>") is None
    assert made.encode(TASK_LETTERS) == list(range(3, 24))
    assert Tokenizer.characters("aab").vocab_size == 5, "a letter that is named twice has one id"
    assert Tokenizer.characters("").vocab_size == 3


def test_any_text_of_the_alphabet_survives_a_round_trip(rng, tmp_path):
    letters = "".join({chr(rng.choice(rng.choice(WORLD))) for _ in range(60)} | {"▁", " ", "Ġ", "é", "\n"})
    made = Tokenizer.characters(letters)
    made.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == made.fingerprint and loaded.vocab_size == 3 + len(letters)
    for _ in range(100):
        text = "".join(rng.choices(letters, k=rng.randint(0, 40)))
        ids = loaded.encode(text)
        assert len(ids) == len(text) and loaded.decode(ids) == text and made.encode(text) == ids
        assert token_bytes(loaded)[ids].sum() == len(text.encode())
    assert token_bytes(loaded)[:3].sum() == 0


@pytest.mark.parametrize("text, strange", [("12a3", "a"), ("é", "é"), ("1\n", "\\n"), (f"1{EOS}", "<"), ("１", "１")])
def test_a_character_outside_the_alphabet_is_named_and_never_dropped(text, strange):
    made = Tokenizer.characters(TASK_LETTERS)
    for encode in (made.encode, lambda t: made.encode_batch(["12", t])):
        with pytest.raises(UserError, match=f"no token for '{re.escape(strange)}'") as error:
            encode(text)
        assert "\n" not in str(error.value)


def test_control_tokens_of_a_character_tokenizer_are_read_on_request_alone():
    made = Tokenizer.characters(TASK_LETTERS)
    assert made.encode(f"{BOS}1>{EOS}", allow_special=True) == [0, 4, made.id(">"), 1]
    assert made.decode([0, 4, 1]) == f"{BOS}1{EOS}" and made.decode([0, 4, 1], skip_special=True) == "1"
    with pytest.raises(UserError, match="no token for 'x'"):
        made.encode(f"{BOS}x", allow_special=True)


def test_transformers_reads_an_exported_character_tokenizer(tmp_path, rng):
    transformers = pytest.importorskip("transformers")
    from moe.interop.hf_folder import write_tokenizer

    made = Tokenizer.characters(TASK_LETTERS)
    write_tokenizer(tmp_path, made, made.vocab_size, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(rng.choices(TASK_LETTERS, k=50))
    assert theirs.encode(text, add_special_tokens=False) == made.encode(text)
    assert theirs.decode(made.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def test_which_tokenizers_keep_characters_apart(tokenizer):
    assert Tokenizer.characters(TASK_LETTERS).keeps_apart(TASK_LETTERS)
    assert Tokenizer.train([], SMALLEST).keeps_apart(TASK_LETTERS) and tokenizer.alphabet is None
    joins = Tokenizer.train(["12 12 12 ( ( (x) (x)" * 50], 400)
    assert not joins.keeps_apart("0123456789") and not joins.keeps_apart(" (") and joins.keeps_apart("3456789")
    assert joins.keeps_apart("("), "a space joined to a sign matters only where spaces are used"


def test_a_foreign_file_of_characters_with_an_unknown_token_keeps_it(tmp_path):
    from tokenizers import Tokenizer as Native
    from tokenizers import models

    native = Native(models.WordLevel({"</s>": 0, "?": 1, "a": 2}, unk_token="?"))
    native.add_special_tokens(["</s>"])
    native.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").encode("b") == [1]
