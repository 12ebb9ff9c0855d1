"""torchvision for the tests in compat/, where it does not load by itself.

The usual build of torchvision is made for a torch with CUDA. Beside a torch without, its operators are missing, and the
import fails because it describes two of them: their schemas are enough for it. Nothing here calls them.
"""

import sys
from pathlib import Path

from torch.library import Library

sys.path.append(str(Path(sys.prefix) / "vision"))  # see the Makefile

try:
    import torchvision  # noqa: F401
except RuntimeError:
    SCHEMAS = Library("torchvision", "DEF")  # forgotten with this object
    for name in ("nms", "qnms"):
        SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
