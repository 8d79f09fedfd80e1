"""Reconstruction Check and Edit Check: how exact an inversion is, and how consistent an edit is."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from comfy_api.v0_0_2 import io, ui

from ..cove import draw, metrics
from . import host

SMALLEST = 12  # pixels a side: SSIM's window and the optical flow want as many


class ReconstructionCheck(io.ComfyNode):
    """PSNR, and SSIM of Wang et al., 2004, of each frame sampled back with the source prompt at cfg 1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveReconstructionCheck",
            display_name="COVE Reconstruction Check",
            category="COVE/check",
            description="Measures how exactly sampling returns the inverted clip, and suggests what to change. Detail "
            "that is lost here is lost in every edit.",
            inputs=[
                io.Image.Input("source", tooltip="The frames from Load Frames."),
                io.Image.Input(
                    "reconstruction", tooltip="Decoded output of DDIM Sampler with the source prompt at cfg 1."
                ),
                io.Image.Input(
                    "vae_only",
                    optional=True,
                    tooltip="The source after VAE Encode and VAE Decode. If connected, losses of the VAE are shown "
                    "separately from those of the inversion.",
                ),
                host.wires.Inversion.Input(
                    "inversion",
                    optional=True,
                    tooltip="From DDIM Inversion. If connected, the advice takes its settings into account.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="side by side", tooltip="Source, source after the VAE, reconstruction."),
                io.String.Output(display_name="report", tooltip="Verdict, and PSNR and SSIM of each frame."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @host.errors.named
    def execute(cls, source, reconstruction, vae_only=None, inversion=None) -> io.NodeOutput:
        clips = {"source": source, "vae_only": vae_only, "reconstruction": reconstruction}
        clips = {name: clip[..., :3].cpu() for name, clip in clips.items() if clip is not None}
        _check_alike(clips)
        # Against what the VAE leaves where it is known: the inversion never saw more.
        reference = clips.get("vae_only", clips["source"])
        back = metrics.psnr(clips["reconstruction"], reference)
        worst = int(back.argmin())
        vae = float(metrics.psnr(reference, clips["source"])[worst]) if vae_only is not None else None
        if inversion is None:
            text = verdict(float(back[worst]), vae=vae)
        else:
            settings = inversion.about["refinements"], bool(inversion.diverged), inversion.schedule.multiple
            text = f"{verdict(float(back[worst]), *settings, vae=vae)} ({inversion.quality()})"
        columns = {}
        for name in [name for name in ("reconstruction", "vae_only") if name in clips]:
            for measure in (metrics.psnr, metrics.ssim):
                columns[f"{name} {measure.__name__.upper()}"] = measure(clips[name], clips["source"]).tolist()
        against = "the source" if vae_only is None else "what the VAE leaves"
        text += f" Lowest PSNR {back[worst]:.1f} dB against {against}, frame {worst}. Below, all against the source."
        text += f"\n\n{metrics.format_table(columns)}"
        host.status.report_status(cls, text)
        sheet = torch.cat(list(clips.values()), dim=2)
        return io.NodeOutput(sheet, text, ui=ui.PreviewImage(sheet, cls=cls))


class EditCheck(io.ComfyNode):
    """Warping error of Lai et al., 2018; CLIP similarities as TokenFlow and COVE report them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveEditCheck",
            display_name="COVE Edit Check",
            category="COVE/check",
            description="Measures how consistent an edited clip is from frame to frame, and how far it is from its "
            "source, to compare settings by numbers.",
            inputs=[
                io.Image.Input("source", tooltip="The frames from Load Frames."),
                io.Image.Input("edited", tooltip="The edited frames, of the same size."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision. If connected, the CLIP similarity of each frame and the next.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="With clip_vision: the CLIP similarity of each frame and the prompt. Use the CLIP of an "
                    "SD2.x checkpoint with CLIP-ViT-H, or of an SDXL one with CLIP-ViT-bigG.",
                ),
                io.String.Input("prompt", default="", multiline=True, tooltip="Edit prompt; only used with clip."),
            ],
            outputs=[
                io.Image.Output(display_name="plot"),
                io.String.Output(display_name="report", tooltip="Values of each frame, and their means."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @host.errors.named
    def execute(cls, source, edited, prompt, clip_vision=None, clip=None) -> io.NodeOutput:
        clips = {"source": source[..., :3].cpu(), "edited": edited[..., :3].cpu()}
        _check_alike(clips)
        if clip is not None and (clip_vision is None or not prompt.strip()):
            missing = "`clip_vision`" if clip_vision is None else "`prompt`"
            raise ValueError(f"`clip` is connected without {missing}. Connect both, or leave `clip` open.")
        metrics.check_libraries()
        words = None if clip is None else _text_embedding(clip, prompt)
        seen_frames = 0 if clip_vision is None else len(source)
        progress = host.status.progress_bar(seen_frames + len(source) - 1)
        similarities = {}
        if clip_vision is not None:
            seen = _image_embeddings(clip_vision, edited, progress)
            similarities["CLIP, next frame"] = [*(seen[:-1] * seen[1:]).sum(1).tolist(), float("nan")]
            if words is not None:
                _check_same_space(seen, words)
                similarities["CLIP, prompt"] = (seen @ words).tolist()
        columns = metrics.measure_edit(**clips, progress=lambda done, total: progress(seen_frames + done, total))
        columns |= similarities
        text = f"{metrics.summarize_edit(columns)}\n\n{metrics.format_table(columns)}"
        host.status.report_status(cls, text)
        picture = draw.plot_edit(columns)
        return io.NodeOutput(picture, text, ui=ui.PreviewImage(picture, cls=cls))


def _check_alike(clips: dict[str, torch.Tensor]) -> None:
    """Raise unless all have the source's shape and SSIM is defined for their size."""
    source = clips["source"]
    for name, clip in clips.items():
        if clip.shape != source.shape:
            both = f"source is {_format_frames(source)}, but {name} is {_format_frames(clip)}"
            raise ValueError(f"{both}. Make both from the same frames.")
    if min(source.shape[1:3]) < SMALLEST:
        least = f"frames of {SMALLEST}x{SMALLEST} pixels or more"
        raise ValueError(f"expected {least}, got {_format_frames(source)}. Load larger frames.")


def _format_frames(clip: torch.Tensor) -> str:
    frames, height, width, _ = clip.shape
    return f"{frames} frames of {width}x{height}"


# --- CLIP ---


BATCH = 8  # frames that CLIP sees at once


def _image_embeddings(clip_vision, images: torch.Tensor, progress: Callable[[int, int], None]) -> torch.Tensor:
    """Return a unit vector per frame, [frames, d], float32, of its central square, as papers report it."""
    found = []
    for start in range(0, len(images), BATCH):
        found.append(clip_vision.encode_image(images[start : start + BATCH])["image_embeds"].float().cpu())
        progress(min(start + BATCH, len(images)), len(images))
    return F.normalize(torch.cat(found), dim=-1)


def _text_embedding(clip, prompt: str) -> torch.Tensor:
    """Return the unit vector of the prompt, [d], float32; raise if the encoder does not project into CLIP's space.

    ComfyUI leaves the projection out for CLIP-L, whose files may lack it.
    """
    towers = clip.cond_stage_model
    encoder = getattr(towers, "clip_g", None) or getattr(towers, getattr(towers, "clip", ""), None)
    if encoder is None or not getattr(encoder, "return_projected_pooled", False):
        raise ValueError(
            f"expected the `clip` of an SD2.x checkpoint (with CLIP-ViT-H as `clip_vision`) or of an SDXL one "
            f"(with CLIP-ViT-bigG), got {type(towers).__name__}, whose words cannot be compared with pictures. Connect "
            f"one of those, or leave `clip` open."
        )
    _, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return F.normalize(pooled[0].float().cpu(), dim=-1)


def _check_same_space(images: torch.Tensor, words: torch.Tensor) -> None:
    """Raise when the two come from different CLIPs."""
    if images.shape[-1] != len(words):
        raise ValueError(
            f"`clip_vision` gives {images.shape[-1]} numbers a frame and `clip` {len(words)} for the prompt: "
            f"they are halves of different CLIPs. Load two that go together: CLIP-ViT-H and the clip of an SD2.x "
            f"checkpoint, or CLIP-ViT-bigG and that of an SDXL one."
        )


# --- verdict ---


GOOD, FAIR = 30.0, 25.0  # dB: differences one has to look for, and differences one sees at once


def verdict(
    lowest: float, refinements: int | None = None, diverged: bool = False, multiple: int = 1, vae: float | None = None
) -> str:
    """Describe whether an inversion is good enough to edit on, and if not, what to change.

    Args:
        lowest: PSNR in dB of the worst frame after sampling back, against the frame as the VAE decodes it if known.
        refinements, multiple: of the inversion, if known. diverged: whether refining diverged at some step.
        vae: PSNR in dB of that frame as the VAE decodes it, if known.
    """
    if lowest >= GOOD:
        words = "Good: the clip comes back. Edit on this inversion."
    else:
        grade = "Fair: the clip comes back with visible loss" if lowest >= FAIR else "Poor: the clip does not come back"
        # docs/results.md: a multiple inverts other steps than sampling takes, and no refinement makes up for it.
        more = "more steps" if diverged or (refinements or 0) >= 2 else "more refinements"
        change = "multiple 1" if multiple > 1 else more
        words = f"{grade}. Set {change} in DDIM Inversion. Sample with the source prompt, cfg 1, and the same model."
    if vae is not None and vae < FAIR:
        words += " The VAE alone loses much: load larger frames."
    return words


NODES = [ReconstructionCheck, EditCheck]
