"""What types of caches cost: measure() beside arithmetic that shares nothing with it, and the command."""

from __future__ import annotations

import dataclasses
import sys
import types

import numpy as np
import pytest
from click.testing import CliRunner

from pa_compiler import PagedAttentionSpec
from pa_compiler.cli.main import main
from pa_compiler.verification import accuracy
from pa_compiler.verification.accuracy import Data, drawn, measure

SPEC = PagedAttentionSpec(4, 2, 32, 16, "float32", kv_dtype="int8")


def attention(query, keys, values):
    """(out, lse) of one head, in float64."""
    scores = keys.astype(np.float64) @ query.astype(np.float64) / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ values.astype(np.float64) / weights.sum(), scores.max() + np.log(weights.sum())


def rounded(rows):
    """What int8 makes of rows, with a scale for each."""
    scale = np.abs(rows).max(axis=-1, keepdims=True) / 127
    return np.rint(rows / scale) * scale


def test_errors_are_those_of_rounded_keys_and_values(compiled):
    data = drawn(SPEC, 100, 3, seed=1)
    found = measure(compiled(SPEC), data)
    wrong, size, of_lse = np.zeros(4), np.zeros(4), np.zeros(4)
    for query in data.query:
        for head in range(4):
            keys, values = data.keys[:, head // 2], data.values[:, head // 2]
            exact, exact_lse = attention(query[head], keys, values)
            out, lse = attention(query[head], rounded(keys), rounded(values))
            wrong[head] += ((out - exact) ** 2).sum()
            size[head] += (exact**2).sum()
            of_lse[head] += (lse - exact_lse) ** 2
    np.testing.assert_allclose(found.out, np.sqrt(wrong / size), rtol=1e-3)
    np.testing.assert_allclose(found.out_of_all, np.sqrt(wrong.sum() / size.sum()), rtol=1e-3)
    np.testing.assert_allclose(found.lse, np.sqrt(of_lse / 3), rtol=1e-2)
    error = np.linalg.norm(rounded(data.keys) - data.keys, axis=-1) / np.linalg.norm(data.keys, axis=-1)
    np.testing.assert_allclose(found.keys, np.sqrt((error**2).mean(axis=0)), rtol=1e-3)


def test_the_worst_token_is_the_one_that_int8_has_not_exactly(compiled):
    """All others have 1 and -1 alone."""
    data = drawn(SPEC, 200, 4, seed=2)
    exact = Data(data.query, np.sign(data.keys), np.sign(data.values))
    exact.values[77, 1] = data.values[77, 1]
    found = measure(compiled(SPEC), exact, num_worst=2)
    assert (found.worst[0].token, found.worst[0].kv_head) == (77, 1)
    assert found.worst[0].share > 1000 * found.worst[1].share
    assert found.worst[0].value > 1e-3 > found.worst[0].key
    assert found.out[:2].max() < 1e-6 < found.out[2:].min()


def test_a_cache_of_the_type_itself_costs_nothing_but_arithmetic(compiled):
    plain = dataclasses.replace(SPEC, kv_dtype=None)
    assert measure(compiled(plain), drawn(plain, 100, 2)).out_of_all < 1e-6


def test_types_in_the_order_of_what_they_keep(compiled):
    """int4 is rotated: with outliers it is less wrong than without."""
    plain, turned = (dataclasses.replace(SPEC, kv_dtype="int4", kv_rotation=each) for each in ("none", "hadamard"))
    data = drawn(SPEC, 300, 2, outliers=True, seed=3)
    errors = [measure(compiled(spec), data).out_of_all for spec in (SPEC, turned, plain)]
    assert errors[0] < errors[1] / 2 < errors[2] / 2


def test_every_type_that_a_spec_may_have():
    names = [accuracy.name_of(spec) for spec in accuracy.variants(SPEC)]
    assert names[0] == "float32"
    assert names[-4:-2] == ["int8, token_head, rotated", "int4, token_head, not rotated"]
    assert names[-2:] == [f"int4, token_head, {rotated}, dots of int8" for rotated in ("rotated", "not rotated")]
    assert len(names) == len(set(names)) == 11
    odd = dataclasses.replace(SPEC, head_dim=24)
    assert not any(spec.rotates for spec in accuracy.variants(odd))


def test_data_is_refused_by_name(compiled):
    module, data = compiled(SPEC), drawn(SPEC, 20, 2)
    with pytest.raises(ValueError, match=r"keys: expected shape \[tokens, 2, 32\], got \[20, 64\]"):
        measure(module, data._replace(keys=data.keys.reshape(20, 64)))
    with pytest.raises(ValueError, match=r"values: expected shape \[20, 2, 32\], got \[19, 2, 32\]"):
        measure(module, data._replace(values=data.values[:19]))
    spoiled = Data(np.full_like(data.query, np.nan), data.keys, data.values)
    with pytest.raises(ValueError, match="query: expected finite numbers, got some that are not"):
        measure(module, spoiled)


OPTIONS = "--num-heads 4 --num-kv-heads 2 --head-dim 32 --block-size 16 --dtype float32 --kv-dtype int8".split()


def test_the_command_takes_files(tmp_path):
    data = drawn(SPEC, 50, 1, seed=4)
    for name in ("keys", "values"):
        np.save(tmp_path / f"{name}.npy", getattr(data, name))
    files = ["--keys", str(tmp_path / "keys.npy"), "--values", str(tmp_path / "values.npy")]
    result = CliRunner().invoke(main, ["accuracy", *OPTIONS, *files, "--worst", "3"])
    assert result.exit_code == 0, result.output
    assert "50 tokens" in result.output
    for given, says in (
        (files[:2], "expected together with values"),
        (["--keys", "none.npy", "--values", "none.npy"], "expected an array in none.npy"),
    ):
        result = CliRunner().invoke(main, ["accuracy", *OPTIONS, *given])
        assert result.exit_code == 2
        assert says in result.output


def test_the_command_draws_slopes_and_sinks():
    words = ["accuracy", *OPTIONS, "--tokens", "64", "--alibi", "--sinks", "--worst", "0"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "ALiBi, a slope for each head; a sink for each head" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mask-mod", "test_accuracy:mask"], "'--mask-mod': expected None for a comparison of caches, got"),
        (["--score-mod", "test_accuracy:score"], "'--score-mod': expected None for a comparison of caches, got"),
        (["--tokens", "99999999999"], "GB are needed and this machine has"),
        (["--queries", "99999999999"], "GB are needed and this machine has"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_refuses_what_it_cannot_measure(words, says):
    result = CliRunner().invoke(main, ["accuracy", *OPTIONS, *words], catch_exceptions=False)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Compiling" not in result.stderr


def score(score, batch, head, query_pos, key_pos):
    return score * 2


def mask(batch, head, query_pos, key_pos):
    return key_pos <= query_pos


def damaged(path):
    """What safetensors.numpy.load_file raises of a file that is none of its own: no subclass of what NumPy raises."""
    raise SafetensorError(f"header too large: {path}")


class SafetensorError(Exception):
    """As safetensors has it."""


FILES = {
    "empty.npy": (lambda path: path.touch(), "expected an array in empty.npy: No data left in file"),
    "k.npz": (lambda path: np.savez(path, np.ones(3)), "expected a .npy, which is one array, got a .npz: k.npz"),
    "bad.npz": (lambda path: path.write_bytes(b"PK\3\4nothing"), "expected an array in bad.npz: "),
    "complex.npy": (lambda path: np.save(path, np.ones((5, 2, 32), complex)), "expected real numbers, got complex128"),
    "words.npy": (lambda path: np.save(path, np.full((5, 2, 32), "no")), "expected real numbers, got <U2"),
    "bad.safetensors:k": (lambda path: None, "expected an array in bad.safetensors:k: header too large"),
}


@pytest.mark.parametrize(("name", "made", "says"), [(name, *each) for name, each in FILES.items()], ids=FILES)
def test_the_command_refuses_files_by_name(tmp_path, monkeypatch, name, made, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", types.SimpleNamespace(load_file=damaged))
    made(tmp_path / name)
    np.save("values.npy", np.ones((5, 2, 32), np.float32))
    words = ["accuracy", *OPTIONS, "--keys", name, "--values", "values.npy"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 2
    assert f"'--keys': {says}" in result.stderr


def test_the_command_says_that_safetensors_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    words = ["accuracy", *OPTIONS, "--keys", "a.safetensors:k", "--values", "a.safetensors:v"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "'--keys': expected safetensors to be installed for a.safetensors:k\n" in result.stderr
