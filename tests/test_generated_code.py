"""What may reach generated C++, and what may not: names are checked, nothing left undefined, nothing unpickled."""

from __future__ import annotations

import ast
import enum

import jinja2
import pytest
from package import python_files
from specs import BASE

from pa_compiler import PagedAttentionSpec, host
from pa_compiler.cpu import backend, target
from pa_compiler.cpu import tiles as tiling

PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg"}
CPU = target.CpuTarget('{"kind": "llvm"}', frozenset({"avx", "avx2", "fma"}))


def render(spec=BASE, more=()):
    """The host of a spec, with kernels of these names besides its own."""
    tiles = tiling.choose(spec, CPU, "fused")
    kernels = host.kernels(backend.build_kernels(spec, tiles, "fused"))
    return host.render(spec, tiles, CPU, "fused", [*kernels, *(host.Kernel(name, ()) for name in more)])


@pytest.mark.scorecard(24)
@pytest.mark.parametrize("name", ["", "a b", "1a", "a;", "a-b", "a\n", "a\nb", "é", 'a"', "a::b", "a(", "*/", "a\\"])
def test_a_name_that_is_none_in_cpp_is_refused(name, figure):
    assert "__tvm_ffi_fused_decode" in render()
    with pytest.raises(ValueError, match=r"kernels: expected names of letters, digits and _, got"):
        render(more=[name])
    figure("names refused", 1)


@pytest.mark.scorecard(24)
def test_a_template_uses_nothing_that_is_not_given():
    with pytest.raises(jinja2.UndefinedError, match="'missing' is undefined"):
        host._environment(()).from_string("{{ missing }}").render()
    with pytest.raises(jinja2.UndefinedError, match="no attribute 'missing'"):
        host._environment(()).from_string("{{ spec.missing }}").render(spec=BASE)


@pytest.mark.scorecard(24)
def test_fields_of_the_spec_are_plain_whatever_they_are_given_as():
    """The text of an enum's member is not its value's: it would be text of the C++."""

    class Heads(enum.IntEnum):
        SIX = 6

        def __str__(self):
            return "6; system()"

    class Name(str):
        def __str__(self):
            return "system()"

    given = PagedAttentionSpec(Heads.SIX, 2, 24, 5, Name("float32"), Name("float32"), Name("NHD"))
    assert given == BASE
    assert render(given) == render(BASE)


@pytest.mark.scorecard(24)
def test_nothing_is_unpickled(figure):
    files = python_files().values()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = path.parent.name == "bundles"  # what bundle() gives to its processes, in a folder that it has made
            assert ours or not {name.partition(".")[0] for name in names} & PICKLERS, path
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
                assert "allow_pickle=False" in [ast.unparse(keyword) for keyword in node.keywords], path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path
            # tvmscript.py evaluates what TVM's parser would evaluate: expressions of the package's own source
            forbidden = {"exec"} if path.match("pa_compiler/tvmscript.py") else {"eval", "exec"}
            assert not (isinstance(node, ast.Name) and node.id in forbidden), path
    figure("files without pickle", len(files))
