"""What a job will take: memory of a rank item by item, seconds of a step, the fewest devices that fit.

    from expface_kernels.plan import Job, advise, plan
    found = plan(Job(classes=10_000_000, device="h100", ranks=8, autocast="bfloat16"))
    found.peak, found.seconds, found.fits
    advise(found).smallest_ranks

    job.py          the job and the sizes that follow from it
    devices.py      memory and rates of devices; this machine's are measured
    optimizers.py   what torch's optimizers hold and move
    memory.py       items, and when they are there; the triton backend's launches, counted
    seconds.py      work and its time
    advice.py       the plan, the fewest devices, what to change

A model: what it counts comes from the code that will run (launches, tiles, optimizers). What it cannot see is
not in it: the backbone, waiting for others, launch latency, the memory of a context.
"""

from expface_kernels.plan.advice import Advice, Change, Plan, advise, plan, smallest_ranks
from expface_kernels.plan.devices import DEVICES, Device, Rates, calibrate
from expface_kernels.plan.job import Job
from expface_kernels.plan.memory import Item
from expface_kernels.plan.optimizers import OPTIMIZERS
from expface_kernels.plan.seconds import Work

__all__ = [
    "DEVICES",
    "OPTIMIZERS",
    "Advice",
    "Change",
    "Device",
    "Item",
    "Job",
    "Plan",
    "Rates",
    "Work",
    "advise",
    "calibrate",
    "plan",
    "smallest_ranks",
]
