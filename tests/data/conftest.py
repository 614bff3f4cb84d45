"""Fresh random text and documents for the data tests, from the seed that every test prints."""

import json
import os
import random
import subprocess
import sys

import pytest

from moe.data.sources import Document
from moe.data.tokenizer import Tokenizer


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.fixture
def words(rng):
    """words(n): n lines of Python-like text, different in every test."""
    names = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(60)]

    def write(lines: int) -> str:
        return "".join(f"    {rng.choice(names)} = {rng.choice(names)}({rng.randint(0, 999)})\n" for _ in range(lines))

    return write


@pytest.fixture
def documents(words, rng):
    """documents(n): n documents of 1 to 30 lines."""
    return lambda n: [Document(f"doc{i}", words(rng.randint(1, 30))) for i in range(n)]


@pytest.fixture(scope="session")
def tokenizer():
    text = "def forward(self, x):\n    return self.linear(x) + 12345  # 你好 café\n" * 20
    return Tokenizer.train([text, "    abc = cab(7)\n" * 50], 400)


@pytest.fixture
def at_once():
    """at_once(code, values): two processes run `code` (which sees `values`) at the same moment; their JSON lines."""

    def run(code: str, values: dict) -> list:
        start = "import json, sys; values = json.loads(sys.argv[1]); print(flush=True); sys.stdin.readline()\n"
        paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        both = [
            subprocess.Popen([sys.executable, "-W", "ignore", "-c", imports(code) + start + code, json.dumps(values)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=paths)
            for _ in range(2)
        ]  # fmt: skip
        for process in both:
            process.stdout.readline()  # it has imported everything and waits
        answers = []
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in both:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            answers.append([json.loads(line) for line in out.splitlines()])
        return answers

    def imports(code: str) -> str:
        return "".join(f"{line}\n" for line in code.splitlines() if line.startswith(("import ", "from ")))

    return run
