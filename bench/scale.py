"""A cost model of a step on GPU nodes, for each config, with and without each saving. Nothing is measured.

    python bench/scale.py                                        # configs/paper, configs/beyond and configs/nemo
    python bench/scale.py configs/paper/mopd-*8b*.yaml --phases --markdown
    python bench/scale.py mfu_update=0.5 livecodebench.response=2000     # other assumptions
    python bench/scale.py --assumptions my.yaml
    python bench/scale.py --splits                               # which GPUs should generate, by `rollout.lag`
    python bench/scale.py --check                                # against this CPU, with the embedded model

The configs give sizes, parallelism, group size and the contexts of the teacher. The lengths of prompts and responses,
the fraction of rollouts with a signal and the fraction of peak speed are assumptions, printed with every table
(formulas and units: bench/cost.py). Verification, evaluation, checkpoints, start-up and waiting are not included, so a
real step is slower.

Savings: `shared` reads each distinct teacher context of a group once; `rows` applies LM heads to response rows alone;
`signal` skips rollouts without a signal; `old` skips the pass for old log-probabilities. `naive` has no saving.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.cost import (
    Lengths,
    Machine,
    Reading,
    cache_room,
    data_seconds,
    decode_seconds,
    follow_seconds,
    forward_flops,
    guest_seconds,
    handover_seconds,
    optimizer_seconds,
    prefill_seconds,
    refit_seconds,
    swap_seconds,
    tensor_seconds,
    tokens_of,
    update_flops,
)
from mopd_nemo.config import Config
from mopd_nemo.config.cluster import training_gpus
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.architecture import Architecture, architecture_of

ROOT = Path(__file__).parent.parent
SAVINGS = ("shared", "rows", "signal", "old")
TASKS = {
    "livecodebench": Lengths(prompt=800, response=3000),
    "maths": Lengths(prompt=200, response=5000),
    "tooluse": Lengths(prompt=1000, response=400, longest=0.5),
    "science": Lengths(prompt=300, response=800, longest=0.75),
}
SIGNAL = {"mopd": 0.95, "sdpo": 0.75, "grpo": 0.75, "opd": 1.0, "gkd": 1.0}
"""Share of rollouts that are learned from."""
ENTRY = 8
"""Bytes of a teacher target's id and log-probability, k of them for each response token."""
PHASES = (
    *("prefill", "decode", "refit", "hand-over", "student's top-k", "teacher", "swap", "old", "update", "optimiser"),
    *("average", "collectives", "targets"),
)
GROUPS = {
    "generate": ("prefill", "decode", "refit", "hand-over"),
    "score": ("student's top-k", "teacher", "swap", "targets"),
    "update": ("old", "update", "optimiser", "average"),
    "collectives": ("collectives",),
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Quantities that the configs do not determine."""

    machine: Machine
    tasks: dict[str, Lengths]
    signal: dict[str, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """A config with the sizes of its models and the lengths of its task."""

    name: str
    config: Config
    student: Architecture
    teacher: Architecture | None
    task: str
    lengths: Lengths

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.config.nemo.num_nodes * self.config.nemo.gpus_per_node


def read(path: Path, tasks: dict[str, Lengths]) -> Setting:
    config = load_config(path)
    task = next((name for name in tasks if name in path.stem), "science")
    if path.parent.name == "nemo":
        task = "livecodebench"
    lengths = tasks[task]
    lengths = replace(lengths, response=min(lengths.response, config.rollout.max_response_tokens))
    if config.nemo.student.pipeline > 1 or config.nemo.teacher.pipeline > 1:
        sys.exit(f"{path}: pipeline parallelism is not modelled")
    student = architecture_of(config.model.path, None)
    external = config.teacher.path if config.teacher.kind == "external" else None
    teacher = architecture_of(external, None) if external else None
    if student is None or (external and teacher is None):
        sys.exit(f"{path}: sizes of model.path={config.model.path} or teacher.path={external} are not known here")
    return Setting(path.stem, config, student, teacher, task, lengths)


def warn_of_small_caches(settings: Sequence[Setting], machine: Machine) -> None:
    for setting in settings:
        config, generation = setting.config, setting.config.nemo.generation
        room = cache_room(
            setting.student,
            machine,
            config.rollout.num_prompts_per_step * config.rollout.num_rollouts_per_prompt,
            setting.lengths.prompt + setting.lengths.response,
            generation.gpus or training_gpus(config.nemo),
            generation.tensor,
            generation.gpu_memory_utilization,
        )
        if room < 1:
            print(f"{setting.name}: {room:.0%} of the caches fit; decoding takes longer than shown", file=sys.stderr)


def contexts(setting: Setting) -> list[tuple[float, float]]:
    """What a target's teacher reads: `context`, or with `divergence.contrast` two, of successes and of failures."""
    config = setting.config
    if not (config.method == "mopd" and config.divergence.contrast):
        return [context(setting)]
    halves = ({"failures": 0}, {"successes": 0})
    return [
        context(replace(setting, config=config.model_copy(update={"peers": config.peers.model_copy(update=half)})))
        for half in halves
    ]


def context(setting: Setting) -> tuple[float, float]:
    """Tokens of a teacher prompt, and the number of distinct ones in a group."""
    config, lengths = setting.config, setting.lengths
    group = config.rollout.num_rollouts_per_prompt
    if config.method == "sdpo":
        whole, brief = 1, 0
    elif config.method == "mopd":
        counts = (config.peers.successes, config.peers.failures, config.peers.summaries)
        shown = [group - 1 if count == "all" else count for count in counts]
        whole, brief = shown[0] + shown[1], shown[2]
    else:
        return lengths.prompt, 1
    tokens = whole * min(lengths.response, config.peers.max_peer_tokens) + brief * config.peers.max_summary_tokens
    return min(lengths.prompt + tokens, config.peers.max_context_tokens), _distinct(config, whole, brief)


def _distinct(config: Config, whole: int, brief: int) -> int:
    """Number of distinct contexts in a group with enough successes and failures."""
    group = config.rollout.num_rollouts_per_prompt
    if config.peers.order == "random":
        return group
    if config.peers.order == "canonical" and not brief and 2 * whole <= group:
        return 2  # those who are shown step aside together
    return min(whole + brief + 1, group)


def readings(setting: Setting, assumed: Assumptions, savings: frozenset[str]) -> dict[str, list[Reading]]:
    """The sequences that student and teacher read in a step."""
    config, lengths = setting.config, setting.lengths
    prompts, group = config.rollout.num_prompts_per_step, config.rollout.num_rollouts_per_prompt
    rows = prompts * group * (assumed.signal[config.method] if "signal" in savings else 1.0)
    heads = lengths.response if "rows" in savings else lengths.prompt + lengths.response
    student = [Reading(rows, lengths.prompt + lengths.response, heads)]
    teacher = []
    for before, distinct in contexts(setting):
        if "shared" in savings:
            rest = Reading(rows, lengths.response, lengths.response, before)
            teacher += [Reading(min(prompts * distinct, rows), before, 0 if "rows" in savings else before), rest]
        else:
            whole = before + lengths.response
            teacher.append(Reading(rows, whole, lengths.response if "rows" in savings else whole))
    return {"student": student, "teacher": teacher}


def seconds(setting: Setting, assumed: Assumptions, savings: frozenset[str] = frozenset(SAVINGS)) -> dict[str, float]:
    """Seconds of every phase, in order."""
    config, machine, student = setting.config, assumed.machine, setting.student
    nemo, rollout, lengths = config.nemo, config.rollout, setting.lengths
    training = training_gpus(nemo)
    generating, apart = nemo.generation.gpus or training, nemo.generation.gpus > 0
    read_by = readings(setting, assumed, savings)
    sequences = rollout.num_prompts_per_step * rollout.num_rollouts_per_prompt
    found = dict.fromkeys(PHASES, 0.0)
    if config.method != "gkd":  # its responses are on disk
        found["prefill"] = prefill_seconds(student, machine, rollout.num_prompts_per_step, lengths.prompt, generating)
        longest = lengths.longest * rollout.max_response_tokens
        found["decode"] = decode_seconds(
            student, machine, sequences, lengths, longest, generating, nemo.generation.tensor
        )
        found["refit"] = refit_seconds(student, machine, nemo.student, apart, nemo.num_nodes > 1)
        if not apart:
            found["hand-over"] = handover_seconds(student, machine, training, nemo.student)

    def forward(model: Architecture, who: str, gpus: int) -> float:
        return forward_flops(model, read_by[who]) / (gpus * machine.flops * machine.mfu_score)

    def exchange(model: Architecture, who: str, gpus: int, parallel: Any, passes: int) -> float:
        return tensor_seconds(model, machine, tokens_of(read_by[who]), gpus, parallel, passes)

    if config.method in ("mopd", "sdpo", "opd"):
        teacher = setting.teacher or student
        gpus = nemo.teacher_gpus or training if setting.teacher else training
        parallel = nemo.teacher if setting.teacher else nemo.student
        found["teacher"] = forward(teacher, "teacher", gpus)
        found["collectives"] += exchange(teacher, "teacher", gpus, parallel, 1)
        if config.divergence.support == "student_topk":
            found["student's top-k"] = forward(student, "student", training)
            found["collectives"] += exchange(student, "student", training, nemo.student, 1)
        if setting.teacher and not nemo.teacher_gpus:
            found["swap"] = guest_seconds(student, teacher, machine, nemo.student, nemo.teacher)
        elif config.teacher.kind in ("ema", "frozen"):
            found["swap"] = swap_seconds(student, machine, training, nemo.gpus_per_node, nemo.student)
        if config.teacher.kind == "ema":
            found["average"] = follow_seconds(student, machine, training)
        tokens = read_by["student"][0].count * lengths.response
        trips = 4 if config.divergence.support == "student_topk" else 2  # ids out and in; targets out and in
        entry = ENTRY * (1.5 if config.divergence.contrast else 1.0)  # a second log-probability for each id
        found["targets"] = trips * entry * tokens * config.divergence.k / machine.driver
    if "old" not in savings:
        found["old"] = forward(student, "student", training)
        found["collectives"] += exchange(student, "student", training, nemo.student, 1)
    work = update_flops(student, read_by["student"], nemo.activation_checkpointing)
    found["update"] = work / (training * machine.flops * machine.mfu_update)
    found["optimiser"] = optimizer_seconds(student, machine, training)
    passes = 3 if nemo.activation_checkpointing else 2
    found["collectives"] += exchange(student, "student", training, nemo.student, passes)
    found["collectives"] += data_seconds(student, machine, training, nemo.gpus_per_node, nemo.student)
    return found


def hours(setting: Setting, step: float) -> float:
    """GPU-hours of a run's steps."""
    return setting.config.train.num_steps * step * setting.gpus / 3600


# ------------------------------------------------------------------------------------------------------- printing


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    if markdown:
        print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
    else:
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        for row in [header, *rows]:
            print(
                "  ".join(
                    f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
                )
            )
    print()


def show_configs(settings: Sequence[Setting], assumed: Assumptions, markdown: bool) -> None:
    """One row per config: seconds of a step's parts, GPU-hours of the run, and the step without each saving."""
    header = ["config", *(f"{group} s" for group in GROUPS), "step s", "GPU h",
              *(f"no {saving} s" for saving in SAVINGS), "naive s"]  # fmt: skip
    rows = []
    for setting in settings:
        found = seconds(setting, assumed)
        step = sum(found.values())
        parts = [sum(found[phase] for phase in members) for members in GROUPS.values()]
        without = [sum(seconds(setting, assumed, frozenset(SAVINGS) - {saving}).values()) for saving in SAVINGS]
        naive = sum(seconds(setting, assumed, frozenset()).values())
        numbers = [*parts, step, hours(setting, step), *without, naive]
        rows.append([setting.name, *(f"{number:.1f}" if number < 100 else f"{number:.0f}" for number in numbers)])
    table(header, rows, markdown)


def show_phases(setting: Setting, assumed: Assumptions, markdown: bool) -> None:
    """One config in full: with all savings, with all but the shared prefix, and with none."""
    found = {
        "all savings": seconds(setting, assumed),
        "no shared": seconds(setting, assumed, frozenset(SAVINGS) - {"shared"}),
        "naive": seconds(setting, assumed, frozenset()),
    }
    steps = {name: sum(column.values()) for name, column in found.items()}
    before, distinct = context(setting)
    print(f"{setting.name}: {setting.gpus} GPUs, {setting.task}; context of {before:.0f} tokens, {distinct} a group\n")
    rows = []
    for phase in PHASES:
        if any(column[phase] for column in found.values()):
            rows.append(
                [phase, *(text for name, column in found.items()
                          for text in (f"{column[phase]:.2f}", f"{column[phase] / steps[name]:.0%}"))]
            )  # fmt: skip
    rows.append(["step", *(text for step in steps.values() for text in (f"{step:.1f}", ""))])
    rows.append(["GPU-hours", *(text for step in steps.values() for text in (f"{hours(setting, step):.0f}", ""))])
    table(["", *(text for name in found for text in (f"{name}, s", ""))], rows, markdown)


def show_overheads(settings: Sequence[Setting], assumed: Assumptions, markdown: bool) -> None:
    """Time of MOPD divided by that of SDPO, for pairs of configs that differ in the method only."""
    by_name = {setting.name: setting for setting in settings}
    rows = []
    for name, setting in by_name.items():
        twin = by_name.get(name.replace("mopd", "sdpo"))
        if setting.config.method == "mopd" and twin is not None and twin is not setting:
            ratios = [
                sum(seconds(setting, assumed, savings).values()) / sum(seconds(twin, assumed, savings).values())
                for savings in (frozenset(SAVINGS), frozenset(SAVINGS) - {"shared"}, frozenset[str]())
            ]
            rows.append([name, *(f"{ratio:.2f}" for ratio in ratios)])
    if rows:
        table(["step of mopd / sdpo", "all savings", "no shared", "naive"], rows, markdown)


def show_assumptions(assumed: Assumptions) -> None:
    print("machine: " + " ".join(f"{name}={value:g}" for name, value in asdict(assumed.machine).items()))
    for name, lengths in assumed.tasks.items():
        print(f"{name}: " + " ".join(f"{key}={value:g}" for key, value in asdict(lengths).items()))
    print("signal: " + " ".join(f"{name}={value:g}" for name, value in assumed.signal.items()) + "\n")


# -------------------------------------------------------------------------------------------------------- options


def assume(changes: dict[str, float]) -> Assumptions:
    """The defaults with `mfu_update=0.5`, `livecodebench.response=2000`, `signal.mopd=0.9` changed."""
    machine, tasks, signal = asdict(Machine()), {name: asdict(task) for name, task in TASKS.items()}, dict(SIGNAL)
    places: dict[str, dict[str, float]] = {"": machine, "signal": signal, **tasks}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if name not in places.get(section, {}):
            known = [f"{place}.{name}".strip(".") for place, values in places.items() for name in values]
            sys.exit(f"unknown assumption {key}={value}; known: {', '.join(known)}")
        places[section][name] = float(value)
    return Assumptions(Machine(**machine), {name: Lengths(**task) for name, task in tasks.items()}, signal)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", help="config files, and assumptions as key=value")
    parser.add_argument("--assumptions", type=Path, help="a YAML file of them")
    parser.add_argument("--phases", action="store_true", help="every phase of every config")
    parser.add_argument("--splits", action="store_true", help="which GPUs should generate")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--check", action="store_true", help="predict phases on this CPU and measure them")
    options = parser.parse_args()
    if options.check:
        from bench.scale_check import check

        table(*check(), options.markdown)
        return
    changes: dict[str, float] = {}
    if options.assumptions:
        import yaml

        changes |= flat(yaml.safe_load(options.assumptions.read_text()))
    changes |= {key: float(value) for key, _, value in (a.partition("=") for a in options.arguments if "=" in a)}
    files = [Path(argument) for argument in options.arguments if "=" not in argument]
    files = files or [
        file
        for folder in ("paper", "beyond", "nemo")
        for file in sorted((ROOT / "configs" / folder).glob("*-qwen3-*.yaml"))
    ]
    assumed = assume(changes)
    settings = [read(file, assumed.tasks) for file in files]
    warn_of_small_caches(settings, assumed.machine)
    show_assumptions(assumed)
    if options.splits:
        from bench.scale_splits import HEADER, rows

        table(HEADER, list(rows(settings, assumed)), options.markdown)
        return
    if options.phases:
        for setting in settings:
            show_phases(setting, assumed, options.markdown)
    else:
        show_configs(settings, assumed, options.markdown)
    show_overheads(settings, assumed, options.markdown)


if __name__ == "__main__":
    main()
