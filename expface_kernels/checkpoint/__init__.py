"""Checkpoints of class centers that load on any number of ranks, and onto other classes.

`save_centres` and `load_centres`: all centers and their optimizer state in one safetensors file.
`save_sharded` and `load_sharded`: whole models and optimizers through torch.distributed.checkpoint.
`open_centres`, `open_insightface`, `centres_of`: tables to load, save again, or give to `remap_classes`.
"""

from expface_kernels.checkpoint.centres import load_centres, save_centres
from expface_kernels.checkpoint.files import open_centres
from expface_kernels.checkpoint.insightface import open_insightface
from expface_kernels.checkpoint.remap import class_mapping, remap_classes
from expface_kernels.checkpoint.sharded import load_sharded, save_sharded
from expface_kernels.checkpoint.table import CentreTable, centres_of

__all__ = [
    "CentreTable",
    "centres_of",
    "class_mapping",
    "load_centres",
    "load_sharded",
    "open_centres",
    "open_insightface",
    "remap_classes",
    "save_centres",
    "save_sharded",
]
