"""The Python blocks of docs/engines.md, for each library that is installed."""

from __future__ import annotations

import pytest
from test_readme import ROOT, blocks, section

PAGE = (ROOT / "docs" / "engines.md").read_text()


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_blocks_run(library, build_cache):
    pytest.importorskip("torch", reason="torch is not installed: its blocks are not run")
    pytest.importorskip(library, reason=f"{library} is not installed: its blocks are not run")
    code = "\n".join(blocks(section(PAGE, f"## {library}"), "python"))
    assert code
    exec(compile(f"import torch\n{code}", "engines.md", "exec"), {})
