from pathlib import Path

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import dump_config, load_config
from tests.conftest import QUICKSTART


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_files_inherit_and_overrides_win(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 1\nmethod: mopd\ntrain: {num_steps: 5, eval_every: 2}\n")
    (tmp_path / "sub").mkdir()
    leaf = write(tmp_path / "sub" / "leaf.yaml", "defaults: ../base.yaml\ntrain: {num_steps: 7}\nname: ${method}-run\n")
    config = load_config(leaf, ["seed=3", "peers.successes=all", "divergence.k=20"])
    assert (config.seed, config.train.num_steps, config.train.eval_every) == (3, 7, 2)
    assert (config.peers.successes, config.divergence.k, config.name) == ("all", 20, "mopd-run")


def test_dump_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(QUICKSTART)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("yaml", "overrides", "message"),
    [
        ("", ["peers.sucesses=1"], r"unknown key peers.sucesses; did you mean peers.successes\?"),
        ("", ["colour=red"], "unknown key colour; known here: name, run_dir"),
        ("seed: -1", [], "seed=-1: input should be greater than or equal to 0"),
        ("teacher: {kind: best}", [], "teacher.kind='best': input should be 'live', 'ema', .* 'several' or"),
        ("", ["teacher.kind=external"], "teacher.kind=external needs teacher.path"),
        ("", ["teacher.path=x"], "teacher.path='x' is unused by teacher.kind=ema"),
        (
            "",
            ["train.keep_best=mean@4"],
            "train.keep_best=mean@4: with eval.num_samples=8 choose mean@8, pass@1, pass@2",
        ),
        ("", ["divergence.entry_clip=0.05", "divergence.support=full"], "set divergence.support=student_topk"),
        ("", ["reference.kl=0.1", "engine=nemo"], "reference.kl=0.1: engine=nemo keeps one teacher"),
        ("method: verified_sft", ["reference.kl=0.1"], "reference.kl=0.1 is unused by method=verified_sft"),
        ("method: suppress", ["divergence.k=7"], "divergence.k=7 is unused by method=suppress"),
        ("", ["divergence.entry_clip=0"], "divergence.entry_clip=0"),
        ("method: grpo", ["divergence.targets=failures"], "divergence.targets='failures' is unused by method=grpo"),
        ("", ["train.keep_best=loss"], "choose mean@8"),
        ("", ["train.keep_best=paper/mean@8", "eval.paper_metrics=true", "train.eval_every=0"], "needs evaluations"),
        ("", ["divergence.support=sampled"], "set divergence.kind=reverse_kl"),
        ("", ["peers.successes=0", "peers.failures=0"], "raise one of them"),
        ("", ["divergence.contrast=1", "peers.failures=0"], "raise the one that is 0"),
        (
            "",
            ["divergence.contrast=1", "peers.failures=1", "peers.when_no_success=plain"],
            "set peers.when_no_success=skip",
        ),
        ("", ["divergence.contrast=1", "peers.failures=1", "peers.choose=measured"], "set peers.choose=fixed"),
        ("", ["divergence.contrast=1", "peers.failures=1", "peers.summaries=2"], "set peers.summaries=0"),
        ("", ["divergence.contrast=1", "peers.failures=1", "peers.control=random_peer"], "set peers.control=none"),
        ("", ["divergence.contrast=1", "method=sdpo"], "divergence.contrast=1.0 is unused by method=sdpo"),
        (
            "",
            ["divergence.contrast=inf", "peers.failures=1"],
            "divergence.contrast='inf': input should be a finite number",
        ),
        (
            "",
            ["optimizer.learning_rate=1e6"],
            "optimizer.learning_rate=1000000.0: input should be less than or equal to 1",
        ),
        ("", ["verifier.success_threshold=.nan"], "verifier.success_threshold=nan: input should be a finite number"),
        ("", ["peers.successes=20"], "peers.successes=20 asks for more than the rollout.num_rollouts_per_prompt=8 "),
        ("", ["peers.failures=9"], "or set peers.failures=all"),
        ("", ["optimizer.learning_rate=inf"], "optimizer.learning_rate='inf': input should be a finite number"),
        ("", ["peers.require={successes: 7, failures: 1}"], "more than the 7 rollouts beside a target"),
        ("", ["divergence.contrast=1", "peers.failures=1", "divergence.support=full"], "three whole vocabularies"),
        ("", ["divergence.contrast=1", "peers.failures=1", "peers.failure_form=contrast"], "choose another form"),
        (
            "",
            ["divergence.weights=sharper", "divergence.kind=reverse_kl", "divergence.support=sampled"],
            "compares one",
        ),
        ("", ["peers.failure_form=contrast", "peers.successes=0", "peers.failures=1"], "shows none: raise the latter"),
        ("", ["peers.failure_form=described", "peers.control=random_peer", "peers.failures=1"], "matches whole"),
        ("", ["peers.failure_form=described"], "failure_form=described is about failures, .* set peers.failures=1"),
        ("", ["peers.when_no_success=failure_only"], "when_no_success=failure_only is about failures"),
        ("", ["peers.control=success_only"], "control=success_only is about failures"),
        ("", ["peers.templates.failure=oops"], r"peers.templates.failure='oops': write \{text\} exactly once"),
        ("", ["peers.max_context_tokens=100"], "raise the first or lower the second"),
        ("", ["teacher.kind=live", "peers.when_no_success=plain"], "zero loss"),
        ("method: grpo", ["teacher.kind=ema"], "teacher.kind=ema does not go with method=grpo: it works with none"),
        (
            "method: sdpo",
            ["peers.failures=2"],
            "peers.failures=2 is unused by method=sdpo: remove it, or .*method=mopd",
        ),
        ("method: grpo", ["divergence.k=20"], "divergence.k=20 is unused by method=grpo"),
        ("method: grpo", ["policy_gradient.weight=2"], "policy_gradient.weight=2.0 is unused by method=grpo"),
        (
            "",
            ["divergence.kind=reverse_kl", "divergence.alpha=0.3"],
            "alpha=0.3 is unused by divergence.kind=reverse_kl",
        ),
        ("", ["divergence.support=full", "divergence.tail=false"], "tail=False is unused by divergence.support=full"),
        ("method: opd", ["teacher.kind=frozen", "divergence.kind=forward_kl", "divergence.alpha=0.3"], "alpha=0.3 is"),
        ("method: opd", ["teacher.kind=frozen", "data.privileged_column=hint"], "hint' is unused by method=opd"),
        ("", ["generation.gpu_memory_utilization=0.5"], "is unused by generation.backend=local"),
        ("", ["engine=nemo", "nemo.teacher.tensor=2"], "nemo.teacher shards an external teacher and is unused"),
        ("", ["policy_gradient.clip_low=0.1"], "or mix in the reward with policy_gradient.weight"),
        ("", ["dpo.beta=0.2"], "dpo.beta=0.2 is unused by method=mopd: remove it, or choose method=dpo"),
        ("method: simpo", ["rollout.importance_clip=3"], "rollout.importance_clip=3.0 is unused by method=simpo"),
        ("method: opd", [], "teacher.kind=external needs teacher.path"),
        ("method: gkd", ["teacher.kind=frozen"], "it works with external"),
        (
            "",
            ["teacher.kind=live", "teacher.offload=true"],
            "teacher.kind=live, which is the student itself: remove it",
        ),
        ("method: grpo", ["teacher.offload=true"], "unused by teacher.kind=none, so there are no weights to move"),
        (
            "teachers: {a: {path: x}}",
            ["method=opd", "teacher.offload=true"],
            "teacher.kind=several, of which each has its own: set it in teachers",
        ),
        ("", ["reference.offload=true"], "reference.offload=true is unused by reference.kl=0: set reference.kl"),
        ("", ["lora.rank=8", "teacher.offload=true"], "teacher.offload=true has no weights to move with lora.rank=8"),
        (
            "lora: {rank: 8}",
            ["reference.kl=1", "reference.offload=true"],
            "reference.offload=true has no weights to move .* remove it",
        ),
        ("engine: nemo", ["teacher.offload=true"], "teacher.offload=true is for engine=local; .* remove it"),
        ("", ["teacher.kind=frozen", "teacher.ema_rate=0.5"], "teacher.ema_rate=0.5 is unused by teacher.kind=frozen"),
        (
            "train: {checkpoint_must_save_by: 3h}",
            [],
            "checkpoint_must_save_by='3h': write it as hours:minutes:seconds or",
        ),
        ("cluster: {time_limit: 240}", [], "config.yaml: cluster.time_limit=240: write it as .* such as 4:00:00"),
        ("", ["cluster.time_limit=90"], "cluster.time_limit=90: write it as"),
        ("", ["peers.successes=-1"], "peers.successes=-1: input should be greater than or equal to 0"),
        ("", ["peers.successes=some"], "peers.successes='some': must be a whole number or input should be 'all'"),
        (
            "",
            ["optimizer.weights=bfloat16"],
            "optimizer.weights=bfloat16 .* model.dtype=float32: set model.dtype=bfloat16",
        ),
        ("engine: nemo", ["optimizer.moments=int8"], "optimizer.moments=int8 is for engine=local; .* remove it"),
        ("lora: {rank: 8}", ["optimizer.moments=int8"], "optimizer.moments=int8: lora.rank=8 trains adapters alone"),
        ("", ["optimizer.betas=[0.9,2]"], "optimizer.betas.1=2: input should be less than or equal to 1"),
        ("", ["seed"], "override 'seed': write it as key=value"),
        ("a: [", [], "not valid YAML"),
        ("- 1", [], "must hold a mapping"),
        ("defaults: missing.yaml", [], "missing.yaml: no such config file"),
        ("defaults: config.yaml", [], "circle"),
        ("name: ${nowhere}", [], "config.yaml: Interpolation key 'nowhere' not found"),
    ],
)
def test_errors_name_the_key_the_value_and_the_remedy(
    tmp_path: Path, yaml: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path / "config.yaml", yaml or "{}"), overrides)


def test_a_setting_of_what_is_replaced_later_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So a file with peers serves under another context; what stands beside that context is an error all the same."""
    base = write(tmp_path / "base.yaml", "peers: {failures: 1, max_peer_tokens: 99}\ndivergence: {alpha: 0.3}\n")
    asked = ["context=[privileged]", "divergence.kind=reverse_kl"]
    above = write(tmp_path / "above.yaml", "defaults: base.yaml\ncontext: [privileged]\n")
    for file, settings in ((base, asked), (above, asked[1:])):
        config = load_config(file, settings)
        assert (config.peers.failures, config.peers.max_peer_tokens, config.divergence.alpha) == (0, 99, 0.5)
        assert caplog.messages == [
            f"context=[privileged] leaves out peers.failures=1 of {base}",
            f"divergence.kind=reverse_kl leaves out divergence.alpha=0.3 of {base}",
        ]
        caplog.clear()
    beside = write(tmp_path / "beside.yaml", "context: [privileged]\npeers: {failures: 1}\n")
    for file, settings in ((beside, []), (above, ["peers.failures=1"]), (base, [*asked, "peers={successes: 1}"])):
        with pytest.raises(UserError, match=r"unused by context=\[privileged\]: remove it, or add peers to context"):
            load_config(file, settings)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path / "c.yaml", "seed: -1\nname: []\n"))
    assert "seed" in str(error.value) and "name" in str(error.value)


def test_yaml_reads_what_people_write(tmp_path: Path) -> None:
    """YAML 1.1 makes 14400 of 4:00:00, false of off, 8 of 010 and a date of the name; all but it read 1e-4."""
    text = "name: 2026-01-01\nseed: 010\ncluster: {time_limit: 4:00:00}\noptimizer: {learning_rate: 1e-4}\n"
    config = load_config(write(tmp_path / "c.yaml", text + "logging: {wandb: off, tensorboard: on}\n"))
    assert (config.name, config.seed, config.cluster.time_limit) == ("2026-01-01", 10, "4:00:00")
    assert (config.optimizer.learning_rate, config.logging.wandb, config.logging.tensorboard) == (1e-4, "off", True)
    assert load_config(None, ["cluster.time_limit=12:00:00"]).cluster.time_limit == "12:00:00"
    assert load_config(write(tmp_path / "d.yaml", dump_config(config))) == config


def test_an_error_names_the_file_that_gave_the_setting_or_the_command_line(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "train: {num_step: 5}\npeers: {max_context_tokens: 64}\n")
    leaf = write(tmp_path / "leaf.yaml", "defaults: base.yaml\nseed: -1\n")
    with pytest.raises(UserError) as error:
        load_config(leaf, ["rollout.batch_sze=3"])
    lines = dict(line.split(": ", 1) for line in str(error.value).splitlines())
    assert lines[str(base)].startswith("unknown key train.num_step; did you mean train.num_steps?")
    assert lines[str(leaf)].startswith("seed=-1")
    assert lines["command line"].startswith("unknown key rollout.batch_sze; did you mean")
    write(base, "peers: {max_context_tokens: 64}\n")
    write(leaf, "defaults: base.yaml\n")
    with pytest.raises(UserError, match=r"^command line: .*data.max_prompt_tokens=100: raise the first"):
        load_config(leaf, ["data.max_prompt_tokens=100"])
    with pytest.raises(UserError, match=r"^.*base.yaml: peers.max_context_tokens=64 leaves no room"):
        load_config(leaf)


@pytest.mark.parametrize(
    "override",
    [
        "verifier.custom={poem: judges}",
        "verifier.http.poem.url=http://user:word@judge:8000",
        "teacher={kind: server, urls: ['judge:8000']}",
        "teachers={a: {kind: frozen, tasks: [math]}, b: {kind: frozen, tasks: [math]}}",
    ],
)
def test_a_rule_that_names_a_block_says_who_gave_it(tmp_path: Path, override: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"^command line: "):
        load_config(file, [override])


@pytest.mark.parametrize("text", ["defaults:\nseed: 1\n", "\ufeffseed: 1\n", "seed: 1\n"])
def test_an_empty_list_of_defaults_and_a_byte_order_mark_are_no_errors(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path / "c.yaml", text)).seed == 1


def test_defaults_are_the_paper_s_but_for_the_failure_that_a_small_model_copies() -> None:
    config = Config()
    assert (config.rollout.num_prompts_per_step, config.rollout.num_rollouts_per_prompt) == (32, 8)
    assert (config.peers.successes, config.peers.failures) == (2, 0)
    assert (config.divergence.kind, config.divergence.alpha, config.divergence.k) == ("jsd", 0.5, 100)
    assert config.optimizer.warmup_steps == 10


def test_another_method_on_the_command_line_leaves_out_what_the_file_s_own_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "peers: {successes: 1, max_peer_tokens: 96}\nteacher: {kind: frozen}\noptimizer: {warmup_steps: 3}\n"
    )
    config = load_config(file, ["method=grpo"])
    assert (config.peers.successes, config.teacher.kind, config.optimizer.warmup_steps) == (2, "none", 3)
    assert {record.getMessage() for record in caplog.records} == {
        f"method=grpo leaves out peers.successes=1 of {file}",
        f"method=grpo leaves out teacher.kind=frozen of {file}",
    }
    assert load_config(file, ["method=sdpo"]).teacher.kind == "frozen"
    with pytest.raises(UserError, match=r"peers\.successes=1 is unused by method=grpo"):
        load_config(file, ["method=grpo", "peers.successes=1"])


def test_each_method_has_its_own_default_teacher() -> None:
    kinds = {method: load_config(QUICKSTART, [f"method={method}"]).teacher.kind for method in ("mopd", "sdpo", "dpo")}
    assert kinds == {"mopd": "ema", "sdpo": "ema", "dpo": "frozen"}
    assert load_config(QUICKSTART, ["method=grpo"]).teacher.kind == "none"


def test_budgets_may_stand_in_a_file_that_methods_share() -> None:
    assert load_config(QUICKSTART, ["method=grpo"]).peers.max_context_tokens == 1024


def test_deadline_is_written_as_nemo_rl_does(tmp_path: Path) -> None:
    assert Config().train.must_save_by_seconds == float("inf")
    config = load_config(QUICKSTART, ["train.checkpoint_must_save_by=00:03:45:00"])
    assert config.train.must_save_by_seconds == 13500
    config = load_config(QUICKSTART, ["train.checkpoint_must_save_by='12:00:00:01'"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml").train.must_save_by_seconds == 12 * 86400 + 1
