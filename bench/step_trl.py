"""TRL's side of `bench/step.py`: one training step for each line on standard input, one line of JSON for each step.

Runs in an environment of its own and imports nothing of this project:

    python -m venv trl-env && trl-env/bin/pip install trl==1.16.0 transformers==5.19.0

The job comes as JSON in the first argument. The clock of a step starts when the trainer has its batch of prompts and
stops when the optimiser, and the teacher's moving average with it, have been updated; TRL's own logging is outside.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

ANSWERS = os.fdopen(os.dup(1), "w")  # TRL prints to standard output too
os.dup2(2, 1)


def settings(job: dict[str, Any], directory: str) -> dict[str, Any]:
    """What both trainers get: one update a step, float32 on a CPU, nothing saved, no activations computed again."""
    rows = job["num_prompts"] * job["num_rollouts"]
    return {
        "output_dir": directory,
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": rows // job["micro_batch"],
        "max_completion_length": job["max_response_tokens"],
        "temperature": 1.0,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_steps": job["num_steps"],
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def sdpo(job: dict[str, Any], directory: str) -> Any:
    """The teacher is a moving average that reads one success; JSD on the student's top 100 and the tail."""
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    config = SDPOConfig(
        **settings(job, directory),
        num_generations=job["num_rollouts"],
        distillation_mode="topk_logits",
        distillation_topk=100,
        distillation_add_tail=True,
        distillation_alpha=0.5,
        teacher_model_kind="ema",
        teacher_update_rate=0.05,
    )
    rows = [{"prompt": problem["messages"], "answer": problem["answer"]} for problem in job["problems"]]
    return SDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
    )


def distillation(job: dict[str, Any], directory: str) -> Any:
    """On-policy distillation from another model that reads the plain prompt; JSD over the whole vocabulary."""
    from trl import DistillationConfig, DistillationTrainer

    rows = [{"prompt": problem["messages"]} for problem in job["problems"] for _ in range(job["num_rollouts"])]
    return DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=DistillationConfig(**settings(job, directory), beta=0.5),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
    )


def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """1 for a right answer. The answer is JSON: a boxed number, or the tests of a function."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(is_right(text, json.loads(right))) for text, right in zip(texts, answer, strict=True)]


def is_right(text: str, answer: Any) -> bool:
    if isinstance(answer, str):
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
        return bool(boxed) and boxed[-1].strip() == answer
    blocks = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    return bool(blocks) and passes(blocks[-1], answer)


def passes(program: str, tests: dict[str, Any]) -> bool:
    """Whether a program passes, run in this process and unprotected: the least that a reward can cost."""
    signal.alarm(2)
    try:
        names: dict[str, Any] = {}
        exec(program, names)
        function = names[tests["fn_name"]]
        for given, expected in zip(tests["inputs"], tests["outputs"], strict=True):
            if function(*map(json.loads, given.splitlines())) != json.loads(expected):
                return False
    except BaseException:  # whatever it raises, it has not passed
        return False
    finally:
        signal.alarm(0)
    return True


def out_of_time(*_: Any) -> None:
    raise TimeoutError


class Turns(TrainerCallback):
    """Waits for a turn before each step and answers after it."""

    def __init__(self, rows: int, clock: str) -> None:
        self.rows = rows
        self.clock = getattr(time, clock)
        self.started = self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # the other side has gone
        self.started = self.clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = self.clock() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        logs = logs or {}
        if "completions/mean_length" in logs:
            tokens = float(logs["completions/mean_length"]) * self.rows
            answer = {
                "seconds": self.seconds,
                "tokens": tokens,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "signal": float(logs.get("self_distillation/reprompt_sample_fraction", 1.0)),
            }
            print(json.dumps(answer), file=ANSWERS, flush=True)


def main() -> None:
    signal.signal(signal.SIGALRM, out_of_time)
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    trainer = {"sdpo": sdpo, "distillation": distillation}[job["trainer"]](job, str(Path(sys.argv[1]).parent))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        Turns(job["num_prompts"] * job["num_rollouts"], job["clock"])
    )  # last: after the teacher's update
    trainer.train()


if __name__ == "__main__":
    main()
