"""The methods: mathematics and state, with torch alone.

`lightning_tpgm.constrain` puts them to work in any PyTorch loop, the callbacks in a Lightning `Trainer`.
"""

from lightning_tpgm.methods.anchor_decay import AnchorDecay
from lightning_tpgm.methods.digrap import DiGraP
from lightning_tpgm.methods.ftp import FTP
from lightning_tpgm.methods.l2sp import L2SP
from lightning_tpgm.methods.method import Method, Step
from lightning_tpgm.methods.spd import SPD
from lightning_tpgm.methods.tpgm import TPGM
from lightning_tpgm.methods.wise_ft import WiSEFT

__all__ = ["FTP", "L2SP", "SPD", "TPGM", "AnchorDecay", "DiGraP", "Method", "Step", "WiSEFT"]
