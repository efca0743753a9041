"""A derived update as equations, its coefficients named after the inputs they come from."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Array

from .exact_filter import ExactFilter
from .generic import generic_steps
from .linear_gaussian import Step

_TOLERANCE = 1e-9


def equations(exact: ExactFilter) -> list[str]:
    """Return the update of one step, line by line, then its coefficients.

    Coefficients are recognised by comparing them with the inputs, and simple functions of them, at
    many generic inputs; what is not recognised is shown at the first example step.
    """
    steps, generic = generic_steps(exact.proof, exact.partition, exact.examples)
    structure = exact.structure
    single = exact.partition.width == 1
    given = steps.observation if steps.observation is not None else steps.evidence
    lines, names = _scalar_update(exact) if single else _matrix_update(exact)
    parts = {"F": steps.transition, "Q": steps.drift}
    if given is not None:
        parts |= {"H": given.observation, "R": given.noise}
    if steps.evidence is not None:
        parts["C"] = steps.evidence.cross
    if steps.evidence is not None and steps.observation is not None:
        parts["H_z"], parts["R_z"] = steps.evidence.observation, steps.evidence.noise
    for letter, array in parts.items():
        if letter in names:
            symbol = names[letter]
            named = recognise(_by_entry(exact, np.asarray(array)), generic)
            if structure.kind == "separate rows" and not _close(*_first_block(np.asarray(array))):
                named += ", row by row"
            lines.append(f"  with {symbol} = {named}")
    for letter, array in _shifts(exact, steps).items():
        if letter in names:
            lines.append(f"  with {names[letter]} = {recognise(array, generic)}")
    prior = exact.initial()
    lines.append(f"  start: mean {_constant(prior.mean)}, variance {_constant(prior.covariance)}")
    return lines


def _matrix_update(exact: ExactFilter) -> tuple[list[str], dict[str, str]]:
    structure = exact.structure
    plural = structure.observations > 1 or structure.evidence > 1
    shared = structure.kind == "shared rows"
    state, move = ("M", "M Fᵀ") if shared else ("m", "F m")
    moves = structure.transition != "identity"
    names = {"F": "F"} if moves else {}
    mean = move if moves else state
    covariance = "F P Fᵀ" if moves else "P"
    if structure.shifted:
        mean += " + f"
        names["f"] = "f"
    offset = " − b" if structure.shifted else ""
    if structure.drift != "zero":
        names["Q"] = "Q"
        covariance += " + Q"
    if structure.evidence:
        also = " + b_z" if structure.shifted else ""
        seen = f"{state} H_zᵀ" if shared else f"H_z {state}"
        moved = f"(z − {seen}{also.replace('+', '−')})"
        write = f"{moved} Gᵀ" if shared else f"G {moved}"
        lines = [
            f"evidence about the change, z = {seen}{also} + e with cov(e) = R_z, cov(w, e) = C:",
            f"  S = H_z P H_zᵀ + R_z,  G = ({'F ' if moves else ''}P H_zᵀ + C) S⁻¹",
            f"  {state}⁻ = {mean} + {write},  P⁻ = {covariance} − G S Gᵀ",
        ]
        names |= {"C": "C", "b_z": "b_z"}
        names |= (
            {"H_z": "H_z", "R_z": "R_z"} if structure.observations else {"H": "H_z", "R": "R_z"}
        )
        if not structure.observations:
            lines.append(f"  {state} = {state}⁻,  P = P⁻")
    else:
        lines = ["predict:", f"  {state}⁻ = {mean},  P⁻ = {covariance}"]
    if structure.observations:
        k, r = ("H", "R") if plural or not shared else ("kᵀ", "r")
        after = "Hᵀ" if k == "H" else "k"
        inverse = "S⁻¹" if k == "H" else "/ s"
        total = "S" if k == "H" else "s"
        read = f"{state}⁻ {after}" if shared else f"{k} {state}⁻"
        write = "(v − " + read + offset + ") gᵀ" if shared else f"g (v − {read}{offset})"
        lines += [
            "update, on observing v:",
            f"  {total} = {k} P⁻ {after} + {r},  g = P⁻ {after} {inverse}",
            f"  {state} = {state}⁻ + {write},  P = P⁻ − g {total} gᵀ",
        ]
        names |= {"H": "k" if k == "kᵀ" else "H", "R": r, "b": "b"}
    return lines, names


def _scalar_update(exact: ExactFilter) -> tuple[list[str], dict[str, str]]:
    structure = exact.structure
    moves = structure.transition != "identity"
    mean = "a m" if moves else "m"
    variance = "a² p" if moves else "p"
    names = {"F": "a"} if moves else {}
    if structure.shifted:
        mean += " + f"
        names["f"] = "f"
    offset = " − b" if structure.shifted else ""
    if structure.drift != "zero":
        names["Q"] = "q"
        variance += " + q"
    lines = ["for every entry:"]
    if structure.evidence:
        past = "h_z m" if structure.observations else "h m"
        z = {"H": "h", "R": "r", "C": "c", "b_z": "b"}
        if structure.observations:
            z = {"H_z": "h_z", "R_z": "r_z", "C": "c", "b_z": "b_z"}
        h, r, b = past[:-2], "r_z" if structure.observations else "r", z["b_z"]
        away = f" − {b}" if structure.shifted else ""
        after = ("m⁻", "p⁻") if structure.observations else ("m", "p")
        lines = ["for every entry, from evidence z about its change:"]
        if structure.evidence_sees_memory:
            lines += [
                f"  s = {h}² p + {r},  g = ({'a ' if moves else ''}{h} p + c) / s",
                f"  {after[0]} = {mean} + g (z − {past}{away}),  {after[1]} = {variance} − s g²",
            ]
        else:  # h = 0: evidence about the change alone
            del z["H_z" if structure.observations else "H"]
            seen = f"(z{away})" if away else "z"
            lines += [
                f"  g = c / {r}",
                f"  {after[0]} = {mean} + g {seen},  {after[1]} = {variance} − {r} g²",
            ]
        names |= z
        if not structure.observations:
            return lines, names
        lines.append("then, on observing v:")
    else:
        lines.append(f"  m⁻ = {mean},  p⁻ = {variance}")
    if structure.observations > 1:
        lines += [
            "  S = H p⁻ Hᵀ + R,  g = p⁻ Hᵀ S⁻¹",
            f"  m = m⁻ + g (v − H m⁻{offset}),  p = p⁻ − g S gᵀ",
        ]
        return lines, names | {"H": "H", "R": "R", "b": "b"}
    lines += [
        "  s = h² p⁻ + r,  g = h p⁻ / s",
        f"  m = m⁻ + g (v − h m⁻{offset}),  p = p⁻ − s g²",
    ]
    return lines, names | {"H": "h", "R": "r", "b": "b"}


def _shifts(exact: ExactFilter, steps: Step) -> dict[str, np.ndarray]:
    """Shifts (draw, ...) of the memory, in its shape, and of what is observed, flattened."""
    if not exact.structure.shifted:
        return {}
    leaves = jax.tree.leaves(exact.proof.memory)
    moved = np.asarray(jax.vmap(exact.flat)(steps.shift))
    if len(leaves) == 1:
        moved = moved.reshape(len(moved), *leaves[0].shape)
    shifts = {"f": moved}
    for letter, given, places in (
        ("b_z", steps.evidence, exact.partition.evidence),
        ("b", steps.observation, exact.partition.observed),
    ):
        if given is not None and places is not None:
            flat = np.empty((len(moved), places.size))
            flat[:, places] = np.asarray(given.shift)
            shifts[letter] = flat
    return shifts


def _by_entry(exact: ExactFilter, array: np.ndarray) -> np.ndarray:
    """Arrange scalars (draw, block, 1, 1) of a (value, key) memory as (draw, value, key)."""
    leaves = jax.tree.leaves(exact.proof.memory)
    states = exact.partition.states
    if exact.partition.width > 1 or array.shape[-2:] != (1, 1):
        return array
    if len(leaves) != 1 or leaves[0].ndim != 2:
        return array
    flat = np.empty((len(array), states.size))
    flat[:, states] = array[:, :, :, :]
    arranged = flat.reshape(len(array), *leaves[0].shape)
    return array if exact.partition.blocks == 1 else arranged


def recognise(coefficient: np.ndarray, inputs: Mapping[str, Array]) -> str:
    """Name a coefficient (draw, ...) after the inputs it comes from, or give its value."""
    if coefficient.ndim == 3 and _close(
        coefficient, np.broadcast_to(coefficient[:, :1, :1], coefficient.shape)
    ):
        coefficient = coefficient[:, :1, :1]
    for axis, where in ((1, " of the entry's column"), (2, " of the entry's row")):
        if coefficient.ndim == 3 and coefficient.shape[axis] > 1:
            first = np.take(coefficient, [0], axis=axis)
            if _close(coefficient, np.broadcast_to(first, coefficient.shape)):
                line = first.reshape(len(first), -1)
                for label, candidate in _candidates(inputs):
                    if candidate.shape == line.shape and _close(line, candidate):
                        return label + where
    reduced, suffix = _reduce(coefficient)
    if not np.any(reduced):
        return "0"
    if _close(reduced, np.broadcast_to(reduced[:1], reduced.shape)):
        return _constant(reduced[0]) + suffix
    for label, candidate in _candidates(inputs):
        if candidate.shape == reduced.shape and _close(reduced, candidate):
            compound = suffix and any(sign in label for sign in (" − ", " + "))
            return f"({label}){suffix}" if compound else label + suffix
    return f"a function of the inputs; {_constant(reduced[0])} at the first step{suffix}"


def _first_block(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A stack (draw, block, ...), and the same with every block like the first."""
    return array, np.broadcast_to(array[:, :1], array.shape)


def _reduce(coefficient: np.ndarray) -> tuple[np.ndarray, str]:
    """Strip equal blocks, and multiples of the identity and diagonals of square matrices."""
    array = coefficient
    if array.ndim > 3 and _close(*_first_block(array)):
        array = array[:, 0]
    rows, columns = array.shape[-2:]
    suffix = ""
    if rows == columns and rows > 1:
        diagonal = np.diagonal(array, axis1=-2, axis2=-1)
        if _close(array, diagonal[..., None] * np.eye(rows)):
            same = _close(diagonal, np.broadcast_to(diagonal[..., :1], diagonal.shape))
            array, suffix = (diagonal[..., 0], " · I") if same else (diagonal, " (diagonal)")
    array = array.reshape(len(array), *(n for n in array.shape[1:] if n > 1))
    return array, suffix


def _candidates(inputs: Mapping[str, Array]) -> Iterator[tuple[str, np.ndarray]]:
    arrays = {n: np.asarray(a, float) for n, a in inputs.items()}
    with np.errstate(all="ignore"):
        for name, x in arrays.items():
            yield name, x
            yield f"{name}²", x**2
            yield f"√{name}", np.sqrt(x)
            yield f"exp({name})", np.exp(x)
            yield f"exp(−{name})", np.exp(-x)
            yield f"1 − {name}", 1 - x
            yield f"1 − {name}²", 1 - x**2
            yield f"1/{name}", 1 / x
            yield f"1/(1 + exp(−{name}))", 1 / (1 + np.exp(-x))
            if x.ndim > 1:
                yield f"{name}/‖{name}‖", x / np.linalg.norm(x, axis=-1, keepdims=True)
            if x.ndim == 3:
                yield f"{name}ᵀ", x.mT
        scalars = [(name, x) for name, x in arrays.items() if x.ndim == 1]
        for i, (first, x) in enumerate(scalars):
            for second, y in scalars[i + 1 :]:
                yield f"{first}·{second}", x * y
                yield f"exp(−{first}·{second})", np.exp(-x * y)
                yield f"{first}/{second}", x / y
                yield f"{second}/{first}", y / x
                yield f"{first} + {second}", x + y


def _close(first: np.ndarray, second: np.ndarray) -> bool:
    if first.shape != second.shape or not np.all(np.isfinite(second)):
        return False
    scale = float(np.max(np.abs(first), initial=0))
    return bool(np.max(np.abs(first - second), initial=0) <= _TOLERANCE * scale)


def _constant(array: Array | np.ndarray | np.floating) -> str:
    values = np.asarray(array)
    if _same(values):
        return f"{values.ravel()[0]:.6g}"
    if values.ndim >= 2 and values.shape[-1] == values.shape[-2]:
        diagonal = np.diagonal(values, axis1=-2, axis2=-1)
        if _close(values, diagonal[..., None] * np.eye(values.shape[-1])):
            if _same(diagonal):
                return f"{diagonal.ravel()[0]:.6g} · I"
            return f"diag{_brief(diagonal)}"
    return _brief(values)


def _same(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= _TOLERANCE * np.max(np.abs(values)))


def _brief(values: np.ndarray) -> str:
    flat = values.ravel()
    shown = ", ".join(f"{value:.4g}" for value in flat[:6])
    return f"({shown}{', ...' if flat.size > 6 else ''})"
