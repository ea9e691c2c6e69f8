"""ToolAlpaca: map a request and an API description to tool calls (Tang et al., 2023).

Three forms of rows are read: those of the paper's code (`{idx, prompt, answer}`), one API of ToolAlpaca's own
`eval_simulated.json` per row, and both mixed. A request whose gold calls need the result of an earlier call
(`${id from search}`) cannot be judged by its text, and is left out as in the paper's code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from mopd_nemo.data.prepare import Source, train_and_test, user
from mopd_nemo.data.rows import Row, RowError, text_field
from mopd_nemo.types import Problem
from mopd_nemo.verifiers.tool import gold_calls

PROMPT = """\
Fulfil the user's request with the tools of this API.

{name}: {description}

{documentation}

Write down every call that is needed, each in this form:
Thought: why this call is needed
Action: the name of one tool
Action Input: its parameters as a JSON object, with values that the user has given

Request: {request}"""


def expand(row: Row) -> Iterator[Row]:
    """One row per request of an API. Other rows stay as they are."""
    if "Instructions" not in row:
        yield row
        return
    requests, golds = row["Instructions"], row.get("Golden_Answers")
    if not isinstance(requests, list) or not isinstance(golds, list) or len(requests) != len(golds):
        raise RowError("Golden_Answers: must be a list with one entry for each of Instructions")
    for number, (request, gold) in enumerate(zip(requests, golds, strict=True)):
        prompt = PROMPT.format(
            name=text_field(row, "Name"),
            description=text_field(row, "Description"),
            documentation=text_field(row, "NLDocumentation").strip(),
            request=request,
        )
        yield {"idx": f"{row['Name']}/{number}", "prompt": prompt, "answer": json.dumps(gold, ensure_ascii=False)}


def to_problem(row: Row, default_id: str) -> Problem | None:
    """`{prompt, answer}`, the answer a list of calls as JSON."""
    prompt, answer = text_field(row, "prompt"), text_field(row, "answer")
    if "${" in answer:
        return None
    try:
        gold_calls(answer)
    except ValueError as error:
        raise RowError(str(error)) from error
    own_id = f"toolalpaca/{row['idx']}" if "idx" in row else default_id
    return Problem(own_id, user(prompt), answer, "tool")


SOURCE = Source(
    name="toolalpaca",
    title="ToolAlpaca",
    hub=None,
    download=(
        "train.json and test.json in datasets/tooluse of https://github.com/lasgroup/SDPO (the paper's rows), or "
        "data/eval_simulated.json of https://github.com/tangqiaoyu/ToolAlpaca (evaluation only)"
    ),
    to_problem=to_problem,
    assign=train_and_test,
    sizes={},
    expand=expand,
)
