"""Bad input as new users give it. Each case ends with a message that names key or file, value and remedy, and code 2.

Nothing is left behind, and nothing is a traceback: an exception that `main` does not make a message of fails the test.
The last table has what is no error but must be said.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mopd_nemo.config.load import load_config
from mopd_nemo.run.checkpoints import checkpoints
from mopd_nemo.trainer import Trainer
from tests.conftest import EMBEDDED, QUICKSTART, Mopd

SMALL = f"""defaults: {QUICKSTART}
rollout: {{num_prompts_per_step: 2, num_rollouts_per_prompt: 4, max_response_tokens: 32, batch_size: 64}}
data: {{num_train: 8, num_eval: 2}}
eval: {{num_samples: 2}}
train: {{num_steps: 2, eval_every: 2, checkpoint_every: 1}}
"""
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A command line in a directory with some files, and what must come of it."""

    words: str
    message: str
    """Regular expression found in what is printed."""
    files: dict[str, str | bytes] = field(default_factory=dict)
    change: Change = lambda _: None
    """Further preparation of the directory."""


def row(**fields: Any) -> str:
    """A line of a data file: a good row with some fields changed."""
    good = {"id": "a", "prompt": "1+1?", "answer": "2", "task": "arithmetic"}
    return json.dumps({name: value for name, value in (good | fields).items() if value is not ...}) + "\n"


def settings(*cases: tuple[str, str]) -> Iterator[Case]:
    """Overrides of a config that is right without them."""
    for overrides, message in cases:
        yield Case(f"train -c small.yaml {overrides}", message)


def config(*cases: tuple[str | bytes, str]) -> Iterator[Case]:
    """Config files."""
    for content, message in cases:
        yield Case("train -c c.yaml", message, {"c.yaml": content})


def data(*cases: tuple[str | bytes, str]) -> Iterator[Case]:
    """Data files."""
    for content, message in cases:
        yield Case("train -c small.yaml data.train=rows.jsonl data.num_train=null", message, {"rows.jsonl": content})


def model(*cases: tuple[Change, str]) -> Iterator[Case]:
    """Model directories: the embedded one with a change."""
    for change, message in cases:
        yield Case("train -c small.yaml model.path=./model", message, change=_with_model(change))


def _with_model(change: Change) -> Change:
    def prepare(place: Path) -> None:
        shutil.copytree(EMBEDDED, place / "model")
        change(place / "model")

    return prepare


def edit(name: str, **values: Any) -> Change:
    """Change keys of a JSON file of a model."""

    def change(directory: Path) -> None:
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def write(name: str, content: str | bytes) -> Change:
    """Replace a file."""

    def change(directory: Path) -> None:
        file = directory / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(*names: str) -> Change:
    """Remove files."""

    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return change


def cut(name: str) -> Change:
    """Keep the first half of a file."""
    return lambda directory: write(name, (directory / name).read_bytes()[: (directory / name).stat().st_size // 2])(
        directory
    )


def template(text: str) -> Change:
    """Another chat template."""

    def change(directory: Path) -> None:
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        edit("tokenizer_config.json", chat_template=text)(directory)

    return change


SETTINGS = list(
    settings(
        ("train.num_step=3", "command line: unknown key train.num_step; did you mean train.num_steps"),
        ("colour=red", "command line: unknown key colour; known here: name"),
        ("train.eval.every=3", "command line: unknown key train.eval"),
        ("seed=-1", "command line: seed=-1: input should be greater than or equal to 0"),
        ("seed=1.5", "seed=1.5: must be a whole number"),
        ("seed=one", "seed='one': must be a whole number"),
        ("seed=", "seed=None: must be a whole number"),
        ("name=[]", r"name=\[\]: must be text"),
        ("method=mopdd", "method=mopdd: choose mopd, sdpo"),
        ("method=nowhere:Thing", "method=nowhere:Thing: there is no module nowhere"),
        ("method=json:Nothing", "method=json:Nothing: module json has no Nothing"),
        ("method=json:JSONDecoder", "method=json:JSONDecoder: not a Method"),
        ("engine=ray", "engine='ray': input should be 'local' or 'nemo'"),
        ("engine=nemo", "engine=nemo|nemo"),
        ("train.num_steps=0", "train.num_steps=0: input should be greater than 0"),
        ("train.num_steps={a: 1}", "train.num_steps={'a': 1}: must be a whole number"),
        ("train=5", "train=5: must be a block of settings"),
        ("train=[1]", "incompatible container types"),
        ("model.path=", "model.path=None: must be text"),
        ("model.device=tpu9", "model.device='tpu9': not a device name; use auto"),
        ("model.device=mps", "model.device='mps': not supported; use auto"),
        ("model.device=cuda:99", "model.device='cuda:99': torch sees"),
        ("model.dtype=float16", "model.dtype='float16': input should be"),
        ("model.chat_template_kwargs=5", "model.chat_template_kwargs=5: must be a mapping"),
        ("model.end_tokens=<x>", "model.end_tokens='<x>': must be a list"),
        ("model.end_tokens=[two tokens]", "model.end_tokens='two tokens': not one token"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate=inf: input should be a finite number"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate='inf': input should be a finite number"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate=nan: input should be a finite number"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate=0: input should be greater than 0"),
        ("optimizer.learning_rate=1e6", "optimizer.learning_rate=1000000.0: input should be less than or equal to 1"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: must be a list"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: missing"),
        ("optimizer.betas=[0.9,0.9,0.9]", "optimizer.betas=.*at most 2"),
        ("optimizer.betas=[a,0.9]", "optimizer.betas.0='a': must be a number"),
        ("optimizer.max_grad_norm=0", "optimizer.max_grad_norm=0: input should be greater than 0"),
        ("rollout.temperature=0", "rollout.temperature=0: input should be greater than 0"),
        ("rollout.temperature=.inf", "rollout.temperature=inf: input should be a finite number"),
        ("rollout.num_rollouts_per_prompt=1", "rollout.num_rollouts_per_prompt=1: input should be greater than"),
        (
            "rollout.num_prompts_per_step=900",
            "rollout.num_prompts_per_step=900 is more than the 8 problems of data.train",
        ),
        ("rollout.batch_size=0", "rollout.batch_size=0: input should be greater than 0"),
        ("rollout.max_response_tokens=-5", "rollout.max_response_tokens=-5: input"),
        (
            "rollout.max_response_tokens=99999",
            "rollout.max_response_tokens=99999 exceeds the 2048 positions of model.path",
        ),
        ("rollout.importance_clip=0", "rollout.importance_clip=0: input"),
        ("peers.successes=20", "peers.successes=20 asks for more than the rollout.num_rollouts_per_prompt=4"),
        ("peers.successes=-1", "peers.successes=-1: input"),
        ("peers.successes=some", "peers.successes='some': must be a whole number or input should be 'all'"),
        ("peers.successes=0", "peers.failures=0 show the teacher no peers"),
        ("peers.max_context_tokens=10", "peers.max_context_tokens=10 leaves no room for peers"),
        ("peers.max_peer_tokens=0", "peers.max_peer_tokens=0: input"),
        ("peers.order=best", "peers.order='best': input should be 'canonical'"),
        ("peers.templates.success=nothing", "peers.templates.success='nothing': write {text} exactly once"),
        ("peers.require={successes: 9}", "peers.require.successes=9 .* ask for more"),
        ("peers.choose=measured peers.choose_from=[9x]", "context '9x'"),
        ("peers.when_no_success=plain teacher.kind=live", "a zero loss: set peers.when_no_success=skip"),
        ("divergence.alpha=1.5", "divergence.alpha=1.5: input"),
        ("divergence.k=0", "divergence.k=0: input"),
        ("divergence.support=sampled", "set divergence.kind=reverse_kl"),
        ("divergence.contrast=1", "raise the one that is 0"),
        ("teacher.kind=external", "teacher.kind=external needs teacher.path"),
        ("teacher.path=x", "teacher.path='x' is unused"),
        ("teacher.kind=external teacher.path=./gone", "teacher.path=./gone: no such directory"),
        ("teacher.ema_rate=2", "teacher.ema_rate=2: input"),
        ("method=grpo peers.successes=1", "peers.successes=1 is unused by method=grpo"),
        ("method=gkd teacher.path=x", "write them with `mopd complete"),
        ("method=gkd teacher.path=x gkd.completions=none.jsonl", "gkd.completions=none.jsonl: no such file"),
        ("verifier.success_threshold=.nan", "verifier.success_threshold=nan: input should be a finite number"),
        ("verifier.success_threshold=.inf", "verifier.success_threshold=inf: input should be a finite number"),
        ("verifier.workers=0", "verifier.workers=0: input"),
        ("verifier.code.sandbox=docker", "verifier.code.sandbox='docker': input"),
        ("data.on_bad_row=ignore", "data.on_bad_row='ignore': input"),
        ("data.num_train=0", "data.num_train=0: input"),
        ("data.max_prompt_tokens=3", "problem '.*' has a prompt of .* tokens, over data.max_prompt_tokens=3"),
        ("eval.top_p=0", "eval.top_p=0: input"),
        ("eval.num_samples=0", "eval.num_samples=0: input"),
        ("logging.wandb=maybe", "logging.wandb='maybe': input should be 'off'"),
        ("logging.tensorboard=perhaps", "logging.tensorboard='perhaps': write true or false"),
        ("cluster.time_limit=4h", "cluster.time_limit='4h': write it as .* such as 4:00:00"),
        ("cluster.time_limit=240", "cluster.time_limit=240: write it as"),
        ("cluster.port=80", "cluster.port=80: Ray would take ports"),
        ("cluster.stop_minutes=600", "cluster.stop_minutes=600 leaves nothing"),
        ("train.checkpoint_must_save_by=soon", "train.checkpoint_must_save_by='soon': write it as"),
        ("guard.action=ask", "guard.action='ask': input should be 'warn' or 'stop'"),
        ("generation.backend=vllm", "generation.backend=vllm"),
        ("seed", "override 'seed': write it as key=value"),
        ("=5", "override '=5': write it as key=value"),
        ("peers..failures=0", "override 'peers..failures=0': write it as key=value"),
        ("seed=[", r"override 'seed=\[': .*not valid YAML"),
        ("seed=1 seed.x=2", "seed"),
        ("name=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("run_dir=small.yaml/run", "run_dir=small.yaml/run: cannot write there"),
        ("run_dir=small.yaml", "run_dir=small.yaml: cannot write there"),
    )
)
CONFIGS = [
    Case("train", "give either --config FILE"),
    Case("train -c none.yaml", "none.yaml: no such config file"),
    Case("train -c .", ".: a directory"),
    *config(
        ("seed: [", "c.yaml, line 1: not valid YAML"),
        ("seed: 1\n\tname: x\n", "c.yaml, line 2: not valid YAML"),
        ("seed: 1\nname: 'x\n", "c.yaml, line .: not valid YAML"),
        ("seed: 1\nseed: 2\n", "c.yaml, line 2: not valid YAML: seed is given twice"),
        ("train:\n  num_steps: 1\n  num_steps: 2\n", "line 3: not valid YAML: num_steps is given twice"),
        ("- seed: 1\n", "c.yaml: must hold a mapping"),
        ("mopd\n", "c.yaml: must hold a mapping"),
        ("train:\n", "c.yaml: train=None: must be a block of settings"),
        ("train: {num_step: 3}\n", "c.yaml: unknown key train.num_step; did you mean"),
        ("trian: {num_steps: 3}\n", "c.yaml: unknown key trian; did you mean train"),
        ("1: 2\n", "c.yaml: unknown key 1"),
        ("defaults: 5\n", "c.yaml: defaults=5: name a file"),
        ("defaults: [1]\n", r"c.yaml: defaults=\[1\]: name a file"),
        ("defaults: {a: b}\n", "c.yaml: defaults={'a': 'b'}: name a file"),
        ("defaults: none.yaml\n", "none.yaml: no such config file"),
        ("defaults: c.yaml\n", "lead back to itself"),
        ("defaults: .\n", ".: a directory"),
        ("name: ${nowhere}\n", "c.yaml: Interpolation key 'nowhere' not found"),
        ("name: ???\n", "c.yaml: Missing mandatory value: name"),
        ("name: Zürich\n".encode("latin-1"), "c.yaml, line 1: not UTF-8 text"),
        ("seed: 1\n".encode("utf-16"), "c.yaml: UTF-16 text"),
        (b"\x00\x01\x02", "c.yaml: .*not valid YAML"),
        (gzip.compress(b"seed: 1\n"), "c.yaml: compressed with gzip"),
        ("cluster: {time_limit: 90}\n", "c.yaml: cluster.time_limit=90: write it as"),
        (
            "name: mine\n",
            r"data.max_prompt_tokens=2048 \+ rollout.max_response_tokens=4096 exceeds .*lower one of them",
        ),
    ),
]
DATA = [
    Case("train -c small.yaml data.train=none.jsonl", "data.train=none.jsonl: no such file; name a JSONL file"),
    Case("train -c small.yaml data.eval=none.jsonl", "data.eval=none.jsonl: no such file"),
    Case("train -c small.yaml data.train=.", "data.train=.: no such file"),
    *data(
        ("", "rows.jsonl: the file has no rows"),
        ("\n\n", "rows.jsonl: the file has no rows"),
        ("{\n", "rows.jsonl, line 1: not valid JSON: .* at column 1"),
        (row() + '{"id": \n', "rows.jsonl, line 2: not valid JSON: EOF while parsing a value at column 6"),
        ("[1, 2]\n", "rows.jsonl, line 1: "),
        ('[{"id": "a"}]\n', "rows.jsonl, line 1: "),
        ("id,prompt\n1,2\n", "rows.jsonl, line 1: not valid JSON"),
        ("null\n", "rows.jsonl, line 1: "),
        (row(id=...), "line 1: id: missing"),
        (row(id=""), "line 1: id: "),
        (row(id=None), "line 1: id: must be text"),
        (row(id=["a"]), "line 1: id: must be text"),
        (row() + row(), "line 2: id 'a' appears twice; ids must be unique"),
        (row(prompt=...), "line 1: give exactly one of `prompt` and `messages`"),
        (row(messages=[{"role": "user", "content": "x"}]), "give exactly one of"),
        (row(prompt=["a"]), "line 1: prompt: must be text"),
        (row(prompt=""), "line 1: the prompt is empty"),
        (row(prompt=" \n "), "line 1: the prompt is empty"),
        (row(prompt=..., messages=[]), "must end with a user turn"),
        (row(prompt=..., messages="hi"), "messages: must be a list"),
        (row(prompt=..., messages=[{"role": "user"}]), "messages.0.content: missing"),
        (row(prompt=..., messages=[{"content": "x"}]), "messages.0.role: missing"),
        (
            row(prompt=..., messages=[{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]),
            "user turn",
        ),
        (row(prompt=..., messages=[{"role": "user", "content": None}]), "content: must be text"),
        (row(prompt=..., messages=[{"role": "user", "content": ""}]), "the prompt is empty"),
        (
            row(prompt=..., messages=[{"role": "alien", "content": "x"}, {"role": "user", "content": "x"}]),
            "role 'alien'",
        ),
        (row(answer=...), "line 1: answer: missing"),
        (row(answer=None), "line 1: .*answer"),
        (row(answer=""), "line 1: .*answer"),
        (row(task=...), "line 1: task: missing"),
        (row(task="maths"), "line 1: task=maths: choose .*math"),
        (row(task="nowhere:Verifier"), "there is no module nowhere"),
        (row(task="json:JSONDecoder"), "task=json:JSONDecoder: not a Verifier"),
        (row(task="choice", answer="Paris"), "line 1: answer='Paris'"),
        (row(task="tool", answer="{"), "line 1: .*not valid JSON"),
        (row(task="code", answer={"inputs": ["1"]}), "line 1: .*outputs: missing"),
        (row(task="code", answer={"inputs": ["1"], "outputs": []}), "line 1: .*answer"),
        (row(task="code", answer="{"), "line 1: .*not valid JSON"),
        (row(task="math", answer=[1]), "line 1: .*answer"),
        (row(prompt="Zürich?").replace("\\u00fc", "ü").encode("latin-1"), "rows.jsonl, line 1: not UTF-8 text"),
        (row().encode("utf-16"), "rows.jsonl: UTF-16 text, not UTF-8"),
        (gzip.compress(row().encode()), "rows.jsonl: compressed with gzip"),
        (b"PAR1\x15\x04", "rows.jsonl: a parquet file"),
        (b"PK\x03\x04\x00", "rows.jsonl: a zip archive"),
        (row(prompt="\ud800x"), "line 1: not valid JSON: .* escape"),
        (row(), "rollout.num_prompts_per_step=2 is more than the 1 problems of data.train=rows.jsonl"),
    ),
]
MODELS = [
    Case("train -c small.yaml model.path=/nope", "model.path=/nope: no such directory"),
    Case("train -c small.yaml model.path=a/b/c", "model.path=a/b/c: no such directory"),
    Case("train -c small.yaml model.path=~/model", "model.path=~/model: no such directory.* with ~ written out"),
    Case("train -c small.yaml model.path=small.yaml", "model.path=small.yaml: a file"),
    Case("train -c small.yaml model.path=.", "model.path=.: no config.json in it"),
    Case(
        "train -c small.yaml model.path=embedded:poetry", "model 'embedded:poetry' is not embedded; embedded models: "
    ),
    *model(
        (remove("config.json"), "model.path=./model: no config.json in it"),
        (write("config.json", "{"), "model.path=./model: .*config"),
        (edit("config.json", model_type="alien"), "model.path=./model: .*alien"),
        (edit("config.json", vocab_size=20), "its tokenizer has .* tokens that the model lacks"),
        (remove("model.safetensors"), "model.path=./model: cannot load a causal language model"),
        (cut("model.safetensors"), "model.path=./model: cannot load a causal language model"),
        (edit("config.json", hidden_size=8), "model.path=./model: cannot load a causal language model"),
        (remove("tokenizer.json"), "model.path=./model: cannot load a tokenizer"),
        (write("tokenizer.json", "{}"), "model.path=./model: cannot load a tokenizer"),
        (cut("tokenizer.json"), "model.path=./model: cannot load a tokenizer"),
        (template(""), "chat template"),
        (template("always the same"), "leaves out the text of the user turn"),
        (template("{% if %}"), "the chat template of ./model refuses .*Expected an expression"),
        (template("{{ raise_exception('never') }}"), "the chat template of ./model refuses .*never"),
        (template("{{ messages[0].content + 1 }}"), "the chat template of ./model refuses .*concatenate"),
        (template("{{ messages[9].content }}"), "the chat template of ./model refuses .*"),
    ),
]
COMMANDS = [
    Case("nonsense", "No such command"),
    Case("train --resume", "requires an argument"),
    Case("train -c small.yaml --resume run", "give either --config FILE"),
    Case("train -c small.yaml --fast", "No such option"),
    Case("eval -c small.yaml --checkpoint none", "--checkpoint none: no config.json in it"),
    Case("eval -c small.yaml --output small.yaml/x", "--output small.yaml/x: .*no directory"),
    Case("eval -c small.yaml --output .", "--output .: a directory is in its place"),
    Case("eval -c small.yaml --rollouts .", "--rollouts .: a directory is in its place"),
    Case("eval -c small.yaml data.eval=none.jsonl", "data.eval=none.jsonl: no such file"),
    Case("verify --task poetry -i in.jsonl -o out.jsonl", "--task=poetry: choose ", {"in.jsonl": row()}),
    Case("verify --task math -i none.jsonl -o out.jsonl", "--input none.jsonl: no such file"),
    Case("verify --task math -i in.jsonl -o out.jsonl", "--input in.jsonl: the file has no rows", {"in.jsonl": ""}),
    Case("verify --task math -i in.jsonl -o .", "--output .: a directory", {"in.jsonl": row()}),
    Case("verify --task math -i in.jsonl -o in.jsonl/x", "no directory", {"in.jsonl": row()}),
    Case("verify --task math -i in.jsonl -o out.jsonl", "not UTF-8 text", {"in.jsonl": b'{"id": "\xe9"}'}),
    Case("verify --task math -i in.jsonl -o out.jsonl", "compressed with gzip", {"in.jsonl": gzip.compress(b"{}")}),
    Case("verify --task math -i in.jsonl -o out.jsonl --workers 0", "Invalid value", {"in.jsonl": row()}),
    Case("verify --task math -i in.jsonl -o o --config none.yaml", "no such config file", {"in.jsonl": row()}),
    Case("inspect none", "none: not a run directory"),
    Case("inspect small.yaml", "small.yaml: not a run directory"),
    Case("report none", "none: not a run directory"),
    Case("compare none", "none: no such directory"),
    Case("compare empty", "empty: neither a run directory", change=lambda place: (place / "empty").mkdir()),
    Case("compare small.yaml", "no run directory among small.yaml"),
    Case("sweep -c small.yaml -o out seed=1", "nothing varies"),
    Case("sweep -c small.yaml -o out seed=0,1 run_dir=x", "say where with --output"),
    Case("sweep -c small.yaml -o out method=mopd,nonsense", "method=nonsense: choose mopd"),
    Case("sweep -c small.yaml -o out seed=0,x", "seed='x': must be a whole number"),
    Case("sweep -c none.yaml -o out seed=0,1", "none.yaml: no such config file"),
    Case("sweep -c small.yaml -o out seed=0,1 train.eval_every=0", "a sweep ends with a comparison of evaluations"),
    Case("train -c small.yaml --config small.yaml", "--config is given twice"),
    Case("train -c small.yaml method=grpo context=[privileged]", r"context=\['privileged'\] is unused by method=grpo"),
    Case("export none -o out", "none: no config.json"),
    Case("export . -o small.yaml", "--output small.yaml: exists"),
    Case("complete -c small.yaml -o out.jsonl", "gkd"),
    Case("preflight -c none.yaml", "none.yaml: no such config file"),
    Case("preflight -c small.yaml method=grpo", "method=grpo has no choice of peers"),
    Case("preflight -c small.yaml --contexts 9x", "9x"),
    Case("analyze teacher-signal --rollouts none", "none: neither a rollouts file"),
    Case("analyze teacher-signal --rollouts small.yaml", "small.yaml"),
    Case("analyze diversity none --output out", "none"),
    Case("analyze cases none --output out", "none"),
    Case("data prepare poetry -o out", "poetry"),
    Case("data prepare gsm8k -o out -i none.jsonl", "none.jsonl"),
    Case("data prepare gsm8k -o out -i in.jsonl", "in.jsonl, line 1", {"in.jsonl": "{\n"}),
    Case("data prepare gsm8k -o out -i in.jsonl", "in.jsonl.*gzip", {"in.jsonl": gzip.compress(b"{}")}),
    Case("data prepare gsm8k -o out -i in.jsonl", "not UTF-8 text", {"in.jsonl": b'{"question": "\xe9"}\n'}),
    Case("data prepare gsm8k -o out -i in.jsonl --revision 1", "--revision 1: local files", {"in.jsonl": row()}),
    Case("submit -c none.yaml", "none.yaml: no such config file"),
    Case("submit -c small.yaml --site none.yaml", "none.yaml: no such site file"),
    Case(
        "submit -c small.yaml --site s.yaml",
        "s.yaml: unknown key accout; did you mean",
        {"s.yaml": "accout: x\nroot: r"},
    ),
    Case("submit -c small.yaml --site s.yaml", "s.yaml: root=5: must be text", {"s.yaml": "root: 5"}),
    Case("submit -c small.yaml --site s.yaml", "looks like a secret", {"s.yaml": "root: r\nenvironment: {API_KEY: x}"}),
    Case("submit -c small.yaml --site s.yaml --seeds a,b", "seeds", {"s.yaml": "root: r"}),
    Case("submit -c small.yaml --site s.yaml --chain 0", "Invalid value", {"s.yaml": "root: r"}),
    Case("submit -c small.yaml --site s.yaml --nodes 0", "nemo.num_nodes=0", {"s.yaml": "root: r"}),
    Case(
        "submit -c small.yaml --site s.yaml --dry-run data.train=none.jsonl",
        "would be refused: ",
        {"s.yaml": "root: r"},
    ),
    Case("submit -c small.yaml --site s.yaml", "sbatch is not", {"s.yaml": "root: ."}),
    Case("submit -c small.yaml cluster.time_limit=4h", "cluster.time_limit='4h': write it as"),
]
RESUMED = [
    (lambda run: (run / "config.yaml").unlink(), "", "run: not a run directory"),
    (write("config.yaml", "train: ["), "", "run/config.yaml, line 1: not valid YAML"),
    (write("config.yaml", "colour: red"), "", "run/config.yaml: unknown key colour"),
    (lambda run: None, "train.num_steps=1", "train.num_steps=1: run has made 2 steps already; give at least"),
    (lambda run: None, "train.num_step=3", "command line: unknown key train.num_step"),
    (lambda run: None, "data.train=none.jsonl", "data.train=none.jsonl: no such file"),
    (lambda run: None, "model.path=./gone", "model.path=./gone: no such directory"),
    (write("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n'), "", "metrics.jsonl, line 2: damaged"),
    (write("metrics.jsonl", '{"stp": 1}\n'), "", "metrics.jsonl, line 1: a row without a step"),
    (write("metrics.jsonl", "step 1\n"), "", "metrics.jsonl, line 1: not JSON Lines"),
    (write("eval.jsonl", '{"mean@2": 1}\n'), "", "eval.jsonl, line 1: a row without a step"),
    (
        lambda run: [cut("model.safetensors")(c) for c in checkpoints(run / "checkpoints")],
        "",
        "no checkpoint is intact",
    ),
    (lambda run: [remove("optimizer.pt")(c) for c in checkpoints(run / "checkpoints")], "", "no checkpoint is intact"),
    (
        lambda run: [write("trainer.json", "{")(c) for c in checkpoints(run / "checkpoints")],
        "",
        "no checkpoint is intact",
    ),
    (lambda run: [edit("config.json", hidden_size=8)(c) for c in checkpoints(run / "checkpoints")], "", "is intact"),
]
"""Damage to a run of two steps, settings on the command line, and the message of a resume."""
SAID = [
    (lambda run: (run / "metrics.jsonl").unlink(), "train.num_steps=3", "metrics.jsonl lacks rows of steps 1 to 2"),
    (lambda run: (run / "eval.jsonl").unlink(), "train.num_steps=3", "eval.jsonl lacks rows of steps 0"),
    (write("metrics.jsonl", b"\0" * 64), "train.num_steps=3", "metrics.jsonl lacks rows of steps 1 to 2"),
    (write("problems.json", "{"), "train.num_steps=3", "problems.json is damaged"),
    (write("problems.json", "[]"), "train.num_steps=3", "problems.json is damaged"),
    (write("problems.json", '{"train": ["p1"]}'), "train.num_steps=3", "problems.json is damaged"),
    (lambda run: None, "train.num_steps=3 seed=7", "changed since the run began: seed: 0 → 7"),
    (lambda run: None, "train.num_steps=3 data.num_train=6", "problems of data.train are not those .*: 2 gone"),
    (lambda run: cut("model.safetensors")(checkpoints(run / "checkpoints")[-1]), "", "step_000002 is passed over"),
    (lambda run: cut("optimizer.pt")(checkpoints(run / "checkpoints")[-1]), "", "step_000002 is passed over"),
    (lambda run: shutil.rmtree(checkpoints(run / "checkpoints")[-1] / "teacher"), "", "step_000002 is passed over"),
    (lambda run: write("my_notes.jsonl", "x")(run / "rollouts"), "train.num_steps=3", "step 3"),
    (lambda run: shutil.copytree(run / "checkpoints/step_000001", run / "checkpoints/step_best"), "", "step_000002"),
]
"""What a resume goes on from, and what it says of it."""
TABLES = {"setting": SETTINGS, "config": CONFIGS, "data": DATA, "model": MODELS, "command": COMMANDS}
EVERY = [
    pytest.param(case, id=f"{kind}-{n}") for kind, cases in TABLES.items() for n, case in enumerate(cases, start=1)
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config that is right."""
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MOPD_SITE", raising=False)
    return tmp_path


def arguments(line: str) -> list[str]:
    """The words of a command. Spaces in brackets and braces do not separate them."""
    return re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\S)+", line)


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")}


@pytest.mark.parametrize("case", EVERY)
def test_bad_input_is_a_message(case: Case, place: Path, mopd: Mopd, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in case.files.items():
        write(name, content)(place)
    case.change(place)
    if case.words.startswith("submit"):
        monkeypatch.setenv("PATH", str(place))  # no Slurm here
    before = contents(place)
    code, printed = mopd(*(arguments(case.words) if isinstance(case.words, str) else case.words))
    assert re.search(case.message, printed.replace("\n", " ")), printed
    assert code == 2 and "Traceback" not in printed
    assert contents(place).keys() == before.keys()
    assert contents(place) == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, to be copied."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "small.yaml").write_text(SMALL)
    console = Console(file=io.StringIO())
    assert Trainer.new(load_config(directory / "small.yaml", [f"run_dir={directory / 'run'}"]), console).fit()
    return directory / "run"


@pytest.mark.parametrize(("change", "words", "message"), RESUMED)
def test_a_run_that_cannot_go_on_is_a_message(
    change: Change,
    words: str,
    message: str,
    trained: Path,
    place: Path,
    mopd: Mopd,
) -> None:
    shutil.copytree(trained, place / "run")
    change(place / "run")
    before = contents(place)
    code, printed = mopd(*arguments(f"train --resume run {words}"))
    assert re.search(message, printed.replace("\n", " ")), printed
    assert code == 2 and "Traceback" not in printed
    after = contents(place)
    assert {name: after[name] for name in before if not name.endswith("run.lock")} == {
        name: content for name, content in before.items() if not name.endswith("run.lock")
    }


@pytest.mark.parametrize(("change", "words", "message"), SAID)
def test_what_a_resume_passes_over_is_said(
    change: Change,
    words: str,
    message: str,
    trained: Path,
    place: Path,
    mopd: Mopd,
) -> None:
    shutil.copytree(trained, place / "run")
    change(place / "run")
    code, printed = mopd(*arguments(f"train --resume run {words}"))
    assert re.search(message, printed.replace("\n", " ")), printed
    assert code == 0 and "Traceback" not in printed


HOSTILE = "[/] \\left[a,b\\right] \x1b]0;title\x07 \x1b[2J"


def test_text_of_models_and_rows_is_shown_as_it_is(trained: Path, place: Path, mopd: Mopd) -> None:
    """`mopd inspect` on a run whose ids, answers, prompts and responses look like markup and escape sequences."""
    shutil.copytree(trained, place / "run")
    file = place / "run" / "rollouts" / "step_000002.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert ["answer" in row for row in rows] == [row["rollout"] == 0 for row in rows]
    texts = dict.fromkeys(("problem", "prompt", "response", "teacher_prompt", "feedback"), HOSTILE)
    answer = {"answer": "x" * 5000 + HOSTILE}
    file.write_text("".join(json.dumps(row | texts | (answer if "answer" in row else {})) + "\n" for row in rows))
    for words in (["inspect", "run"], ["inspect", "run", "--problem", HOSTILE]):
        code, printed = mopd(*words)
        assert code == 0 and "\x1b" not in printed and "[/] \\left[a,b\\right] ␛" in printed
        assert len(printed) < 50_000
