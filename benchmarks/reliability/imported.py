"""What runs of the command line import, to be imported once by the process that they are forked from.

Nothing here computes or starts a process, so a fork of what has imported it is like a process that has just started.
"""

import os

os.environ.setdefault("TORCH_WARM_POOL", "0")  # torch's compiler would start processes while it is imported

import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
import sympy.tensor.tensor  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.utils.cpp_extension  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama
import transformers.models.phi3.modeling_phi3
import transformers.optimization  # noqa: F401

import phinetune.cli.app
import phinetune.cli.quiet
import phinetune.cli.train
import phinetune.evaluate
import phinetune.layers.fast
import phinetune.train  # noqa: F401
