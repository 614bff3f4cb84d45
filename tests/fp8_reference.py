"""The quantisers and the products over them, a loop over tiles and experts, in float64: what kernels/fp8.py means.

E4M3 is a table here and rounding a search in it, so that nothing is shared with the arithmetic it judges.
"""

import torch

TABLE = torch.tensor(  # sign apart: 4 bits of exponent with bias 7, 3 of mantissa; the last code is NaN
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1],
    dtype=torch.float64,
)


def e4m3(x):
    """Nearest entry of the table, ties to the even one. x float64, of at most 448."""
    middle = (TABLE[1:] + TABLE[:-1]) / 2
    index = torch.bucketize(x.abs(), middle)
    tie = (index < len(middle)) & (middle[index.clamp_max(len(middle) - 1)] == x.abs())
    return TABLE[index + (tie & (index % 2 == 1))] * x.sign()


def tiled(x, height, width, power_of_two=False):
    """[R, C] -> float64. Each tile has one scale, an fp32 number."""
    x = x.float()
    amax = torch.empty_like(x)
    for r in range(0, x.shape[0], height):
        for c in range(0, x.shape[1], width):
            amax[r : r + height, c : c + width] = x[r : r + height, c : c + width].abs().max()
    scale = amax.clamp_min(1e-30) / 448
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return e4m3((x / scale).double()) * scale.double()


def rows(x, power_of_two=False):
    return tiled(x, 1, 128, power_of_two)


def columns(x, power_of_two=False):
    return tiled(x, 128, 1, power_of_two)


def blocks(x, power_of_two=False):
    return tiled(x, 128, 128, power_of_two)


def linear(x, w, dy, inputs=False, others=False):
    """-> y, dx, dw."""
    y = rows(x, inputs) @ blocks(w, others).t()
    return y, rows(dy, others) @ blocks(w, others), columns(dy, others).t() @ columns(x, inputs)


def experts(x, w13, w2, ids, gates, dy, inputs=False, others=False):
    """-> y, dx, dw13, dw2, dgates; float64 in, float64 out."""
    y, dx, dw13, dw2, dgates = (torch.zeros_like(t) for t in (x, x, w13, w2, gates))
    width = w2.shape[2]
    for e in range(w13.shape[0]):
        n, k = (ids == e).nonzero(as_tuple=True)  # in token order
        if not len(n):
            continue
        up, down, g = blocks(w13[e], others), blocks(w2[e], others), gates[n, k].unsqueeze(1)
        z = rows(x[n], inputs) @ up.t()
        gate, sig = z[:, :width], torch.sigmoid(z[:, :width])
        h = gate * sig * z[:, width:]
        y.index_add_(0, n, g * (rows(h, others) @ down.t()))
        dh = rows(dy[n], inputs) @ down
        dgates[n, k] = (dh * rows(h, others)).sum(1)
        dw2[e] = columns(g * dy[n], inputs).t() @ columns(h, others)
        dgate = g * dh * z[:, width:] * sig * (1 + gate * (1 - sig))
        dz = torch.cat([dgate, g * dh * gate * sig], 1)
        dx.index_add_(0, n, rows(dz, others) @ up)
        dw13[e] = columns(dz, others).t() @ columns(x[n], inputs)
    return y, dx, dw13, dw2, dgates
