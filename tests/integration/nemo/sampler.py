"""What samples in place of vLLM where NeMo-RL's own loops run: transformers, with the weights of the last refit."""

from __future__ import annotations

from typing import Any

import ray
import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from transformers import AutoModelForCausalLM

from tests.integration.nemo.cpu import refit_file


class HuggingFaceGeneration:
    """`VllmGeneration` as `distillation.setup` and its loop call it, in the driver.

    A response depends on nothing but weights and prompt, so that a resumed run draws what the whole one has drawn.
    """

    def __init__(self, cluster: Any, config: Any) -> None:
        self.cfg = config
        self._model: Any = AutoModelForCausalLM.from_pretrained(config["model_name"], dtype=torch.float32)
        self._names: set[str] = set()
        self._stale = True

    def prepare_refit_info(self, info: dict[str, Any]) -> None:
        """Which weights a refit brings."""
        self._names = set(info)

    def update_weights_via_ipc_zmq(self) -> list[Any]:
        """Take a refit, which the workers are about to write."""
        self._stale = True
        return [ray.put(True)]

    def prepare_for_generation(self, *_: Any, **__: Any) -> bool:
        return True

    def finish_generation(self, *_: Any, **__: Any) -> bool:
        return True

    def generate(self, data: Any, greedy: bool = False) -> Any:
        """Responses to the rows of a batch."""
        if self._stale:
            weights = torch.load(refit_file())
            assert set(weights) == self._names
            self._model.load_state_dict(weights, strict=False)  # the head is the embedding
            self._stale = False
        torch.manual_seed(int(data["input_ids"].sum()))
        prompts = [ids[:length] for ids, length in zip(data["input_ids"], data["input_lengths"].tolist(), strict=True)]
        answers = [self._answer(prompt, greedy) for prompt in prompts]
        rows = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        pad = self.cfg["_pad_token_id"]
        return BatchedDataDict(
            {
                "output_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad),
                "generation_lengths": torch.tensor([len(answer) for answer in answers]),
                "unpadded_sequence_lengths": torch.tensor([len(row) for row in rows]),
            }
        )

    def _answer(self, prompt: torch.Tensor, greedy: bool) -> torch.Tensor:
        whole = self._model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=self.cfg["max_new_tokens"],
            do_sample=not greedy,
            temperature=self.cfg["temperature"],
            top_k=0,
            eos_token_id=self.cfg["stop_token_ids"],
            pad_token_id=self.cfg["_pad_token_id"],
        )
        return whole[0, len(prompt) :]
