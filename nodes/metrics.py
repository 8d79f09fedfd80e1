"""Reconstruction Check and Edit Check: how well a clip comes back, and how steady an edit is."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.v0_0_2 import io, ui

from ..cove import metrics, report
from . import _host

SMALLEST = 12  # pixels a side: SSIM's window and the optical flow want as many


class ReconstructionCheck(io.ComfyNode):
    """PSNR, and SSIM of Wang et al., 2004, of each frame sampled back with the source prompt at cfg 1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveReconstructionCheck",
            display_name="COVE Reconstruction Check",
            category="COVE/check",
            description="Says how well the clip comes back from its inversion, and what to change when it does not. "
            "What is lost here is lost in every edit.",
            inputs=[
                io.Image.Input("source", tooltip="The frames from Load Frames."),
                io.Image.Input(
                    "reconstruction", tooltip="What DDIM Sampler gives with the source prompt at cfg 1, decoded."
                ),
                io.Image.Input(
                    "vae_only",
                    optional=True,
                    tooltip="The source through VAE Encode and VAE Decode. If given, what the VAE loses is shown apart "
                    "from what the inversion loses.",
                ),
                _host.InversionType.Input(
                    "inversion", optional=True, tooltip="If given, the advice knows how the inversion went."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="side by side", tooltip="Source, what the VAE leaves, reconstruction."),
                io.String.Output(display_name="report", tooltip="The verdict, and PSNR and SSIM of each frame."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, source, reconstruction, vae_only=None, inversion=None) -> io.NodeOutput:
        clips = {"source": source, "vae_only": vae_only, "reconstruction": reconstruction}
        clips = {name: clip[..., :3].cpu() for name, clip in clips.items() if clip is not None}
        _check_alike(cls, clips)
        # Against what the VAE leaves where it is known: the inversion never saw more.
        reference = clips.get("vae_only", clips["source"])
        back = metrics.psnr(clips["reconstruction"], reference)
        worst = int(back.argmin())
        vae = float(metrics.psnr(reference, clips["source"])[worst]) if vae_only is not None else None
        about = ()
        if inversion is not None:
            about = inversion.about["refinements"], bool(inversion.diverged), inversion.schedule.multiple
        text = verdict(float(back[worst]), *about, vae=vae)
        if inversion is not None:
            text += f" ({inversion.quality()})"
        columns = {}
        for name in [name for name in ("reconstruction", "vae_only") if name in clips]:
            for measure in (metrics.psnr, metrics.ssim):
                columns[f"{name} {measure.__name__.upper()}"] = measure(clips[name], clips["source"]).tolist()
        against = "the source" if vae_only is None else "what the VAE leaves"
        text += f" Lowest PSNR {back[worst]:.1f} dB against {against}, frame {worst}. Below, all against the source."
        text += f"\n\n{report.table(columns)}"
        _host.report_status(cls, text)
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
            description="Measures how steady an edited clip is, and how far it is from its source. To compare settings "
            "by numbers: change one, look at both.",
            inputs=[
                io.Image.Input("source", tooltip="The frames from Load Frames."),
                io.Image.Input("edited", tooltip="The edited frames, of the same size."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision. If given, how alike each frame and the next are to CLIP.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="With clip_vision: how alike each frame and the prompt are. That of an SD2.x checkpoint "
                    "with CLIP-ViT-H, or of an SDXL one with CLIP-ViT-bigG.",
                ),
                io.String.Input("prompt", default="", multiline=True, tooltip="The edit prompt; only used with clip."),
            ],
            outputs=[
                io.Image.Output(display_name="plot"),
                io.String.Output(display_name="report", tooltip="The numbers of each frame, and their means."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, source, edited, prompt, clip_vision=None, clip=None) -> io.NodeOutput:
        node = "Edit Check"
        clips = {"source": source[..., :3].cpu(), "edited": edited[..., :3].cpu()}
        _check_alike(cls, clips)
        if clip is not None and (clip_vision is None or not prompt.strip()):
            missing = "`clip_vision`" if clip_vision is None else "`prompt`"
            raise ValueError(f"{node}: a `clip` came without a {missing}. Give both, or leave `clip` open.")
        try:
            report.check_libraries()
        except ImportError as error:
            raise ImportError(f"{node}: {error}") from error
        words = None if clip is None else _host.text_embedding(clip, prompt, node)
        seen_frames = 0 if clip_vision is None else len(source)
        bar = comfy.utils.ProgressBar(max(1, seen_frames + len(source) - 1))

        def progress(done: int, _total: int) -> None:
            bar.update_absolute(done)
            comfy.model_management.throw_exception_if_processing_interrupted()

        similarities = {}
        if clip_vision is not None:
            seen = _host.image_embeddings(clip_vision, edited, progress)
            similarities["CLIP, next frame"] = [*(seen[:-1] * seen[1:]).sum(1).tolist(), float("nan")]
            if words is not None:
                _host.check_same_space(seen, words, node)
                similarities["CLIP, prompt"] = (seen @ words).tolist()
        columns = report.edit_columns(**clips, progress=lambda done, total: progress(seen_frames + done, total))
        columns |= similarities
        text = f"{report.summary(columns)}\n\n{report.table(columns)}"
        _host.report_status(cls, text)
        picture = report.plot(report.panels_of(columns))
        return io.NodeOutput(picture, text, ui=ui.PreviewImage(picture, cls=cls))


def _check_alike(node, clips: dict[str, torch.Tensor]) -> None:
    """An error unless all are of the source's size, and that is one which SSIM is defined for."""
    name_of_node, source = _host.name_of(node), clips["source"]
    for name, clip in clips.items():
        if clip.shape != source.shape:
            raise ValueError(
                f"{name_of_node}: source is {_format_frames(source)}, but {name} is {_format_frames(clip)}. Make both "
                f"from the same frames."
            )
    if min(source.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"{name_of_node}: expected frames of {SMALLEST}x{SMALLEST} pixels or more, got {_format_frames(source)}. "
            f"Load larger frames."
        )


def _format_frames(clip: torch.Tensor) -> str:
    frames, height, width, _ = clip.shape
    return f"{frames} frames of {width}x{height}"


GOOD, FAIR = 30.0, 25.0  # dB: differences one has to look for, and differences one sees at once


def verdict(
    lowest: float,
    refinements: int | None = None,
    diverged: bool = False,
    multiple: int = 1,
    vae: float | None = None,
) -> str:
    """Say whether an inversion is good enough to edit on, and if not, what to change.

    Args:
        lowest: PSNR in dB of the worst frame after sampling back, against the frame as the VAE decodes it if known.
        refinements, multiple: of the inversion, if known. diverged: whether refining diverged at some step.
        vae: PSNR in dB of that frame as the VAE decodes it, if known.
    """
    if lowest >= GOOD:
        words = "Good: the clip comes back. Edit on this inversion."
    else:
        words = (
            "Fair: the clip comes back with visible loss." if lowest >= FAIR else "Poor: the clip does not come back."
        )
        # docs/results.md: a multiple inverts other steps than sampling takes, and no refinement makes up for it.
        change = (
            "multiple 1"
            if multiple > 1
            else "more steps"
            if diverged or (refinements or 0) >= 2
            else "more refinements"
        )
        words += (
            f" Set {change} in DDIM Inversion. DDIM Sampler must have the source prompt, cfg 1, and the same model."
        )
    if vae is not None and vae < FAIR:
        words += " The VAE alone loses much: load larger frames."
    return words


NODES = [ReconstructionCheck, EditCheck]
