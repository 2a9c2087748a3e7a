"""What makes it fast; each kernel stands beside a plain reference. Needs torch and nothing else."""

from phinetune.kernels.attention import packed_attention
from phinetune.kernels.loss import linear_cross_entropy, linear_cross_entropy_sum
from phinetune.kernels.packs import Path, separate

__all__ = ["Path", "linear_cross_entropy", "linear_cross_entropy_sum", "packed_attention", "separate"]
