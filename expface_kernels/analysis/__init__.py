"""What a margin does, on paper and to your data: curves, an angular monitor, a ranking of wrong labels.

    describe(margin), curves                  a margin, ours or your own, in numbers and as functions
    AngularMonitor                            where a training set lies, epoch by epoch
    LabelNoiseRanker                          which samples look wrongly labelled

Importing this loads neither matplotlib nor rich; drawing (`plots`, `AngularMonitor.draw`) and the command
`python -m expface_kernels curves` need the extra `analysis`.
"""

from expface_kernels.analysis import curves
from expface_kernels.analysis.angle_counts import AngleCounts
from expface_kernels.analysis.curves import Description, describe
from expface_kernels.analysis.monitor import AngularMonitor
from expface_kernels.analysis.ranking import LabelNoiseRanker, RankingQuality

__all__ = [
    "AngleCounts",
    "AngularMonitor",
    "Description",
    "LabelNoiseRanker",
    "RankingQuality",
    "curves",
    "describe",
]
