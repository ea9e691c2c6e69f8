"""Settings of the teacher and of the reference: which model each is, and where it runs."""

from __future__ import annotations

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mopd_nemo.config.base import ConfigBlock, Fraction


class TeacherConfig(ConfigBlock):
    """The model whose distribution the student learns. What each kind needs: docs/teachers.md."""

    kind: Literal["live", "ema", "frozen", "external", "server", "several", "none"] = "ema"
    """`live`: the student itself; `ema`: a moving average of it; `frozen`: its initial weights; `external`: `path`;
    `server`: the model at `urls`; `several`: those of `teachers`; `none`: no teacher. Default: `several` where
    `teachers` names some; `ema` for mopd and sdpo, `external` for opd and gkd, `frozen` for dpo (its reference model),
    else `none`."""
    ema_rate: Fraction = 0.05
    """After each step: teacher ← (1 - rate)·teacher + rate·student. The average is kept in float32."""
    offload: bool = False
    """For kinds `ema`, `frozen` and `external` with `engine: local`: the teacher's weights are in host memory, and a
    copy of them on the device only while it scores. See docs/one-gpu.md."""
    path: str | None = None
    """Model directory or hub name of an external teacher, which must have the student's vocabulary."""
    urls: tuple[str, ...] = ()
    """Servers of the teacher, `http://HOST:PORT`, all with the same model. Requests are dealt out among them, and one
    that does not answer any more is left out."""
    server: Literal["vllm", "sglang"] = "vllm"
    """Software of the servers. `sglang` has not been tried."""
    model: str | None = None
    """Name under which the servers serve the teacher. `null`: they serve one model."""
    api_key_env: str = "MOPD_TEACHER_API_KEY"
    """Environment variable with the servers' API key. The key itself is never written anywhere."""
    max_in_flight: PositiveInt = 16
    """Requests that one server has at a time; each is one response."""
    timeout: PositiveFloat = 120.0
    """Seconds that a server may take to answer a request."""
    retries: NonNegativeInt = 5
    """How often a request is sent again after no answer, a 429 or a 5xx: after 1 second, 2, 4, and so on. Then its
    server is left out."""

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        if self.kind == "external" and self.path is None:
            raise ValueError("teacher.kind=external needs teacher.path: name the teacher's model directory")
        if self.kind != "external" and self.path is not None:
            raise ValueError(
                f"teacher.path={self.path!r} is unused by teacher.kind={self.kind}: set teacher.kind=external"
            )
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload and self.kind not in ("ema", "frozen", "external"):
            why = {
                "live": "which is the student itself",
                "several": "of which each has its own: set it in teachers",
            }.get(self.kind, "so there are no weights to move")
            raise ValueError(f"teacher.offload=true is unused by teacher.kind={self.kind}, {why}: remove it here")
        return self

    @model_validator(mode="after")
    def _check_urls(self) -> Self:
        if self.kind == "server" and not self.urls:
            raise ValueError("teacher.kind=server needs teacher.urls: name the server, as in [http://host:8000]")
        for name in ("urls", "server", "model", "api_key_env", "max_in_flight", "timeout", "retries"):
            value = getattr(self, name)
            if self.kind != "server" and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"teacher.{name}={value!r} is unused by teacher.kind={self.kind}: set teacher.kind=server"
                )
        if not self.api_key_env.isidentifier():  # not shown: it may be the key itself
            raise ValueError(
                "teacher.api_key_env is no name of an environment variable: put the key into one, and name it"
            )
        for url in self.urls:
            parts = urlsplit(url)
            if "@" in parts.netloc or parts.query:  # not shown: it would be a secret
                raise ValueError(
                    f"teacher.urls: the one of {parts.hostname} holds a password or a query: put a key into the "
                    f"environment variable {self.api_key_env}, and write http://HOST:PORT"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"teacher.urls: {url!r} is no address of a server: write it as http://HOST:PORT")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError(
                f"teacher.urls={list(self.urls)} names a server twice: raise teacher.max_in_flight instead"
            )
        return self


class NamedTeacherConfig(TeacherConfig):
    """One of several teachers."""

    kind: Literal["frozen", "external", "server"] = "external"  # type: ignore[assignment]
    """As `teacher.kind`."""
    tasks: tuple[str, ...] = ()
    """Tasks whose responses it teaches. Default: the one that is called as it is."""


class ReferenceConfig(ConfigBlock):
    """A pull back to the student's initial weights P_0, which read the student's prompt."""

    kl: NonNegativeFloat = 0.0
    """β of an additional loss β·KL(P‖P_0), on the `divergence.k` likeliest tokens of the student and the tail, over all
    responses that the method learns from. It costs a scoring pass and a copy of the weights. With engine=local only.
    0: none."""
    offload: bool = False
    """Keep that copy in host memory, as `teacher.offload` does with the teacher's."""

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload and not self.kl:
            raise ValueError("reference.offload=true is unused by reference.kl=0: set reference.kl, or remove it")
        return self


def key_of(name: str) -> str:
    """The config key of a teacher's block, given its name among several; that of a single one is empty."""
    return f"teachers.{name}" if name else "teacher"
