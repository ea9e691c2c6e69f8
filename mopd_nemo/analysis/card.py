"""The model card of a trained model, written from the records of its run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from mopd_nemo import __version__
from mopd_nemo.analysis.page import markdown_table
from mopd_nemo.analysis.plots import mean_name
from mopd_nemo.config import Config
from mopd_nemo.config.checks import uses
from mopd_nemo.config.load import flatten
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.guard import signs

_PRIVATE = ("run_dir", "name", "cluster.", "logging.")
"""Settings that say where and by whom a run was made, not what was done."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

Rows = Sequence[Mapping[str, Any]]


def model_card(run: RunDirectory, step: int, name: str) -> str:
    """A README.md with a hub's front matter.

    Args:
        step: after which the model was saved.
        name: of the model.
    """
    config = run.read_config()
    metrics = [row for row in run.rows(run.metrics_file) if row["step"] <= step]
    evaluations = run.rows(run.eval_file)
    on_hub = _HUB_NAME.fullmatch(config.model.path) and not Path(config.model.path).exists()
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"base_model": config.model.path} if on_hub else {}
    front |= {"tags": ["mopd-nemo", config.method, *(["on-policy-distillation"] if config.method == "mopd" else [])]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"`{config.model.path}` after {step} of {config.train.num_steps} steps of `{config.method}` by "
        "mopd-nemo, on problems whose answers a program can check."
        + (" The method: [arXiv 2605.12652](https://arxiv.org/abs/2605.12652)." if config.method == "mopd" else ""),
        "## Results",
        *_results(config, step, evaluations),
        "## Training",
        _training(config, metrics),
        "## Use",
        _use(config, name),
        "## Make it again",
        "```bash\nmopd train --config mopd.yaml\n```",
        *_launches(run, step),
        "`mopd.yaml` beside this file has every setting of the run that is not a default; paths in it are those of the "
        f"machine that trained. Exported with {_versions()}.",
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(metrics, evaluations, step)),
    ]
    return "\n\n".join(parts) + "\n"


def settings_file(config: Config) -> str:
    """The settings that are not defaults, without those of the place where the run was made, as a config file."""
    defaults = flatten(Config())
    values: dict[str, Any] = {}
    for key, value in flatten(config).items():
        if value != defaults.get(key) and not key.startswith(_PRIVATE):
            block = values
            *above, last = key.split(".")
            for part in above:
                block = block.setdefault(part, {})
            block[last] = value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else "# every setting is a default\n"


def _versions() -> str:
    return ", ".join([f"mopd-nemo {__version__}", *(f"{name} {version(name)}" for name in ("torch", "transformers"))])


def _launches(run: RunDirectory, step: int) -> list[str]:
    """What is recorded of the processes that trained up to this step: no hosts, as a card may be published."""
    said = []
    for row in run.rows(run.launches_file):
        if row["step"] < step:
            packages = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
            code = f" at commit {row['commit']}" if row["commit"] else ""
            command = f", as `{row['command']}`" if row["command"] else ""
            said.append(
                f"- {row['started'][:10]}, from step {row['step']}: {row['hardware']}{code}{command}; {packages}"
            )
    return ["Trained:\n\n" + "\n".join(said)] if said else []


def _results(config: Config, step: int, evaluations: Rows) -> list[str]:
    here = next((row for row in evaluations if row["step"] == step), None)
    if here is None:
        return ["This checkpoint was not evaluated."]
    first = evaluations[0]
    rows = [first, here] if first["step"] < step else [here]
    n = mean_name(here).removeprefix("mean@")
    names = [name for name in (f"mean@{n}", f"pass@{n}", f"maj@{n}") if name in here]
    head = ["", *("before training" if row["step"] == 0 else f"step {row['step']}" for row in rows)]
    body = [[name, *(_with_interval(row, name) for row in rows)] for name in names]
    eval_ = config.eval
    sampled = f"{eval_.num_samples} samples each at temperature {eval_.temperature:g}, top-p {eval_.top_p:g}"
    said = [
        f"{here['num_problems']:.0f} held-out problems (`{config.data.eval}`), {sampled}, responses of up to "
        f"{config.rollout.max_response_tokens} tokens. mean@{n}: share of right samples. "
        f"pass@{n}: problems with at least one. maj@{n}: problems whose most frequent answer is right. In brackets: "
        "95 % intervals over problems.",
        markdown_table(head, body),
    ]
    best = max(evaluations, key=lambda row: row[mean_name(row)])
    if len(evaluations) > 2 and best is here:
        said.append(
            f"This step is the best of {len(evaluations)} evaluations on these same problems, so its figures are "
            "somewhat too good; the intervals do not count that choice."
        )
    return said


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    bounds = f" ({row[f'{name}/low']:.1%} to {row[f'{name}/high']:.1%})" if f"{name}/low" in row else ""
    return f"{row[name]:.1%}{bounds}"


def _training(config: Config, metrics: Rows) -> str:
    rollout = config.rollout
    lines = [
        f"method `{config.method}`" + (f", teacher `{config.teacher.kind}`" if config.teacher.kind != "none" else "")
    ]
    if config.teacher.path:
        lines[0] += f" (`{config.teacher.path}`)"
    if uses(config.method, "context"):
        lines.append(f"in the teacher's prompt: {config.teacher_reads}")
    if uses(config.method, "divergence.kind"):
        lines.append(f"objective: `{config.divergence.kind}` on `{config.divergence.support}`")
    lines.append(
        f"problems: `{config.data.train}`" + (f", the first {config.data.num_train}" if config.data.num_train else "")
    )
    lines.append(
        f"{rollout.num_prompts_per_step} problems x {rollout.num_rollouts_per_prompt} rollouts a step, up to "
        f"{rollout.max_response_tokens} tokens, temperature {rollout.temperature:g}"
    )
    lines.append(f"learning rate {config.optimizer.learning_rate:g}, seed {config.seed}, engine `{config.engine}`")
    if metrics:
        seconds = sum(row["seconds/step"] for row in metrics)
        lines.append(f"{len(metrics)} steps in {timedelta(seconds=round(seconds))} (evaluations and start not counted)")
    return "\n".join(f"- {line}" for line in lines)


def _use(config: Config, name: str) -> str:
    suffix = config.data.prompt_suffix + config.data.train_prompt_suffix
    said = [
        f"```python\nfrom transformers import pipeline\n\ntalk = pipeline('text-generation', '{name}')\n"
        "answer = talk([{'role': 'user', 'content': '...'}], max_new_tokens=512)\n"
        "print(answer[0]['generated_text'][-1]['content'])\n```",
        f"`vllm serve {name}` serves it, and `mopd chat {name}` talks to it.",
    ]
    if suffix:
        said.append(
            f"Every training prompt ended with this text; end yours with it, too:\n\n```text\n{suffix.strip()}\n```"
        )
    if kwargs := config.model.chat_template_kwargs:
        said.append(f"Prompts were rendered with these arguments of the chat template: `{dict(kwargs)}`.")
    return "\n\n".join(said)


def _limits(metrics: Rows, evaluations: Rows, step: int) -> list[str]:
    said = ["One run with one seed: another seed gives other figures. The intervals do not count that."]
    now = signs(metrics, [row for row in evaluations if row["step"] <= step])
    if now.alarm:
        said.append(f"The run looked ruined at this step: {'; '.join(now.reasons)}.")
    errors = [row["outcome/verifier_error"] for row in metrics if "outcome/verifier_error" in row]
    if errors and fmean(errors) > 0:
        said.append(f"{fmean(errors):.2%} of the training responses could not be judged.")
    said.append("Nothing but the held-out problems above was measured: neither other abilities nor safety.")
    return said
