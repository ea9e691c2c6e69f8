"""`mopd chat`: a few lines with what was trained, or with any model, in the terminal or through a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopd_nemo.commands.export import Which, trained
from mopd_nemo.config import ModelConfig, UserError
from mopd_nemo.terminal import Terminal, visible
from mopd_nemo.types import Message

if TYPE_CHECKING:
    from mopd_nemo.chat import Chat

NEW = "/new"
"""What the user writes to begin again."""
CUT = "cut short"
"""An answer that Ctrl-C has ended."""


def chat(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A run, a checkpoint, an export, or any model.")],
    checkpoint: Which = "best",
    seed: Annotated[int, typer.Option(help="Of the draws: the same words then give the same answers.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 1024,
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.")] = None,
) -> None:
    """Talk to a model: each line is a turn. Ctrl-C cuts an answer short, Ctrl-D ends, /new begins again.

    mopd chat runs/quickstart-20260101-120000

    echo "What is 7+5 modulo 10?" | mopd chat my-model --temperature 0
    """
    console = Terminal(stderr=True)
    with console.status("loading torch and the model"):
        talk = _load(source, checkpoint, console)
    talk.seed, talk.temperature, talk.max_tokens = seed, temperature, max_tokens
    start = [Message(role="system", content=talk.chat.escape_control_tokens(system))] if system else []
    asks = sys.stdin.isatty()
    if asks:
        with suppress(ImportError):
            import readline  # noqa: F401  # so that `input` has a history and can be edited
        console.print("Each line is a turn. Ctrl-C cuts an answer short, Ctrl-D ends, /new begins again.", style="dim")
    messages = list(start)
    for line in _lines(asks):
        if line == NEW:
            messages = list(start)
        elif line:
            messages.append(Message(role="user", content=talk.chat.escape_control_tokens(line)))
            said, note = talk.answer(messages)
            messages.append(Message(role="assistant", content=said))
            if note:
                console.print(f"[{note}]", style="yellow")
            if note == CUT and not asks:
                raise typer.Exit(128 + signal.SIGINT)


def _lines(asks: bool) -> Iterator[str]:
    """What the user writes, line by line, until its end or Ctrl-C at the prompt."""
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> ") if asks else sys.stdin.readline()
            if not asks and not line:
                return
            yield line.strip()
    if asks:
        print()


def _load(source: str, which: str, console: Terminal) -> Talk:
    settings = ModelConfig(path=source)
    if (path := Path(source)).is_dir():
        found = trained(path, which)
        if found.run is not None:
            console.print(f"{found.directory}{found.why}", style="dim", soft_wrap=True)
            settings = found.run.read_config().model
        if (found.directory / "policy").is_dir():
            raise UserError(f"{found.directory}: a checkpoint of NeMo-RL; first `mopd export {source} --output DIR`")
        settings = settings.model_copy(update={"path": str(found.directory)})
    from mopd_nemo.engines.local.model import resolve_device
    from mopd_nemo.engines.models import check_directory, load_chat

    check_directory(settings.path, "DIR")
    talking = load_chat(settings)  # before the weights: it fails fast
    import torch
    from transformers.utils import logging

    from mopd_nemo.engines.local.adapters import read_module
    from mopd_nemo.engines.models import first_line

    logging.disable_progress_bar()
    device = resolve_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = read_module(settings.path, dtype).to(device).eval()
    except UserError:
        raise
    except Exception as error:  # damaged files make libraries raise anything
        raise UserError(f"DIR={source}: cannot load a causal language model: {first_line(error)}") from error
    return Talk(model, talking)


class Talk:
    """A model that answers, token by token.

    Args:
        model: of `transformers`, with `generate`.
    """

    def __init__(self, model: Any, chat: Chat) -> None:
        self.model, self.chat = model, chat
        self.seed, self.temperature, self.max_tokens = 0, 0.7, 1024
        listed = model.generation_config.eos_token_id
        self._ends = chat.end_ids | {i for i in (listed if isinstance(listed, list) else [listed]) if i is not None}
        self._window = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def answer(self, messages: list[Message]) -> tuple[str, str]:
        """Print an answer as it is drawn.

        Returns:
            What the next turn shows of it (no thinking), and a remark; empty: it ended by itself.
        """
        import torch

        from mopd_nemo.chat import opens_thinking, strip_thinking

        prompt = self.chat.prompt_text(messages)
        ids = self.chat.encode(prompt)
        room = min(self.max_tokens, self._window - len(ids)) if self._window else self.max_tokens
        if room < 1:
            raise UserError(f"these turns fill all {self._window} positions of the model; begin again ({NEW})")
        printer = _Printer(self.chat, len(ids))
        draws = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(self.seed + len(messages))
        note = ""
        try:
            self.model.generate(
                torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                streamer=printer,
                max_new_tokens=room,
                eos_token_id=sorted(self._ends),
                pad_token_id=self.chat.pad_id,
                **(draws if self.temperature > 0 else {"do_sample": False}),
            )
            if printer.ids and printer.ids[-1] not in self._ends:
                why = (
                    f"--max-tokens {self.max_tokens}" if room == self.max_tokens else "the model has no more positions"
                )
                note = f"cut after {len(printer.ids)} tokens: {why}"
        except KeyboardInterrupt:
            note = CUT
        printer.end()
        return strip_thinking(printer.text, opened_in_prompt=opens_thinking(prompt)), note


class _Printer:
    """Prints tokens as they come, whole characters only; a streamer of `transformers`."""

    def __init__(self, chat: Chat, num_prompt: int) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._chat, self._skip, self._ended = chat, num_prompt, False

    def put(self, value: Any) -> None:
        """The prompt, then tokens one by one."""
        ids = value.flatten().tolist()
        skipped = min(self._skip, len(ids))
        self._skip -= skipped
        if ids := ids[skipped:]:
            self.ids += ids
            self._print(self._chat.decode(self.ids), last=False)

    def end(self) -> None:
        """No more tokens come."""
        if not self._ended:
            self._ended = True
            self._print(self._chat.decode(self.ids), last=True)
            print(flush=True)

    def _print(self, text: str, last: bool) -> None:
        from mopd_nemo.chat import PART_OF_CHARACTER

        if text.startswith(self.text) and (last or not text.endswith(PART_OF_CHARACTER)):
            sys.stdout.write(visible(text[len(self.text) :]))
            sys.stdout.flush()
            self.text = text
