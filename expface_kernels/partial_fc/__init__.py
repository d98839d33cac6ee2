"""The old place of `expface_kernels.distributed`, which pickles of heads from earlier versions name."""
