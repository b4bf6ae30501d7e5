"""Sharing: what several programs do with the key alone, each of them the same, is done once for them all."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var


class Shared(NamedTuple):
    """Programs in two stages.

    Attributes:
      commons: what each program does first, with the key alone: from a key to intermediate values.
      rests: what each program does then: from those values, the key and its other arguments to its results. What does
        not even depend on the key stays here, where it is not repeated for each seed.
    """

    commons: list[ClosedJaxpr]
    rests: list[ClosedJaxpr]


def share(programs: Sequence[ClosedJaxpr]) -> Shared:
    """Splits programs, whose first argument is a key, into what they have in common and the rest.

    What they have in common is the longest sequence of equations that depend on nothing but the key and with which
    all programs begin, whatever other equations stand between them. Equations are the same if they are written the
    same. That leaves values of constants aside, so that commons may still differ in those.
    """
    alone = [_of_key_alone(program) for program in programs]
    written = [_written(program, equations) for program, equations in zip(programs, alone, strict=True)]
    num = [*(len(set(lines)) == 1 for lines in zip(*written, strict=False)), False].index(False)
    alone = [equations[:num] for equations in alone]
    left = [
        _without(program.jaxpr.eqns, _random(program, equations))
        for program, equations in zip(programs, alone, strict=True)
    ]
    places = sorted(set().union(*map(_needed, programs, alone, left)))
    commons, rests = [], []
    for program, equations, others in zip(programs, alone, left, strict=True):
        jaxpr, values = program.jaxpr, [equations[i].outvars[j] for i, j in places]
        common = jaxpr.replace(eqns=equations, invars=jaxpr.invars[:1], outvars=values)
        rest = jaxpr.replace(eqns=others, invars=[*values, *jaxpr.invars])
        commons.append(ClosedJaxpr(common, program.consts))
        rests.append(ClosedJaxpr(rest, program.consts))
    return Shared(commons, rests)


def _of_key_alone(program: ClosedJaxpr) -> list[JaxprEqn]:
    """The equations that depend on the first argument and constants only, have no effects, and do not ask the host."""
    known = {*program.jaxpr.invars[:1], *program.jaxpr.constvars}
    equations = []
    for equation in program.jaxpr.eqns:
        pure = not equation.effects and "_callback" not in f"{equation.primitive} {equation.params}"
        if pure and all(isinstance(value, Literal) or value in known for value in equation.invars):
            known.update(equation.outvars)
            equations.append(equation)
    return equations


def _random(program: ClosedJaxpr, equations: list[JaxprEqn]) -> list[JaxprEqn]:
    """Those of some equations that depend on the key."""
    made, random = {*program.jaxpr.invars[:1]}, []
    for equation in equations:
        if any(isinstance(value, Var) and value in made for value in equation.invars):
            made.update(equation.outvars)
            random.append(equation)
    return random


def _written(program: ClosedJaxpr, equations: list[JaxprEqn]) -> list[str]:
    """Each equation as text that is the same wherever the same is computed."""
    names: dict[Any, str] = {var: f"constant {i}" for i, var in enumerate(program.jaxpr.constvars)}
    names[program.jaxpr.invars[0]] = "key"
    lines = []
    for i, equation in enumerate(equations):
        arguments = [repr(v) if isinstance(v, Literal) else names[v] for v in equation.invars]
        shapes = [v.aval for v in (*equation.invars, *equation.outvars)]
        lines.append(re.sub(r" at 0x[0-9a-f]+", "", f"{equation.primitive} {equation.params} {arguments} {shapes}"))
        names.update({var: f"{i}.{j}" for j, var in enumerate(equation.outvars)})
    return lines


def _needed(program: ClosedJaxpr, equations: list[JaxprEqn], left: list[JaxprEqn]) -> set[tuple[int, int]]:
    """Which results of some equations those left need and do not make: number of the equation, number of its result."""
    used = {v for equation in left for v in equation.invars if isinstance(v, Var)}
    used.update(v for v in program.jaxpr.outvars if isinstance(v, Var))
    used.difference_update(v for equation in left for v in equation.outvars)
    return {(i, j) for i, equation in enumerate(equations) for j, v in enumerate(equation.outvars) if v in used}


def _without(equations: Sequence[JaxprEqn], left_out: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    out = set(map(id, left_out))
    return [equation for equation in equations if id(equation) not in out]
