"""File names through the server's API: nothing outside ComfyUI's folders is read or written."""

import shutil
from types import SimpleNamespace

import pytest

from scripts.host import PromptFailed
from tests.file_helpers import (
    CORRESPONDENCE,
    LOADERS,
    MISSING,
    NAMES,
    NO_NAMES,
    PREFIXES,
    fill,
    link_out,
    matches,
    opened,
    spelled,
)


@pytest.fixture
def wires():
    """Loader, file name -> a prompt."""

    def made(node, name):
        takers = {
            "LoadFrames": ("PreviewImage", {"images": ["1", 0]}),
            "LoadCorrespondence": ("CoveSaveCorrespondence", {"correspondence": ["1", 0], "filename_prefix": "api/a"}),
            "LoadInversion": ("CoveSaveInversion", {"inversion": ["1", 1], "filename_prefix": "api/a"}),
        }
        settings = {"start": 0, "count": 0, "stride": 1, "width": 0, "height": 0, "fit": "crop"}
        settings = {"LoadFrames": settings, "LoadInversion": {"model": ["3", 0]}}.get(node, {})
        prompt = {"1": (f"Cove{node}", {"file": name} | settings), "2": takers[node]}
        if node == "LoadInversion":
            prompt["3"] = ("CheckpointLoaderSimple", {"ckpt_name": "sd15.ckpt"})
        return {place: {"class_type": kind, "inputs": inputs} for place, (kind, inputs) in prompt.items()}

    return made


@pytest.fixture
def served(base, tmp_path):
    """The server's folders, and one outside of them."""
    own = SimpleNamespace(**{kind: base / kind for kind in ("input", "output", "temp")}, outside=tmp_path / "outside")
    own.outside.mkdir()
    names = [own.input / name for name in ("link", "sub", "link_file", "gone")]
    link_out(own.input, own.outside)
    yield own
    for path in names:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(own.output / "api", ignore_errors=True)


@pytest.mark.parametrize("node", LOADERS)
def test_load_nodes_read_nothing_outside_through_the_api(server, served, wires, record, node):
    file = LOADERS[node]
    fill(served.outside, record)
    with opened(served.outside, served.outside / "sub", served.outside / "images") as seen:
        for name in [spelled(name, served, file) for name in NAMES]:
            with pytest.raises(PromptFailed) as caught:
                server.queue(wires(node, name), 60)
            assert caught.value.node_type == f"Cove{node}" and "inside ComfyUI's" in caught.value.reason, name
        for name in [None, *NO_NAMES, *(spelled(name, served, file) for name in MISSING)]:
            with pytest.raises(PromptFailed) as caught:
                server.queue(wires(node, {"__value__": name}), 60)
            assert caught.value.node_type == f"Cove{node}", name
        assert not seen()


def test_save_correspondence_writes_nothing_outside_through_the_api(server, served, wires):
    matches().save(served.input / CORRESPONDENCE)
    prompt = wires("LoadCorrespondence", CORRESPONDENCE)
    (served.output / "api").symlink_to(served.outside, target_is_directory=True)
    try:
        with pytest.raises(PromptFailed, match="inside ComfyUI's output folder"):
            server.queue(prompt, 60)
        for prefix in [spelled(prefix, served) for prefix in PREFIXES if "link" not in prefix and "year" not in prefix]:
            prompt["2"]["inputs"]["filename_prefix"] = prefix
            with pytest.raises(PromptFailed) as caught:
                server.queue(prompt, 60)
            assert caught.value.node_type == "CoveSaveCorrespondence", prefix
            assert "inside ComfyUI's output folder" in caught.value.reason
        assert not list(served.outside.iterdir())
    finally:
        (served.output / "api").unlink()
        (served.input / CORRESPONDENCE).unlink()
