"""Save Inversion and Load Inversion: no clip has to be inverted twice."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cove.inversion import Inversion
from . import host

ENDING = ".inversion.safetensors"


class SaveInversion(io.ComfyNode):
    """Latents of every step, sigmas, prompt, fingerprint of the model, and the features if they were stored."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveSaveInversion",
            display_name="COVE Save Inversion",
            category="COVE/load",
            description="Saves an inversion to ComfyUI's output folder, so that the clip need not be inverted again.",
            inputs=[
                host.types.Inversion.Input("inversion", tooltip="From DDIM Inversion."),
                io.String.Input(
                    "filename_prefix",
                    default="cove/clip",
                    tooltip="Folder and beginning of the name in the output folder; a number is added. "
                    "Load Inversion lists the output folder itself and its subfolder `cove`.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @host.errors.named
    def execute(cls, inversion, filename_prefix) -> io.NodeOutput:
        path = host.files.output_path(filename_prefix, ENDING)
        host.files.check_space(path.parent, inversion.bytes)
        with host.files.saving():
            inversion.save(path)
        host.status.report_status(cls, f"saved as {path.name}, {host.status.format_bytes(path.stat().st_size)}")
        return io.NodeOutput()


class LoadInversion(io.ComfyNode):
    """What Save Inversion wrote, if it fits the model and the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveLoadInversion",
            display_name="COVE Load Inversion",
            category="COVE/load",
            description="Loads what Save Inversion wrote, in place of DDIM Inversion.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.files.list_saved(ENDING),
                    tooltip="A saved inversion, newest first. Lists ComfyUI's output and input folders and the "
                    "subfolder `cove` of each.",
                ),
                io.Model.Input("model", tooltip="Of the checkpoint that the clip was inverted with."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The clip's frames from VAE Encode. If given, it is checked that they were inverted.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="noise"),
                host.types.Inversion.Output(display_name="inversion"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return host.files.check_name(file, cls)

    @classmethod
    def fingerprint_inputs(cls, file=None, **others) -> str:
        return host.files.state_of(file)

    @classmethod
    @host.errors.named
    def execute(cls, file, model, latent=None) -> io.NodeOutput:
        path = host.files.path_of(file)
        host.unet.unet_of(model)
        inversion = Inversion.load(path)
        host.identity.check_fits(inversion, model, latent)
        summary = f"{inversion.frames} frames, {inversion.schedule.steps} steps; {inversion.quality()}"
        host.status.report_status(cls, summary)
        return io.NodeOutput(host.noise.noise_of(model, inversion), inversion)


NODES = [SaveInversion, LoadInversion]
