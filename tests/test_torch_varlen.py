"""torch.nn.attention.varlen on CPUs, against the float64 reference; what it refuses; and torch as it was."""

from __future__ import annotations

import numpy as np
import pytest
from ragged_inputs import assert_near_float64, make_ragged
from test_arrays import as_numpy, as_torch

from pa_compiler import PagedAttentionSpec

torch = pytest.importorskip("torch", reason="torch is not installed: its operators are not tested")

from torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out  # noqa: E402  (need torch)

from pa_compiler.integrations.torch import disable_varlen_attention, enable_varlen_attention  # noqa: E402
from pa_compiler.integrations.torch import varlen as implementation  # noqa: E402

SEQUENCES = [(5, 20), (1, 70), (0, 9), (17, 17), (33, 300), (1, 1)]
"""(query tokens, context): a prompt, chunks, single tokens, and none."""

WINDOWS = {(-1, -1): (None, False), (-1, 0): (None, True), (11, 0): (12, True), (11, -1): (12, False)}
"""window_size as torch has it: the window of a spec, and whether attention is causal."""

DTYPES = {"float32": (6, 2, 32), "bfloat16": (4, 4, 32)}
"""With heads, kv heads and head_dim."""

every_window = pytest.mark.parametrize("window_size", WINDOWS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def enabled():
    enable_varlen_attention()
    yield
    disable_varlen_attention()


def call(dtype, window_size, block_size):
    """(spec, Ragged, positional arguments, keywords) of a paged call, or of a plain one where block_size is 1."""
    window, causal = WINDOWS[window_size]
    spec = PagedAttentionSpec(*DTYPES[dtype], block_size, dtype, window=window)
    ragged = make_ragged(spec, SEQUENCES, causal=causal)
    query, key, value, table, lens, starts = map(as_torch, ragged.arguments)
    given = {"window_size": window_size, "enable_gqa": spec.group > 1, "return_aux": AuxRequest(lse=True)}
    cu_seq_k = None
    if block_size == 1:
        ids = torch.cat([table[seq, :length].long() for seq, length in enumerate(lens)])
        key, value, cu_seq_k = key[ids, 0], value[ids, 0], torch.from_numpy(np.cumsum([0, *lens], dtype=np.int32))
    else:
        given |= {"block_table": table, "seqused_k": lens}
    return spec, ragged, [query, key, value, starts, cu_seq_k, 33, 300], given


@every_dtype
@every_window
@pytest.mark.parametrize("block_size", [16, 1], ids=["paged", "plain"])
def test_near_float64(dtype, window_size, block_size):
    spec, ragged, arguments, given = call(dtype, window_size, block_size)
    out, lse = varlen_attn(*arguments, **given)
    assert out.dtype == arguments[0].dtype
    assert lse.dtype == torch.float32
    assert_near_float64(spec, ragged, as_numpy(out), lse.T.numpy())
    written = torch.empty_like(out)
    assert varlen_attn_out(written, *arguments, **given)[0] is written
    assert torch.equal(written, out)


def test_fewer_keys_than_there_is_room_for():
    """seqused_k beside cu_seq_k: what is behind the first tokens of a sequence is not looked at."""
    spec, ragged, (query, key, value, starts, cu_seq_k, *most), given = call("float32", (-1, 0), 1)
    room = [length + 3 for _, length in SEQUENCES]
    wide = [torch.full((sum(room), *each.shape[1:]), torch.nan) for each in (key, value)]
    for begin, (_, length), (first, _) in zip(
        np.cumsum([0, *room]), SEQUENCES, np.c_[cu_seq_k[:-1], room], strict=False
    ):
        for to, of in zip(wide, (key, value), strict=True):
            to[begin : begin + length] = of[first : first + length]
    begins = torch.from_numpy(np.cumsum([0, *room]))
    lens = torch.tensor([length for _, length in SEQUENCES])
    out, lse = varlen_attn(query, *wide, starts, begins, *most, seqused_k=lens, **given)
    assert_near_float64(spec, ragged, out.numpy(), lse.T.numpy())


def test_the_scale_and_views():
    _, _, arguments, given = call("float32", (-1, 0), 16)
    expected, _ = varlen_attn(arguments[0] * 0.5, *arguments[1:], scale=0.25, **given)
    head_first = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)
    out, _ = varlen_attn(head_first, *arguments[1:], scale=0.125, **given)
    assert torch.equal(out, expected)
    assert out.stride() == head_first.stride()


@pytest.mark.parametrize("block_size", [16, 1], ids=["paged", "plain"])
def test_in_a_whole_graph(block_size):
    _, _, arguments, given = call("float32", (-1, 0), block_size)
    del given["return_aux"]

    def model(query, *others):
        out = varlen_attn(query * 2, *others, **given)
        written = torch.empty_like(out)
        varlen_attn_out(written, query, *others, **given)
        return out * 2, written * 2

    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, model(*arguments), strict=True))


def test_no_gradient():
    _, _, arguments, given = call("float32", (-1, 0), 1)
    arguments[0].requires_grad_()
    out, _ = varlen_attn(*arguments, **given)
    with pytest.raises(NotImplementedError):
        out.sum().backward()


BAD = [  # id, block size, error, what its message begins with, changes of arguments by number and of keywords
    ("window_right", 16, ValueError, "window_size: expected .*, got \\(3, 2\\)", {}, {"window_size": (3, 2)}),
    ("window_left", 16, ValueError, "window_size: expected .*, got \\(-2, 0\\)", {}, {"window_size": (-2, 0)}),
    ("float64", 16, ValueError, "query: expected dtype one of", {0: lambda x: x.double()}, {}),
    ("key_dtype", 16, TypeError, "key: expected dtype float32", {1: lambda x: x.bfloat16()}, {}),
    ("value_dim", 16, ValueError, "value: expected 32 elements", {2: lambda x: x[..., :16]}, {}),
    ("query_axes", 16, ValueError, "query: expected 3 axes", {0: lambda x: x[..., None]}, {}),
    ("no_lengths", 16, ValueError, "seqused_k: expected the lengths", {}, {"seqused_k": None}),
    ("id_over", 16, IndexError, "block_table: expected a block id", {}, {"block_table": torch.full((6, 30), 9999)}),
    ("too_long", 16, ValueError, "seqused_k: expected ", {}, {"seqused_k": torch.full((6,), 9999)}),
    ("few_keys", 16, ValueError, "cu_seq_q: expected up to .* seqused_k", {}, {"seqused_k": torch.ones(6).int()}),
    ("no_begins", 1, ValueError, "cu_seq_k: expected where", {4: lambda x: None}, {}),
    ("begins_over", 1, ValueError, "cu_seq_k: expected .* rising", {4: lambda x: x * 2}, {}),
    ("begins_fall", 1, ValueError, "cu_seq_k: expected .* rising", {4: lambda x: x.flip(0)}, {}),
    ("no_room", 1, ValueError, "seqused_k: expected at most", {}, {"seqused_k": torch.full((6,), 9999)}),
]


@pytest.mark.parametrize(
    ("block_size", "error", "begins", "changes", "others"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_refused(block_size, error, begins, changes, others):
    _, _, arguments, given = call("float32", (-1, 0), block_size)
    for number, change in changes.items():
        arguments[number] = change(arguments[number])
    out = torch.full((sum(count for count, _ in SEQUENCES), 6, 32), torch.nan)
    with pytest.raises(error, match=rf"^{begins}"):
        varlen_attn_out(out, *arguments, **given | others)
    assert out.isnan().all()


def test_specs_are_compiled_once(capfd):
    _, _, arguments, given = call("float32", (-1, 0), 16)
    implementation.modules._MODULES.clear()
    implementation.modules.keep()  # what was found before is forgotten
    for _ in range(2):
        varlen_attn(*arguments, **given)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("pa_compiler: compiling PagedAttentionSpec(num_heads=6, ")


def test_modules_that_are_given(compiled, capfd):
    spec, _, arguments, given = call("float32", (-1, 0), 16)
    implementation.modules._MODULES.clear()
    enable_varlen_attention(compiled(spec, attend=True))
    varlen_attn(*arguments, **given)
    assert capfd.readouterr().err == ""
    with pytest.raises(TypeError, match=r"^modules_to_use: expected Modules, got int"):
        enable_varlen_attention(3)
    with pytest.raises(ValueError, match=r"^modules_to_use: expected modules with attend, got Module"):
        enable_varlen_attention(compiled(spec))


def test_disabled():
    _, _, arguments, given = call("float32", (-1, 0), 16)
    enable_varlen_attention()
    disable_varlen_attention()
    for function in (varlen_attn, lambda *each, **more: varlen_attn_out(each[0].clone(), *each, **more)):
        with pytest.raises(NotImplementedError):
            function(*arguments, **given)
    disable_varlen_attention()


def test_an_unknown_version_is_refused(monkeypatch):
    disable_varlen_attention()
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    with pytest.raises(RuntimeError, match=r"^torch: expected version 2\.13, of which .* is known, got 2\.99\.0\+cpu"):
        enable_varlen_attention()
    monkeypatch.undo()
    _, _, arguments, given = call("float32", (-1, 0), 16)
    with pytest.raises(NotImplementedError):
        varlen_attn(*arguments, **given)
