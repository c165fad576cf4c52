"""Two views on top of each other: what each of the 2B rows is contrasted with."""

import torch

from ..softmax_rows import Block
from .options import RowOptions, Rows, extra_blocks, numbered


def stacked_blocks(rows: Rows, options: RowOptions) -> list[Block]:
    """All rows but itself and its twin, then the extra negatives; less those of equal ids."""
    u_i, u_j = rows.units
    z = torch.cat((u_i.z, u_j.z))
    ids = numbered(rows.pairs, options, repeat=2)
    own = (z, torch.cat((u_j.z, u_i.z)))
    if ids.rows is None or ids.columns is None:
        batch = Block(rows.pairs, z, z, "self", "twins", own=own)
    else:  # a row, its twin and their duplicates have one id
        batch = Block(rows.pairs, z, z, "self", ids=(ids.rows, ids.columns))
    return [batch, *extra_blocks(rows, z, ids)]
