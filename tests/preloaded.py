"""What most processes of the command line import, imported by the one that they are forked from (commands.py)."""

import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
import tokenizers  # noqa: F401
import torch  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import phinetune.cli.app
import phinetune.cli.quiet
import phinetune.cli.train
import phinetune.evaluate
import phinetune.train  # noqa: F401
