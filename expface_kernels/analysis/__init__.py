"""What a margin does, on paper and to your data: curves, an angular monitor, a ranking of wrong labels.

Imports neither matplotlib nor rich: `plots` and `cli` need the extra `analysis`.
"""

from expface_kernels.analysis.description import describe

__all__ = ["describe"]
