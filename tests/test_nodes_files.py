"""File names in the nodes: nothing outside ComfyUI's folders is read or written, and listing files is cheap."""

import os
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from cove.files import atomic_write
from tests.file_helpers import (
    CORRESPONDENCE,
    FRAMES,
    HEIGHT,
    INVERSION,
    LOADERS,
    MISSING,
    NAMES,
    NO_NAMES,
    PREFIXES,
    WIDTH,
    fill,
    link_out,
    matches,
    opened,
    spelled,
    write_images,
)
from tests.helpers import call, refused
from tests.inversion_helpers import same

SETTINGS = {"LoadFrames": {"count": 0, "fit": "crop"}, "LoadInversion": {"model": None}, "LoadCorrespondence": {}}


def tree(folder):
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture
def folders(comfy, tmp_path):
    """Empty ComfyUI folders for this test, and one outside of them."""
    import folder_paths

    kinds = ("input", "output", "temp")
    before = {kind: folder_paths.get_directory_by_type(kind) for kind in kinds}
    own = SimpleNamespace(**{kind: tmp_path / "comfy" / kind for kind in kinds}, outside=tmp_path / "outside")
    own.outside.mkdir()
    for kind in kinds:
        getattr(own, kind).mkdir(parents=True)
        getattr(folder_paths, f"set_{kind}_directory")(str(getattr(own, kind)))
    yield own
    for kind in kinds:
        getattr(folder_paths, f"set_{kind}_directory")(before[kind])


# --- reading ---


@pytest.mark.parametrize("node", LOADERS)
def test_load_nodes_refuse_names_that_lead_out_without_opening_them(nodes, folders, record, node):
    file, node, settings = LOADERS[node], nodes[node], SETTINGS[node]
    name = node.define_schema().display_name.removeprefix("COVE ")
    fill(folders.outside, record)
    link_out(folders.input, folders.outside)
    with opened(folders.outside, folders.outside / "sub", folders.outside / "images") as seen:
        os.listdir(folders.outside)
        assert seen() or sys.platform != "linux"
        for bad in [spelled(name, folders, file) for name in NAMES]:
            stated = node.validate_inputs(file=bad)
            assert isinstance(stated, str) and stated.startswith(f"{name}: "), bad
            assert "inside ComfyUI's " in stated and "folder. Absolute paths, drive letters" in stated, stated
            assert node.fingerprint_inputs(file=bad) == "", bad
            with pytest.raises(ValueError) as caught:
                call(node, file=bad, **settings)
            assert str(caught.value) == stated
        assert not seen()


@pytest.mark.parametrize("node", LOADERS)
def test_load_nodes_refuse_missing_and_existing_files_outside_alike(nodes, folders, record, node):
    file, node = LOADERS[node], nodes[node]
    link_out(folders.input, folders.outside)
    (folders.input / "clips").mkdir()
    write_images(folders.input / "clips")
    (folders.input / "clips" / "7.png").symlink_to(folders.outside / "images" / "0.png")
    names = [spelled(name, folders, file) for name in NAMES] + ["clips"]
    missing = [node.validate_inputs(file=name) for name in names]
    fill(folders.outside, record)
    assert [node.validate_inputs(file=name) for name in names] == missing


@pytest.mark.parametrize("node", LOADERS)
def test_load_nodes_refuse_names_of_files_that_cannot_be_loaded(nodes, folders, node):
    file, node, settings = LOADERS[node], nodes[node], SETTINGS[node]
    name = node.define_schema().display_name.removeprefix("COVE ")
    fill(folders.input)
    (folders.input / "loop").symlink_to("loop")
    os.mkfifo(folders.input / "pipe")  # reading would wait forever
    for bad in [spelled(name, folders, file) for name in MISSING] + ["sub"] * (node is not nodes["LoadFrames"]):
        stated = node.validate_inputs(file=bad)
        assert isinstance(stated, str) and stated.startswith(f"{name}: there is no file"), bad
        assert "Press R to refresh the list" in stated and len(stated) < 500 and "\n" not in stated
        assert node.fingerprint_inputs(file=bad) == ""
        with refused(name, "there is no file"):
            call(node, file=bad, **settings)
    for bad in NO_NAMES:
        assert f"{name}: expected the name of a file" in node.validate_inputs(file=bad)
        with refused(name, "expected the name of a file", repr(bad)):
            call(node, file=bad, **settings)
    # A name from a wire is unknown when the prompt is validated.
    assert node.validate_inputs() is True and node.fingerprint_inputs() == ""
    with refused(name, "expected the name of a file"):
        call(node, file=None, **settings)


def test_load_nodes_accept_every_form_of_the_hosts_file_names(nodes, folders, small, record):
    for kind in ("input", "output", "temp"):
        fill(getattr(folders, kind), record)
    deep = folders.output / "a" / "b" / "c"
    deep.mkdir(parents=True)
    for file in (INVERSION, CORRESPONDENCE):
        shutil.copyfile(folders.output / file, deep / file)
    names = ["{}", "{} [input]", "{} [output]", "{} [temp]", "./{}", "a/b/c/{} [output]", "a//b/./c/{} [output]"]
    for name in names:
        for node in ("LoadInversion", "LoadCorrespondence"):
            file = name.format(LOADERS[node])
            assert nodes[node].validate_inputs(file=file) is True
            assert nodes[node].fingerprint_inputs(file=file) not in ("", nodes[node].fingerprint_inputs(file="x"))
        assert same(call(nodes["LoadInversion"], file=name.format(INVERSION), model=small)[1], record)
        (found,) = call(nodes["LoadCorrespondence"], file=name.format(CORRESPONDENCE))
        assert torch.equal(found.forward, matches().forward)
    for name in ("clip.mp4", "sub/clip.mp4", "images", "images/", "clip.mp4 [output]", "images [temp]"):
        assert nodes["LoadFrames"].validate_inputs(file=name) is True
        images, _, count, *_ = call(nodes["LoadFrames"], file=name, count=0, width=0, fit="crop")
        assert images.shape == (FRAMES, HEIGHT, WIDTH, 3) and count == FRAMES


def test_load_nodes_follow_links_of_and_inside_the_hosts_folders(comfy, nodes, folders, tmp_path):
    import folder_paths

    fill(folders.input)
    (tmp_path / "linked").symlink_to(folders.input, target_is_directory=True)
    folder_paths.set_input_directory(str(tmp_path / "linked"))
    (folders.input / "other.mp4").symlink_to(folders.input / "sub" / "clip.mp4")
    (folders.input / "other").symlink_to("images", target_is_directory=True)
    (slot, *_) = nodes["LoadFrames"].define_schema().inputs
    assert slot.options == ["clip.mp4", "other.mp4", "sub/clip.mp4", "images", "other"]
    for name in slot.options:
        assert nodes["LoadFrames"].validate_inputs(file=name) is True
        assert len(call(nodes["LoadFrames"], file=name, count=0, fit="crop")[0]) == FRAMES
    assert "a.correspondence.safetensors [input]" in nodes["LoadCorrespondence"].define_schema().inputs[0].options


@pytest.mark.parametrize("target", ["images/0.png", "missing.png"])
def test_load_frames_refuses_images_that_link_out_of_the_folder(nodes, folders, target):
    fill(folders.outside)
    write_images(folders.input / "clip")
    node = nodes["LoadFrames"]
    state = node.fingerprint_inputs(file="clip")
    (folders.input / "clip" / "1.png").unlink()
    (folders.input / "clip" / "1.png").symlink_to(folders.outside / target)
    with opened(folders.outside, folders.outside / "images") as seen:
        assert "clip/1.png" in node.validate_inputs(file="clip")
        with refused("Load Frames", "'clip/1.png'", "links that lead out"):
            call(node, file="clip", count=0, fit="crop")
        assert node.fingerprint_inputs(file="clip") != state and not seen()


def test_load_frames_fingerprint_changes_with_the_files(nodes, folders):
    fill(folders.input)
    for name, file in (("clip.mp4", "clip.mp4"), ("images", "images/1.png")):
        state = nodes["LoadFrames"].fingerprint_inputs(file=name, start=0)
        assert state and nodes["LoadFrames"].fingerprint_inputs(file=name) == state
        os.utime(folders.input / file, (1, 1))
        assert nodes["LoadFrames"].fingerprint_inputs(file=name) != state


# --- writing ---


def test_save_nodes_refuse_prefixes_that_lead_out(nodes, folders, record):
    link_out(folders.output, folders.outside)
    (folders.output / str(time.localtime().tm_year)).symlink_to(folders.outside, target_is_directory=True)
    before = tree(folders.outside.parent)
    for prefix in [spelled(prefix, folders) for prefix in PREFIXES]:
        for node, wire in (("Inversion", record), ("Correspondence", matches())):
            with refused(f"Save {node}", f"filename_prefix {prefix!r}", "inside ComfyUI's output folder"):
                call(nodes[f"Save{node}"], **{node.lower(): wire}, filename_prefix=prefix)
            assert tree(folders.outside.parent) == before, prefix


@pytest.mark.parametrize(
    ("prefix", "file"),
    [
        ("clip", "clip_00001_"),
        ("cove/clip", "cove/clip_00001_"),
        ("a/b/", "a/b_00001_"),
        ("a\\b", "a/b_00001_"),
        ("./a//b", "a/b_00001_"),
        ("inside/b", "real/b_00001_"),
        ("%year%/%width%-%month%", "%Y/0-%m_00001_"),
        ("%date:yyyy%", "%date:yyyy%_00001_"),
    ],
)
def test_save_correspondence_saves_prefixes_inside_the_output_folder(nodes, folders, prefix, file):
    (folders.output / "real").mkdir()
    (folders.output / "inside").symlink_to("real", target_is_directory=True)
    call(nodes["SaveCorrespondence"], correspondence=matches(), filename_prefix=prefix)
    expected = file if "date" in file else time.strftime(file)
    found = [path.relative_to(folders.output).as_posix() for path in folders.output.rglob("*.safetensors")]
    assert found == [f"{expected}.correspondence.safetensors"]


def test_atomic_write_does_not_follow_a_planted_link(tmp_path):
    target, path = tmp_path / "precious", tmp_path / "output" / "a.safetensors"
    target.write_text("as it was")
    path.parent.mkdir()
    for link in (path.with_name(f".{path.name}.{os.getpid()}.tmp"), path):
        link.symlink_to(target)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "as it was" and path.read_text() == "new" and not path.is_symlink()


def test_save_correspondence_refuses_paths_that_cannot_be_written(nodes, folders):
    (folders.output / "file").write_text("in the way")
    for prefix in ("file/clip", "x" * 250, "deep/" * 1500 + "clip"):
        with refused("Save Correspondence", "choose another folder"):
            call(nodes["SaveCorrespondence"], correspondence=matches(), filename_prefix=prefix)


# --- lists ---


@pytest.fixture
def scans(monkeypatch):
    """The folders that were listed, by any function."""
    found = []

    def counted(function):
        def call(path="."):
            found.append(os.fspath(path))
            return function(path)

        return call

    for function in (os.scandir, os.listdir):
        monkeypatch.setattr(os, function.__name__, counted(function))
    return found


def test_load_nodes_list_without_scanning_deep_folders(nodes, folders, scans):
    for root in (folders.input, folders.output):
        for number in range(100):
            deep = root / "a" / f"{number}" / "b"
            deep.mkdir(parents=True)
            for file in range(50):
                (deep / f"{file}{LOADERS['LoadInversion']}").touch()
        (root / "cove").mkdir()
        for folder in (root, root / "cove", root / "a"):
            for file in LOADERS.values():
                (folder / file).touch()
    for node, file in LOADERS.items():
        scans.clear()
        slot = nodes[node].define_schema().inputs[0]
        assert len(scans) <= 4, scans
        if node == "LoadFrames":
            assert slot.options == ["a/clip.mp4", "clip.mp4", "cove/clip.mp4"]
        else:
            kinds = ("output", "input")
            assert sorted(slot.options) == sorted(f"{f}{file} [{kind}]" for kind in kinds for f in ("", "cove/"))
        # A file that is not listed still loads by name.
        assert nodes[node].validate_inputs(file=f"a/{file}") is True


def test_load_nodes_list_only_files_that_can_be_loaded(nodes, folders):
    fill(folders.outside)
    link_out(folders.input, folders.outside)
    for kind in (folders.input, folders.output):
        (kind / "cove").symlink_to(folders.outside, target_is_directory=True)
        (kind / CORRESPONDENCE).symlink_to(folders.outside / CORRESPONDENCE)
    (folders.input / "b.correspondence.safetensors").mkdir()
    (folders.input / ".c.correspondence.safetensors").touch()
    assert nodes["LoadFrames"].define_schema().inputs[0].options == []
    assert nodes["LoadCorrespondence"].define_schema().inputs[0].options == []


def test_load_nodes_list_files_beside_unreadable_folders(nodes, folders, monkeypatch):
    fill(folders.input)
    (folders.input / "loop").symlink_to("loop")
    (folders.input / "loop.mp4").symlink_to("loop.mp4")
    (folders.input / "gone.mp4").symlink_to("nothing.mp4")
    shutil.rmtree(folders.output)
    (slot, *_) = nodes["LoadFrames"].define_schema().inputs
    assert slot.options == ["clip.mp4", "sub/clip.mp4", "images"]
    scandir = os.scandir

    def closed(path="."):
        if os.path.basename(path) == "sub":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        assert "sub/clip.mp4" not in nodes["LoadFrames"].define_schema().inputs[0].options
        assert "clip.mp4" in nodes["LoadFrames"].define_schema().inputs[0].options
        with refused("Load Frames", "'sub'", "Permission denied", "permissions"):
            call(nodes["LoadFrames"], file="sub", fit="crop")
        assert nodes["LoadCorrespondence"].define_schema().inputs[0].options == [f"{CORRESPONDENCE} [input]"]
    shutil.rmtree(folders.input)
    for node in LOADERS:
        assert nodes[node].define_schema().inputs[0].options == []
