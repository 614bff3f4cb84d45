"""Multi-token prediction from its parts: what each depth reads, what it predicts, and that evaluation leaves it out."""

import pytest
import torch

import moe
from moe.objectives import Pretraining

F64 = torch.float64


def norm(x, layer):
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight


def by_equations_21_to_24(model, inputs, tokens, segments=None, mask=None):
    """Sum of the losses of each depth. inputs [B, T] = tokens[:, :-1]; every index is spelt out."""
    hidden, _ = model.encode(inputs, segments[:, :-1] if segments is not None else None)
    sums = []
    for depth, module in enumerate(model.mtp):
        k = depth + 1
        time = inputs.shape[1] - k
        rows = [
            [module.proj.weight @ torch.cat((norm(model.embed.weight[inputs[b, i + k]], module.embed_norm),
                                             norm(hidden[b, i], module.hidden_norm)))
             for i in range(time)]
            for b in range(inputs.shape[0])
        ]  # fmt: skip
        x = torch.stack([torch.stack(row) for row in rows])
        positions = torch.arange(time).expand(x.shape[0], -1)
        if segments is not None:
            positions = torch.tensor(
                [[sum(int(s == row[i]) for s in row[:i]) for i in range(time)] for row in segments]
            )
        hidden, _ = module.block(x, model.rotary(positions), None if segments is None else segments[:, :time])
        logp = (norm(hidden, module.norm) @ model.head.weight.t()).log_softmax(-1)
        total = torch.zeros((), dtype=F64)
        for b in range(x.shape[0]):
            for i in range(time):
                at = i + k + 1
                same = segments is None or segments[b, at] == segments[b, i]
                if same and (mask is None or mask[b, at]):
                    total = total - logp[b, i, tokens[b, at]]
        sums.append(total)
    return sums


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_mtp_loss_is_the_papers_in_value_and_every_gradient(small, agree, depths, tied):
    model = moe.Transformer(
        small(num_nextn_predict_layers=depths, tie_word_embeddings=tied, seq_aux_alpha=0.0)
    ).double()
    tokens = torch.randint(0, 37, (2, 9))
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2, 2, 2]])
    mask = torch.rand(2, 9) < 0.8
    out = Pretraining(model)(tokens, segments, mask, 10.0, mtp_weight=0.3)
    by_hand = sum(by_equations_21_to_24(model, tokens[:, :-1], tokens, segments, mask)) / depths
    main = Pretraining(model)(tokens, segments, mask, 10.0, mtp_weight=0.0)
    agree(out.sums["mtp"] / depths, by_hand)
    expected = main.loss + 0.3 * by_hand / 10
    agree(out.loss, expected)
    for (name, p), a, e in zip(
        model.named_parameters(), torch.autograd.grad(out.loss, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
    ):  # fmt: skip
        agree(a, e, what=name)
    assert {n for n, _ in model.named_parameters() if "mtp" in n} and p is not None


@pytest.mark.parametrize("depth", [1, 2])
def test_depth_k_reads_up_to_token_i_plus_k_and_no_further(small, depth):
    """MTP fed its own target (a public project did so for weeks) would see token i+k+1."""
    model = moe.Transformer(small(num_nextn_predict_layers=2)).double()
    tokens = torch.randint(0, 37, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 37
    before, after = model(tokens).mtp_logits[depth - 1], model(changed).mtp_logits[depth - 1]
    assert before.shape == (1, 10 - depth, 37)
    difference = (before - after).abs().amax(-1)[0]
    assert difference[: 6 - depth].lt(1e-12).all() and difference[6 - depth] > 1e-9


def test_targets_stop_at_document_borders_and_counts_say_so(small, agree):
    model = Pretraining(moe.Transformer(small(num_nextn_predict_layers=2)).double())
    tokens = torch.randint(0, 37, (1, 8))
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    out = model(tokens, segments, None, 1.0, mtp_weight=1.0)
    assert out.sums["tokens"] == 6 and out.sums["mtp_tokens"] == 4 + 2
    other = tokens.clone()
    other[0, 4:] = (other[0, 4:] + 5) % 37
    first_document = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    losses = [model(t, segments, first_document, 1.0, mtp_weight=1.0).sums["mtp"] for t in (tokens, other)]
    agree(*losses)


def test_embedding_and_head_are_the_main_models(small):
    model = moe.Transformer(small())
    assert not any("embed.weight" in n or "head" in n for n, _ in model.mtp.named_parameters())
    tokens = torch.randint(0, 37, (1, 6))
    hidden, _ = model.encode(tokens)
    states, _ = model.look_ahead(hidden.detach(), tokens)  # no gradient through the main layers
    model.head(states[0]).sum().backward()
    assert model.head.weight.grad.abs().max() > 0
    read = torch.unique(tokens[:, 1:])
    rows = model.embed.weight.grad.abs().amax(-1) > 0
    assert torch.equal(rows.nonzero().flatten(), read)


def test_loss_reaches_the_main_layers_through_mtp(small):
    model = moe.Transformer(small())
    tokens = torch.randint(0, 37, (1, 8))
    hidden, _ = model.encode(tokens)
    states, _ = model.look_ahead(hidden, tokens)
    states[0].square().sum().backward()
    assert model.layers[0].attn.o.weight.grad.abs().max() > 0


def test_evaluation_runs_no_mtp_module_and_needs_none(small, agree):
    model = moe.Transformer(small()).double().eval()
    tokens = torch.randint(0, 37, (2, 7))
    ran = []
    for module in model.mtp.modules():
        module.register_forward_hook(lambda m, *_: ran.append(m))
    out = model(tokens)
    assert not ran and out.mtp_logits == () and set(out.routings) == {"layers.1", "layers.2"}
    losses = Pretraining(model).eval()(tokens, None, None, 1.0, mtp_weight=0.3)
    assert not ran and "mtp" not in losses.sums and "balance" not in losses.sums
    moe.generate(model, [[1, 2]], 2)
    assert not ran
    model(tokens, mtp=True)
    assert ran
    del model.mtp[:]
    agree(model(tokens).logits, out.logits)


def test_training_gives_main_logits_untouched_by_mtp(small, agree):
    model = moe.Transformer(small()).double()
    tokens = torch.randint(0, 37, (2, 7))
    agree(model(tokens).logits, model(tokens, mtp=False).logits)
    assert model(tokens, mtp=False).mtp_logits == ()


@pytest.mark.parametrize("time", [0, 1, 2])
def test_rows_too_short_to_look_ahead_give_no_prediction(small, time):
    model = moe.Transformer(small(num_nextn_predict_layers=2))
    out = model(torch.randint(0, 37, (2, time)))
    assert out.logits.shape == (2, time, 37)
    assert [x.shape[1] for x in out.mtp_logits] == [max(time - 1, 0), max(time - 2, 0)]
    (out.logits.sum() + sum(x.sum() for x in out.mtp_logits)).backward()
