"""Routing by Triton, in the interpreter, and by the native kernels: ops for autograd and compilers, and the router."""

import pytest
import torch

from moe import ops
from moe.kernels import reference
from moe.kernels.native import library
from moe.layers.router import Router
from moe.ops import paths
from tests.kernels.test_route import clear_logits
from tests.op_cases import with_gradients

F32, BF16 = torch.float32, torch.bfloat16
needs_native = pytest.mark.skipif(library.status() != "", reason=library.status())
N, E, CHOICE = 22, 24, (4, 6, 3)  # tokens, experts; choices, groups, groups used


@pytest.fixture
def triton(ops_path, monkeypatch):
    """Demanded for every op of the test, and trusted: the start-up check has tests of its own."""
    monkeypatch.setattr(paths, "_verdicts", {("cpu", None, dtype): "" for dtype in paths.KERNEL_DTYPES})
    ops_path("triton")


def router_of(scoring="sigmoid", **options):
    """A router that takes its input for logits, with a bias, and an input whose choice no rounding moves."""
    router = Router(E, E, *CHOICE, scoring, routed_scaling_factor=2.5, **options)
    router.weight.data.copy_(torch.eye(E))
    router.bias.copy_(torch.randn(E) * 0.2)
    return router, clear_logits(N, E, router.bias, *CHOICE, scoring)


@pytest.mark.parametrize("scoring, norm", [("sigmoid", True), ("softmax", False)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_op_is_well_formed_for_autograd_and_compilers(scoring, norm, masked):
    logits, bias = torch.randn(9, E, requires_grad=True), torch.randn(E)
    mask = torch.rand(9) < 0.7 if masked else None
    torch.library.opcheck(torch.ops.moe.route.default, (logits, bias, mask, *CHOICE, scoring, norm, 2.5))
    ids = ops.route(logits.detach(), bias, *CHOICE, scoring, norm, 2.5, mask)[0]
    torch.library.opcheck(
        torch.ops.moe.route_backward.default, (torch.randn(9, 4), logits.detach(), ids, scoring, norm, 2.5)
    )


def test_only_gates_carry_a_gradient_and_only_logits_get_one():
    logits, bias = torch.randn(9, E, requires_grad=True), torch.randn(E, requires_grad=True)
    ids, gates, counts = ops.route(logits, bias, *CHOICE, "sigmoid", True, 1.0)
    assert gates.requires_grad and not ids.requires_grad and not counts.requires_grad
    assert ids.dtype == counts.dtype == torch.int64 and counts.sum() == 36
    gates.square().sum().backward()
    assert logits.grad.ne(0).sum() == 36 and bias.grad is None


@pytest.mark.parametrize("kernel", ["triton", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("shape", [(N,), (2, N // 2), (1, 2, N // 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "scoring, options",
    [
        ("sigmoid", {}), ("sigmoid", dict(seq_aux_alpha=0.2, batch_aux_alpha=0.3)),
        ("softmax", dict(norm_topk_prob=False, seq_aux_alpha=0.2)),
    ],
)  # fmt: skip
def test_the_router_decides_alike_on_both_paths(agree, triton, ops_path, kernel, scoring, options, training, shape):
    router, x = router_of(scoring, **options)
    router.train(training)
    x, keep = x.view(*shape, E), bool(torch.rand(()) < 0.5)
    mask = (torch.rand(shape) < 0.7) if torch.rand(()) < 0.7 else None
    upstream, found = torch.randn(*shape, 4), []
    for path in (kernel, "torch"):
        ops_path(path)
        leaf = x.clone().requires_grad_()
        routing = router(leaf, mask=mask, keep_scores=keep)
        total = (routing.gates * upstream).sum() + sum(routing.losses.values())
        found.append((routing, torch.autograd.grad(total, (leaf, router.weight))))
    (a, gradients), (e, right) = found
    assert torch.equal(a.experts, e.experts) and torch.equal(a.counts, e.counts) and a.counts.dtype == e.counts.dtype
    agree(a.gates, e.gates, 1e-6)
    assert a.gates.dtype == e.gates.dtype and a.losses.keys() == e.losses.keys() and a.stats.keys() == e.stats.keys()
    assert len(a.losses) == training * sum("aux" in name for name in options) and bool(a.stats) == training
    for name, value in (*e.losses.items(), *e.stats.items()):
        agree({**a.losses, **a.stats}[name].float(), value.float(), 1e-5, what=name)
    assert (a.scores is None) == (not keep)
    if keep:
        agree(a.scores, e.scores, 1e-6)
    for actual, expected in zip(gradients, right):
        agree(actual, expected, 5e-6, scale=2.5)


def test_half_precision_tokens_are_routed_in_fp32(agree, triton, ops_path):
    router = Router(16, E, *CHOICE).to(BF16)
    x = torch.randn(N, 16).to(BF16)
    logits = x.double() @ router.weight.double().t()
    routing = router(x)
    s = torch.sigmoid(logits).gather(1, routing.experts)
    assert routing.gates.dtype == F32
    agree(routing.gates, s / s.sum(-1, keepdim=True), 1e-5)
    routing.gates.square().sum().backward()
    assert router.weight.grad.dtype == BF16 and router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_leading_dimensions_are_kept(triton, shape):
    routing = router_of()[0](torch.randn(*shape, E))
    assert routing.experts.shape == routing.gates.shape == (*shape, 4)
    assert torch.equal(routing.counts, torch.bincount(routing.experts.flatten(), minlength=E))


@pytest.mark.parametrize("options", [{}, dict(seq_aux_alpha=0.2)])
def test_whole_affinities_are_made_only_for_those_who_read_them(triton, monkeypatch, options):
    router, x = router_of(**options)
    rows = []
    affinities = Router._affinities
    monkeypatch.setattr(Router, "_affinities", lambda self, z: rows.append(len(z)) or affinities(self, z))
    monkeypatch.setattr("moe.layers.router.SAMPLE", 2)  # every 11th token
    router(x)
    assert rows == ([N] if options else [2])
    rows.clear()
    router.eval()(x)
    assert rows == []
    router.eval()(x, keep_scores=True)
    assert rows == [N]


def test_recorded_choices_and_choices_of_ones_own_stay_with_pytorch(triton, monkeypatch):
    router, x = router_of()
    recorded = torch.rand(N, E).topk(4).indices
    monkeypatch.setattr(ops, "route", None)
    assert torch.equal(router(x, replay=recorded).experts, recorded)

    class Last(Router):
        def choose(self, s, bias):
            return torch.arange(E - self.k, E).expand(s.shape[0], -1)

    assert Last(E, E, 4)(x).experts.eq(torch.arange(E - 4, E)).all()


@pytest.mark.parametrize("path", ["triton", "torch", pytest.param("native", marks=needs_native)])
def test_a_compiled_router_is_one_graph_with_the_same_gradients(triton, ops_path, agree, path):
    ops_path(path)
    router, x = router_of(seq_aux_alpha=0.1)
    mask, upstream = torch.rand(2, N // 2) < 0.8, torch.randn(2, N // 2, 4)

    def total(x, mask):
        routing = router(x, mask=mask)
        return (routing.gates * upstream).sum() + routing.losses["seq_aux"], routing.experts, routing.counts

    found = []
    for call in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaf = x.view(2, -1, E).clone().requires_grad_()
        y, ids, counts = call(leaf, mask)
        found.append((ids, counts, torch.autograd.grad(y, leaf)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    agree(found[1][2], found[0][2])


def test_a_token_is_routed_alike_whatever_stands_beside_it(triton):
    router, x = router_of()
    whole = router.eval()(x)
    for n in (0, 7, 8, N - 1):
        alone = router(x[n : n + 1])
        assert torch.equal(alone.experts[0], whole.experts[n]) and torch.equal(alone.gates[0], whole.gates[n])


def test_a_variant_keeps_its_own_affinities_where_a_kernel_would_answer(triton, ops_path):
    """The kernel knows one rule, the class's own."""

    class Flat(Router):
        def _affinities(self, logits):
            return torch.sigmoid(0.1 * logits)

    router, x, found = Flat(16, 8, 2), torch.randn(5, 16), []
    for path in ("torch", "triton"):
        ops_path(path)
        found.append(router(x).gates)
    assert torch.equal(*found)


# -------------------------------------------------------------------------------------------------- the native kernels


@needs_native
@pytest.mark.parametrize("scoring, norm", [("sigmoid", True), ("softmax", False)])
@pytest.mark.parametrize("n, masked, scored", [(9, True, True), (9, False, False), (0, True, False)])
def test_the_native_op_is_well_formed_for_autograd_and_compilers(scoring, norm, n, masked, scored):
    logits, bias = torch.randn(n, E, requires_grad=True), torch.randn(E)
    mask = torch.rand(n) < 0.7 if masked else None
    rule = *CHOICE, scoring, norm, 2.5
    torch.library.opcheck(torch.ops.moe.route_native.default, (logits, bias, mask, *rule, scored))
    ids = torch.ops.moe.route_native(logits.detach(), bias, mask, *rule, scored)[1]
    ds = torch.randn(n if scored else 0, E)
    torch.library.opcheck(
        torch.ops.moe.route_native_backward.default, (torch.randn(n, 4), ds, logits.detach(), ids, scoring, norm, 2.5)
    )


@needs_native
@pytest.mark.parametrize("masked", [True, False])
def test_the_native_sequence_loss_is_well_formed_and_right(agree, masked):
    s, mask = torch.rand(2, 5, 9), (torch.rand(2, 5) < 0.7) if masked else None
    torch.library.opcheck(torch.ops.moe.sequence_loss_native.default, (s.clone().requires_grad_(), mask, 3))
    found = with_gradients(lambda s: ops.sequence_loss(s, 3, mask), (s,), torch.tensor(0.3), (0,))
    right = with_gradients(lambda s: reference.sequence_loss(s, 3, mask), (s.double(),), torch.tensor(0.3), (0,))
    agree(found[0], right[0])
    agree(found[1][0], right[1][0], scale=1e-3)


@needs_native
def test_gradients_reach_the_logits_through_gates_and_scores_alike(agree, ops_path):
    ops_path("native")
    logits, bias = torch.randn(9, E), torch.randn(E)
    dgates, ds = torch.randn(9, 4), torch.randn(9, E)
    for of_gates, of_scores in ((1, 1), (1, 0), (0, 1)):
        leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        ids, gates, counts, s = ops.route_scored(leaf, bias, *CHOICE, "sigmoid", True, 2.5)
        assert not ids.requires_grad and not counts.requires_grad
        wide = torch.sigmoid(exact)
        chosen = wide.gather(1, ids)
        right = chosen / chosen.sum(1, keepdim=True) * 2.5
        terms = of_gates * (gates * dgates).sum() + of_scores * (s * ds).sum()
        wanted = of_gates * (right * dgates).sum() + of_scores * (wide * ds).sum()
        agree(torch.autograd.grad(terms, leaf)[0], torch.autograd.grad(wanted, exact)[0], scale=0.1)


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_router_logits_are_wide_and_their_gradients_have_the_layers_dtype(agree, ops_path, dtype):
    ops_path("native")
    x, weight, upstream = torch.randn(9, 16).to(dtype), torch.randn(E, 16).to(dtype), torch.randn(9, E)
    y, gradients = with_gradients(ops.router_logits, (x, weight), upstream, (0, 1))
    exact, right = with_gradients(lambda x, w: x @ w.t(), (x.double(), weight.double()), upstream, (0, 1))
    assert y.dtype == F32
    agree(y, exact, 2e-6)
    for g, e in zip(gradients, right):
        assert g.dtype == dtype
        agree(g, e, 1e-2 if dtype is BF16 else None)
    if dtype is BF16:
        torch.library.opcheck(torch.ops.moe.router_logits_native.default, (x.requires_grad_(), weight))


@needs_native
@pytest.mark.parametrize("options", [{}, dict(seq_aux_alpha=0.2, batch_aux_alpha=0.1)])
def test_the_native_router_makes_no_affinities_twice_and_never_by_pytorch(ops_path, monkeypatch, options):
    ops_path("native")
    router, x = router_of(**options)
    rows = []
    affinities = Router._affinities
    monkeypatch.setattr(Router, "_affinities", lambda self, z: rows.append(len(z)) or affinities(self, z))
    monkeypatch.setattr(Router, "choose", None)  # statistics included
    monkeypatch.setattr("moe.layers.router.SAMPLE", 2)
    assert router(x).stats["kept"] > 0
    assert rows == ([] if options else [2])  # for the margins of the sample
    router.eval()(x, keep_scores=True)
    assert rows == ([] if options else [2])


@needs_native
def test_a_native_router_obeys_a_record_and_a_variant(ops_path, agree):
    found = []
    recorded = torch.rand(N, E).topk(4).indices

    class Flat(Router):
        def _affinities(self, logits):
            return torch.sigmoid(0.1 * logits)

    router, x = router_of(seq_aux_alpha=0.1)
    flat = Flat(16, 8, 2)
    y = torch.randn(5, 16)
    for path in ("torch", "native"):
        ops_path(path)
        routing = router(x, replay=recorded)
        assert torch.equal(routing.experts, recorded)
        found.append((routing.gates, routing.losses["seq_aux"], flat(y).gates))
    for a, e in zip(*found):
        agree(a, e)
