"""The local engine: the seam's five verbs over a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, UserError
from mopd_nemo.engines.base import OnRollout, Progress, Sampling
from mopd_nemo.engines.local.learner import Learner
from mopd_nemo.engines.local.model import (
    DTYPES,
    LanguageModel,
    Work,
    check_vocabularies,
    load_model,
    load_tokenizer,
    resolve_device,
)
from mopd_nemo.engines.local.sampler import sample
from mopd_nemo.engines.local.scoring import response_logprobs
from mopd_nemo.engines.local.teacher import Teacher, load_weights
from mopd_nemo.engines.local.vllm_backend import VllmBackend, check_backend
from mopd_nemo.lesson import Lesson
from mopd_nemo.types import Rollout, TrainRow

SCORING_BATCH, SCORING_ROWS = 2, 4
"""A pass without gradients, which keeps the activations of one layer, takes so many times the tokens of an update's
micro-batch, and at least so many of the longest rows: responses share a long context only if they are in one batch."""


class LocalEngine:
    """Student, teacher and optimiser in this process. See `engines.base.Engine` for the contract."""

    def __init__(self, config: Config) -> None:
        check_backend(config)
        self._config = config
        path, dtype = config.model.path, DTYPES[config.model.dtype]
        device = resolve_device(config.model.device)
        if config.teacher.path is not None:
            check_vocabularies(path, config.teacher.path)
        model = config.model
        self.chat = Chat(
            load_tokenizer(path, key="model.path"), model.chat_template_kwargs, model.end_tokens, source=model.path
        )
        self.student = load_model(path, key="model.path", dtype=dtype, weights=torch.float32, device=device)
        self.teacher = Teacher(self.student, config)
        self._check_lengths()
        self._learner = Learner(self.student, self.teacher.model, config, piece=lambda token: self.chat.decode([token]))
        self._eos_ids = _end_ids(self.student, self.chat)
        self.chat.check_end_of_turn(self._eos_ids)
        self._scored: dict[str, float] = {}
        """Metrics of the last scoring, reported with the update that it is for."""
        self._vllm: VllmBackend | None = None
        self._stale = True
        """vLLM has not the student's weights."""
        if config.generation.backend == "vllm":
            self._vllm = VllmBackend(config, getattr(self.student.module.config, "max_position_embeddings", None))

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        num_samples: int,
        sampling: Sampling,
        seed: str,
        on_progress: Progress | None = None,
        writer: Literal["student", "teacher"] = "student",
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        model = self.student if writer == "student" else self.teacher.model
        assert model is not None
        rollouts: dict[int, Rollout] = {}

        def finish(number: int, ids: list[int], logprobs: list[float]) -> None:
            finished = ids[-1] in self._eos_ids
            rollouts[number] = Rollout(tuple(ids), self.chat.decode(ids), finished, tuple(logprobs))
            if on_rollout:
                on_rollout(*divmod(number, num_samples), rollouts[number])

        if self._vllm is not None and writer == "student":
            if self._stale:
                self._vllm.refresh(self.student)
                self._stale = False
            groups = self._vllm.sample(prompts, num_samples, sampling, eos_ids=self._eos_ids, seed=seed)
            for number, (ids, logprobs, _) in enumerate(one for group in groups for one in group):
                finish(number, ids, logprobs)
            if on_progress:
                on_progress(1.0)
        else:
            sample(
                model,
                prompts,
                num_samples,
                sampling,
                eos_ids=self._eos_ids,
                seed=seed,
                batch_size=self._config.rollout.batch_size,
                on_progress=on_progress,
                on_sequence=finish,
            )
        return [[rollouts[p * num_samples + s] for s in range(num_samples)] for p in range(len(prompts))]

    @torch.no_grad()
    def score(self, rows: Sequence[TrainRow], on_progress: Progress | None = None) -> list[Tensor | None]:
        """Per row with a teacher prompt, the teacher's hidden states that predict its response: [response tokens, H].

        The teacher's head is applied in `update`, chunk by chunk, where the student's own top-k is known: the same
        work, without [tokens, vocabulary] ever being kept.
        """
        hidden: list[Tensor | None] = [None] * len(rows)
        taught = [(i, row.teacher_prompt_ids) for i, row in enumerate(rows) if row.teacher_prompt_ids is not None]
        self._scored = {}
        if not taught:
            return hidden
        teacher = self.teacher.model
        assert teacher is not None
        lengths = [len(prompt) + len(rows[i].response_ids) for i, prompt in taught]
        batches = teacher.batches([[prompt + rows[i].response_ids] for i, prompt in taught], self._budget(lengths))
        teacher.work = Work()
        for done, batch in enumerate(batches, start=1):
            prompts = [taught[position][1] for position in batch]
            responses = [rows[taught[position][0]].response_ids for position in batch]
            with teacher.computing():
                hidden_TH = teacher.response_hidden_TH(prompts, responses)
            for position, part in zip(batch, hidden_TH.split([len(r) for r in responses]), strict=True):
                hidden[taught[position][0]] = part
            if on_progress:
                on_progress(done / len(batches))
        self._scored = teacher.work.metrics("score", sum(lengths))
        return hidden

    def update(
        self,
        lesson: Lesson,
        targets: Sequence[Tensor | None],
        learning_rate: float,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        self._stale = True
        return self._learner.step(lesson, targets, learning_rate, on_progress) | self._scored

    def response_logprobs(
        self,
        prompts: Sequence[tuple[int, ...]],
        responses: Sequence[tuple[int, ...]],
        on_progress: Progress | None = None,
    ) -> list[tuple[float, ...]]:
        budget = self._budget([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        return response_logprobs(self.student, prompts, responses, max_tokens=budget, on_progress=on_progress)

    def update_teacher(self) -> None:
        self.teacher.follow(self.student)

    def save(self, directory: Path) -> None:
        self.student.module.save_pretrained(directory)
        self.chat.tokenizer.save_pretrained(directory)
        self.teacher.save(directory)
        torch.save(self._learner.optimizer.state_dict(), directory / "optimizer.pt")

    def load(self, directory: Path) -> None:
        self._stale = True
        load_weights(self.student, directory)
        self.teacher.load(directory)
        state = torch.load(directory / "optimizer.pt", map_location=self.student.device, weights_only=True)
        self._learner.optimizer.load_state_dict(state)

    def _budget(self, lengths: Sequence[int]) -> int:
        """Tokens of a batch without gradients, given those of the rows."""
        return max(SCORING_BATCH * self._config.train.tokens_per_micro_batch, SCORING_ROWS * max(lengths, default=0))

    def _check_lengths(self) -> None:
        config = self._config
        response = config.rollout.max_response_tokens
        reads_peers = config.method in ("mopd", "sdpo")
        for model, model_key, prompt_key, prompt in (
            (self.student, "model.path", "data.max_prompt_tokens", config.data.max_prompt_tokens),
            (self.teacher.model, "the teacher", "data.max_prompt_tokens", config.data.max_prompt_tokens),
            *(
                [(self.teacher.model, "the teacher", "peers.max_context_tokens", config.peers.max_context_tokens)]
                * reads_peers
            ),
        ):
            if model is None:
                continue
            limit = getattr(model.module.config, "max_position_embeddings", None)
            if limit is not None and prompt + response > limit:
                raise UserError(
                    f"{prompt_key}={prompt} + rollout.max_response_tokens={response} exceeds the {limit} positions "
                    f"of {model_key}: lower one of them"
                )


def _end_ids(model: LanguageModel, chat: Chat) -> frozenset[int]:
    """Tokens that end a response: the chat's, and those of the model's generation config."""
    listed = model.module.generation_config.eos_token_id
    ids = listed if isinstance(listed, list) else [listed]
    return chat.end_ids | {index for index in ids if index is not None}
