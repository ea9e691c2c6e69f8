"""Our settings from the config of a NeMo-RL distillation run: NeMo-RL's own keys, and one block, `peer_teacher`.

    peer_teacher:
      method: mopd                      # or sdpo, opd
      teacher: {kind: ema, ema_rate: 0.05}
      peers: {successes: 2, failures: 1}
      divergence: {kind: jsd, support: student_topk}
      aggregation: token_mean

The block's sections are those of our config, with its defaults; what NeMo-RL has a key for is read from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.checks import teacher_prompt, uses
from mopd_nemo.config.load import config_from
from mopd_nemo.config.plugins import method_class
from mopd_nemo.engines.nemo.checks import check_models

BLOCK = "peer_teacher"
KEYS = ("method", "teacher", "context", "peers", "feedback", "divergence", "aggregation")
THEIRS = {
    "model.path": "policy.model_name",
    "model.dtype": "policy.precision",
    "teacher.path": "teacher.model_name",
    "divergence.k": "distillation.topk_logits_k",
    "data.max_prompt_tokens": "data.max_input_seq_length",
    "rollout.max_response_tokens": "policy.generation.max_new_tokens",
    "rollout.num_prompts_per_step": "distillation.num_prompts_per_step",
    "rollout.num_rollouts_per_prompt": "distillation.num_generations_per_prompt",
    "train.aggregation": f"{BLOCK}.aggregation",
}
"""Our keys, as errors name them, and those of a NeMo-RL config that give their values."""
_OUR_KEY = re.compile(
    r"(?<![\w.])(?:(?:model|rollout|data|divergence|teacher|peers|feedback|train)(?:\.\w+)+|(?:method|context)(?==))"
)


def settings_of(master: Mapping[str, Any]) -> Config:
    """Our config of a NeMo-RL run, checked.

    Args:
        master: NeMo-RL's `MasterConfig` as a mapping, with the block `peer_teacher`.

    Raises:
        UserError: a key is unknown, or its value does not go with this teacher; it names the key and the remedy.
    """
    if not isinstance(block := master.get(BLOCK), Mapping):
        raise UserError(f"{BLOCK}: missing; without settings for it use NeMo-RL's own run_distillation.py")
    if unknown := sorted(set(block) - set(KEYS)):
        raise UserError(f"unknown key {BLOCK}.{unknown[0]}; known here: {', '.join(KEYS)}")
    method = block.get("method", "mopd")
    if not uses(method, "divergence.kind") or not method_class(method).samples:
        raise UserError(f"{BLOCK}.method={method}: choose one that distils the student's own rollouts: mopd, sdpo, opd")
    divergence = dict(block.get("divergence", {}))
    if "k" in divergence:
        raise UserError(f"{BLOCK}.divergence.k={divergence['k']}: set distillation.topk_logits_k, and leave it out")
    policy, generation, distillation = master["policy"], master["policy"]["generation"], master["distillation"]
    teacher = dict(block.get("teacher", {}))
    if teacher.get("kind") == "external":
        teacher["path"] = master["teacher"]["model_name"]
    values: dict[str, Any] = {
        "seed": distillation["seed"],
        "method": method,
        "model": {"path": policy["model_name"], "dtype": policy["precision"]},
        "data": {"max_prompt_tokens": master["data"]["max_input_seq_length"]},
        "rollout": {
            "num_prompts_per_step": distillation["num_prompts_per_step"],
            "num_rollouts_per_prompt": distillation["num_generations_per_prompt"],
            "max_response_tokens": generation["max_new_tokens"],
            "importance_clip": None,  # the loop hands no log-probabilities of the sampler to its loss
        },
        **{name: block[name] for name in ("context", "peers", "feedback") if name in block},
        "teacher": teacher,
        "divergence": divergence | {"k": distillation["topk_logits_k"]},
        "train": {"aggregation": block.get("aggregation", "token_mean")},
    }
    try:
        settings = config_from(values, BLOCK)
    except UserError as error:
        raise UserError(in_their_words(str(error))) from error
    _check(settings, master)
    return settings


def vocabulary_of(settings: Config) -> int:
    """Tokens of the student's vocabulary, which an external teacher shares, and whose models have enough positions.

    Raises:
        UserError: they do not.
    """
    try:
        return check_models(settings)
    except UserError as error:
        raise UserError(in_their_words(str(error))) from error


def in_their_words(message: str) -> str:
    """An error about our keys as one about the keys of a NeMo-RL config."""
    return _OUR_KEY.sub(lambda key: THEIRS.get(key[0], f"{BLOCK}.{key[0]}"), message)


def _check(settings: Config, master: Mapping[str, Any]) -> None:
    """Refuse what NeMo-RL's loop would do otherwise than the settings say."""
    policy, distillation = master["policy"], master["distillation"]
    if settings.teacher.kind == "server":
        raise UserError(
            "teacher.kind=server: NeMo-RL's distillation loop has a teacher policy of its own: set external, or run "
            "`mopd train` with engine=nemo"
        )
    external = settings.teacher.kind == "external"
    if settings.divergence.support not in ("student_topk", "teacher_topk"):
        raise UserError(
            f"{BLOCK}.divergence.support={settings.divergence.support}: NeMo-RL's loop carries the top k of a "
            "distribution: set student_topk or teacher_topk"
        )
    if "privileged" in settings.context:
        raise UserError(
            f"{BLOCK}.context={list(settings.context)}: NeMo-RL's rows have no privileged text: name peers, "
            "feedback, or a function that finds the text itself"
        )
    if settings.peers.choose != "fixed":
        raise UserError(
            f"{BLOCK}.peers.choose={settings.peers.choose}: NeMo-RL's loop measures no contexts: set fixed, and the "
            "peers that `mopd preflight` recommends"
        )
    if distillation["max_rollout_turns"] != 1:
        raise UserError(
            f"distillation.max_rollout_turns={distillation['max_rollout_turns']}: peers are responses of one turn: "
            "set it to 1"
        )
    if (master.get("env") or {}).get("should_use_nemo_gym"):
        raise UserError("env.should_use_nemo_gym=true: verdicts come from environments that this loop calls: unset it")
    if policy["generation"]["temperature"] != 1.0:
        raise UserError(
            f"policy.generation.temperature={policy['generation']['temperature']}: NeMo-RL would divide the student's "
            "logits in the loss by it, and the teacher's not: set it to 1.0"
        )
    rows = distillation["num_prompts_per_step"] * distillation["num_generations_per_prompt"]
    if policy["train_global_batch_size"] != rows:
        raise UserError(
            f"policy.train_global_batch_size={policy['train_global_batch_size']}: a step is one update on all of its "
            f"rollouts: set it to distillation.num_prompts_per_step × num_generations_per_prompt = {rows}"
        )
    for key in ("policy", "teacher") if external else ("policy",):
        if not master[key]["megatron_cfg"]["enabled"]:
            raise UserError(f"{key}.megatron_cfg.enabled=false: this teacher works in NeMo-RL's Megatron workers")
    if not external and master["teacher"]["model_name"] != policy["model_name"]:
        raise UserError(
            f"teacher.model_name={master['teacher']['model_name']} is not used: with {BLOCK}.teacher.kind="
            f"{settings.teacher.kind} the student is its own teacher. Set teacher.model_name=${{policy.model_name}}, "
            f"or {BLOCK}.teacher.kind=external"
        )
    _check_budget(settings, "teacher" if external else "policy", master)


def _check_budget(settings: Config, key: str, master: Mapping[str, Any]) -> None:
    """The longest row that a teacher reads fits a micro-batch; NeMo-RL says so in the middle of a run."""
    scoring = master[key]
    packing = scoring["sequence_packing"]
    if not packing["enabled"]:
        return
    prompt_key, prompt = teacher_prompt(settings)
    response, multiple = settings.rollout.max_response_tokens, scoring["make_sequence_length_divisible_by"]
    longest = -(-(prompt + response) // multiple) * multiple
    if longest > packing["logprob_mb_tokens"]:
        raise UserError(
            f"{key}.sequence_packing.logprob_mb_tokens={packing['logprob_mb_tokens']}: a teacher's prompt of up to "
            f"{in_their_words(prompt_key)}={prompt} and a response of up to policy.generation.max_new_tokens="
            f"{response} are {longest} tokens: raise the first to that, or lower one of the others"
        )
