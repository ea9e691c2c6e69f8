"""Sampling beside `transformers.generate`, and beside the matrix products that it cannot do without.

    python bench/generation.py                     # every case, 1 and 2 threads
    python bench/generation.py embedded --rounds 9 --threads 1
    python bench/generation.py SmolLM2             # the model that `make real` has prepared

Three sides take turns in this process on the same model, prompts, number of samples and temperature:

- `ours`: `engines.local.sampler`;
- `generate`: `model.generate` of transformers, as a user would call it;
- `products`: the matrix products that our side executes, alone, at the same shapes. Same weights, those that read the
  same input as one matrix. The prompts once, padded to the longest. Then for each position the sequences that still
  run: every linear layer; queries by keys and probabilities by values, for each prompt once (the queries of its
  sequences in as many slots as the prompt with the most of them needs), and for the responses at their length then,
  with the one place that stands for the prompt; and the LM head. No norms, no rotations, no softmax, no cache to
  write, no sampling.

Sequences end at an end token, so the two samplers write responses of different total length: `generate`'s seconds are
for as many response tokens as ours. A ratio is the median over the rounds of one round's ratio, in which the sides run
one after the other; seconds are the least of the rounds, the process's own time with one thread, so that other programs
count little, and wall-clock time with more. Random models get prompts of random tokens, and as many end
tokens as make responses of the length of a real model's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from mopd_nemo.config.load import load_config
from mopd_nemo.data.load import load_problems
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.llama import is_like_llama
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.engines.local.sampler import left_padded, sample

Ids = tuple[int, ...]
REAL_MODEL = Path("data/real/warm")


@dataclass(frozen=True)
class Case:
    """A model and what is asked of it."""

    model: LanguageModel
    prompts: list[Ids]
    num_samples: int
    sampling: Sampling
    eos_ids: frozenset[int]


def of_config(path: str, num_prompts: int) -> Case:
    """Model, prompts, group size and response limit of a config, in float32."""
    config = load_config(path, ["teacher.kind=live", "model.dtype=float32"])
    engine = LocalEngine(config)
    prompts = [engine.chat.prompt_ids(problem.messages) for problem in load_problems(config, "train")[:num_prompts]]
    rollout = config.rollout
    sampling = Sampling(rollout.max_response_tokens)
    return Case(engine.student, prompts, rollout.num_rollouts_per_prompt, sampling, engine._eos_ids)


def random_weights(name: str, num_prompts: int = 8, max_tokens: int = 64, top_p: float = 1.0, **sizes: Any) -> Case:
    import transformers

    sizes = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8} | sizes
    sizes |= {"intermediate_size": 3 * sizes["hidden_size"], "max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
        **sizes, pad_token_id=0, eos_token_id=1, bos_token_id=2
    )
    module = getattr(transformers, f"{name}ForCausalLM")(config)
    prompts = [tuple(torch.randint(3, 8192, (64 - number,)).tolist()) for number in range(num_prompts)]
    eos_ids = frozenset(range(1, sizes["vocab_size"] // 64 + 1))
    return Case(LanguageModel(module, torch.float32), prompts, 8, Sampling(max_tokens, top_p=top_p), eos_ids)


CASES: dict[str, Callable[[], Case]] = {
    "embedded, 16 prompts": lambda: of_config("configs/quickstart.yaml", 16),
    "embedded, 128 prompts": lambda: of_config("configs/quickstart.yaml", 128),
    "SmolLM2-135M, 6 prompts": lambda: of_config("configs/real/smollm2.yaml", 6),
    "Qwen3, hidden 512, 8 layers": lambda: random_weights("Qwen3", head_dim=64, num_key_value_heads=4),
    "Qwen3, 151936 tokens": lambda: random_weights(
        "Qwen3", 4, 32, hidden_size=128, num_hidden_layers=4, vocab_size=151936, num_key_value_heads=4
    ),
    "Qwen3, 32768 tokens, top_p 0.95": lambda: random_weights(
        "Qwen3", 4, 32, 0.95, hidden_size=128, num_hidden_layers=4, vocab_size=32768, num_key_value_heads=4
    ),
    "Llama, hidden 512, 8 layers": lambda: random_weights("Llama", num_key_value_heads=4),
    "GPT-NeoX, hidden 512, 8 layers": lambda: random_weights("GPTNeoX"),
    "Gemma3, hidden 512, 8 layers": lambda: random_weights(
        "Gemma3", head_dim=64, num_key_value_heads=4, sliding_window=32, tie_word_embeddings=False
    ),
}


def ours(case: Case, seed: str) -> list[int]:
    """Lengths of the responses."""
    request = Request(case.prompts, case.num_samples, case.sampling, seed)
    found = sample(case.model, request, eos_ids=case.eos_ids, batch_size=len(request))
    return [len(ids) for ids, _ in found]


@torch.inference_mode()
def generate(case: Case) -> int:
    """Response tokens."""
    mask_BS, ids_BS = left_padded(case.prompts, case.model.device)
    found_BS = case.model.module.generate(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        do_sample=True,
        temperature=case.sampling.temperature,
        top_k=0,
        top_p=case.sampling.top_p,
        num_return_sequences=case.num_samples,
        max_new_tokens=case.sampling.max_tokens,
        eos_token_id=sorted(case.eos_ids),
        pad_token_id=0,
    )[:, ids_BS.shape[1] :]
    ended_BS = torch.isin(found_BS, torch.tensor(sorted(case.eos_ids))).int().cumsum(-1)
    return int((ended_BS.cumsum(-1) <= 1).sum())


class Products:
    """The products of one call of our sampler, as stated at the top. For models built like Llama.

    Args:
        lengths: of the responses that the call writes, prompt by prompt.
    """

    def __init__(self, case: Case, lengths: list[int]) -> None:
        model, config = case.model.module.base_model, case.model.module.config
        self.layers = [_matrices(layer) for layer in model.layers]
        self.head = case.model.head.weight
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = model.layers[0].self_attn.head_dim
        self.prompts, self.width = len(case.prompts), max(map(len, case.prompts))
        groups = [lengths[i : i + case.num_samples] for i in range(0, len(lengths), case.num_samples)]
        self.running = [[sum(length > step for length in group) for group in groups] for step in range(1, max(lengths))]
        self.shared, self.own = (
            [[torch.randn(count, self.kv_heads, width, self.dim) for _ in "kv"] for _ in self.layers]
            for count, width in ((self.prompts, self.width), (len(lengths), max(lengths)))
        )
        self.inputs = {w.shape[1]: torch.randn(max(len(lengths), self.prompts * self.width), w.shape[1])
                       for weights in [*self.layers, [self.head]] for w in weights}  # fmt: skip

    @torch.inference_mode()
    def __call__(self) -> None:
        self._linear(self.prompts * self.width)
        queries = torch.randn(self.prompts * self.heads, self.width, self.dim)
        for _ in self.layers:
            torch.bmm(torch.bmm(queries, queries.mT), queries)
        self._product(self.head, self.prompts)
        for step, running in enumerate(self.running, start=1):
            groups, slots, rows = sum(count > 0 for count in running), max(running), sum(running)
            self._linear(rows)
            for shared, own in zip(self.shared, self.own, strict=True):
                self._attend([x[:groups] for x in shared], slots)
                self._attend([x[:rows, :, : 1 + step] for x in own], 1)
            self._product(self.head, rows)

    def _attend(self, seen: list[Tensor], sequences: int) -> None:
        keys, values = (x.flatten(0, 1) for x in seen)
        queries = torch.empty(len(keys), sequences * self.heads // self.kv_heads, self.dim)
        torch.bmm(torch.bmm(queries, keys.mT), values)

    def _linear(self, rows: int) -> None:
        for weights in self.layers:
            for weight in weights:
                self._product(weight, rows)

    def _product(self, weight: Tensor, rows: int) -> None:
        nn.functional.linear(self.inputs[weight.shape[1]][:rows], weight)


def _matrices(layer: Any) -> list[Tensor]:
    """A layer's weights; those that read the same input are one matrix."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
    joined += [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
    return [torch.cat([module.weight.detach() for module in modules]) for modules in joined]


def seconds(side: Callable[[], Any]) -> tuple[float, Any]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    found = side()
    return clock() - started, found


def measure(name: str, case: Case, threads: int, rounds: int) -> str:
    torch.set_num_threads(threads)
    lengths = ours(case, "bench")
    generate(case)
    products = Products(case, lengths) if is_like_llama(case.model.module) else None
    table: dict[str, list[float]] = {"ours": [], "generate": [], "products": []}
    for _ in range(rounds):
        table["ours"].append(seconds(lambda: ours(case, "bench"))[0])
        took, tokens = seconds(lambda: generate(case))
        table["generate"].append(took * sum(lengths) / tokens)
        table["products"].append(seconds(products)[0] if products else float("nan"))
    ratios = [
        median(a / b for a, b in zip(table[x], table[y], strict=True))
        for x, y in (("ours", "products"), ("generate", "ours"))
    ]
    least = " | ".join(f"{min(table[side]):.3f}" for side in table)
    rate = sum(lengths) / min(table["ours"])
    row = f"| {name} | {threads} | {sum(lengths)} | {least} | {ratios[0]:.2f} | {ratios[1]:.2f} | {rate:,.0f} |"
    return row.replace("nan", "-")  # no products: not built like Llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print(
        "| model | threads | tokens | ours s | generate s | products s | ours / products | generate / ours | tokens/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, build in CASES.items():
        if arguments.only in name and (REAL_MODEL.exists() or not name.startswith("SmolLM2")):
            case = build()
            for threads in arguments.threads:
                print(measure(name, case, threads, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
