"""Open-set verification of kanji glyphs: a complete small training program on real images.

Import it before torch: idle OpenMP threads then sleep instead of spinning, which slowed training down
severely on a busy machine. A value of OMP_WAIT_POLICY that is already set stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
