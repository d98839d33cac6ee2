"""A margin on paper, ours or your own: curves over the target angle, and a summary of them.

describe(margin)                          where psi falls, where it penalizes most, where it pulls too little
similarity, slope, curvature, pull        psi, its derivatives, its pull beside the push of the other classes
cosine_penalty, angular_penalty           how much less similar, how much farther out the target looks
effective_angle, decision_boundary        as which angle it is treated; where it wins against another class
"""

from expface_kernels.analysis.curves.description import Description, Interval, Jump, Peak, describe
from expface_kernels.analysis.curves.functions import (
    angular_penalty,
    cosine_penalty,
    curvature,
    decision_boundary,
    effective_angle,
    label,
    pull,
    similarity,
    slope,
)

__all__ = [
    "Description",
    "Interval",
    "Jump",
    "Peak",
    "angular_penalty",
    "cosine_penalty",
    "curvature",
    "decision_boundary",
    "describe",
    "effective_angle",
    "label",
    "pull",
    "similarity",
    "slope",
]
