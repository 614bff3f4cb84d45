"""Problems are the same everywhere and for ever, held-out ones never appear in training, and only right answers pass."""

import ast
import itertools
import random

import numpy as np
import pytest

from moe.config import TaskConfig, UserError
from moe.data.packing import _mix
from moe.data.tasks import (
    ALPHABET,
    TASKS,
    Problem,
    Task,
    countdown_solved,
    draws,
    encode_answer,
    encode_prompt,
    mix,
    render,
    spaced,
    spelled,
)
from moe.data.tokenizer import Tokenizer


def task(name="sort", **changes) -> Task:
    sizes = dict(min_length=3, max_length=4, held_out=300) if name == "countdown" else {}
    return TASKS[name](TaskConfig(name=name, **{**sizes, **changes}))


@pytest.fixture(scope="module", params=list(TASKS))
def each(request):
    return task(request.param)


def test_prompts_never_change():
    """A run must find the same problems after any update, on any machine."""
    assert [(p.prompt, p.answer) for p in task().train(0, 0, 4)] == [
        ("722629875156>", "122255667789"), ("43415928>", "12344589"), ("2350434495>", "0233444559"),
        ("86766650>", "05666678"),
    ]  # fmt: skip
    assert [p.prompt for p in task().held_out()[:3]] == ["029012185>", "20155660>", "175843>"]
    assert [p.prompt for p in task().demonstrations(0)[:3]] == ["33546756335>", "510317208>", "053715782>"]
    assert task("countdown", min_length=3, max_length=3).train(0, 0, 2) == [
        Problem("7 6 9>22:", "6+9+7", 3), Problem("2 4 9>72:", "2*4*9", 3)
    ]  # fmt: skip


def test_draws_are_plain_integer_arithmetic_as_the_order_of_rows(rng):
    numbers = [rng.randrange(-(2**63), 2**63) for _ in range(100)]
    want = _mix(np.array([n % 2**64 for n in numbers], np.uint64)).tolist()
    assert [mix(n) for n in numbers] == want
    a, b = numbers[:2]
    assert mix(a, b) == int(_mix(_mix(np.array([a % 2**64], np.uint64)) + np.uint64(b % 2**64))[0])
    assert list(itertools.islice(draws(a, b), 3)) == [mix(mix(a, b), k) for k in range(3)]


def test_a_problem_depends_on_its_number_alone(each, rng):
    seed, start, count = rng.randrange(2**40), rng.randrange(10**6), 40
    together = each.train(seed, start, count)
    assert together == [each.train(seed, start + i, 1)[0] for i in range(count)]
    assert together == [*each.train(seed, start, 7), *each.train(seed, start + 7, count - 7)]
    assert together != each.train(seed + 1, start, count) and together != each.train(seed, start + count, count)
    assert each.train(seed, start, 0) == []


def test_held_out_problems_are_the_same_for_every_seed_and_in_no_stream(each, rng):
    held = each.held_out()
    assert len({p.prompt for p in held}) == len(held) == each.cfg.held_out
    assert TASKS[each.cfg.name](each.cfg).held_out() == held
    hidden = {each.content(p) for p in held}
    for seed in (0, rng.randrange(2**40)):
        seen = [*each.train(seed, rng.randrange(10**6), 3000), *each.demonstrations(seed)]
        assert not hidden & {each.content(p) for p in seen} and not any(map(each.is_held_out, seen))
    assert all(map(each.is_held_out, held))


def test_more_held_out_problems_begin_with_the_fewer():
    assert task(held_out=100).held_out() == task(held_out=300).held_out()[:100]


def test_demonstrations_are_distinct_and_follow_the_seed(each):
    one, again, other = each.demonstrations(1), each.demonstrations(1), each.demonstrations(2)
    assert len({p.prompt for p in one}) == len(one) == each.cfg.demonstrations
    assert one == again != other


def test_all_sizes_appear_about_equally(rng):
    problems = task(min_length=2, max_length=9, held_out=4).train(rng.randrange(2**40), 0, 4000)
    counts = np.bincount([p.level for p in problems], minlength=10)[2:]
    assert counts.sum() == 4000 and abs(counts - 500).max() < 130, counts
    digits = np.bincount([int(c) for p in problems for c in p.prompt[:-1]], minlength=10)
    assert abs(digits / digits.sum() - 0.1).max() < 0.01


def test_sorting_is_sorting(rng):
    for p in task(min_length=1, max_length=12).train(rng.randrange(2**40), 0, 300):
        assert p.prompt.endswith(">") and p.level == len(p.answer) == len(p.prompt) - 1
        assert p.answer == "".join(map(str, np.sort([int(c) for c in p.prompt[:-1]])))


def test_the_stored_answer_passes_and_fits_the_alphabet(each, rng):
    tokenizer = Tokenizer.characters(each.alphabet)
    for p in each.train(rng.randrange(2**40), 0, 500):
        assert each.check(p, p.answer) and each.check(spaced(p), spaced(p).answer)
        assert set(p.prompt + p.answer) <= set(each.alphabet)
        assert spelled(encode_answer(p, tokenizer), tokenizer) == p.answer


def test_sort_takes_the_exact_answer_only(rng):
    sort = task()
    p = Problem("52931>", "12359", 5)
    wrong = [
        "",
        "1235",
        "123599",
        "12359 ",
        " 12359",
        "012359",
        "12395",
        "1 2 3 5 9",
        "12359>",
        "１２３５９",
        "x" * 10**6,
    ]
    assert sort.check(p, "12359") and not any(sort.check(p, text) for text in wrong)


@pytest.mark.parametrize("text, right", [
    ("3*5+7", True), ("7+5*3", True), ("(3*5)+7", True), ("((7)+((5)*3))", True), ("3 * 5 + 7", True),
    ("3*(5+7)", False), ("22", False), ("3*5", False), ("3*5+7+0", False), ("3*5+7*1", False), ("5*3+7-7+7", False),
    ("35-7", False), ("3*5+7=22", False), ("3*5+7)", False), ("(3*5+7", False), ("3**5+7", False), ("+3*5+7", False),
    ("3*5--7", False), ("", False), ("()", False), ("(" * 10**5, False), ("3*５+7", False), ("3*5+7\n", False),
    ("3 *5+7", False), ("3×5+7", False), ("__import__('os')", False), ("3" * 10**5, False), ("3²+5+7", False),
    ("(" * 40 + "3*5+7" + ")" * 40, True),
])  # fmt: skip
def test_countdown_takes_any_expression_over_exactly_its_numbers(text, right):
    assert countdown_solved("3 5 7>22:", text) is right


def test_countdown_reads_expressions_as_python_does(rng):
    """Random strings of the alphabet, against Python's own parser."""
    valid = 0
    for _ in range(6000):
        text = "".join(rng.choices("12345()+-*", weights=[3] * 5 + [2, 2, 3, 3, 3], k=rng.randint(1, 9)))
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError):
            tree = None
        nodes = list(ast.walk(tree)) if tree else []
        ours = all(not isinstance(n, (ast.UnaryOp, ast.Call, ast.Pow, ast.Tuple)) for n in nodes)
        numbers = [n.value for n in nodes if isinstance(n, ast.Constant)]
        if not tree or not ours or not numbers or max(numbers) > 9:
            assert not countdown_solved("1 2>3:", text) or text in ("1+2", "2+1")
            continue
        valid += 1
        value = eval(compile(tree, "", "eval"))
        given = " ".join(map(str, numbers))
        assert countdown_solved(f"{given}>{value}:", text) and not countdown_solved(f"{given}>{value + 1}:", text)
        assert not countdown_solved(f"{given} 1>{value}:", text)
    assert valid > 50


@pytest.mark.parametrize("size", [2, 3, 4])
def test_countdown_problems_use_their_numbers_once_and_stay_small(size, rng):
    for p in task("countdown", min_length=size, max_length=size, held_out=20).train(rng.randrange(2**40), 0, 300):
        given, target = p.prompt[:-1].split(">")
        assert sorted(map(int, given.split())) == sorted(int(c) for c in p.answer if c.isdigit())
        assert eval(p.answer) == int(target) and 0 <= int(target) <= 99 and p.level == size


def test_the_same_numbers_in_another_order_are_on_the_same_side(rng):
    countdown = task("countdown")
    for p in countdown.held_out()[:50]:
        given, target = p.prompt.split(">")
        numbers = given.split()
        rng.shuffle(numbers)
        assert countdown.is_held_out(Problem(f"{' '.join(numbers)}>{target}", p.answer, p.level))


@pytest.mark.parametrize("changes, message", [
    (dict(min_length=2, max_length=2), r"task.held_out=512: problems of size 2 to 2 gave only \d+ .* task.max_length"),
    (dict(min_length=1, max_length=1, held_out=9), r"task.held_out=9: .* raise task.max_length"),
    (dict(max_length=2000), r"task.max_length=2000: task.name=sort has sizes 1 to 999"),
    (dict(name="countdown"), r"task.min_length=6: task.name=countdown has sizes 2 to 4"),
])  # fmt: skip
def test_settings_that_cannot_be_met_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr("moe.data.tasks.PATIENCE", 2000)
    with pytest.raises(UserError, match=message):
        TASKS[changes.get("name", "sort")](TaskConfig(**changes))


def test_more_demonstrations_than_there_are_problems_are_refused(monkeypatch):
    monkeypatch.setattr("moe.data.tasks.PATIENCE", 2000)
    few = task(min_length=2, max_length=2, held_out=5, demonstrations=99)
    with pytest.raises(UserError, match=r"task.demonstrations=99: problems of size 2 to 2 gave only \d+"):
        few.demonstrations(0)


# ------------------------------------------------------------------------------------------------- text to ids and back


@pytest.fixture(scope="module")
def joining():
    """A BPE that joins digits and signs."""
    text = "".join(random.Random(0).choices("0123456789+-*()> ", k=20_000))
    return Tokenizer.train([text, "12359 12359 " * 500], 900)


def test_problems_are_spaced_only_where_a_tokenizer_joins_characters(joining, tokenizer):
    p = Problem("52931>", "12359", 5)
    assert render(p, Tokenizer.characters(ALPHABET)) == p
    assert render(p, joining) == spaced(p) == Problem("5 2 9 3 1 >", "1 2 3 5 9", 5)
    assert spaced(Problem("3 5 7>22:", "3*5+7", 3)) == Problem("3 5 7 > 2 2 :", "3 * 5 + 7", 3)
    assert not joining.keeps_apart("0123456789") and joining.keeps_apart("x~")


def test_what_is_encoded_is_spelled_back(each, joining, rng):
    for tokenizer in (joining, Tokenizer.characters(each.alphabet)):
        for p in each.train(rng.randrange(2**40), 0, 100):
            prompt, answer = encode_prompt(p, tokenizer), encode_answer(p, tokenizer)
            assert prompt[0] == tokenizer.bos and answer[-1] == tokenizer.eos
            assert tokenizer.decode(prompt[1:]) == render(p, tokenizer).prompt
            assert spelled([*answer, answer[0], answer[0]], tokenizer) == p.answer, "nothing counts after EOS"
            assert not each.check(p, spelled([*answer[:-1], answer[0]], tokenizer))


def test_only_the_spaces_of_the_rendering_are_taken_out(joining):
    for said, want in (("1 2 3", "123"), ("123", "123"), ("1 2 3 ", "1 2 3 "), ("1  2", "1  2"), ("", ""), ("7", "7")):
        assert spelled(joining.encode(said), joining) == want
    characters = Tokenizer.characters(ALPHABET)
    assert spelled(characters.encode("1 2"), characters) == "1 2"


def test_control_tokens_and_ids_without_a_spelling_are_no_part_of_a_right_answer():
    t = Tokenizer.characters(ALPHABET)
    one, two = t.encode("12")
    for strange in (t.pad, t.bos, t.vocab_size, t.vocab_size + 7):
        assert spelled([one, strange, two], t) != "12" and spelled([strange, one, two], t) != "12"
