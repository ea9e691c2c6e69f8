"""Diversity of the responses to one prompt (paper section 5.4 and appendix D), method by method.

Every method is measured on the same prompts and with as many responses for each. Two things make a method look diverse
that is not: Distinct-n as the paper defines it falls with the number of tokens, which `distinct_n_equal` takes out; and
wrong responses differ from each other in more ways than right ones, so that a model that collapses looks more diverse.
Two further readings take that out: as many right and wrong responses of every method, and right ones alone.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
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
from mopd_nemo.run.rollouts import RecordedGroup, Row, num_successes, solved_fraction

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
    "solved": "solved at least once",
}
READINGS = {
    "all": "All responses",
    "equal_accuracy": "At equal accuracy: of each prompt as many right and as many wrong responses of every method",
    "successes": "Right responses alone, as many of every method",
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


def self_bleu(responses: Sequence[Tokens]) -> float | None:
    """Mean BLEU-4 of each response against the others: 1 when all are alike.

    Precisions above unigrams are smoothed by adding one to numerator and denominator (Lin and Och 2004).
    """
    from sacrebleu.metrics.bleu import BLEU

    # With smoothed counts every order is an effective one, so `effective_order` changes nothing but a warning.
    bleu = BLEU(smooth_method="add-k", smooth_value=1, tokenize="none", effective_order=True)
    texts = [" ".join(tokens) for tokens in responses if tokens]
    if len(texts) < 2:
        return None
    scores = (bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts))
    return fmean(scores) / 100.0


def compare(methods: Mapping[str, Sequence[RecordedGroup]], samples: int | None, code: bool) -> dict[str, Any]:
    """By reading: means over the common prompts with 95 % intervals, and paired differences to the first method.

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
    prompts = [{label: groups[problem].rows[:count] for label, groups in by_problem.items()} for problem in problems]
    readings = {
        "all": prompts,
        "equal_accuracy": [as_many(prompt, (True, False)) for prompt in prompts],
        "successes": [as_many(prompt, (True,)) for prompt in prompts],
    }
    return {
        "samples": count,
        "code": code,
        "readings": {name: _reading(members, code, list(methods)) for name, members in readings.items()},
    }


def as_many(prompt: Mapping[str, Sequence[Row]], outcomes: Sequence[bool]) -> dict[str, list[Row]]:
    """The first responses of each method to a prompt, as many of each outcome as every method has.

    Args:
        prompt: label -> responses.
        outcomes: those to keep; True: success.
    """
    kept: dict[str, list[Row]] = {label: [] for label in prompt}
    for outcome in outcomes:
        having = {label: [row for row in rows if row["success"] is outcome] for label, rows in prompt.items()}
        least = min(map(len, having.values()))
        for label, rows in having.items():
            kept[label] += rows[:least]
    return kept


def _reading(prompts: Sequence[Mapping[str, Sequence[Row]]], code: bool, labels: Sequence[str]) -> dict[str, Any]:
    """Means and paired differences over the prompts that have two responses."""
    measured = [_measure(prompt, code) for prompt in prompts if len(prompt[labels[0]]) > 1]
    values = {label: [prompt[label] for prompt in measured] for label in labels}
    first, *others = labels
    return {
        "num_prompts": len(measured),
        "methods": {label: _summary(values[label]) for label in labels},
        "minus_first": {label: _summary(_difference(values[label], values[first])) for label in others},
    }


def write_result(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write JSON, Markdown and a figure; their paths, the one for people first."""
    markdown, data = directory / "diversity.md", directory / RESULT_FILE
    write_text(markdown, to_markdown(result))
    write_json(data, result)
    names = {name: text for name, text in METRICS.items() if name not in ("tokens", "success", "solved")}
    figure = bars(result["readings"]["all"]["methods"], names, "diversity of the responses to one prompt", columns=4)
    return [markdown, *(save_figure(figure, directory / "diversity") if figure else []), data]


def to_markdown(result: Mapping[str, Any]) -> str:
    """The tables with what they need to be read."""
    reduced = ", reduced to their last fenced code block where there is one" if result["code"] else ""
    blocks = [
        "# Diversity",
        f"The first {result['samples']} responses to each prompt that all methods have{reduced}. Mean over prompts "
        "with its 95 % interval. Distinct-n falls with length; compare the rows of equal length, where all methods get "
        "as many n-grams of a prompt as the shortest has. Among all responses a method that fails more looks more "
        "diverse, since there are more ways to be wrong: compare methods of unequal success on right responses. "
        "`–`: fewer than two responses parse as Python.",
    ]
    for name, title in READINGS.items():
        reading = result["readings"][name]
        metrics = [metric for metric in METRICS if name == "all" or metric not in ("success", "solved")]
        blocks += [f"## {title}", f"{reading['num_prompts']} prompts.", _markdown(reading["methods"], metrics)]
        if reading["minus_first"]:
            first = next(iter(reading["methods"]))
            blocks += [f"Minus {first}, prompt by prompt:", _markdown(reading["minus_first"], metrics, "+")]
    return "\n\n".join(blocks) + "\n"


def _markdown(table: Mapping[str, Any], metrics: Sequence[str], sign: str = "") -> str:
    rows = [[METRICS[name], *(_cell(row[name], sign) for row in table.values())] for name in metrics]
    return markdown_table(["", *table], rows)


def _by_problem(label: str, groups: Sequence[RecordedGroup]) -> dict[str, RecordedGroup]:
    by_problem = {group.problem_id: group for group in groups}
    if len(by_problem) < len(groups):
        raise UserError(f"{label}: a problem occurs in several steps of the file; give the rollouts of one step")
    return by_problem


def _measure(prompt: Mapping[str, Sequence[Row]], code: bool) -> dict[str, dict[str, float | None]]:
    """By method: every metric of its responses to one prompt."""
    view: Callable[[str], str] = extract_code if code else str.strip
    texts = {label: [view(row["response"]) for row in rows] for label, rows in prompt.items()}
    tokens = {label: [tokenize(text) for text in items] for label, items in texts.items()}
    counts = {label: [ngram_counts(items, n) for n in (1, 2)] for label, items in tokens.items()}
    equal = [min(c[n].total() for c in counts.values()) for n in (0, 1)]
    return {
        label: {
            **{f"distinct_{n + 1}": distinct(counts[label][n]) for n in (0, 1)},
            **{f"distinct_{n + 1}_equal": distinct_at(counts[label][n], equal[n]) for n in (0, 1)},
            "ast_distance": ast_distance(texts[label]),
            "unique": unique_ratio(texts[label]),
            "self_bleu_4": self_bleu(tokens[label]),
            "tokens": fmean(len(items) for items in tokens[label]),
            "success": solved_fraction(rows),
            "solved": float(num_successes(rows) > 0),
        }
        for label, rows in prompt.items()
    }


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


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
