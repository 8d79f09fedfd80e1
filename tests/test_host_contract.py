"""`host_contract.USES` is complete and holds on the running ComfyUI and on every recorded one.

    COMFYUI_PATH=... python -m pytest tests/test_host_contract.py --record-host

records one more ComfyUI.
"""

import ast
import copy
import os
import pathlib
import re
import types
from collections import namedtuple
from collections.abc import Iterable, Iterator
from functools import cache, partial

import pytest
import torch

from scripts.host import PACK, version_of
from tests import host_contract as contract
from tests.helpers import HEIGHT, WIDTH, hints, latents, prompt, windowed

HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfyui_version", "folder_paths", "latent_preview"}
HOST |= {"nodes", "server"}
CALLS = {name: use for name, use in contract.USES.items() if use not in contract.KINDS}
TRIED = sorted(
    {version for facts in contract.recorded().values() for versions in facts.values() for version in versions}
)


# --- the running host ---


@pytest.fixture(scope="module")
def facts(comfy, nodes, load, control, base, models) -> dict[str, str]:
    """Line of the table -> its fact on the running host."""
    instances, keys = look_at(comfy, nodes, load, control, lambda kind: str(base / "models/checkpoints" / models[kind]))
    return {name: contract.fact_of(name, kind, instances, keys) for name, kind in contract.USES.items()}


@torch.inference_mode()  # as in the host; a model that ran under it in another file requires it
def look_at(comfy, nodes, load, control, path_of) -> tuple[dict, dict]:
    """Return an instance of each class whose fields are read, and the keys of the dictionaries that are read."""
    import comfy.hooks
    import comfy.model_base
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    from comfy.clip_vision import ClipVisionModel
    from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed
    from comfy_api.input_impl import VideoFromFile
    from comfy_api.util import VideoComponents

    import nodes as stock

    text = control(prompt(1), hints())
    text = stock.ConditioningSetArea().append(text, 8 * WIDTH, 8 * HEIGHT, 0, 0, 1.0)[0]
    text = stock.ConditioningSetMask().append(text, torch.ones(1, HEIGHT, WIDTH), "default", 1.0)[0]
    text = stock.ConditioningSetTimestepRange().set_range(text, 0.0, 1.0)[0]
    with_hooks = comfy.hooks.set_hooks_for_conditioning(text, comfy.hooks.HookGroup())
    by_default = comfy.hooks.set_default_conds_and_combine([prompt(1)], [prompt(2)])[0]
    masked = stock.SetLatentNoiseMask().set_mask(latents(), torch.ones(1, HEIGHT, WIDTH))[0]

    model = windowed(load("sd15"))
    model.set_model_sampler_post_cfg_function(lambda seen: seen["denoised"], disable_cfg1_optimization=True)
    model.set_model_attn1_patch(lambda query, key, value, options: (query, key, value))
    seen = {}

    def attend(query, key, value, options):
        seen["attention"] = options
        return value

    for block in ("input", 1), ("output", 3):
        model.set_model_attn1_replace(attend, *block)

    def keep(executor, model, conds, x, timestep, model_options):
        seen.update(executor=executor, conds=conds, options=model_options)
        return executor(model, conds, x, timestep, model_options)

    def sampler(denoise, x, sigmas, extra_args, callback, disable):
        seen.update(denoise=denoise, guider=copy.copy(denoise.inner_model), extra_args=extra_args)
        return denoise(x, sigmas[0].expand(len(x)), **extra_args)

    model.add_wrapper_with_key("calc_cond_batch", "test", keep)
    samples, sigmas = latents()["samples"], torch.tensor([3.0, 0.0, 0.0])
    options = {"disable_pbar": True, "seed": 0}
    kind = comfy.samplers.KSAMPLER(sampler)
    plain = control(prompt(2, mask=torch.ones(1, HEIGHT, WIDTH)), hints(1))
    plain[0][1].update(area=(HEIGHT, WIDTH, 0, 0), start_percent=0.0, end_percent=1.0)
    comfy.sample.sample_custom(
        model, torch.zeros_like(samples), 2.0, kind, sigmas, plain, prompt(3), samples, **options
    )

    unet = model.model.diffusion_model
    parts = {type(part).__name__: part for part in unet.modules()}
    (cond,) = seen["conds"][0]
    loaded = {
        kind: comfy.sd.load_checkpoint_guess_config(path_of(kind), output_vae=False)[1] for kind in ("sd15", "sdxl")
    }
    towers = loaded["sd15"].cond_stage_model
    attention, openai = "comfy.ldm.modules.attention", "comfy.ldm.modules.diffusionmodules.openaimodel"
    instances = {
        "comfy_api.input_impl.VideoFromFile": VideoFromFile("clip.mp4"),
        "comfy_api.util.VideoComponents": VideoComponents(images=torch.zeros(1, 8, 8, 3), frame_rate=12),
        "comfy_api.v0_0_2.io.ComfyNode": nodes["DDIMInversion"],
        "comfy_api.v0_0_2.io.Schema": nodes["DDIMInversion"].define_schema(),
        "comfy.patcher_extension.WrapperExecutor": seen["executor"],
        "comfy.samplers.CFGGuider": seen["guider"],
        "comfy.samplers.KSamplerX0Inpaint": seen["denoise"],
        "comfy.context_windows.IndexListContextWindow": seen["attention"]["context_window"],
        "comfy.context_windows.IndexListContextHandler": model.model_options["context_handler"],
        "comfy.conds.CONDRegular": cond["model_conds"]["c_crossattn"],
        "comfy.controlnet.ControlNet": cond["control"],
        "comfy.model_patcher.ModelPatcher": model,
        "comfy.hooks.Hook": comfy.hooks.Hook(),
        "comfy.hooks.HookGroup": comfy.hooks.HookGroup(),
        "comfy.model_base.BaseModel": model.model,
        "comfy.model_sampling.ModelSamplingDiscrete": model.get_model_object("model_sampling"),
        f"{attention}.CrossAttention": parts["CrossAttention"],
        f"{attention}.BasicTransformerBlock": parts["BasicTransformerBlock"],
        f"{attention}.SpatialTransformer": parts["SpatialTransformer"],
        f"{openai}.ResBlock": parts["ResBlock"],
        f"{openai}.UNetModel": unet,
        "comfy.sd.CLIP": loaded["sd15"],
        "comfy.sd.VAE": comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}),
        "comfy.sd1_clip.SD1ClipModel": towers,
        "comfy.sd1_clip.SDClipModel": getattr(towers, towers.clip),
        "comfy.sdxl_clip.SDXLClipModel": loaded["sdxl"].cond_stage_model,
        "comfy.latent_formats.SD15": model.model.latent_format,
        "comfy.supported_models.SD15": model.model.model_config,
    }
    published = seen["options"]["transformer_options"]
    keys = {
        "model_options": seen["options"],
        "transformer_options": published | seen["attention"],
        "patches": {*published["patches"], *forward_timestep_embed.__code__.co_consts},
        "patches_replace": published["patches_replace"],
        "extra_args": seen["extra_args"],
        "LATENT": masked,
        "CONDITIONING": with_hooks[0][1]
        | by_default[-1][1]
        | stock.CLIPTextEncode().encode(loaded["sd15"], "a boat")[0][0][1],
        "cond": cond,
        "unet_config": model.model.model_config.unet_config,
        "ClipVisionOutput": ClipVisionModel.encode_image.__code__.co_consts,
    }
    return instances, keys


def complaints(facts: dict[str, str]) -> dict[str, str]:
    """Return the lines of the table that do not hold, with the reason."""
    found = {}
    for name, fact in facts.items():
        if fact == contract.MISSING and contract.USES[name] != contract.OPTIONAL:
            found[name] = fact
        elif name in CALLS and (why := contract.complaint(CALLS[name], fact[1:-1])):
            found[name] = why
    return found


def test_uses_hold_on_the_running_host(facts):
    assert not complaints(facts)


def test_uses_of_the_running_host_match_the_record(request, facts, host):
    version = version_of(host)
    if request.config.getoption("--record-host"):
        contract.record(version, facts)
    if version not in TRIED:
        pytest.skip(f"nothing is recorded of ComfyUI {version}: run with --record-host")
    known = contract.facts_of(version)
    changed = {name: (known.get(name, "not recorded"), fact) for name, fact in facts.items() if known.get(name) != fact}
    assert not changed, "recorded and found; run with --record-host when the table or the host was changed on purpose"


# --- recorded hosts ---


@pytest.mark.parametrize("version", TRIED)
def test_uses_held_on_every_recorded_host(version):
    assert not complaints(contract.facts_of(version))


# --- the table is complete ---


@cache
def sources() -> dict[str, ast.Module]:
    """Return the published Python files that run in ComfyUI, parsed, by path."""
    paths = [PACK / "__init__.py", *PACK.glob("nodes/**/*.py"), *PACK.glob("demo/*.py")]
    return {path.relative_to(PACK).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imported(tree: ast.Module) -> dict[str, str]:
    """Return the dotted names of imports from outside the pack by their name in the file."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                found[name.asname or name.name.partition(".")[0]] = (
                    name.name if name.asname else name.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return found


def uses_of_the_host() -> Iterator[tuple[str, str, ast.Call | None]]:
    """Yield file, dotted name of the host, and the call if it is called or passed to `partial` with arguments."""
    for file, tree in sources().items():
        names = imported(tree)
        parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Name) or names.get(node.id, "").partition(".")[0] not in HOST:
                continue
            name, top = names[node.id], node
            while isinstance(parents[top], ast.Attribute) and not parents[top].attr.startswith("__"):
                top = parents[top]
                name += f".{top.attr}"
            around = parents[top]
            is_call = isinstance(around, ast.Call) and (around.func is top or ast.unparse(around.func) == "partial")
            yield file, name, around if is_call else None


def listed(what_to_do: str, names: Iterable[str]) -> str:
    return "\n".join([what_to_do, *sorted(names)])


def lines_of(name: str) -> list[str]:
    """Return the lines of the table about a name or its attributes."""
    return [line for line in contract.USES if line == name or line.startswith(f"{name}.")]


def test_uses_list_every_name_imported_from_the_host():
    left_out, wrong = set(), set()
    for file, name, used in uses_of_the_host():
        if not lines_of(name):
            left_out.add(f"{name} ({file})")
        elif used is not None and name in CALLS:
            by_position, by_name = contract.parameters(CALLS[name])
            handed = len(used.args) - (ast.unparse(used.func) == "partial")
            given = {word.arg for word in used.keywords if word.arg}
            too_many = handed > len(by_position) and "*args" not in by_position
            if too_many or not given <= {*by_position, *by_name}:
                wrong.add(f"{name} ({file}): {ast.unparse(used)}")
    assert not left_out | wrong, listed("add to tests/host_contract.py, then run with --record-host", left_out | wrong)


# --- fields and keys, known by name only ---

PYTHON = (str, bytes, dict, list, tuple, set, int, float, type, OSError, pathlib.Path, os.stat_result, partial)
PYTHON += (types.FunctionType, types.MethodType, types.CodeType, types.CellType, namedtuple("Empty", ()))
TORCH = (torch.Tensor, torch.nn.Module, torch.Generator, torch.Size, torch.dtype, torch.device)
OTHERS = HOST | {"free", "hexdigest", "in_features"}  # of shutil, hashlib, torch
OTHERS |= {"hidden_size", "ids", "post_processor", "special_tokens", "vocab_size"}  # of transformers and tokenizers
OTHERS |= {"ad_params", "sub_idxs", "ref_opts"}  # of AnimateDiff-Evolved and Advanced-ControlNet


def fields_in(tree: ast.Module) -> set[str]:
    """Return the names read from objects, with a dot or getattr, except from imported names."""
    found, names = set(), imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).partition(".")[0] not in names:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            found |= {name.value for name in node.args[1:2] if isinstance(name, ast.Constant)}
    return found


def keys_in(tree: ast.Module) -> set[str]:
    """Return the keys that are read: `x["key"]`, `x.get("key")`, `"key" in x`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Store):
            found.append(node.slice)
        elif isinstance(node, ast.Compare):
            found.append(node.left)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            found += node.args[:1]
    texts = {node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text.isidentifier()}


@cache
def our_names() -> set[str]:
    """Return the names of the pack's functions, classes and fields, and the keys of its dictionaries and files."""
    found = set()
    for path in [path for folder in ("nodes", "cove", "demo", "evidence") for path in PACK.glob(f"{folder}/**/*.py")]:
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [name for target in targets for name in ast.walk(target)]
                found |= {ast.unparse(name).removeprefix("self.") for name in names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                found |= {name.asname or name.name for name in node.names}
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "vars(self).update":
                found |= {word.arg for word in node.keywords}
            elif isinstance(node, ast.Dict):
                found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return found


def last_part(line: str) -> str:
    return line.rstrip("]").replace("[", ".").rpartition(".")[2]


def test_uses_list_every_field_and_key_that_is_read():
    """A name that the pack or Python also has passes."""
    known = {part for line in contract.USES for part in re.split(r"[.\[\]]", line)} | our_names() | OTHERS
    known |= {name for kind in (*PYTHON, *TORCH) for name in (*dir(kind), *dir(type(kind)))}
    read = {file: fields_in(tree) | keys_in(tree) for file, tree in sources().items()}
    left_out = {f"{name} ({file})" for file, names in read.items() for name in names - known}
    assert not left_out, listed("add to tests/host_contract.py, then run with --record-host", left_out)


def test_uses_have_no_unused_line():
    names = {name for _, name, _ in uses_of_the_host()}
    texts = {node.value for tree in sources().values() for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    read = {name for tree in sources().values() for name in fields_in(tree)} | texts
    unused = [line for line in contract.USES if line not in names and last_part(line) not in read]
    assert not unused, listed("remove from tests/host_contract.py", unused)
