"""The NeMo-RL engine: `engines.base.Engine` over groups of workers on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

import torch
import yaml

from mopd_nemo.config import Config
from mopd_nemo.engines.base import InFlight, OnRollout, Progress, Request, TokenSignal, added
from mopd_nemo.engines.models import load_chat
from mopd_nemo.engines.nemo.batches import NO_ROW
from mopd_nemo.engines.nemo.checks import check_models, check_surroundings
from mopd_nemo.engines.nemo.dealing import deal
from mopd_nemo.engines.nemo.launch import BACKENDS, Launch, Runtime, launch
from mopd_nemo.engines.nemo.learner import Learner
from mopd_nemo.engines.nemo.policy_config import student_policy
from mopd_nemo.engines.nemo.scorer import Scorer, Targets
from mopd_nemo.engines.served import ServedTeacher
from mopd_nemo.engines.vllm import Numbered
from mopd_nemo.files import write_text
from mopd_nemo.losses.logits import TopK
from mopd_nemo.losses.objectives import Divergence
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.types import Rollout


class NemoEngine:
    """Student, teacher and vLLM on a cluster.

    The constructor makes every check that needs no GPU. The first method that needs GPUs reserves them, because
    Megatron can load a checkpoint to continue from only while it starts.

    Args:
        launch: starts the workers.
    """

    def __init__(self, config: Config, launch: Launch = launch) -> None:
        check_surroundings(config.nemo.backend)
        self._config = config
        self._vocab_size = check_models(config)
        self.chat = load_chat(config.model)
        self.chat.check_end_of_turn(self.chat.end_ids)
        if self.chat.tokenizer.pad_token_id is None:
            self.chat.tokenizer.pad_token = self.chat.tokenizer.eos_token
        self._served = {
            name: ServedTeacher(config, name, self.chat, self._vocab_size)
            for name, teacher in config.every_teacher.items()
            if teacher.kind == "server"
        }
        self._launch = launch
        self._checkpoint: Path | None = None
        self._running: Runtime | None = None
        self._row_keys = count()
        """Of rows whose targets workers keep: a new one for each row of each step."""
        self._stale = True
        """vLLM's weights are older than the student's, or the student occupies the GPUs that vLLM needs."""
        self._in_flight: InFlight | None = None

    def generate(
        self,
        request: Request,
        on_progress: Progress | None = None,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        self._wake()
        return self._drawn(request, on_progress, on_rollout)

    def generate_ahead(
        self,
        request: Request,
        on_rollout: OnRollout,
    ) -> InFlight:
        self._wake()
        self._in_flight = InFlight(partial(self._drawn, request), on_rollout)
        return self._in_flight

    def _wake(self) -> None:
        """Bring vLLM, once it has drawn what is in flight, to the GPUs with the student's present weights."""
        if self._in_flight is not None:
            self._in_flight.wait()
        if self._stale:
            # After a step without an update, or with an external teacher on the same GPUs, the student is offloaded: a
            # refit would read freed memory.
            self._runtime.student.prepare_for_lp_inference()
        self._runtime.generation.wake(refit=self._stale)
        self._stale = False

    def _drawn(
        self,
        request: Request,
        on_progress: Progress | None,
        on_rollout: OnRollout | None,
    ) -> list[list[Rollout]]:
        """Responses with the weights that vLLM has. Calls nothing of student and teacher, which may be at work."""
        rollouts: dict[tuple[int, int], Rollout] = {}

        def finish(samples: Sequence[Numbered]) -> None:
            for prompt, number, (ids, logprobs, finished) in samples:
                rollout = Rollout(tuple(ids), self.chat.decode(ids), finished, tuple(logprobs))
                rollouts[prompt, number] = rollout
                if on_rollout:
                    on_rollout(prompt, number, rollout)
            if on_progress:
                on_progress(len(rollouts) / len(request))

        generation = self._runtime.generation
        generation.sample(
            request.prompts,
            finish,
            num_samples=request.num_samples,
            max_tokens=request.sampling.max_tokens,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            stop_ids=sorted(self.chat.end_ids),
            seed=request.seed if self._config.nemo.generation.seeded else None,
        )
        generation.sleep()
        numbers = range(request.num_samples)
        return [[rollouts[prompt, number] for number in numbers] for prompt in range(len(request.prompts))]

    def score(self, batch: TrainBatch, on_progress: Progress | None = None) -> tuple[Targets, dict[str, float]]:
        scored = [i for i, example in enumerate(batch.examples) if example.teacher_prompt_ids is not None]
        objective = next((term.objective for term in batch.terms if term.objective.reads_teacher), None)
        targets = Targets.none(len(batch.examples))
        metrics: dict[str, float] = {}
        if self._served:
            metrics = self._ask_servers(batch, scored, targets, on_progress)
        elif objective is not None and scored:
            self._stale = True
            rank_of = self._deal(batch)
            rows, ranks = [batch.examples[i] for i in scored], [rank_of[i] for i in scored]
            if self._scorer.stays(objective):
                for i in scored:
                    targets.keys[i] = next(self._row_keys)
                metrics = self._scorer.keep(rows, objective, ranks, [targets.keys[i] for i in scored])
            else:
                answers, metrics = self._scorer.teach(rows, objective, ranks)
                for i, target in zip(scored, answers, strict=True):
                    targets.here[i] = target
        if on_progress:
            on_progress(1.0)
        return targets, metrics

    def _ask_servers(
        self, batch: TrainBatch, scored: Sequence[int], targets: Targets, on_progress: Progress | None
    ) -> dict[str, float]:
        """Put what servers say of the examples into the targets. No GPU of the cluster is touched. Returns metrics."""
        told, rows = [], {name: [i for i in scored if batch.examples[i].teacher == name] for name in self._served}
        with ExitStack() as at_once:
            asked = [
                (own, at_once.enter_context(self._served[name].teaching([batch.examples[i] for i in own])))
                for name, own in rows.items()
                if own
            ]
            for own, answers in asked:
                found, metrics = answers(on_progress)
                told.append(metrics)
                for i, topk in zip(own, found, strict=True):
                    dtype = getattr(torch, self._config.nemo.target_dtype)
                    targets.here[i] = TopK(topk.ids_TK.int(), topk.logprobs_TK.to(dtype))
        return added(told)

    def update(
        self,
        batch: TrainBatch,
        targets: Targets,
        learning_rate: float,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        self._stale = True
        learner = Learner(self._runtime.student, self._scorer, self._config, self.chat, self._vocab_size)
        return learner.step(batch, targets, self._deal(batch), learning_rate, on_progress)

    def token_signal(self, batch: TrainBatch, targets: Targets, top: int) -> list[TokenSignal | None]:
        signals: list[TokenSignal | None] = [None] * len(batch.examples)
        taught = [i for i, key in enumerate(targets.keys) if key != NO_ROW]
        if taught:
            self._stale = True
            objective = next(term.objective for term in batch.terms if isinstance(term.objective, Divergence))
            rank_of, rows, keys = (
                self._deal(batch),
                [batch.examples[i] for i in taught],
                [targets.keys[i] for i in taught],
            )
            told = self._scorer.token_signal(rows, objective, [rank_of[i] for i in taught], keys, top)
            for i, signal in zip(taught, told, strict=True):
                signals[i] = signal
        return signals

    def response_logprobs(
        self,
        prompts: Sequence[tuple[int, ...]],
        responses: Sequence[tuple[int, ...]],
        on_progress: Progress | None = None,
    ) -> list[tuple[float, ...]]:
        self._stale = True
        scores = self._scorer.sampled_logprobs(list(zip(prompts, responses, strict=True)))
        if on_progress:
            on_progress(1.0)
        return [tuple(logprobs_R.tolist()) for logprobs_R in scores]

    def update_teacher(self) -> None:
        if self._config.teacher.kind == "ema":
            student = self._runtime.student
            self._stale = True
            student.prepare_for_training()  # the optimiser's weights are where they were, unless the step had no update
            student.run_all_workers_single_data("follow_student", rate=self._config.teacher.ema_rate)

    def save(self, directory: Path) -> None:
        """Write `policy/` (a NeMo-RL checkpoint, with the configuration for NeMo-RL's converter) and `teacher/`."""
        student = self._runtime.student
        self._stale = True
        student.prepare_for_training()
        policy = directory.absolute() / "policy"
        student.save_checkpoint(
            weights_path=str(policy / "weights"),
            optimizer_path=str(policy / "optimizer"),
            tokenizer_path=str(policy / "tokenizer"),
            **BACKENDS[self._config.nemo.backend].checkpointing,
        )
        if hasattr(student, "finalize_async_save"):  # newer than v0.7.0, where a save may return before it is complete
            student.finalize_async_save()
        self.chat.tokenizer.save_pretrained(policy / "tokenizer")
        write_text(policy / "config.yaml", yaml.safe_dump({"policy": student_policy(self._config)}))
        if self._config.teacher.kind in ("ema", "frozen"):
            student.run_all_workers_single_data("save_teacher", directory=str(directory.absolute() / "teacher"))

    def checkpoint_bytes(self) -> int:
        return 0

    def load(self, directory: Path) -> None:
        """End running workers. The next ones start from this checkpoint."""
        if self._running is not None:
            self._running.shutdown()
        self._running, self._stale, self._in_flight = None, True, None
        self._checkpoint = directory.absolute()

    def _deal(self, batch: TrainBatch) -> list[int]:
        """The data-parallel rank of each example, the same whenever it is asked for."""
        updates = batch.updates(self._config.train.num_updates_per_step)
        ranks = self._runtime.student.data_parallel_size
        return deal(batch.examples, updates, ranks, packed=self._config.nemo.batching == "packed")

    @property
    def _runtime(self) -> Runtime:
        if self._running is None:
            self._running = self._launch(self._config, self.chat.tokenizer, self._checkpoint)
            kind = self._config.teacher.kind
            if kind in ("ema", "frozen"):
                saved = None if self._checkpoint is None else str(self._checkpoint / "teacher")
                self._running.student.run_all_workers_single_data("start_teacher", kind=kind, directory=saved)
        return self._running

    @property
    def _scorer(self) -> Scorer:
        return Scorer(self._runtime.student, self._runtime.teacher, self._config, self.chat.pad_id, self._vocab_size)
