"""Reconstruction Check: look before you edit."""

from __future__ import annotations

import torch
from comfy_api.v0_0_2 import io, ui

from ..cove import metrics
from . import _host


class ReconstructionCheck(io.ComfyNode):
    """PSNR, and SSIM of Wang et al., 2004, of each frame sampled back with the source prompt at cfg 1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveReconstructionCheck",
            display_name="Reconstruction Check",
            category="COVE",
            description="Says how well the clip comes back from its inversion, and what to change when it does not. "
            "What is lost here is lost in every edit.",
            inputs=[
                io.Image.Input("source", tooltip="The frames out of Load Frames."),
                io.Image.Input(
                    "reconstruction", tooltip="What DDIM Sampler gives with the source prompt at cfg 1, decoded."
                ),
                io.Image.Input(
                    "vae_only",
                    optional=True,
                    tooltip="The source through VAE Encode and VAE Decode. If given, what the VAE loses is told apart "
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
        for name, clip in clips.items():
            if clip.shape != clips["source"].shape:
                raise ValueError(
                    f"Reconstruction Check: source is {_spell(clips['source'])}, but {name} is {_spell(clip)}. Make "
                    f"both from the same frames."
                )
        if min(source.shape[1:3]) < metrics.SSIM_WINDOW:
            raise ValueError(
                f"Reconstruction Check: expected frames of {metrics.SSIM_WINDOW}x{metrics.SSIM_WINDOW} pixels or more, "
                f"got {_spell(source)}. Load larger frames."
            )
        # Against what the VAE leaves where it is known: the inversion never saw more.
        reference = clips.get("vae_only", clips["source"])
        back = metrics.psnr(clips["reconstruction"], reference)
        worst = int(back.argmin())
        vae = float(metrics.psnr(reference, clips["source"])[worst]) if vae_only is not None else None
        about = () if inversion is None else (inversion.about["refinements"], inversion.diverged)
        text = metrics.verdict(float(back[worst]), *about, vae=vae)
        if inversion is not None:
            text += f" ({inversion.quality()})"
        report = f"{text} Lowest PSNR {back[worst]:.1f} dB, frame {worst}.\n\n{_table(clips)}"
        _host.say(cls, report)
        sheet = torch.cat(list(clips.values()), dim=2)
        return io.NodeOutput(sheet, report, ui=ui.PreviewImage(sheet, cls=cls))


def _table(clips: dict[str, torch.Tensor]) -> str:
    """PSNR in dB and SSIM of each frame against the source, as a table of plain text."""
    heads, columns = ["frame"], [range(len(clips["source"]))]
    for name in [name for name in ("reconstruction", "vae_only") if name in clips]:
        heads += [f"{name} PSNR", "SSIM"]
        columns += [metric(clips[name], clips["source"]).tolist() for metric in (metrics.psnr, metrics.ssim)]
    lines = ["  ".join(heads)]
    for numbers in zip(*columns, strict=True):
        cells = (f"{number:.{1 if i % 2 else 4}f}" if i else str(number) for i, number in enumerate(numbers))
        lines.append("  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)))
    return "\n".join(lines)


def _spell(clip: torch.Tensor) -> str:
    frames, height, width, _ = clip.shape
    return f"{frames} frames of {width}x{height}"


NODES = [ReconstructionCheck]
