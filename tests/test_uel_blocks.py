"""UEL from blocks of keys: the same as with all keys at once, dominant negatives included."""

import pytest
import torch

from clae_fast import reference
from clae_fast.reference.sweep import Skip
from clae_fast.uel_blocks import uel_over_blocks


def whole(z, t, m):
    return reference.pair_uel(z, z, t, m, need_dq=True)


def in_blocks(z, rows, t, m, cuts):
    """This process's rows are `rows` pairs; the other keys come in blocks between `cuts`."""
    B = len(z) // 2
    own = torch.cat((z[:rows], z[B : B + rows]))
    rest = torch.cat((z[rows:B], z[B + rows :]))
    edges = [0, *cuts, len(rest)]
    blocks = [rest[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    lse = reference.pair_lse(own, own, t, skip="twins")
    for block in blocks:
        lse = torch.logaddexp(lse, reference.pair_lse(own, block, t))

    def passes():
        yield own, Skip("twins", 0, None, None)
        for block in blocks:
            yield block, Skip("none", 0, None, None)

    s_pos = (own * own.roll(rows, 0)).sum(-1) * t
    return uel_over_blocks(own, s_pos, lse, t, m, passes, True)


@pytest.mark.parametrize("dominant", ["none", "own", "other"])
@pytest.mark.parametrize("m", [1.0, 1.5])
@pytest.mark.parametrize("t", [1.0, 20.0, 200.0])
def test_blocks(t, m, dominant):
    g = torch.Generator().manual_seed(3)
    B, rows = 11, 4
    z = torch.randn(2 * B, 16, generator=g, dtype=torch.float64)
    z = torch.nn.functional.normalize(z, dim=1)
    if dominant == "own":  # nearer to row 0 than its twin is
        z[1] = torch.nn.functional.normalize(z[0] + 0.01 * z[1], dim=0)
    if dominant == "other":
        z[rows + 1] = torch.nn.functional.normalize(z[0] + 0.01 * z[1], dim=0)
    loss, dq = whole(z, t, m)
    mine = [*range(rows), *range(B, B + rows)]
    for cuts in ([], [3], [0, 3, 3, 9]):
        got, d = in_blocks(z, rows, t, m, cuts)
        torch.testing.assert_close(got, loss[mine], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(d, dq[mine], rtol=1e-9, atol=1e-10)
    single, d = in_blocks(z.float(), rows, t, m, [3, 9])
    alone, expected = whole(z.float(), t, m)
    exact = loss[mine]
    # As exact as with all keys at once.
    assert (single - exact).norm() <= 3 * (alone[mine] - exact).norm() + 1e-5 * exact.norm()
    assert (d - dq[mine]).norm() <= 3 * (expected[mine] - dq[mine]).norm() + 1e-5 * dq[mine].norm()


def test_equal_keys_and_nan():
    """Two negatives as near as can be; a NaN in another block is seen."""
    z = torch.nn.functional.normalize(torch.ones(12, 8, dtype=torch.float64), dim=1)
    loss, dq = whole(z, 5.0, 1.0)
    got, d = in_blocks(z, 3, 5.0, 1.0, [2])
    torch.testing.assert_close(got, loss[:6])
    torch.testing.assert_close(d, dq[:6], atol=1e-12, rtol=0)
    for place in (1, 4):
        bad = z.clone()
        bad[place] = torch.nan
        assert in_blocks(bad, 3, 5.0, 1.0, [2])[0].isnan().any()
