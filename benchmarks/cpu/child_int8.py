"""A short tune of SmolLM2, its base in int8 or not, and its held-out loss."""

import tempfile
from pathlib import Path

import job_io

import phinetune


def main() -> None:
    job = job_io.read()
    with tempfile.TemporaryDirectory() as folder:
        result = phinetune.finetune(
            model="smollm2",
            train=job["train"],
            eval=job["eval"],
            data={"max_length": 1024, "num_proc": 1},
            model_kwargs={"dtype": "bfloat16", "load_in_8bit": job["int8"]},
            training_config={
                "output_dir": str(Path(folder) / "run"), "max_steps": job["steps"], "use_cpu": True,
                "per_device_train_batch_size": 16, "learning_rate": 4e-4, "save_strategy": "no", "disable_tqdm": True,
            },
            peft_config={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
        )  # fmt: skip
    job_io.answer(result.summary)


if __name__ == "__main__":
    main()
