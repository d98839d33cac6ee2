"""The old place of `expface_kernels.distributed.ranges`, which pickled heads of earlier versions name."""

from expface_kernels.distributed.ranges import ClassRange as ClassRange
