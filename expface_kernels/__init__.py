"""Fused margin-softmax loss heads for training embeddings over very many classes."""

from expface_kernels.distributed.gradients import GradScaler, clip_grad_norm_
from expface_kernels.functional import margin_cross_entropy
from expface_kernels.heads import MarginSoftmaxHead
from expface_kernels.margins import ArcFace, CombinedMargin, CosFace, ExpFace, NormFace, SphereFace
from expface_kernels.stats import BatchStats

__version__ = "0.1.0"

__all__ = [
    "ArcFace",
    "BatchStats",
    "CombinedMargin",
    "CosFace",
    "ExpFace",
    "GradScaler",
    "MarginSoftmaxHead",
    "NormFace",
    "SphereFace",
    "clip_grad_norm_",
    "margin_cross_entropy",
]
