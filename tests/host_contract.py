"""Everything that the pack uses of ComfyUI, and the record of the versions it was tested with.

`USES` has a line for each name. A call lists its parameters as the pack passes them: by position, then after `*` by
name. CLASS: a base class or a class for isinstance. VALUE: a constant or a variable. FIELD: read or set on instances.
OPTIONAL: a field that older or newer ComfyUIs lack. KEY: read from a dictionary, named before the bracket.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

CLASS, VALUE, FIELD, KEY, OPTIONAL = "class", "value", "field", "key", "optional field"
KINDS = (CLASS, VALUE, FIELD, KEY, OPTIONAL)

FACTS = Path(__file__).with_name("host_facts.json")
MISSING = "missing"

INPUT = "id, *, tooltip"
OUTPUT = "*, display_name, tooltip"
NUMBER = "id, display_name, *, default, min, max, step, tooltip"

USES = {
    "comfyui_version.__version__": VALUE,
    # --- nodes ---
    "comfy_api.v0_0_2.ComfyExtension": CLASS,
    "comfy_api.v0_0_2.io.ComfyNode": CLASS,
    "comfy_api.v0_0_2.io.ComfyNode.hidden": FIELD,
    "comfy_api.v0_0_2.io.Custom": "io_type",
    "comfy_api.v0_0_2.io.Hidden.extra_pnginfo": VALUE,
    "comfy_api.v0_0_2.io.Hidden.prompt": VALUE,
    "comfy_api.v0_0_2.io.Hidden.unique_id": VALUE,
    "comfy_api.v0_0_2.io.NodeOutput": "*args, *, ui",
    "comfy_api.v0_0_2.io.Schema": "*, node_id, display_name, category, description, inputs, outputs, hidden, "
    "is_output_node",
    "comfy_api.v0_0_2.io.Schema.display_name": FIELD,
    "comfy_api.v0_0_2.io.Schema.inputs": FIELD,
    "comfy_api.v0_0_2.io.UploadType.video": VALUE,
    "comfy_api.v0_0_2.io.Boolean.Input": "id, *, default, tooltip",
    "comfy_api.v0_0_2.io.Combo.Input": "id, *, options, default, upload, tooltip",
    "comfy_api.v0_0_2.io.Float.Input": f"{NUMBER}, round",
    "comfy_api.v0_0_2.io.Int.Input": NUMBER,
    "comfy_api.v0_0_2.io.String.Input": "id, *, default, multiline, placeholder, tooltip",
    **{f"comfy_api.v0_0_2.io.{kind}.Input": f"{INPUT}, optional" for kind in ("Clip", "ClipVision", "Conditioning")},
    **{f"comfy_api.v0_0_2.io.{kind}.Input": f"{INPUT}, optional" for kind in ("Image", "Latent", "Model", "Video")},
    **{f"comfy_api.v0_0_2.io.{kind}.Output": OUTPUT for kind in ("Clip", "Float", "Image", "Int", "Latent", "Model")},
    **{f"comfy_api.v0_0_2.io.{kind}.Output": OUTPUT for kind in ("Sampler", "Sigmas", "String", "Vae")},
    **{f"comfy_api.v0_0_2.io.{kind}.Output": OUTPUT for kind in ("Audio", "Mask")},
    "comfy_api.v0_0_2.io.Int.Input.get_io_type": "self",
    "comfy_execution.validation.validate_node_input": "received_type, input_type",
    "comfy_api.input_impl.VideoFromFile": CLASS,
    "comfy_api.input_impl.VideoFromFile.as_trimmed": OPTIONAL,
    "comfy_api.input_impl.VideoFromFile.get_active_trim_window": OPTIONAL,
    "comfy_api.input_impl.VideoFromFile.get_components": "self",
    "comfy_api.input_impl.VideoFromFile.get_stream_source": "self",
    "comfy_api.util.VideoComponents.alpha": OPTIONAL,
    "comfy_api.util.VideoComponents.audio": FIELD,
    "comfy_api.util.VideoComponents.frame_rate": FIELD,
    "comfy_api.util.VideoComponents.images": FIELD,
    "comfy_api.v0_0_2.ui.PreviewImage": "image, *, cls",
    "server.PromptServer.instance": VALUE,
    "server.PromptServer.send_progress_text": "self, text, node_id",
    # --- files ---
    "folder_paths.annotated_filepath": "name",
    "folder_paths.filter_files_content_types": "files, content_types",
    "folder_paths.get_directory_by_type": "type_name",
    "folder_paths.get_input_directory": "",
    "folder_paths.get_output_directory": "",
    "folder_paths.get_save_image_path": "filename_prefix, output_dir",
    "folder_paths.get_temp_directory": "",
    "folder_paths.get_user_directory": "",
    # --- memory, progress, interruption ---
    "comfy.model_management.get_free_memory": "dev",
    "comfy.model_management.get_torch_device": "",
    "comfy.model_management.intermediate_device": "",
    "comfy.model_management.throw_exception_if_processing_interrupted": "",
    "comfy.utils.ProgressBar": "total",
    "comfy.utils.ProgressBar.update_absolute": "self, value, total",
    "latent_preview.prepare_callback": "model, steps",
    # --- a run ---
    "comfy.patcher_extension.WrappersMP.APPLY_MODEL": VALUE,
    "comfy.patcher_extension.WrappersMP.CALC_COND_BATCH": VALUE,
    "comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL": VALUE,
    "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE": VALUE,
    "comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING": VALUE,
    "comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE": VALUE,
    "comfy.patcher_extension.WrapperExecutor.class_obj": FIELD,
    "comfy.sample.fix_empty_latent_channels": "model, latent_image",
    "comfy.sample.sample_custom": "model, noise, cfg, sampler, sigmas, positive, negative, latent_image, *, callback, "
    "seed",
    "comfy.sampler_helpers.cleanup_models": "conds, models",
    "comfy.sampler_helpers.convert_cond": "cond",
    "comfy.sampler_helpers.get_additional_models": "conds, dtype",
    "comfy.samplers.CFGGuider.conds": FIELD,
    "comfy.samplers.CFGGuider.inner_model": FIELD,
    "comfy.samplers.CFGGuider.model_options": FIELD,
    "comfy.samplers.CFGGuider.model_patcher": FIELD,
    "comfy.samplers.KSAMPLER": "sampler_function, *, extra_options",
    "comfy.samplers.KSamplerX0Inpaint.inner_model": FIELD,
    "comfy.samplers.calc_cond_batch": "model, conds, x_in, timestep, model_options",
    "comfy.samplers.process_conds": "model, noise, conds, device, *, seed",
    "comfy.context_windows.IndexListContextWindow.causal_anchor_index": OPTIONAL,
    "comfy.context_windows.IndexListContextWindow.index_list": FIELD,
    "comfy.context_windows.IndexListContextHandler.context_length": FIELD,
    "comfy_api.torch_helpers.torch_compile.COMPILE_KEY": VALUE,
    "model_options[context_handler]": KEY,
    "model_options[disable_cfg1_optimization]": KEY,
    "model_options[transformer_options]": KEY,
    "transformer_options[activations_shape]": KEY,
    "transformer_options[attn_precision]": KEY,
    "transformer_options[block]": KEY,
    "transformer_options[block_index]": KEY,
    "transformer_options[callbacks]": KEY,
    "transformer_options[cond_or_uncond]": KEY,
    "transformer_options[context_window]": KEY,
    "transformer_options[n_heads]": KEY,
    "transformer_options[patches]": KEY,
    "transformer_options[patches_replace]": KEY,
    "transformer_options[sample_sigmas]": KEY,
    "transformer_options[uuids]": KEY,
    "transformer_options[wrappers]": KEY,
    "patches[attn1_patch]": KEY,
    "patches[forward_timestep_embed_patch]": KEY,
    "patches_replace[attn1]": KEY,
    "extra_args[model_options]": KEY,
    "extra_args[seed]": KEY,
    # --- prompts and latents ---
    "comfy.hooks.Hook.hook_keyframe": FIELD,
    "comfy.hooks.HookGroup.hooks": FIELD,
    "comfy.hooks.HookKeyframeGroup.prepare_current_keyframe": "self, curr_t, transformer_options",
    "comfy.latent_formats.LatentFormat.process_in": "self, latent",
    "comfy.latent_formats.LatentFormat.process_out": "self, latent",
    "comfy.conds.CONDConstant": CLASS,
    "comfy.conds.CONDRegular._copy_with": "self, cond",
    "comfy.conds.CONDRegular.cond": FIELD,
    "LATENT[samples]": KEY,
    "LATENT[noise_mask]": KEY,
    "CONDITIONING[area]": KEY,
    "CONDITIONING[control]": KEY,
    "CONDITIONING[control_apply_to_uncond]": KEY,
    "CONDITIONING[default]": KEY,
    "CONDITIONING[end_percent]": KEY,
    "CONDITIONING[hooks]": KEY,
    "CONDITIONING[mask]": KEY,
    "CONDITIONING[pooled_output]": KEY,
    "CONDITIONING[start_percent]": KEY,
    "cond[area]": KEY,
    "cond[control]": KEY,
    "cond[mask]": KEY,
    "cond[model_conds]": KEY,
    "cond[timestep_end]": KEY,
    "cond[timestep_start]": KEY,
    "cond[uuid]": KEY,
    "comfy.controlnet.ControlBase": CLASS,
    "comfy.controlnet.ControlNet.cond_hint": FIELD,
    "comfy.controlnet.ControlNet.cond_hint_original": FIELD,
    "comfy.controlnet.ControlNet.extra_concat": FIELD,
    "comfy.controlnet.ControlNet.extra_concat_orig": FIELD,
    "comfy.controlnet.ControlNet.multigpu_clones": OPTIONAL,
    "comfy.controlnet.ControlNet.previous_controlnet": FIELD,
    "comfy.controlnet.ControlNet.strength": FIELD,
    "comfy.controlnet.ControlNet.vae": FIELD,
    # --- MODEL ---
    "comfy.model_patcher.ModelPatcher": "model, *, load_device, offload_device",
    "comfy.model_patcher.ModelPatcher.add_wrapper_with_key": "self, wrapper_type, key, wrapper",
    "comfy.model_patcher.ModelPatcher.additional_models": FIELD,
    "comfy.model_patcher.ModelPatcher.attachments": FIELD,
    "comfy.model_patcher.ModelPatcher.backup": FIELD,
    "comfy.model_patcher.ModelPatcher.clear_cached_hook_weights": "self",
    "comfy.model_patcher.ModelPatcher.clone": "self",
    "comfy.model_patcher.ModelPatcher.forced_hooks": FIELD,
    "comfy.model_patcher.ModelPatcher.get_model_object": "self, name",
    "comfy.model_patcher.ModelPatcher.get_wrappers": "self, wrapper_type, key",
    "comfy.model_patcher.ModelPatcher.hook_patches": FIELD,
    "comfy.model_patcher.ModelPatcher.injections": FIELD,
    "comfy.model_patcher.ModelPatcher.load_device": FIELD,
    "comfy.model_patcher.ModelPatcher.model": FIELD,
    "comfy.model_patcher.ModelPatcher.model_dtype": "self",
    "comfy.model_patcher.ModelPatcher.model_options": FIELD,
    "comfy.model_patcher.ModelPatcher.object_patches": FIELD,
    "comfy.model_patcher.ModelPatcher.patches": FIELD,
    "comfy.model_patcher.ModelPatcher.set_additional_models": "self, key, models",
    "comfy.model_patcher.ModelPatcher.set_model_attn1_patch": "self, patch",
    "comfy.model_patcher.ModelPatcher.set_model_attn1_replace": "self, patch, block_name, number",
    "comfy.model_patcher.ModelPatcher.wrappers": FIELD,
    "comfy.model_base.BaseModel.diffusion_model": FIELD,
    "comfy.model_base.BaseModel.get_dtype": "self",
    "comfy.model_base.BaseModel.latent_format": FIELD,
    "comfy.model_base.BaseModel.manual_cast_dtype": FIELD,
    "comfy.model_base.BaseModel.memory_required": "self, input_shape",
    "comfy.model_base.BaseModel.model_config": FIELD,
    "comfy.model_base.BaseModel.model_sampling": FIELD,
    "comfy.model_base.BaseModel.load_model_weights": "self, sd, unet_prefix",
    "comfy.model_base.BaseModel.process_latent_in": "self, latent",
    "comfy.model_sampling.EPS.calculate_input": "self, sigma, noise",
    "comfy.model_sampling.EPS.inverse_noise_scaling": "self, sigma, latent",
    "comfy.model_sampling.EPS.noise_scaling": "self, sigma, noise, latent_image, max_denoise",
    "comfy.model_sampling.ModelSamplingDiscrete": "",
    "comfy.model_sampling.ModelSamplingDiscrete.percent_to_sigma": "self, percent",
    "comfy.model_sampling.ModelSamplingDiscrete.sigma": "self, timestep",
    "comfy.model_sampling.ModelSamplingDiscrete.sigma_data": FIELD,
    "comfy.model_sampling.ModelSamplingDiscrete.sigma_max": FIELD,
    "comfy.model_sampling.ModelSamplingDiscrete.sigmas": FIELD,
    "comfy.model_sampling.ModelSamplingDiscrete.timestep": "self, sigma",
    # --- the UNet ---
    "comfy.cli_args.args.use_quad_cross_attention": VALUE,
    "comfy.ldm.modules.attention.CrossAttention.to_q": FIELD,
    "comfy.ldm.modules.attention.BasicTransformerBlock.attn1": FIELD,
    "comfy.ldm.modules.attention.BasicTransformerBlock.disable_self_attn": FIELD,
    "comfy.ldm.modules.attention.SpatialTransformer": CLASS,
    "comfy.ldm.modules.attention.SpatialTransformer.transformer_blocks": FIELD,
    "comfy.ldm.modules.attention.SpatialVideoTransformer": CLASS,
    "comfy.ldm.modules.attention.attention_pytorch": "q, k, v, heads, *, attn_precision, transformer_options",
    "comfy.ldm.modules.attention.attention_sub_quad": "query, key, value, heads, *, attn_precision, "
    "transformer_options",
    "comfy.ldm.modules.attention.optimized_attention": VALUE,
    "comfy.ldm.modules.diffusionmodules.openaimodel.Downsample": CLASS,
    "comfy.ldm.modules.diffusionmodules.openaimodel.ResBlock": CLASS,
    "comfy.ldm.modules.diffusionmodules.openaimodel.ResBlock.out_channels": FIELD,
    "comfy.ldm.modules.diffusionmodules.openaimodel.ResBlock.out_layers": FIELD,
    "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel": CLASS,
    "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel.input_blocks": FIELD,
    "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel.middle_block": FIELD,
    "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel.output_blocks": FIELD,
    "comfy.ldm.modules.diffusionmodules.openaimodel.Upsample": CLASS,
    # --- CLIP for Edit Check ---
    "comfy.clip_vision.ClipVisionModel.encode_image": "self, image",
    "ClipVisionOutput[image_embeds]": KEY,
    "comfy.sd.CLIP.cond_stage_model": FIELD,
    "comfy.sd.CLIP.encode_from_tokens": "self, tokens, *, return_pooled",
    "comfy.sd.CLIP.tokenize": "self, text",
    "comfy.sd1_clip.SD1ClipModel.clip": FIELD,
    "comfy.sd1_clip.SDClipModel.return_projected_pooled": FIELD,
    "comfy.sdxl_clip.SDXLClipModel.clip_g": FIELD,
    # --- the demo model ---
    "comfy.clip_model.CLIPTextModel": "config_dict, dtype, device, operations",
    "comfy.clip_model.CLIPTextModel.set_input_embeddings": "self, embeddings",
    "comfy.latent_formats.SD15.latent_channels": FIELD,
    "comfy.latent_formats.SD15.latent_rgb_factors": FIELD,
    "comfy.latent_formats.SD15.latent_rgb_factors_bias": FIELD,
    "comfy.latent_formats.SD15.scale_factor": FIELD,
    "comfy.latent_formats.SD15.taesd_decoder_name": FIELD,
    "comfy.model_detection.detect_unet_config": "state_dict, key_prefix",
    "comfy.model_management.unet_dtype": "*, supported_dtypes, weight_dtype",
    "comfy.model_management.unet_manual_cast": "weight_dtype, inference_device, supported_dtypes",
    "comfy.model_management.unet_offload_device": "",
    "comfy.model_management.vae_offload_device": "",
    "comfy.ops.disable_weight_init.Conv2d": CLASS,
    "comfy.ops.manual_cast.Embedding": "num_embeddings, embedding_dim, *, dtype, device",
    "comfy.sd.CLIP": "target, *, parameters",
    "comfy.sd.CLIP.load_sd": "self, sd",
    "comfy.sd.VAE": "*, sd",
    "comfy.sd.VAE.device": FIELD,
    "comfy.sd.VAE.downscale_ratio": FIELD,
    "comfy.sd.VAE.first_stage_model": FIELD,
    "comfy.sd.VAE.latent_channels": FIELD,
    "comfy.sd.VAE.memory_used_decode": FIELD,
    "comfy.sd.VAE.memory_used_encode": FIELD,
    "comfy.sd.VAE.patcher": FIELD,
    "comfy.sd.VAE.size": OPTIONAL,
    "comfy.sd.VAE.upscale_ratio": FIELD,
    "comfy.sd.VAE.vae_dtype": FIELD,
    "comfy.sd1_clip.SD1ClipModel": "*, clip_model",
    "comfy.sd1_clip.SD1Tokenizer": "*, tokenizer",
    "comfy.sd1_clip.SDClipModel": "*, max_length, textmodel_json_config, model_class, special_tokens, "
    "return_projected_pooled",
    "comfy.sd1_clip.SDTokenizer": "*, max_length, embedding_size, tokenizer_class",
    "comfy.supported_models.SD15": "unet_config",
    "comfy.supported_models.SD15.get_model": "self, state_dict, prefix",
    "comfy.supported_models.SD15.latent_format": FIELD,
    "comfy.supported_models.SD15.set_inference_dtype": "self, dtype, manual_cast_dtype",
    "comfy.supported_models.SD15.supported_inference_dtypes": FIELD,
    "comfy.supported_models.SD15.unet_config": FIELD,
    "comfy.supported_models_base.ClipTarget": "tokenizer, clip",
    "comfy.utils.calculate_parameters": "sd, prefix",
    "comfy.utils.load_torch_file": "ckpt, *, safe_load, return_metadata",
    "comfy.utils.weight_dtype": "sd, prefix",
    "unet_config[context_dim]": KEY,
    "unet_config[num_heads]": KEY,
}


def parameters(call: str) -> tuple[list[str], list[str]]:
    """Return the parameters in a line of `USES` that are passed by position, and those passed by name."""
    by_position, _, by_name = call.partition("*, ")
    names = [[name for name in part.split(", ") if name] for part in (by_position, by_name)]
    return names[0], names[1]


def resolve(name: str) -> Any:
    """Return the object with a dotted name: a module, or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:length]).startswith(error.name):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def from_source(name: str) -> Any:
    """Return a name of a module that cannot be imported here: a function without its body, or an expression's text."""
    module, _, inside = name.partition(".")
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == inside.rpartition(".")[2]:
            return eval(ast.unparse(ast.Lambda(node.args, ast.Constant(None))))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == inside:
            return ast.unparse(node.value)
    raise AttributeError(name)


def signature_text(function) -> str:
    """Return a signature without annotations and default values, as valid Python: `a, b=..., *, c`."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(
            annotation=parameter.empty, default=... if parameter.default is not parameter.empty else parameter.empty
        )
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(bare))[1:-1].replace("Ellipsis", "...")


def complaint(call: str, text: str) -> str | None:
    """Return why a function of this signature does not accept the call, or None."""
    by_position, by_name = parameters(call)
    signature = inspect.signature(eval(f"lambda {text}: None"))
    try:
        bound = signature.bind(*by_position, **{name: name for name in by_name})
    except TypeError as error:
        return str(error)
    moved = [
        f"{value} is now {name}" for name, value in bound.arguments.items() if isinstance(value, str) and value != name
    ]
    return "; ".join(moved) or None


def fact_of(name: str, kind: str, instances: dict[str, Any], keys: dict[str, set[str]]) -> str:
    """Return the fact to record about one line of `USES` on the running host.

    Args:
        instances: objects by the dotted name of their class.
        keys: observed keys by the dictionary's name in `USES`.
    """
    if kind == KEY:
        owner, key = name.rstrip("]").split("[")
        return KEY if key in keys[owner] else MISSING
    owner, _, attribute = name.rpartition(".")
    if kind in (FIELD, OPTIONAL):
        return FIELD if hasattr(instances[owner], attribute) else MISSING
    try:
        found = from_source(name) if name.startswith("server.") else resolve(name)
    except AttributeError:
        return MISSING
    if kind == CLASS:
        return CLASS if inspect.isclass(found) else type(found).__name__
    if kind == VALUE:
        return found if isinstance(found, str) and name != "comfyui_version.__version__" else type(found).__name__
    return f"({signature_text(found)})"


def recorded() -> dict[str, dict[str, list[str]]]:
    """Return the recorded facts: line of `USES` -> fact -> versions of ComfyUI."""
    return json.loads(FACTS.read_text(encoding="utf-8"))


def facts_of(version: str) -> dict[str, str]:
    """Return the recorded fact of this version by line of `USES`, without unrecorded lines."""
    known = recorded()
    found = {name: [fact for fact, versions in known.get(name, {}).items() if version in versions] for name in USES}
    return {name: facts[0] for name, facts in found.items() if facts}


def record(version: str, facts: dict[str, str]) -> None:
    """Replace the record of a version, and drop lines that are no longer in `USES`."""
    kept, lines = recorded(), []
    for name in USES:
        found = {fact: [one for one in versions if one != version] for fact, versions in kept.get(name, {}).items()}
        found.setdefault(facts[name], []).append(version)
        found = {fact: sorted(versions, key=_numbers) for fact, versions in found.items() if versions}
        lines.append(f"{json.dumps(name)}: {json.dumps(found)}")
    FACTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]
