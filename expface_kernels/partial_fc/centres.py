"""Centres of one rank: their first values, and as a parameter that knows of the whole.

C classes of all ranks · D features
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expface_kernels.partial_fc.comm import Ranks
from expface_kernels.partial_fc.ranges import ClassRange
from expface_kernels.partial_fc.sampling import mixed_seed

INIT_STD = 0.01
SEED_ROWS = 8192
"""Rows that one seed draws: whichever rank holds a class, and however many there are, it starts the same."""
DRAW_ROWS = 16
"""torch draws normals 16 at a time: of rows by sixteens the first are the same however many follow."""


@torch.no_grad()
def initialize(local_weight: Tensor, shard: ClassRange, seed: int) -> None:
    """Fill (num_local, D) with the rows `shard` of the initial centres, normal(0, 0.01).

    They depend on seed, D and dtype alone, not on the device. Extra memory: 8192 rows.
    """
    dtype, features = local_weight.dtype, local_weight.shape[1]
    for block in range(shard.start // SEED_ROWS, -(-shard.stop // SEED_ROWS)):
        first = block * SEED_ROWS
        start, stop = max(first, shard.start), min(first + SEED_ROWS, shard.stop)
        if start >= stop:
            continue
        generator = torch.Generator().manual_seed(seed if block == 0 else mixed_seed(seed, block))
        rows = -(-(stop - first) // DRAW_ROWS) * DRAW_ROWS
        drawn = torch.empty((rows, features), dtype=dtype).normal_(0, INIT_STD, generator=generator)
        local_weight[start - shard.start : stop - shard.start].copy_(drawn[start - first : stop - first])


def sharded_parameter(local_weight: Tensor, num_classes: int, ranks: Ranks) -> nn.Parameter:
    """A (num_classes, D) DTensor, Shard(0), as a parameter; this rank holds local_weight (num_local, D)."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    # Where a meta tensor will be is not known, but what its group can send is.
    device = ranks.device if local_weight.is_meta else local_weight.device
    mesh = DeviceMesh.from_group(ranks.group, device.type)
    features = local_weight.shape[1]
    whole = DTensor.from_local(
        local_weight,
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size((num_classes, features)),
        stride=(features, 1),
    )
    return nn.Parameter(whole)
