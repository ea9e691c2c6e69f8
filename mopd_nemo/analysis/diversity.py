"""Diversity of the responses to one prompt (paper section 5.4 and appendix D), method by method.

Every method is measured on the same prompts and with as many responses for each. Distinct-n as the paper defines it
falls with the number of tokens, so shorter responses look more diverse; `distinct_n_equal` takes that out.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.special import gammaln

from mopd_nemo.analysis.page import markdown_table
from mopd_nemo.analysis.plots import bars, save_figure
from mopd_nemo.config import UserError
from mopd_nemo.evaluation import bootstrap
from mopd_nemo.files import write_json, write_text
from mopd_nemo.run.rollouts import RecordedGroup, solved_fraction

RESULT_FILE = "diversity.json"
METRICS = {
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "distinct_1_equal": "Distinct-1, equal length",
    "distinct_2_equal": "Distinct-2, equal length",
    "ast_distance": "AST Jaccard distance",
    "unique": "unique responses",
    "self_bleu_4": "self-BLEU-4 (lower: more diverse)",
    "tokens": "tokens per response",
    "success": "success rate",
}
Tokens = Sequence[str]
_EMPTY: dict[str, float | None] = {"mean": None, "low": None, "high": None}


def extract_code(response: str) -> str:
    """The last fenced block (```python or ```), else the whole response (appendix D); a tag other than python stays."""
    blocks = re.findall(r"```(?:python)?(.*?)```", response, flags=re.DOTALL)
    return (blocks[-1] if blocks else response).strip()


def tokenize(text: str) -> list[str]:
    """Names, numbers, and single other characters."""
    return re.findall(r"[^\W\d]\w*|\d+|\S", text)


def ngram_counts(responses: Sequence[Tokens], n: int) -> Counter[tuple[str, ...]]:
    """n-grams of all responses together; none spans two responses."""
    return Counter(tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1))


def distinct(counts: Counter[tuple[str, ...]]) -> float | None:
    """Unique over total n-grams (eq. 11)."""
    return len(counts) / counts.total() if counts else None


def distinct_at(counts: Counter[tuple[str, ...]], size: int) -> float | None:
    """Expected distinct-n of `size` n-grams drawn without replacement: rarefaction (Hurlbert 1971), exact.

    Equal sizes make texts of different length comparable. At the full size it is `distinct`.
    """
    total = counts.total()
    if not 0 < size <= total:
        return None
    frequency = np.fromiter(counts.values(), dtype=float)
    rest = total - frequency
    possible = rest >= size  # else every draw contains this n-gram
    never = np.zeros_like(frequency)
    never[possible] = np.exp(_log_choose(rest[possible], size) - _log_choose(np.array(float(total)), size))
    return float((1.0 - never).sum() / size)


def ast_distance(programs: Sequence[str]) -> float | None:
    """Mean multiset Jaccard distance of AST node types over pairs of responses that parse (eq. 12); else None."""
    nodes = [counts for counts in map(_node_types, programs) if counts is not None]
    distances = [1.0 - (a & b).total() / (a | b).total() for a, b in combinations(nodes, 2)]
    return fmean(distances) if distances else None


def unique_ratio(texts: Sequence[str]) -> float:
    """Distinct texts over texts."""
    return len(set(texts)) / len(texts)


def self_bleu(responses: Sequence[Tokens], order: int = 4) -> float | None:
    """Mean BLEU-4 of each response against the others: 1 when all are alike.

    Precisions above unigrams are smoothed by adding one to numerator and denominator (Lin and Och 2004).
    """
    responses = [tokens for tokens in responses if tokens]
    if len(responses) < 2:
        return None
    counts = [[ngram_counts([tokens], n) for n in range(1, order + 1)] for tokens in responses]
    return fmean(_bleu(i, responses, counts) for i in range(len(responses)))


def compare(methods: Mapping[str, Sequence[RecordedGroup]], samples: int | None, code: bool) -> dict[str, Any]:
    """Means over the common prompts with 95 % intervals by prompt, and paired differences to the first method.

    Args:
        methods: label -> groups of one policy.
        samples: responses per prompt; default: the most that all methods have for all common prompts.
        code: reduce responses to their code first.

    Raises:
        UserError: nothing in common, or too few responses.
    """
    by_problem = {label: _by_problem(label, groups) for label, groups in methods.items()}
    first, *others = by_problem.values()
    problems = [problem for problem in first if all(problem in other for other in others)]
    if not problems:
        raise UserError(f"{', '.join(methods)}: no problem is in all of them, nothing can be compared")
    least = min(len(groups[problem].rows) for groups in by_problem.values() for problem in problems)
    if least < (samples or 2):
        raise UserError(f"--samples {samples or 2}: some problem has only {least} responses")
    count = samples or least
    values = _values(by_problem, problems, count, code)
    baseline = next(iter(methods))
    return {
        "num_prompts": len(problems),
        "samples": count,
        "code": code,
        "methods": {label: _summary(values[label]) for label in methods},
        "minus_first": {
            label: _summary(_difference(values[label], values[baseline])) for label in methods if label != baseline
        },
    }


def write_result(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write JSON, Markdown and a figure; their paths, the one for people first."""
    markdown, data = directory / "diversity.md", directory / RESULT_FILE
    write_text(markdown, to_markdown(result))
    write_json(data, result)
    names = {name: text for name, text in METRICS.items() if name not in ("tokens", "success")}
    figure = bars(result["methods"], names, "diversity of the responses to one prompt", columns=4)
    return [markdown, *(save_figure(figure, directory / "diversity") if figure else []), data]


def to_markdown(result: Mapping[str, Any]) -> str:
    """The table with what it needs to be read."""
    methods, baseline = result["methods"], next(iter(result["methods"]))
    reduced = ", reduced to their last fenced code block where there is one" if result["code"] else ""
    blocks = [
        "# Diversity",
        f"{result['num_prompts']} prompts that all methods have, the first {result['samples']} responses of each"
        f"{reduced}. Mean over prompts with its 95 % interval. Distinct-n falls with length; compare "
        "the rows of equal length, where every method gets as many n-grams of a prompt as the shortest has. "
        "`–`: fewer than two responses parse as Python.",
        _markdown(methods),
    ]
    if result["minus_first"]:
        differences = result["minus_first"]
        blocks += [
            f"## Minus {baseline}, prompt by prompt",
            _markdown(differences, "+"),
        ]
    return "\n\n".join(blocks) + "\n"


def _markdown(table: Mapping[str, Any], sign: str = "") -> str:
    rows = [[text, *(_cell(row[name], sign) for row in table.values())] for name, text in METRICS.items()]
    return markdown_table(["", *table], rows)


def _by_problem(label: str, groups: Sequence[RecordedGroup]) -> dict[str, RecordedGroup]:
    by_problem = {group.problem_id: group for group in groups}
    if len(by_problem) < len(groups):
        raise UserError(f"{label}: a problem occurs in several steps of the file; give the rollouts of one step")
    return by_problem


def _values(
    methods: Mapping[str, Mapping[str, RecordedGroup]], problems: Sequence[str], count: int, code: bool
) -> dict[str, list[dict[str, float | None]]]:
    """By method and prompt: every metric."""
    values: dict[str, list[dict[str, float | None]]] = {label: [] for label in methods}
    view: Callable[[str], str] = extract_code if code else str.strip
    for problem in problems:
        rows = {label: groups[problem].rows[:count] for label, groups in methods.items()}
        texts = {label: [view(row["response"]) for row in members] for label, members in rows.items()}
        tokens = {label: [tokenize(text) for text in items] for label, items in texts.items()}
        counts = {label: [ngram_counts(items, n) for n in (1, 2)] for label, items in tokens.items()}
        equal = [min(c[n].total() for c in counts.values()) for n in (0, 1)]
        for label in methods:
            values[label].append(
                {
                    **{f"distinct_{n + 1}": distinct(counts[label][n]) for n in (0, 1)},
                    **{f"distinct_{n + 1}_equal": distinct_at(counts[label][n], equal[n]) for n in (0, 1)},
                    "ast_distance": ast_distance(texts[label]),
                    "unique": unique_ratio(texts[label]),
                    "self_bleu_4": self_bleu(tokens[label]),
                    "tokens": fmean(len(items) for items in tokens[label]),
                    "success": solved_fraction(rows[label]),
                }
            )
    return values


def _difference(a: Sequence[Mapping[str, float | None]], b: Sequence[Mapping[str, float | None]]) -> list[dict]:
    def minus(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None else x - y

    return [{name: minus(one[name], two[name]) for name in METRICS} for one, two in zip(a, b, strict=True)]


def _summary(prompts: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Per metric the mean over the prompts where it is defined, its interval, and their number."""
    return {name: _mean([prompt[name] for prompt in prompts]) for name in METRICS}


def _mean(values: Sequence[float | None]) -> dict[str, Any]:
    defined = np.array([[value] for value in values if value is not None])
    if not len(defined):
        return {**_EMPTY, "num_prompts": 0}
    low, high = bootstrap(defined)
    return {
        "mean": float(defined.mean()),
        "low": float(low[0]),
        "high": float(high[0]),
        "num_prompts": len(defined),
    }


def _cell(value: Mapping[str, Any], sign: str = "") -> str:
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:{sign}.3f} ({value['low']:{sign}.3f} to {value['high']:{sign}.3f})"


def _node_types(program: str) -> Counter[str] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a SyntaxWarning is the model's business
            tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return Counter(type(node).__name__ for node in ast.walk(tree))


def _bleu(index: int, responses: Sequence[Tokens], counts: Sequence[Sequence[Counter]]) -> float:
    """Of one response against all others, with the brevity penalty of the reference nearest in length."""
    length = len(responses[index])
    others = [i for i in range(len(responses)) if i != index]
    total = 0.0
    for n, own in enumerate(counts[index]):
        best: Counter = Counter()
        for other in others:
            best |= counts[other][n]
        matched, possible = (own & best).total(), own.total()
        if n == 0 and matched == 0:
            return 0.0
        total += log((matched + (n > 0)) / (possible + (n > 0)))
    reference = min((len(responses[i]) for i in others), key=lambda other: (abs(other - length), other))
    return exp(total / len(counts[index])) * (1.0 if length >= reference else exp(1.0 - reference / length))


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
