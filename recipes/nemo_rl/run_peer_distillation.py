"""Distil from peers in NeMo-RL's own loop: its config, data, environments, logger and checkpoints.

    python recipes/nemo_rl/run_peer_distillation.py --config recipes/nemo_rl/NAME.yaml [KEY=VALUE]...

In a NeMo-RL container or checkout, as its examples are run, `ray.sub` included; docs/nemo.md says when to choose this
way and when `recipes/run_mopd.py`. `defaults` of a config may name NeMo-RL's own with `${oc.env:NEMO_RL}`, which is set
to the checkout that is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nemo_rl
from nemo_rl.algorithms.distillation import MasterConfig, distillation_train, setup
from nemo_rl.algorithms.utils import get_tokenizer
from nemo_rl.data.utils import setup_response_data
from nemo_rl.distributed.virtual_cluster import init_ray
from nemo_rl.models.generation import configure_generation_config
from nemo_rl.utils.config import load_config, parse_hydra_overrides, register_omegaconf_resolvers
from nemo_rl.utils.logger import get_next_experiment_dir
from omegaconf import DictConfig, OmegaConf

from mopd_nemo.chat import Chat
from mopd_nemo.config import UserError
from mopd_nemo.engines.nemo.distillation.data import ProblemBook, Verdicts
from mopd_nemo.engines.nemo.distillation.settings import settings_of, vocabulary_of
from mopd_nemo.engines.nemo.distillation.student import divergence_loss, peer_policies
from mopd_nemo.engines.nemo.distillation.teacher import PeerTeacher
from mopd_nemo.engines.nemo.environments import register_environments
from mopd_nemo.engines.nemo.launch import make_package_visible, register_workers
from mopd_nemo.engines.nemo.scorer import Scorer
from mopd_nemo.methods.base import make_method


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file as NeMo-RL's, with a block peer_teacher")
    known, overrides = parser.parse_known_args(arguments)
    try:
        train(read_config(known.config, overrides))
    except UserError as error:
        sys.exit(f"error: {error}")


def read_config(path: str, overrides: list[str]) -> MasterConfig:
    """NeMo-RL's config of a run, from a file and `key=value` overrides."""
    os.environ.setdefault("NEMO_RL", str(Path(nemo_rl.__file__).resolve().parents[1]))
    register_omegaconf_resolvers()
    merged = load_config(path)
    if overrides:
        merged = parse_hydra_overrides(merged, overrides)
    assert isinstance(merged, DictConfig)
    values: Any = OmegaConf.to_container(merged, resolve=True)
    return MasterConfig(**values)


def train(config: MasterConfig) -> None:
    """Run NeMo-RL's distillation, from the newest checkpoint if there is one."""
    settings = settings_of(config.model_dump())
    vocab_size = vocabulary_of(settings)
    config.logger["log_dir"] = get_next_experiment_dir(config.logger["log_dir"])
    make_package_visible()
    register_workers()
    register_environments()
    init_ray()

    tokenizer = get_tokenizer(config.policy["tokenizer"])
    generation = config.policy["generation"] = configure_generation_config(config.policy["generation"], tokenizer)
    chat = Chat(tokenizer, source=config.policy["model_name"])
    end_ids = {*chat.end_ids, *generation["stop_token_ids"]}
    chat.check_end_of_turn(end_ids)
    problems, verdicts = ProblemBook(chat), Verdicts()
    problems.register()
    train_data, val_data, environments, val_environments = setup_response_data(tokenizer, config.data, config.env)
    with peer_policies(settings):
        student, external, sampler, _, loader, val_loader, _, logger, checkpointer, state, config = setup(
            config, tokenizer, train_data, val_data
        )
    teacher = PeerTeacher(
        Scorer(student, external if settings.teacher.kind == "external" else None, settings, chat.pad_id, vocab_size),
        make_method(settings, chat).build,
        problems,
        verdicts,
        chat,
        group_size=settings.rollout.num_rollouts_per_prompt,
        end_ids=end_ids,
        steps_done=state["total_steps"] if isinstance(state, dict) else state.total_steps,  # a dict in v0.7.0
        log=lambda metrics, step: logger.log_metrics(metrics, step, prefix="peer_teacher"),
    )
    # In NeMo-RL's main branch, checkpoints are finished in the background, and on the way out.
    with checkpointer if hasattr(checkpointer, "__exit__") else nullcontext():
        distillation_train(
            student,
            teacher,
            sampler,
            loader,
            val_loader,
            tokenizer,
            divergence_loss(settings, vocab_size),
            verdicts.watch(environments),
            val_environments,
            logger,
            checkpointer,
            state,
            config,
        )


if __name__ == "__main__":
    main()
