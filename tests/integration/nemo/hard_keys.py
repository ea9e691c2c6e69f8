"""Keys that NeMo-RL's source reads from a config block, on the way that this block leads it, and that are not there.

The source is not run. Each function is walked once, statement by statement, with the block in place of `config`, `cfg`
and their like; names that are given a part of it (`megatron_cfg = config["megatron_cfg"]`) stand for that part. A test
that the block decides (`"peft" in config`, `cfg["draft"]["enabled"]`, `config.get("x") is not None`) is taken one way,
any other both ways. Used by tests only.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOTS = ("config", "cfg", "policy_cfg", "policy_config", "self.cfg", "self.config")
UNKNOWN: Any = object()
SAFE = ("KeyError", "Exception", "BaseException")
"""Errors that, where they are caught, make a missing key no fault."""
COMPARED: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


def missing_keys(
    files: Iterable[Path],
    block: Mapping[str, Any],
    unused: Iterable[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Key, dotted → where it is read.

    Args:
        unused: functions that nobody calls with such a block.
        arguments: what other arguments are, by name.
    """
    found: dict[str, str] = {}
    for file in files:
        reader = _Reader(file.name, block, set(unused), arguments or {}, found)
        reader.statements(ast.parse(file.read_text()).body, {})
    return found


class _Reader:
    def __init__(
        self,
        file: str,
        block: Mapping[str, Any],
        unused: set[str],
        arguments: Mapping[str, Any],
        found: dict[str, str],
    ) -> None:
        self._file, self._block, self._unused, self._arguments, self._found = file, block, unused, arguments, found
        self._paths: dict[int, str] = {}
        self._kept: list[Any] = []  # an id is one object's only while that lives
        self._safe = 0

    def statements(self, body: Iterable[ast.stmt], names: dict[str, Any]) -> bool:
        """Walk; whether the block leads out of the function."""
        return any(self._statement(statement, names) for statement in body)

    def _statement(self, node: ast.stmt, names: dict[str, Any]) -> bool:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if node.name not in self._unused:
                    self.statements(node.body, self._entered(node, names))
            case ast.ClassDef():
                self.statements(node.body, dict(names))
            case ast.If():
                return self._if(node, names)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                self._assign(node, names)
            case ast.Try():
                catches = [ast.unparse(handler.type) if handler.type else "Exception" for handler in node.handlers]
                safe = any(name in text for name in SAFE for text in catches)
                self._safe += safe
                left = self.statements(node.body, names)
                self._safe -= safe
                for part in (*(handler.body for handler in node.handlers), node.orelse, node.finalbody):
                    self.statements(part, names)
                return left and not node.handlers
            case ast.For() | ast.AsyncFor() | ast.While() | ast.With() | ast.AsyncWith():
                self._value_of_children(node, names)
                for target in ast.walk(node):
                    if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                        names[target.id] = UNKNOWN
                left = self.statements(node.body, names)
                self.statements(getattr(node, "orelse", []), names)
                return left and isinstance(node, ast.With | ast.AsyncWith)
            case _:
                self._value_of_children(node, names)
                return isinstance(node, ast.Return | ast.Raise | ast.Continue | ast.Break)
        return False

    def _entered(self, node: ast.FunctionDef | ast.AsyncFunctionDef, names: dict[str, Any]) -> dict[str, Any]:
        """What names stand for inside a function."""
        block = copy.deepcopy(dict(self._block))
        self._name_parts(block, "")
        arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        inner = dict(names) | {name: self._arguments.get(name, UNKNOWN) for name in arguments}
        return inner | {name: block for name in ROOTS if name in arguments or "." in name}

    def _name_parts(self, block: dict[str, Any], path: str) -> None:
        self._paths[id(block)] = path
        self._kept.append(block)
        for key, value in block.items():
            if isinstance(value, dict):
                self._name_parts(value, f"{path}{key}.")

    def _if(self, node: ast.If, names: dict[str, Any]) -> bool:
        test = self._value(node.test, names)
        if test is not UNKNOWN:
            return self.statements(node.body if test else node.orelse, names)
        one, other = dict(names), dict(names)
        left = [self.statements(node.body, one), self.statements(node.orelse, other)]
        for name in one.keys() | other.keys():
            values = [values.get(name, UNKNOWN) for values, gone in zip((one, other), left, strict=True) if not gone]
            names[name] = values[0] if values and all(value is values[0] for value in values) else UNKNOWN
        return all(left)

    def _assign(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign, names: dict[str, Any]) -> None:
        value = UNKNOWN if node.value is None else self._value(node.value, names)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                names[target.id] = UNKNOWN if isinstance(node, ast.AugAssign) else value
            elif isinstance(target, ast.Subscript):
                held, key = self._value(target.value, names), self._value(target.slice, names)
                if isinstance(held, dict) and isinstance(key, str):
                    held[key] = value
            else:
                names.update(dict.fromkeys((n.id for n in ast.walk(target) if isinstance(n, ast.Name)), UNKNOWN))

    def _value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return names.get(node.id, UNKNOWN)
            case ast.Attribute():
                self._value(node.value, names)
                return names.get(ast.unparse(node), UNKNOWN)
            case ast.Subscript():
                return self._item(node, names)
            case ast.Call():
                return self._call(node, names)
            case ast.BoolOp():
                return self._either(node, names)
            case ast.UnaryOp(op=ast.Not()):
                value = self._value(node.operand, names)
                return UNKNOWN if value is UNKNOWN else not value
            case ast.IfExp():
                test = self._value(node.test, names)
                if test is not UNKNOWN:
                    return self._value(node.body if test else node.orelse, names)
            case ast.Compare(ops=[sign], comparators=[other]) if type(sign) in COMPARED:
                left, right = self._value(node.left, names), self._value(other, names)
                return UNKNOWN if UNKNOWN in (left, right) else COMPARED[type(sign)](left, right)
        self._value_of_children(node, names)
        return UNKNOWN

    def _value_of_children(self, node: ast.AST, names: dict[str, Any]) -> None:
        """Read what is read inside; statements have been walked, or will be."""
        bound = [part.target for part in getattr(node, "generators", [])]
        shadowed = {name.id for target in bound for name in ast.walk(target) if isinstance(name, ast.Name)}
        inner = names | dict.fromkeys(shadowed, UNKNOWN) if shadowed else names
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child, inner)
            elif not isinstance(child, ast.stmt):
                self._value_of_children(child, inner)

    def _item(self, node: ast.Subscript, names: dict[str, Any]) -> Any:
        held, key = self._value(node.value, names), self._value(node.slice, names)
        if not isinstance(held, dict) or not isinstance(key, str):
            return UNKNOWN
        if key not in held and id(held) in self._paths and not self._safe:
            self._found.setdefault(f"{self._paths[id(held)]}{key}", f"{self._file}:{node.lineno}")
        return held.get(key, UNKNOWN)

    def _call(self, node: ast.Call, names: dict[str, Any]) -> Any:
        arguments = [self._value(argument, names) for argument in node.args]
        for keyword in node.keywords:
            self._value(keyword.value, names)
        if isinstance(node.func, ast.Attribute):
            held = self._value(node.func.value, names)
            if node.func.attr == "get" and isinstance(held, dict) and isinstance(arguments[0], str):
                return held.get(arguments[0], arguments[1] if len(arguments) > 1 else None)
        elif isinstance(node.func, ast.Name) and node.func.id in ("dict", "bool") and len(arguments) == 1:
            return arguments[0]
        return UNKNOWN

    def _either(self, node: ast.BoolOp, names: dict[str, Any]) -> Any:
        """The value that decides; after one that is not known, what follows may be read or not, and is."""
        known, deciding = True, isinstance(node.op, ast.Or)
        value: Any = UNKNOWN
        for part in node.values:
            value = self._value(part, names)
            if value is UNKNOWN:
                known = False
            elif bool(value) is deciding:
                return value
        return value if known else UNKNOWN
