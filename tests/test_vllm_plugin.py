"""What vLLM is given: on which platforms and versions, in which layers, and from which libraries."""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
from importlib.metadata import entry_points

import pytest
from click.testing import CliRunner

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed: vLLM's plug-in is not run")
    vllm = pytest.importorskip("vllm", reason="vllm is not installed: its plug-in is not run")
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from pa_compiler.integrations.vllm import backend
    from pa_compiler.integrations.vllm.backend import PagedImpl

from vllm_layers import make_layer

import pa_compiler
from pa_compiler.cli.main import main
from pa_compiler.integrations import modules
from pa_compiler.integrations.vllm import BACKEND, layers, libraries, register

STOCK = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
SPEC = pa_compiler.PagedAttentionSpec(8, 2, 64, 64, "float32", kv_layout="packed")
FLOAT8 = dataclasses.replace(SPEC, kv_dtype="float8_e5m2")


@pytest.fixture
def registered():
    """registered() -> the path of the backend that vLLM would take. In the end it is vLLM's own."""
    AttentionBackendEnum.CPU_ATTN.clear_override()
    yield AttentionBackendEnum.CPU_ATTN.get_path
    AttentionBackendEnum.CPU_ATTN.clear_override()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def layer(monkeypatch):
    return make_layer(PagedImpl, monkeypatch, torch.float32)


@pytest.fixture
def said(monkeypatch):
    """What vLLM's log has been told."""
    lines = []

    def say(level, text, *values):
        lines.append(f"{level}: {text % values}")

    for level in ("info", "warning"):
        monkeypatch.setattr(layers.logger, level, functools.partial(say, level))
    return lines


def test_vllm_finds_it():
    (found,) = entry_points(group="vllm.general_plugins", name="pa_compiler")
    assert found.load() is register


def test_it_takes_the_place_of_the_backend_for_cpus(registered):
    assert registered() == STOCK
    register()
    assert registered() == BACKEND
    register()  # as vLLM may call it again
    backend = AttentionBackendEnum.CPU_ATTN.get_class()
    assert backend.get_impl_cls() is PagedImpl
    assert backend.get_name() == "CPU_ATTN"


@pytest.mark.parametrize("version", ["0.28.1", "0.33.0", "1.32.0+cpu"])
def test_a_version_that_is_not_known_is_refused(registered, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError) as caught:
        register()
    expected = f"vllm: expected version 0.32, of which the attention backend for CPUs is known, got {version}"
    assert str(caught.value) == f'{expected}; VLLM_PLUGINS="" leaves pa_compiler out'
    assert registered() == STOCK


def test_vllm_does_not_start_with_a_version_that_is_not_known(registered, monkeypatch):
    """Its own loader of plug-ins lets the refusal through."""
    from vllm import plugins

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    monkeypatch.setenv("VLLM_PLUGINS", "pa_compiler")
    with pytest.raises(RuntimeError, match=r"^vllm: expected version 0\.32, .*, got 0\.33\.0; VLLM_PLUGINS"):
        plugins.load_general_plugins()
    assert registered() == STOCK


def test_on_other_platforms_nothing_is_done(registered, monkeypatch):
    monkeypatch.setattr(type(current_platform), "device_type", "xpu")
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    register()
    assert registered() == STOCK


@pytest.mark.parametrize(
    ("of", "name", "value", "reason"),
    [
        ("impl", "attn_type", "encoder_only", "attn_type 'encoder_only', where expected is 'decoder'"),
        ("impl", "attn_type", "encoder_decoder", "attn_type 'encoder_decoder', where expected is 'decoder'"),
        ("layer", "head_size_v", 32, "head_size_v 32, where expected is head_size, 64"),
        ("layer", "use_mm_prefix", True, "use_mm_prefix, images whose tokens see each other"),
        ("impl", "sliding_window", 2**31, "window: expected 1 to 1073741824, got 2147483648"),
    ],
    ids=lambda value: str(value).partition(",")[0],
)
def test_what_the_kernels_have_not_is_left_to_vllm_and_said(layer, said, of, name, value, reason):
    setattr(layer.impl if of == "impl" else layer, name, value)
    assert layers.choose_kernels({"model.layers.0.attn": layer}, 64, torch.float32) == {"model.layers.0.attn": None}
    (line,) = said
    assert line.startswith(f"warning: pa_compiler leaves 1 layers to vLLM's kernel: model.layers.0.attn: {reason}")


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "int8_per_token_head", "fp8_inc", "nvfp4"])
def test_pages_that_vllm_has_not_on_cpus_are_refused(monkeypatch, kv_cache_dtype):
    """vLLM does not ask its kernel, which takes them for pages of the model's type and writes beyond them."""
    layer = make_layer(PagedImpl, monkeypatch, torch.float32, kv_cache_dtype=kv_cache_dtype)
    with pytest.raises(NotImplementedError) as caught:
        layers.choose_kernels({"attn": layer}, 64, torch.float32)
    expected = "auto, for the model's torch.float32, or one of fp8, fp8_e4m3, fp8_e5m2"
    assert str(caught.value) == f"kv_cache_dtype: expected {expected}, on a CPU, got {kv_cache_dtype!r}"


def test_what_vllms_own_kernel_has_not_is_an_error_only_where_a_layer_needs_it(layer, monkeypatch):
    """As float8 on CPUs without AVX-512, or with heads of 80 elements."""

    def refuse(*_):
        raise NotImplementedError("FP8 KV cache")

    monkeypatch.setattr(backend.CPUAttentionMetadataBuilder, "__init__", refuse)
    monkeypatch.setattr(backend, "get_layers_from_vllm_config", lambda *_: {"attn": layer})
    model = types.SimpleNamespace(dtype=torch.float32)
    config = types.SimpleNamespace(diffusion_config=None, model_config=model)
    of = (types.SimpleNamespace(block_size=64), ["attn"], config, torch.device("cpu"))
    builder = backend.PagedBuilder(*of)
    assert layer.impl.kernels.module.spec == SPEC
    fields = ("num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len", "seq_lens", "block_table_tensor")
    step = types.SimpleNamespace(**dict.fromkeys((*fields, "slot_mapping", "causal"), 1))
    assert builder.build(0, step).scheduler_metadata is None
    layer.use_mm_prefix = True
    with pytest.raises(NotImplementedError, match=r"^FP8 KV cache$"):
        backend.PagedBuilder(*of)


def test_models_of_diffusion_are_left_to_vllm(layer, said):
    assert layers.choose_kernels({"attn": layer}, 64, torch.float32, diffusion=True) == {"attn": None}
    assert said[0].startswith("warning: pa_compiler leaves 1 layers to vLLM's kernel: attn: diffusion_config")


def test_layers_that_share_pages_go_together(monkeypatch, said):
    made = {f"layers.{i}.attn": make_layer(PagedImpl, monkeypatch, torch.float32) for i in range(4)}
    for i in (1, 3):
        made[f"layers.{i}.attn"].kv_sharing_target_layer_name = "layers.0.attn"
    made["layers.3.attn"].use_mm_prefix = True
    found = layers.choose_kernels(made, 64, torch.float32)
    assert [name for name, each in found.items() if each is not None] == ["layers.2.attn"]
    assert [line.split(": ")[:3] for line in said] == [
        ["warning", "pa_compiler leaves 3 layers to vLLM's kernel", "layers.0-1,3.attn"],
        ["info", "pa_compiler attends in 1 layers on 1 threads", "layers.2.attn"],
    ]


def test_names_of_layers():
    names = [f"model.layers.{i}.attn" for i in (0, 1, 2, 4, 10, 9)]
    assert layers.listed([*names, "draft.0.attn", "encoder"]) == "model.layers.0-2,4,9-10.attn, draft.0.attn, encoder"


SPECS = [
    SPEC,
    pa_compiler.PagedAttentionSpec(9, 3, 64, 128, "bfloat16", kv_layout="packed", window=512, softcap=30.5),
    pa_compiler.PagedAttentionSpec(4, 1, 33, 32, "float16", kv_layout="HND", alibi=True, sinks=True),
    pa_compiler.PagedAttentionSpec(8, 2, 64, 64, "bfloat16", kv_dtype="float8_e4m3fn", kv_scale="head"),
]


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "window and cap", "of heads", "float8"])
def test_the_command_that_builds_a_library(spec, tmp_path):
    program, *arguments = libraries.build_command(spec).split()
    assert program == "pa-compiler"
    assert arguments[-2:] == ["-o", "NAME.so"]
    done = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path / "a.so")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert pa_compiler.load(tmp_path / "a.so").spec == spec


@pytest.fixture
def folder(tmp_path, monkeypatch, compiled):
    """The folder that PA_MODULES names, with the libraries of SPEC and FLOAT8. Nothing can be compiled."""
    compiled(SPEC, attend=True).save(tmp_path / "a.so")
    compiled(FLOAT8, attend=True).save(tmp_path / "float8.so")
    monkeypatch.setenv("PA_MODULES", str(tmp_path))
    monkeypatch.setattr(modules, "_MODULES", {})

    def fail(spec):
        raise ImportError("there is no TVM")

    monkeypatch.setattr(pa_compiler, "compile", fail)
    yield tmp_path
    libraries.load_folder.cache_clear()


def test_libraries_of_a_folder(folder, layer, said):
    """They are taken for their specs; without one the layer stays with vLLM, and the log says how to build it."""
    found = layers.choose_kernels({"attn": layer}, 64, torch.float32)["attn"]
    assert found.module.checksum == pa_compiler.load(folder / "a.so").checksum
    assert found.module.num_threads <= torch.get_num_threads()
    assert layers.choose_kernels({"attn": layer}, 32, torch.float32) == {"attn": None}
    command = "pa-compiler build --num-heads 8 --num-kv-heads 2 --head-dim 64 --block-size 32 --dtype float32"
    command += " --out-dtype float32 --kv-layout packed -o NAME.so"
    assert said[1].endswith(f"there is no TVM; to build it for PA_MODULES: {command}")


def test_a_library_of_float8_in_a_folder(folder, monkeypatch):
    layer = make_layer(PagedImpl, monkeypatch, torch.float32, kv_cache_dtype="fp8_e5m2")
    found = layers.choose_kernels({"attn": layer}, 64, torch.float32)["attn"]
    assert found.module.checksum == pa_compiler.load(folder / "float8.so").checksum


def test_a_folder_that_is_wrong(folder, layer, monkeypatch):
    (folder / "b.so").write_bytes(b"no library")
    with pytest.raises(RuntimeError, match=r"b\.so"):
        layers.choose_kernels({"attn": layer}, 64, torch.float32)
    monkeypatch.setenv("PA_MODULES", str(folder / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"^PA_MODULES: expected a folder of libraries, got .*nowhere'$"):
        layers.choose_kernels({"attn": layer}, 64, torch.float32)
