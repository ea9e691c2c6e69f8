"""The local engine: `engines.base.Engine` over a Hugging Face model in this process.

Shape suffixes: T response tokens laid end to end, R of one response, C tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.checks import teacher_prompt
from mopd_nemo.config.teacher import key_of
from mopd_nemo.engines.base import InFlight, OnRollout, Progress, Request, TokenSignal, added
from mopd_nemo.engines.local.learner import Learner
from mopd_nemo.engines.local.lora import AdaptedModel
from mopd_nemo.engines.local.memory import checkpoint_bytes, scoring_budget
from mopd_nemo.engines.local.model import DTYPES, LanguageModel, load_model, resolve_device
from mopd_nemo.engines.local.optimizer import check_optimizer, load_optimizer
from mopd_nemo.engines.local.sampler import sample
from mopd_nemo.engines.local.targets import Target, add_references
from mopd_nemo.engines.local.teacher import Teacher, initial
from mopd_nemo.engines.local.vllm_backend import VllmBackend, check_backend
from mopd_nemo.engines.models import check_positions, check_vocabularies, load_chat
from mopd_nemo.engines.vllm import Numbered
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.types import Rollout

LOGIT_BUDGET = 2**26
"""Logits of one chunk of response tokens, counted as tokens × vocabulary: 256 MiB in float32."""

Ids = tuple[int, ...]


class LocalEngine:
    """Student, teacher and optimiser in this process. `engines.base.Engine` documents the methods."""

    def __init__(self, config: Config) -> None:
        check_backend(config)
        check_optimizer(config)
        self._config = config
        path, dtype = config.model.path, DTYPES[config.model.dtype]
        device = resolve_device(config.model.device)
        for name, teacher in config.every_teacher.items():
            if teacher.path is not None:
                check_vocabularies(path, teacher.path, f"{key_of(name)}.path")
        self.chat = load_chat(config.model)
        self.student = load_model(
            path,
            key="model.path",
            dtype=dtype,
            weights=dtype if config.lora.rank else DTYPES[config.optimizer.weights],
            device=device,
            recompute=config.train.activation_checkpointing,
        )
        if config.lora.rank:
            self.student = AdaptedModel(self.student, config.lora, path, str(config.seed))
        self.teachers = {name: Teacher(self.student, self.chat, config, name) for name in config.every_teacher}
        self._reference = initial(self.student, config.reference.offload) if config.reference.kl else None
        self._check_lengths()
        self._learner = Learner(self.student, config)
        self._eos_ids = _end_ids(self.student, self.chat)
        self.chat.check_end_of_turn(self._eos_ids)
        self._student_copy: LanguageModel | None = None
        self._in_flight: InFlight | None = None
        self._vllm: VllmBackend | None = None
        self._vllm_weights_outdated = True
        if config.generation.backend == "vllm":
            self._vllm = VllmBackend(config, getattr(self.student.module.config, "max_position_embeddings", None))

    def generate(
        self,
        request: Request,
        on_progress: Progress | None = None,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        self._settle()
        self._refresh()
        return self._drawn(self.student, request, on_progress, on_rollout)

    def generate_ahead(
        self,
        request: Request,
        on_rollout: OnRollout,
    ) -> InFlight:
        if self._in_flight is not None:
            self._in_flight.wait()
        self._refresh()
        student = self.student if self._vllm is not None else self._copied_student()
        aside = _stream_aside(student.device)

        def draw(on_progress: Progress, on_rollout: OnRollout) -> list[list[Rollout]]:
            with torch.cuda.stream(aside):
                return self._drawn(student, request, on_progress, on_rollout)

        self._in_flight = InFlight(draw, on_rollout)
        return self._in_flight

    def _settle(self) -> None:
        """Wait until vLLM is free. The engine's own sampler answers several callers at once."""
        if self._vllm is not None and self._in_flight is not None:
            self._in_flight.wait()

    def _refresh(self) -> None:
        """Give vLLM the student's weights, if they have changed."""
        if self._vllm is not None and self._vllm_weights_outdated:
            self._vllm.refresh(self.student)
            self._vllm_weights_outdated = False

    @torch.no_grad()
    def _copied_student(self) -> LanguageModel:
        """The student's present weights, in memory of their own, which stays reserved for the next time."""
        if self._student_copy is None:
            self._student_copy = self.student.copy()
        copies = self._student_copy.named_parameters()
        for name, weights in self.student.trained().items():
            copies[name].copy_(weights)
        return self._student_copy

    def _drawn(
        self,
        student: LanguageModel,
        request: Request,
        on_progress: Progress | None,
        on_rollout: OnRollout | None,
    ) -> list[list[Rollout]]:
        """Responses of `student`, or of vLLM with the weights that it has."""
        rollouts: dict[int, Rollout] = {}

        def finish(number: int, ids: list[int], logprobs: list[float]) -> None:
            finished = ids[-1] in self._eos_ids
            rollouts[number] = Rollout(tuple(ids), self.chat.decode(ids), finished, tuple(logprobs))
            if on_rollout:
                on_rollout(*divmod(number, request.num_samples), rollouts[number])

        if self._vllm is not None:

            def finish_some(samples: list[Numbered]) -> None:
                for prompt, index, (ids, logprobs, _) in samples:
                    finish(prompt * request.num_samples + index, ids, logprobs)
                if on_progress:
                    on_progress(len(rollouts) / len(request))

            self._vllm.sample(request, self._eos_ids, finish_some)
        else:
            sample(
                student,
                request,
                eos_ids=self._eos_ids,
                batch_size=self._config.rollout.batch_size,
                on_progress=on_progress,
                on_sequence=finish,
            )
        count = request.num_samples
        return [[rollouts[p * count + s] for s in range(count)] for p in range(len(request.prompts))]

    @torch.no_grad()
    def score(
        self, batch: TrainBatch, on_progress: Progress | None = None
    ) -> tuple[list[Target | None], dict[str, float]]:
        """Per example with a teacher prompt, what its teacher says of its response."""
        targets: list[Target | None] = [None] * len(batch.examples)
        taught = [i for i, example in enumerate(batch.examples) if example.teacher_prompt_ids is not None]
        told: list[dict[str, float]] = []
        rows = {name: [i for i in taught if batch.examples[i].teacher == name] for name in self.teachers}
        here_first = sorted(rows, key=lambda name: self.teachers[name].served is not None)
        with ExitStack() as at_once:
            scoring = []
            for name in here_first:
                if own := [batch.examples[i] for i in rows[name]]:
                    asked = at_once.enter_context(self.teachers[name].scoring(own, self._budget))
                    scoring.append((rows[name], asked))
            for own, score in scoring:
                found, metrics = score(on_progress)
                for i, target in zip(own, found, strict=True):
                    targets[i] = target
                told.append(metrics)
        if self._reference is not None:
            add_references(targets, batch, self._reference, self._budget, on_progress)
        return targets, added(told)

    def update(
        self,
        batch: TrainBatch,
        targets: Sequence[Target | None],
        learning_rate: float,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        self._vllm_weights_outdated = True
        return self._learner.step(batch, targets, learning_rate, on_progress)

    def token_signal(self, batch: TrainBatch, targets: Sequence[Target | None], top: int) -> list[TokenSignal | None]:
        return self._learner.token_signal(batch, targets, top)

    def response_logprobs(
        self,
        prompts: Sequence[tuple[int, ...]],
        responses: Sequence[tuple[int, ...]],
        on_progress: Progress | None = None,
    ) -> list[tuple[float, ...]]:
        budget = self._budget([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        return response_logprobs(self.student, prompts, responses, max_tokens=budget, on_progress=on_progress)

    @property
    def teacher(self) -> Teacher:
        """The only one, or the first of several."""
        return next(iter(self.teachers.values()))

    def update_teacher(self) -> None:
        self.teacher.follow(self.student)

    def save(self, directory: Path) -> None:
        self.student.save(directory)
        self.chat.tokenizer.save_pretrained(directory)
        self.teacher.save(directory)
        torch.save(self._learner.optimizer.state_dict(), directory / "optimizer.pt")

    def checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self._config, sum(p.numel() for p in self.student.trained().values()))

    def load(self, directory: Path) -> None:
        self._vllm_weights_outdated = True
        self.student.load(directory)
        self.teacher.load(directory)
        state = torch.load(directory / "optimizer.pt", map_location=self.student.device, weights_only=True)
        load_optimizer(self._learner.optimizer, state, self._config.optimizer)

    def _budget(self, lengths: Sequence[int]) -> int:
        """Tokens of a batch in a pass without gradients, given the lengths of its sequences."""
        return scoring_budget(self._config.train.tokens_per_micro_batch, max(lengths, default=0))

    def _check_lengths(self) -> None:
        config = self._config
        response = config.rollout.max_response_tokens
        prompt = config.data.max_prompt_tokens
        check_positions(self.student.module.config, "model.path", "data.max_prompt_tokens", prompt, response)
        for teacher in self.teachers.values():
            if teacher.model is not None:
                check_positions(teacher.model.module.config, "the teacher", *teacher_prompt(config), response)


def _stream_aside(device: torch.device) -> torch.cuda.Stream | None:
    """On a GPU, a queue of its own for a sampler beside training; it begins with the weights as they are now."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _end_ids(model: LanguageModel, chat: Chat) -> frozenset[int]:
    """Tokens that end a response: those of the chat and those of the model's generation config."""
    listed = model.module.generation_config.eos_token_id
    ids = listed if isinstance(listed, list) else [listed]
    return chat.end_ids | {index for index in ids if index is not None}


@torch.inference_mode()
def response_logprobs(
    model: LanguageModel,
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    *,
    max_tokens: int,
    on_progress: Progress | None = None,
) -> list[tuple[float, ...]]:
    """Log-probability (nats, temperature 1) of every response token after its prompt, in order.

    Args:
        prompts: one per response; equal (prompt, response) pairs are computed once.
        responses: token ids, at least one each.
        max_tokens: of a batch, as `LanguageModel.batches` counts them.

    Raises:
        UserError: a pair is longer than the model's positions.
    """
    longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    _check_longest(model, longest)
    pairs = list(dict.fromkeys(zip(prompts, responses, strict=True)))
    scores: dict[tuple[Ids, Ids], tuple[float, ...]] = {}
    batches = model.batches([[prompt + response] for prompt, response in pairs], max_tokens)
    for number, batch in enumerate(batches, start=1):
        chosen = [pairs[i] for i in batch]
        ids_T = torch.tensor([token for _, response in chosen for token in response], device=model.device)
        with model.computing():
            hidden_TH = model.response_hidden_TH(*zip(*chosen, strict=True))
            logprobs_T = _logprobs_of(model, hidden_TH, ids_T)
        parts = logprobs_T.split([len(response) for _, response in chosen])
        scores.update(zip(chosen, (tuple(part_R.tolist()) for part_R in parts), strict=True))
        if on_progress:
            on_progress(number / len(batches))
    return [scores[pair] for pair in zip(prompts, responses, strict=True)]


def _check_longest(model: LanguageModel, longest: int) -> None:
    limit = getattr(model.module.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"a prompt with its response has {longest} tokens, the model {limit} positions: "
            "lower peers.max_context_tokens or leave out the longest responses"
        )


def _logprobs_of(model: LanguageModel, hidden_TH: Tensor, ids_T: Tensor) -> Tensor:
    chunk = max(LOGIT_BUDGET // model.module.config.vocab_size, 1)
    parts = []
    for hidden_CH, ids_C in zip(hidden_TH.split(chunk), ids_T.split(chunk), strict=True):
        logits_CV = model.head(hidden_CH).float()
        parts.append(logits_CV.gather(-1, ids_C.unsqueeze(-1)).squeeze(-1) - logits_CV.logsumexp(-1))
    return torch.cat(parts).cpu()
