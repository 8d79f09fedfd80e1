"""Public names of `cove`, and the page that documents them."""

import re

import pytest
import torch

import cove
from cove.encode import write_frames
from tests.clip_files import quarters
from tests.method_helpers import ROOT, fresh


def test_cove_public_names_exist():
    for name in cove.__all__:
        assert callable(getattr(cove, name)), name
        assert name in dir(cove)
    with pytest.raises(AttributeError, match="no attribute 'refined'"):
        cove.refined  # noqa: B018


def test_cove_public_names_are_in_the_docs():
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    table = page[page.index("| name |") :]
    assert set(re.findall(r"`(\w+)`", table)) == set(cove.__all__) - {"Audio", "Frames"}


def test_cove_import_loads_no_submodule():
    assert fresh("import json, sys, cove; print(json.dumps([n for n in sys.modules if n.startswith('cove.')]))") == []


def test_cove_example_in_the_docs_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    write_frames("clip.mp4", quarters(5), 12)
    names = {}
    exec(code, names)
    latents, edit = names["latents"], names["edit"]
    assert edit.shape == latents.shape == (5, 3, 5, 8) and edit.isfinite().all()
    back = cove.sample(names["denoise"], names["noise"], names["sigmas"].flip(0), extra_args={"prompt": 0.0})
    lost, changed = (back - latents).norm() / latents.norm(), (edit - latents).norm() / latents.norm()
    assert lost < 1e-3 and changed > 0.1
    assert torch.isfinite(names["noise"]).all() and names["noise"].std() > 5
