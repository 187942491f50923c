"""What articles claim about cost, crossover, utilisation and cold start, recomputed from their own inputs.

A claim (claims.toml, in our words) has the number that was said and an expression over its own inputs. A verdict is

* `holds`: within `tolerance` (5 % unless the claim was rounder);
* `holds if`: the inputs leave something open, and it holds under a condition that is computed and said;
* `does not follow`: its own inputs (`contradicts` in the file) give something else, by how much and what it would take.
"""

import ast
import operator
import tomllib
from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

TOLERANCE = 0.05
_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def check() -> list[dict[str, Any]]:
    """Every claim with what it said, what its inputs give, and the verdict."""
    table = tomllib.loads((Path(__file__).parent / "claims.toml").read_text())
    return [_checked(claim, table["source"]) for claim in table["claim"]]


def value(expression: str, inputs: Mapping[str, float]) -> float:
    """Arithmetic over named inputs: + - * / ** and ceil(). Raises ValueError for anything else."""
    return _value(ast.parse(expression, mode="eval").body, inputs)


def _value(node: ast.expr, inputs: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name) if name in inputs:
            return float(inputs[name])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, inputs), _value(right, inputs))
        case ast.Call(func=ast.Name(id="ceil"), args=[inner], keywords=[]):
            return float(ceil(_value(inner, inputs)))
        case _:
            raise ValueError(f"not arithmetic over {sorted(inputs)}: {ast.dump(node)[:80]}")


def _checked(claim: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    inputs = claim.get("inputs", {})
    low, high = claim.get("said_range", (claim.get("said"), claim.get("said")))
    computed = value(claim["formula"], inputs)
    upper = value(claim["formula_high"], inputs) if "formula_high" in claim else computed
    tolerance, unit = claim.get("tolerance", TOLERANCE), claim["unit"]
    fits = low * (1 - tolerance) <= computed and upper <= high * (1 + tolerance)
    verdict = "holds" if fits else "does not follow"
    why = claim.get("why", "")
    condition = claim.get("only_if", "")
    if "if_formula" in claim:
        condition = condition.format(needed=value(claim["if_formula"], inputs))
    if not fits:
        off = _off(computed if computed < low * (1 - tolerance) else upper, low, high)
        why = f"{off}; {why}" if why else off
    if condition:
        verdict = "does not follow" if claim.get("contradicts") else "holds if"
        why = condition if fits else f"{why}; {condition}"
    return {
        "id": claim["id"],
        "source": sources[claim["source"]],
        "claim": claim["claim"],
        "said": _shown(low, high, unit),
        "computed": _shown(computed, upper, unit),
        "verdict": verdict,
        "why": why,
        "formula": claim["formula"],
        "inputs": dict(inputs),
    }


def _off(computed: float, low: float, high: float) -> str:
    near = low if abs(computed - low) < abs(computed - high) else high
    if not computed or not near:
        return f"{abs(computed - near):.3g}"
    ratio = computed / near
    return f"the inputs give {ratio:.3g} times as much" if ratio > 1 else f"the inputs give {100 * ratio:.0f} % of it"


def _shown(low: float, high: float, unit: str) -> str:
    text = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
    return f"{text} {unit}"


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value:,.0f}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
