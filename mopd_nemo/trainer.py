"""The loop: generate, verify, build, score, update, track, checkpoint, evaluate. It knows no algorithm by name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mopd_nemo.chat import with_prompt_ids
from mopd_nemo.config import Config, TeacherConfig, TeacherError, UserError
from mopd_nemo.config.load import changed_settings
from mopd_nemo.config.plugins import method_class
from mopd_nemo.data.completions import read_completions
from mopd_nemo.data.load import changes, fingerprints, judgeable, load_problems, recorded_fingerprints, with_teachers
from mopd_nemo.engines import make_engine
from mopd_nemo.evaluation import change_since, check_votes, evaluate
from mopd_nemo.files import append_row, write_json, write_rows
from mopd_nemo.methods.base import make_method
from mopd_nemo.outlook import privileged_texts, summary
from mopd_nemo.peers.metrics import group_metrics
from mopd_nemo.preflight import choice
from mopd_nemo.run import ahead
from mopd_nemo.run import checkpoints as saved
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import Display, PhaseTimer
from mopd_nemo.run.guard import Signs, best_evaluation, errors_over_problems, missing_steps, remarks, signs
from mopd_nemo.run.launches import record_launch
from mopd_nemo.run.rollouts import read_groups, rollout_records, solved_fraction
from mopd_nemo.run.stop import TIME_IS_UP, StopRequest
from mopd_nemo.run.token_signal import write_token_signal
from mopd_nemo.run.trackers import Trackers, check_trackers, make_trackers
from mopd_nemo.types import RolloutGroup
from mopd_nemo.verifiers.pool import VerifierPool


class Trainer:
    """One run of a method on an engine.

    Args:
        run: a run directory, new or with checkpoints to continue from.
        started: `time.monotonic()` when the process began. Default: now.
    """

    def __init__(self, config: Config, run: RunDirectory, console: Console, started: float | None = None) -> None:
        check_trackers(config)
        choice.check_choice(config)
        self.config = config
        self.run = run
        self.problems = load_problems(config, "train")
        self.eval_problems = load_problems(config, "eval") if config.train.eval_every else []
        self.verifiers = VerifierPool(config.verifier, {p.task for p in [*self.problems, *self.eval_problems]})
        self.problems = with_teachers(judgeable(self.problems, self.verifiers, config, "train"), config)
        self.eval_problems = judgeable(self.eval_problems, self.verifiers, config, "eval")
        check_votes(config, self.eval_problems)
        if len(self.problems) < config.rollout.num_prompts_per_step:
            raise UserError(
                f"rollout.num_prompts_per_step={config.rollout.num_prompts_per_step} is more than the "
                f"{len(self.problems)} problems of data.train={config.data.train}: lower it or add problems"
            )
        if self.verifiers.sandbox:
            console.print(f"programs run in the sandbox {self.verifiers.sandbox}", highlight=False, soft_wrap=True)
        samples = method_class(config.method).samples
        completions = None if samples else read_completions(config, self.problems)
        # Completions exist already, so their teacher is not loaded.
        teacher = config.teacher if samples else TeacherConfig(kind="none")
        self.engine = make_engine(config.model_copy(update={"teacher": teacher}))
        limit, escape = config.data.max_prompt_tokens, config.data.escape_control_tokens
        self.problems = with_prompt_ids(self.problems, self.engine.chat, limit, escape_control_tokens=escape)
        self.eval_problems = with_prompt_ids(self.eval_problems, self.engine.chat, limit, escape_control_tokens=escape)
        self.rollouts = ahead.RolloutSource(config, self.problems, self.engine, self.verifiers, completions)
        self.method = make_method(config, self.engine.chat)
        self.step = 0
        self.saved_step = -1
        self.ever_solved: set[str] = set()
        self.recorded: dict[str, list[dict[str, Any]]] = {"metrics": [], "evaluations": [], "choices": []}
        """Rows that the run has written so far, oldest first."""
        self.signs = Signs({})
        self.halted = False
        """Whether the guard has ended the run."""
        self.display = Display(console, config.train.num_steps)
        self.stop = StopRequest(config.train.must_save_by_seconds, started, self.display.notice)
        self.trackers = Trackers()

    @classmethod
    def new(cls, config: Config, console: Console, started: float | None = None) -> Trainer:
        """A new run. Its directory is claimed first, and left empty if a check fails."""
        run = RunDirectory.at(config)
        run.claim(partial(console.print, markup=False))
        try:
            run.check_unused()
            trainer = cls(config, run, console, started)
            run.create(config)
            trainer._compare_problems()
        except BaseException:
            run.abandon()
            raise
        return trainer

    @classmethod
    def resumed(
        cls, run: RunDirectory, overrides: Sequence[str], console: Console, started: float | None = None
    ) -> Trainer:
        """A run that continues, with changed settings if overrides are given."""
        before, config = run.load_config(), run.load_config(overrides)
        made = saved.newest_step(run.checkpoints)
        if made > config.train.num_steps:
            raise UserError(
                f"train.num_steps={config.train.num_steps}: {run.path} has made {made} steps already; give at least "
                "as many, or start a new run"
            )
        run.claim(partial(console.print, markup=False))
        try:
            trainer = cls(config, run, console, started)
            for change in changed_settings(before, config):
                trainer.display.say(f"changed since the run began: {change}")
            trainer._compare_problems()
        except BaseException:
            run.release()
            raise
        return trainer

    def fit(self) -> bool:
        """Train to the last step, from the newest checkpoint if there is one.

        Returns:
            True when the run is complete, False when a signal, the deadline or the guard stopped it. It is saved,
            unless the guard did.

        Raises:
            TeacherError: a served teacher does not answer any more. The run is saved.
        """
        try:
            self._restore()
            self.run.write_config(self.config)
            record_launch(self.run, self.config, self.step)
            self._look_for_room()
            start = f"step {self.step}" if self.step else "the beginning"
            for line in (*summary(self.config, self.run.path, start), *privileged_texts(self.config, self.problems)):
                self.display.say(line)
            self.trackers = make_trackers(self.config, self.run)
            with self.stop, self.display:
                try:
                    self._loop()
                except TeacherError:  # nothing of the step that it was asked in has been learned
                    self._save()
                    raise
        finally:
            self.rollouts.stop()
            self.verifiers.close()
            self.trackers.close()
            self.run.release()
        return self.step == self.config.train.num_steps and not self._evaluation_due() and not self.halted

    def _compare_problems(self) -> None:
        """Record the problems of a run that begins; say when those of a resumed one are not the recorded ones."""
        now = {"train": fingerprints(self.problems), "eval": fingerprints(self.eval_problems)}
        file = self.run.problems_file
        try:
            before = now | recorded_fingerprints(file) if file.exists() else now
        except ValueError:
            self.display.say(f"WARNING: {file} is damaged: whether the problems have changed is unknown", "yellow")
            before = now
        for split, problems in now.items():
            if before[split] and problems and (found := changes(before[split], problems)):
                self.display.say(
                    f"WARNING: the problems of data.{split} are not those of this run so far: {found}. What follows is "
                    "not what an undisturbed run would give",
                    "bold red",
                )
        write_json(file, now)

    def _loop(self) -> None:
        """A step is saved before it is evaluated. An evaluation that a stop has prevented is made after a resume."""
        train = self.config.train
        while (work := self._next_work()) and self._may_start(work):
            with self.stop.timed(work):
                if work == "evaluation":
                    self._evaluate()
                elif work == "choice":
                    self._choose_peers()
                else:
                    self._train_step(self.step + 1)
            if work == "step":
                for remark in remarks(self.recorded["metrics"], self.config.engine == "local"):
                    self.display.say(f"WARNING, step {self.step}: {remark}", "yellow")
            if work == "evaluation":
                self._keep_best()
            if work != "choice":
                self._watch()
            if work != "step" or self.halted:
                continue
            if self.step == train.num_steps or self.step % train.checkpoint_every == 0:
                self._save()
        if not self.halted:
            self._save()

    def _next_work(self) -> Literal["evaluation", "choice", "step"] | None:
        if self._evaluation_due():
            return "evaluation"
        if choice.due(self.config, self.step) and not self._chosen_at(self.step):
            return "choice"
        return "step" if self.step < self.config.train.num_steps else None

    def _may_start(self, work: str) -> bool:
        """No stop was requested, and there is time for it."""
        if self.stop.reason is None and not self.stop.leaves_time_for(work):
            limit = self.config.train.checkpoint_must_save_by
            self.stop.ask(TIME_IS_UP, f"Stopping in time for train.checkpoint_must_save_by={limit}.")
        return self.stop.reason is None and not self.halted

    def _evaluation_due(self) -> bool:
        """Before the first step, every `train.eval_every` steps and after the last; unless it is recorded already."""
        every = self.config.train.eval_every
        if not every or any(row["step"] == self.step for row in self.recorded["evaluations"]):
            return False
        return self.step % every == 0 or self.step == self.config.train.num_steps

    def _train_step(self, step: int) -> None:
        config, engine, display = self.config, self.engine, self.display
        timer = PhaseTimer(display.phase)
        with timer("generate"):
            rollouts = self.rollouts.of(step, display.progress)
        with timer("reward"):
            groups = rollouts.judged()
        with timer("context"):
            batch = self.method.build(groups, step)
        with timer("score"):
            targets, scored = engine.score(batch, display.progress)
            if (every := config.logging.save_token_signal_every) and step % every == 0:
                signals = engine.token_signal(batch, targets, top=1)
                write_token_signal(self.run.signal_file(step), groups, batch, signals, engine.chat)
        with timer("update"):
            learned = engine.update(batch, targets, self._learning_rate(step), display.progress)
            engine.update_teacher()
        display.phase("recording")
        if config.logging.save_rollouts_every and step % config.logging.save_rollouts_every == 0:
            records = rollout_records(step, groups, batch.contexts, engine.chat, batch.leaks)
            write_rows(self.run.rollouts_file(step), records)
        self.step = step
        metrics = learned | scored | group_metrics(groups) | batch.metrics | errors_over_problems(groups)
        metrics |= {"learning_rate": self._learning_rate(step), "ever_solved": self._count_solved(groups)}
        metrics |= rollouts.metrics | timer.metrics()
        metrics["tokens_per_second"] = (
            sum(len(r.response_ids) for g in groups for r in g.rollouts) / metrics["seconds/step"]
        )
        self._record(metrics)
        if (every := config.logging.track_groups_every) and step % every == 0:
            self.trackers.groups(step, "train", groups, batch.contexts, engine.chat)

    def _evaluate(self) -> None:
        started = time.perf_counter()
        self.display.phase("evaluating")
        metrics, groups = evaluate(self.engine, self.verifiers, self.eval_problems, self.config, self.display.progress)
        if best := best_evaluation(self.recorded["evaluations"]):
            before = {
                group.problem_id: solved_fraction(group.rows)
                for group in read_groups(self.run.rollouts_file(best["step"], "eval"))
            }
            metrics |= {"change/from": float(best["step"]), **change_since(groups, before)}
        write_rows(
            self.run.rollouts_file(self.step, "eval"),
            rollout_records(self.step, groups, None, self.engine.chat),
        )
        metrics["seconds"] = time.perf_counter() - started
        self._write("evaluations", self.run.eval_file, {"step": self.step, **metrics})
        self.trackers.log(self.step, {f"eval/{name}": value for name, value in metrics.items()})
        self.trackers.groups(self.step, "held_out", groups, None, self.engine.chat)
        self.display.evaluation(self.step, metrics)

    def _choose_peers(self) -> None:
        """Measure which peers to show from here on."""
        self.display.phase("choosing peers")
        row = choice.choose(self.step, self.problems, self.engine, self.verifiers, self.config, self.display.progress)
        self._write("choices", self.run.choices_file, row)
        self._show_chosen()
        self.trackers.log(self.step, row["metrics"])
        for sentence in (*row["sentences"], *row["cautions"]):
            self.display.say(f"peers, step {self.step}: {sentence}")

    def _show_chosen(self) -> None:
        """Let the method show what the latest choice says."""
        peers = choice.chosen_peers(self.recorded["choices"][-1], self.config.peers)
        self.method = make_method(self.config.model_copy(update={"peers": peers}), self.engine.chat)

    def _chosen_at(self, step: int) -> bool:
        return any(row["step"] == step for row in self.recorded["choices"])

    def _watch(self) -> None:
        """Say so when the run begins to look ruined, and stop it if asked."""
        before, self.signs = self.signs, signs(self.recorded["metrics"], self.recorded["evaluations"])
        if not self.signs.alarm:
            return
        stop = self.config.guard.action == "stop"
        if not before.alarm or stop:
            good = self.good_checkpoint
            where = f"the last good checkpoint is {good}" if good else "no checkpoint is old enough to be good"
            for reason in self.signs.reasons:
                self.display.say(f"WARNING, step {self.step}: {reason}", "bold red")
            self.display.say(f"WARNING, step {self.step}: this run looks ruined; {where}", "bold red")
        self.halted = stop

    @property
    def good_checkpoint(self) -> Path | None:
        """The newest checkpoint from before the signs."""
        step = self.signs.good_step
        return None if step is None else saved.newest_up_to(self.run.checkpoints, step)

    def _write(self, name: str, file: Path, row: dict[str, Any]) -> None:
        append_row(file, row)
        self.recorded[name].append(row)

    def _record(self, metrics: dict[str, float]) -> None:
        row = {"step": self.step, **metrics}
        metrics |= signs([*self.recorded["metrics"], row], self.recorded["evaluations"]).metrics
        self._write("metrics", self.run.metrics_file, {"step": self.step, **metrics})
        self.trackers.log(self.step, metrics)
        self.display.step(self.step, metrics)

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up that ends at `warmup_steps`, then constant. `step` counts from 1, so no update has rate 0."""
        optimizer = self.config.optimizer
        return optimizer.learning_rate * min(1.0, step / max(optimizer.warmup_steps, 1))

    def _count_solved(self, groups: list[RolloutGroup]) -> float:
        """Training problems solved at least once so far (the paper's figure 3)."""
        self.ever_solved |= {group.problem.id for group in groups if group.successes}
        return float(len(self.ever_solved))

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        self.display.phase("saving")
        state = {"step": self.step, "ever_solved": sorted(self.ever_solved)}
        with self.stop.timed("save"):  # which waits for the rollouts in flight
            rows = {ahead.FILE: self.rollouts.rows(self.step, self.display.progress)}
            saved.save_checkpoint(self.run.checkpoints, self.step, self.engine, state, rows=rows)
        self.saved_step = self.step
        self._prune()
        self._look_for_room()

    def _keep_best(self) -> None:
        """Save the step of the latest evaluation if it is the best so far, and let go of the one that was."""
        metric, (*before, now) = self.config.train.keep_best, self.recorded["evaluations"]
        if metric is None or not self.step:
            return
        best = saved.best_saved(self.run.checkpoints, before, metric)
        if self.step != self.saved_step and (best is None or now[metric] > best[1][metric]):
            self._save()
        else:
            self._prune()

    def _prune(self) -> None:
        metric = self.config.train.keep_best
        best = saved.best_saved(self.run.checkpoints, self.recorded["evaluations"], metric) if metric else None
        spare = [best[0] if best else None, self.good_checkpoint if self.signs.doubt else None]
        saved.prune(self.run.checkpoints, self.config.train.keep_checkpoints, spare)

    def _look_for_room(self) -> None:
        """Say early when the next checkpoint will not fit."""
        if self.step < self.config.train.num_steps and (problem := saved.lacking(self.run.checkpoints, self.engine)):
            self.display.say(f"WARNING: the next checkpoint will not be written: {problem}", "bold red")

    def _restore(self) -> None:
        checkpoint = saved.recover(self.run.checkpoints, partial(self.display.say, style="bold red"))
        if checkpoint is not None:
            state = saved.load_checkpoint(checkpoint, self.engine)
            self.step = self.saved_step = state["step"]
            self.ever_solved = set(state["ever_solved"])
            if notice := self.rollouts.restore(checkpoint, self.step):
                self.display.say(notice)
            self.display.resume(self.step)
        self.run.forget_after(self.step)
        files = {
            "metrics": self.run.metrics_file,
            "evaluations": self.run.eval_file,
            "choices": self.run.choices_file,
        }
        self.recorded = {name: self.run.rows(file) for name, file in files.items()}
        self.signs = signs(self.recorded["metrics"], self.recorded["evaluations"])
        self._say_holes()
        if self.recorded["choices"]:
            self._show_chosen()

    def _say_holes(self) -> None:
        """Say which rows of the steps so far are missing."""
        every = self.config.train.eval_every
        expected = {
            "metrics": (self.run.metrics_file, range(1, self.step + 1)),
            "evaluations": (self.run.eval_file, range(0, self.step, every) if every else ()),
        }
        for name, (file, steps) in expected.items():
            if missing := missing_steps(self.recorded[name], steps):
                self.display.say(f"WARNING: {file} lacks rows of steps {missing}; the run goes on without", "yellow")
