"""Save Inversion and Load Inversion, so that a clip is inverted once."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cove.inversion import Inversion
from . import host


class SaveInversion(io.ComfyNode):
    """`Inversion.save`: latents and sigmas of every step, prompt, fingerprint of the model, and stored features."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveSaveInversion",
            display_name="COVE Save Inversion",
            category="COVE/load",
            description="Saves an inversion to ComfyUI's output folder, so that the clip need not be inverted again.",
            inputs=[
                host.wires.Inversion.Input("inversion", tooltip="From DDIM Inversion."),
                host.files.prefix_input("Load Inversion"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @host.errors.named
    def execute(cls, inversion, filename_prefix) -> io.NodeOutput:
        host.files.save(inversion, "inversion", filename_prefix, cls)
        return io.NodeOutput()


class LoadInversion(io.ComfyNode):
    """`Inversion.load`, after checking that the inversion fits the model and the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveLoadInversion",
            display_name="COVE Load Inversion",
            category="COVE/load",
            description="Loads a file of Save Inversion, instead of running DDIM Inversion again.",
            inputs=[
                host.files.saved_input("inversion"),
                io.Model.Input("model", tooltip="The checkpoint that inverted the clip."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The clip's frames from VAE Encode. If connected, the node checks that they were inverted.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="noise"), host.wires.Inversion.Output(display_name="inversion")],
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
