"""What machine code of a kernel must not do: the rules of tools/compile_kernels.py, one line a breach."""

from __future__ import annotations

from moe.kernels import ahead


def faults(dtype: str, ctas: int | None, made: ahead.Compiled) -> list[str]:
    """What this binary does that it must not; ctas is None for kernels that have no row in the table."""
    have = ahead.LIMITS[made.arch]
    local = made.count("LDL", "STL")
    # whole words: REDUX is no RED, and tcgen05 brings ATOMS of its own, on whole numbers
    atomics = made.count("ATOM", "ATOMG", "RED", "REDG") + made.count("ATOMS", of=("F16x2", "BF16x2", "F32", "F64"))
    broken = {
        f"{made.stack} bytes of stack": made.stack,
        f"{local} accesses to local memory": local,
        f"{atomics} atomics": atomics,
        f"{made.shared} bytes of shared memory, the card has {have.block_shared}": made.shared > have.block_shared,
        f"{made.tensor_columns} columns of tensor memory": made.tensor_columns > ahead.TENSOR_COLUMNS,
        **{line.strip(): True for line in made.warnings},
    }
    if ctas is not None:
        broken |= product_faults(dtype, ctas, made)
    return [what for what, is_so in broken.items() if is_so]


def product_faults(dtype: str, ctas: int, made: ahead.Compiled) -> dict[str, object]:
    """The rules of kernels whose tile comes from the table: all of them multiply matrices."""
    found: dict[str, object] = {f"{made.ctas} programs a multiprocessor, the row says {ctas}": made.ctas < ctas}
    if dtype == "float32":
        return found | {"no FFMA: exact fp32 products do not run on tensor cores": not made.count("FFMA", "FFMA2")}
    own = made.tensor_word
    found[f"no {own}"] = not made.count(own)
    if dtype != "tf32":
        found[f"{made.count('HMMA')} HMMA beside HGMMA"] = made.arch == 90 and made.count("HMMA")
        moved, step = wide_bytes(made), step_bytes(made)
        found[f"16-byte loads move {moved} bytes, a step has {step}"] = moved < step
        found[f"{narrow(made)} narrow loads"] = narrow(made)
    return found


def wide_bytes(made: ahead.Compiled) -> int:
    """What a program's threads move if each load of 16 or 8 bytes runs once."""
    return 32 * made.warps * sum(n * made.count("LDG", "LDGSTS", of=(f"{8 * n}",)) for n in (16, 8))


def step_bytes(made: ahead.Compiled) -> int:
    """Both operands of one step in depth, of a 2-byte type."""
    m, n, k = (made.constants[f"BLOCK_{name}"] for name in "MNK")
    return 2 * (m + n) * k


def narrow(made: ahead.Compiled) -> int:
    """Loads of one 2-byte element, asynchronous copies of 4 bytes: a lost alignment hint, but for `order` within the loop."""
    copies = made.count("LDGSTS") - made.count("LDGSTS", of=("64", "128"))
    indexed = made.constants.get("GATHER_A") or made.constants.get("GATHER_B")
    return made.count("LDG", of=("U8", "S8", "U16", "S16")) + (0 if indexed else copies)
